"""Training after each shot, with the quality of the model measured on the way."""

from collections.abc import Callable

import torch
from torch import nn

import transact
from transact.recovery import shot_trainings

from ..quality.perplexity import Windows, measure_perplexity

EVALUATIONS = 3  # of a model on its way through training, beside the one before


def trainer_of(
    training: transact.Training,
    shots: int,
    windows: torch.Tensor,
    teacher: nn.Module | None,
    evaluated: Windows,
    history: list[dict[str, float]],
) -> Callable:
    """What `transact.prune` calls after each shot: it trains by a part of the budget.

    `history` receives the loss and perplexity of the `evaluated` windows on the way, by tokens trained in all.
    """
    trainings = shot_trainings(training, shots)

    def measured(model: nn.Module) -> dict[str, float]:
        quality = measure_perplexity(model, evaluated)
        return {"loss_nats": quality.loss, "perplexity": quality.perplexity}

    def train(model: nn.Module, shot: int) -> nn.Module:
        recovered = transact.recover(model, windows, trainings[shot - 1], teacher=teacher, evaluate=measured,
                                     evaluations=max(1, EVALUATIONS // shots), progress=True)  # fmt: skip
        before = sum(one.tokens for one in trainings[: shot - 1])
        history.extend({**row, "tokens": before + row["tokens"]} for row in recovered.history if "perplexity" in row)
        return recovered.model

    return train
