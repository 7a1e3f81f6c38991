"""Training after each shot, with the quality of the model measured on the way."""

from collections.abc import Callable

import torch
from torch import nn

import transact
from transact.recovery import shot_trainings

from ..efficiency.memory import peak_memory_mib, reset_peak_memory
from ..quality.perplexity import Windows, measure_perplexity

EVALUATIONS = 3  # of a model on its way through training, beside the one before
PEAKS = ("pruning_peak_mib", "recovery_peak_mib")


def trainer_of(
    training: transact.Training,
    shots: int,
    windows: torch.Tensor,
    teacher: nn.Module | None,
    evaluated: Windows,
    history: list[dict[str, float]],
    peaks: dict[str, float],
) -> Callable:
    """What `transact.prune` calls after each shot: it trains by a part of the budget.

    `history` receives the loss and perplexity of the `evaluated` windows on the way, by tokens trained in all;
    `peaks` the most memory that was held until training and in it, by the names of `PEAKS`.
    """
    trainings = shot_trainings(training, shots)

    def measured(model: nn.Module) -> dict[str, float]:
        quality = measure_perplexity(model, evaluated)
        return {"loss_nats": quality.loss, "perplexity": quality.perplexity}

    def note_peak(name: str, device: torch.device) -> None:
        peaks[name] = max(peaks.get(name, 0), peak_memory_mib(device))
        reset_peak_memory(device)

    def train(model: nn.Module, shot: int) -> nn.Module:
        note_peak(PEAKS[0], model.device)
        recovered = transact.recover(model, windows, trainings[shot - 1], teacher=teacher, evaluate=measured,
                                     evaluations=max(1, EVALUATIONS // shots), progress=True)  # fmt: skip
        note_peak(PEAKS[1], model.device)
        before = sum(one.tokens for one in trainings[: shot - 1])
        history.extend({**row, "tokens": before + row["tokens"]} for row in recovered.history if "perplexity" in row)
        return recovered.model

    return train
