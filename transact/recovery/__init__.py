"""Recovery: train a narrowed model, between shots of pruning or after them, on transformers' Trainer."""

from .checkpoints import check_checkpoints, checkpoints_in
from .held_out import HELD_OUT_EVERY, held_out_loss, hold_out
from .schedule import WAYS, Training, check_budget, parse_tokens, shot_budgets, shot_trainings
from .trainer import NonFiniteLossError, Recovered, check_recoverable, recover

__all__ = [
    "HELD_OUT_EVERY",
    "WAYS",
    "NonFiniteLossError",
    "Recovered",
    "Training",
    "check_budget",
    "check_checkpoints",
    "check_recoverable",
    "checkpoints_in",
    "held_out_loss",
    "hold_out",
    "parse_tokens",
    "recover",
    "shot_budgets",
    "shot_trainings",
]
