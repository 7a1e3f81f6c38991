"""Made-up records of every question of the suite, for tests of the report: no model is measured."""

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import numpy as np

from bench.records import Case, Record
from reports.questions import RECIPE

CRITERIA = ("activation", "magnitude", "random", "taylor", "wanda", "fluctuation", "leverage", "obs")
PRESETS = {
    "best": {"criterion": "predicted-loss", "allocation": "searched", "compensation": "pruned", "measurements": 3},
    "transact": {},
    "transact-released": {"rope": "released"},
    "wanda-sp": {"criterion": "wanda", "granularity": "heads"},
    "flap": {"criterion": "fluctuation", "granularity": "heads", "allocation": "global", "compensation": "bias"},
    "llm-pruner": {"criterion": "taylor", "granularity": "heads"},
    "shortgpt": {"depth": "influence", "compensation": "magnitude"},
    "replaceme": {"depth": "run", "compensation": "linear"},
    "crash": {"depth": "clusters"},
}
COST = {"predicted-loss": 1.0, "activation": 1.9, "random": 6.0, "magnitude": 4.0, "taylor": 2.4, "wanda": 2.1,
        "fluctuation": 2.0, "leverage": 1.8, "obs": 1.5}  # fmt: skip
LAYERS, HEADS, HEAD_DIM, MLP = 8, 3, 64, 1536
BASE = Case(
    model="synthetic", model_hash="0" * 16, criterion="activation", granularity="dims", modules="qk+vo+mlp",
    allocation="uniform", compensation="none", output_bias=False, rope="pairs", shots=1, ratio=0.3, kv_ratio=None,
    seed=0, calibration_text="embedded", calibration_sha256="a" * 64, calibration_samples=64, calibration_seq_len=256,
    evaluation_text="embedded", evaluation_sha256="b" * 64, evaluation_windows=48, evaluation_seq_len=256,
    evaluation_windowing="blocks", evaluation_bos=False, tasks="", task_limit=None, dtype="float32", device="cpu",
    code="c0de",
)  # fmt: skip
NO_TEXT = {"calibration_text": None, "calibration_sha256": None, "calibration_samples": 0, "calibration_seq_len": 0}
DENSE = replace(BASE, criterion="dense", ratio=0.0, **NO_TEXT)
RATIOS = (0.1, 0.2, 0.3, 0.5)


def method_of(case: Case) -> str:
    """The preset's name, or the criterion."""
    for name, fields in PRESETS.items():
        recipe = replace(BASE, **fields)
        if all(getattr(case, field) == getattr(recipe, field) for field in RECIPE):
            name = f"{name}, drops" if case.drop_modules else name
            return name if case.sparsity == "none" else f"{name}, {case.sparsity}"
    return case.criterion


class Maker:
    """Makes records with losses that are paired (the windows are the same) and made up (the seed decides)."""

    def __init__(self, seed: int = 0, windows: int = 48):
        self.generator = np.random.default_rng(seed)
        self.windows = self.generator.normal(3.4, 0.3, windows)
        self.others = [np.random.default_rng(seed + place).normal(2.5, 0.3, 8) for place in (1, 2)]

    def record(self, case: Case, **changes) -> Record:
        attention = 1 - case.ratio if case.mha_dim is None else case.mha_dim / (HEADS * HEAD_DIM * 3)
        mlp = 1 - case.ratio if case.mlp_dim is None else case.mlp_dim / MLP
        share = case.only_layer is not None
        removed = case.ratio / LAYERS if share else 0.25 * (1 - attention) + 0.75 * (1 - mlp)
        if case.speedup:
            removed = {"latency": 0.9, "parameters": 1.0}[case.budget] * (1 - 1 / case.speedup)
        cost = COST.get(case.criterion, 0.0) * (0.7 if case.compensation != "none" else 1) * removed * (1 + 2 * removed)
        cost *= (1.15 if case.granularity == "heads" else 1.0) * (1.6 if case.rope == "released" else 1.0)
        cost *= 1 + 8 / (1 + case.calibration_samples) if case.calibration_samples else 1
        cost += 0.6 * (1 - attention) ** 2 if case.mha_dim is not None else 0
        cost *= 1 + 2 / (1 + case.only_layer) if share else 1
        cost *= {"": 1, "full": 0.4, "lora": 0.6, "distillation": 0.35}[case.recovery]
        cost += {"": 0, "int8": 0.004, "int4": 0.08}[case.quantisation]
        cost += {"none": 0, "wanda-2:4": 0.3, "magnitude-2:4": 0.5}[case.sparsity]
        losses = self.windows + cost + self.generator.normal(0, 0.02 + 0.05 * cost, len(self.windows))
        if case == DENSE:
            losses = self.windows
        loss = float(losses.mean())
        error = float(losses.std(ddof=1) / len(losses) ** 0.5)
        texts, nearness = self.texts(case, cost, losses)
        bytes_each = {"": 4, "int8": 1, "int4": 0.5}[case.quantisation]
        parameters = int(1e8 * (1 - removed))
        metrics = {
            "perplexity": math.exp(loss), "bits_per_byte": loss / 3, "loss_nats": loss, "tokens": 48 * 255,
            "fraction_removed": removed, "kv_fraction_removed": 1 - attention, "parameters": parameters,
            "weight_bytes": int(parameters * bytes_each), "kv_bytes_per_token": int(23040 * attention),
            "peak_memory_mib": 900, "prune_s": 1.0, "perplexity_s": 2.0, **nearness,
        }  # fmt: skip
        errors = {"perplexity": math.exp(loss) * error, "loss_nats": error, **dict.fromkeys(nearness, 0.02)}
        if case.decode_tokens:
            metrics["decode_tokens_per_s"] = 30 * (1 + removed) + self.generator.normal(0, 0.3)
            errors["decode_tokens_per_s"] = 0.4
            if case.criterion != "dense" or case.quantisation:
                metrics |= {"decode_speedup": 1 + removed, "decode_speedup_low": 0.98 + removed,
                            "decode_speedup_high": 1.02 + removed}  # fmt: skip
        width = {"kv_heads": HEADS, "qk_head_dim": round(HEAD_DIM * attention), "mlp": round(MLP * mlp),
                 "v_head_dim": round(HEAD_DIM * attention)}  # fmt: skip
        return Record(
            case, method_of(case), metrics, errors,
            {"device": "Imaginary CPU @ 2 GHz", "torch": "2", "transformers": "5", "transact": "0", "python": "3"},
            losses=tuple(losses.tolist()), widths=(width,) * LAYERS, texts=texts,
            greedy_agreement=(nearness["greedy_agreement"],) * 16,
            command=f"python -m pytest 'ablations/ablate_criterion.py::test_criterion[{case.criterion}-{case.ratio}]' "
            "--model synthetic", **changes,
        )  # fmt: skip

    def texts(self, case: Case, cost: float, losses: np.ndarray) -> tuple[tuple[dict, ...], dict[str, float]]:
        """The texts of a record, the others dearer than that it was calibrated on; and how near it is to dense."""
        distance = {"embedded": 1.0, "sources": 2.2, "probes": 1.8}
        source = (case.calibration_text or "embedded").removesuffix(":calibration")
        texts = []
        for name, windows in zip(distance, (self.windows, *self.others), strict=True):
            far = 1.0 if name == source else max(distance[name], 1.5)
            noise = self.generator.normal(0, 0.01 + 0.02 * cost, len(windows)) if cost else 0
            own = losses if name == "embedded" else windows + far * cost + noise
            shares = {"kl_nats": [0.8 * far * cost] * 8, "top1_agreement": [math.exp(-far * cost)] * 8}
            texts.append({
                "name": f"{name}:evaluation", "sha256": {"embedded": "b"}.get(name, name[0]) * 64, "tokens": 2040,
                "loss_nats": float(own.mean()), "losses": own.tolist(), **shares,
            })  # fmt: skip
        nearness = {"kl_nats": 0.8 * cost, "top1_agreement": math.exp(-cost), "greedy_agreement": math.exp(-4 * cost)}
        return tuple(texts), nearness

    def every_question(self) -> Iterator[Record]:
        """The dense model, and the grid of each ablation file."""
        yield self.record(DENSE)
        yield self.record(replace(DENSE, decode_tokens=64))
        for criterion, ratio in product(CRITERIA, RATIOS):
            text = NO_TEXT if criterion in ("magnitude", "random") else {}
            yield self.record(replace(BASE, criterion=criterion, ratio=ratio, **text))
        for fields, ratio in product(PRESETS.values(), (0.1, 0.3, 0.5)):
            preset = replace(BASE, ratio=ratio, **fields)
            yield self.record(preset)
            yield self.record(replace(preset, decode_tokens=64))
        best = replace(BASE, **PRESETS["best"])
        for granularity, ratio in product(("dims", "heads", "both"), RATIOS):
            yield self.record(replace(BASE, granularity=granularity, ratio=ratio))
        for mha, mlp in product((None, 432, 288, 144), (None, 1152, 768, 384)):
            if mha or mlp:
                yield self.record(replace(BASE, ratio=0.0, mha_dim=mha, mlp_dim=mlp))
        for layer in range(LAYERS):
            yield self.record(replace(BASE, only_layer=layer, ratio=0.5))
        for shots, ratio in product((1, 2, 4, 8), (0.3, 0.5)):
            yield self.record(replace(BASE, shots=shots, ratio=ratio))
        for samples, length in product((4, 16, 64), (64, 256, 1024)):
            yield self.record(replace(BASE, calibration_samples=samples, calibration_seq_len=length))
        texts = ("stories", "d"), ("wikitext2", "e"), ("sources:calibration", "c")
        for (text, letter), name, ratio in product(texts, ("best", "transact", "flap"), (0.1, 0.3)):
            preset = replace(BASE, **PRESETS[name], ratio=ratio)
            yield self.record(replace(preset, calibration_text=text, calibration_sha256=letter * 64))
        for rope, ratio in product(("pairs", "released"), (0.1, 0.3)):
            yield self.record(replace(BASE, rope=rope, ratio=ratio))
        for compensation, ratio in product(("none", "bias", "dense", "pruned"), (0.3, 0.5)):
            yield self.record(replace(best, compensation=compensation, ratio=ratio))
            if compensation in ("dense", "pruned"):
                yield self.record(replace(best, compensation=compensation, ratio=ratio, ridge=0.01))
        ways = ("uniform", "transformers"), ("searched", "transformers"), ("searched", "plain")
        for (allocation, engine), ratio, kv_ratio in product(ways, (0.1, 0.3, 0.5), (None, 0.5)):
            allocated = replace(best, allocation=allocation, engine=engine, compensation="dense", measurements=0)
            yield self.record(replace(allocated, ratio=ratio, kv_ratio=kv_ratio))
        for rounds, ratio in product((0, 1, 3), (0.1, 0.3)):
            yield self.record(replace(best, measurements=rounds, ratio=ratio))
        for ratio in RATIOS:
            yield self.record(replace(best, drop_modules=True, ratio=ratio))
        for heads, mlp in product((1, 8, 16), (1, 64, 128)):
            yield self.record(replace(BASE, head_multiple=heads, mlp_multiple=mlp, decode_tokens=64))
        for budget, speedup in product(("latency", "parameters"), (1.1, 1.3)):
            yield self.record(replace(best, ratio=0.0, speedup=speedup, budget=budget, decode_tokens=64))
        for sparsity, ratio in product(("magnitude-2:4", "wanda-2:4"), (0.0, 0.3)):
            yield self.record(replace(best, ratio=ratio, sparsity=sparsity))
        yield from self.recoveries()
        for quantisation in ("", "int8", "int4"):
            yield self.record(replace(DENSE, quantisation=quantisation, decode_tokens=64))
            yield self.record(replace(best, quantisation=quantisation, decode_tokens=64))
        yield self.with_tasks(self.record(replace(DENSE, tasks="probe_sums+probe_copying", task_limit=80)), 0.9)
        for name, rate in (("best", 0.6), ("transact", 0.4)):
            case = replace(BASE, **PRESETS[name], tasks="probe_sums+probe_copying", task_limit=80)
            yield self.with_tasks(self.record(case), rate)

    def recoveries(self) -> Iterator[Record]:
        """Training: each way, then shots and criteria after the same tokens."""
        trained = {"recovery_tokens": 100_000, "recovery_sha256": "f" * 64, "learning_rate": 1e-4}
        for recovery in ("full", "lora", "distillation"):
            record = self.record(replace(BASE, recovery=recovery, **trained))
            end, start = math.log(record.metrics["perplexity"]), record.metrics["loss_nats"] + 0.5
            steps = [
                (tokens, start + (end - start) * (tokens / 100_000) ** 0.4) for tokens in range(0, 100_001, 10_000)
            ]
            history = tuple({"tokens": t, "loss_nats": loss, "perplexity": math.exp(loss)} for t, loss in steps)
            yield replace(record, history=history)
        for shots in (2, 4):
            yield self.record(replace(BASE, shots=shots, recovery="full", **trained))
        for criterion in ("random", "taylor"):
            yield self.record(replace(BASE, criterion=criterion, recovery="full", **trained))

    def with_tasks(self, record: Record, rate: float) -> Record:
        tasks = {}
        for name, capability in (("probe_sums", "arithmetic"), ("probe_copying", "attention")):
            scores = (self.generator.random(80) < rate).astype(float)
            accuracy = float(scores.mean())
            tasks[name] = {
                "version": "1", "shots": 0, "items": 80, "sha256": "d" * 64, "capability": capability, "chance": 0.25,
                "metrics": {"acc": accuracy}, "standard_errors": {"acc": (accuracy * (1 - accuracy) / 80) ** 0.5},
                "scores": {"acc": scores.tolist()},
            }  # fmt: skip
        return replace(record, tasks=tasks)
