"""The released schedule and scores, reproduced exactly from figures that the authors' code computed."""

import json
import math
from pathlib import Path

import pytest
import torch

from transact.calibration import sum_of_squares
from transact.plan import select
from transact.scores import LayerScores
from transact.widths import Widths, narrower, next_shot

GOLDEN = json.loads((Path(__file__).parent / "data" / "released_pruning.json").read_text())


def granularity(case: dict) -> str:
    return {(True, False): "heads", (False, True): "dims", (True, True): "both"}[
        case["prune_heads"], case["prune_dims"]
    ]


@pytest.mark.parametrize("case", GOLDEN["schedule"], ids=lambda case: f"{granularity(case)}-{case['shots']}")
def test_released_schedule(case):
    heads, head_dim = case["num_heads"], case["head_dim"]
    current = Widths(heads, head_dim, head_dim, case["intermediate_size"])
    kept_mha = [torch.arange(heads * head_dim)] * case["num_layers"]
    kept_mlp = [torch.arange(case["intermediate_size"])] * case["num_layers"]
    mha_scores, mlp_scores = (torch.tensor(case[name]) for name in ("mha_scores", "mlp_scores"))
    for step in case["steps"]:
        shots_left = case["shots"] - step["shot"] + 1
        mha_dim = next_shot(current.kv_heads * current.v_head_dim, case["target_mha_dim"], shots_left)
        mlp_dim = next_shot(current.mlp, case["target_mlp_dim"], shots_left)
        widths = narrower(current, mha_dim, mlp_dim, 1, granularity(case))
        assert (widths.kv_heads, widths.v_head_dim, widths.mlp) == (
            step["num_heads"],
            step["head_dim"],
            step["mlp_dim"],
        )
        for index in range(case["num_layers"]):
            values = mha_scores[index][kept_mha[index]].view(current.kv_heads, current.v_head_dim)
            scores = LayerScores(values[:, ::2], values, mlp_scores[index][kept_mlp[index]])
            plan = select([scores], [widths], rope="released").layers[0]
            flat = (plan.kv_heads[:, None] * current.v_head_dim + plan.value_dims).flatten()
            kept_mha[index], kept_mlp[index] = kept_mha[index][flat], kept_mlp[index][plan.mlp_dims]
            assert kept_mha[index].tolist() == step["kept_mha"][index]
            assert kept_mlp[index].tolist() == step["kept_mlp"][index]
        current = widths


@pytest.mark.parametrize("part", ["mha", "mlp"])
def test_released_activation_scores(part):
    golden = GOLDEN["activation_scores"]
    for layer, expected in enumerate(golden[f"{part}_scores"]):
        batches = [batch[part][layer] for batch in golden["batches"]]
        squares = sum(sum_of_squares(torch.tensor(batch)) for batch in batches)
        torch.testing.assert_close(squares.sqrt().float(), torch.tensor(expected), rtol=1e-6, atol=0)
        assert math.isfinite(squares.sum())
