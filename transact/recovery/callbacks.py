"""What happens on the way through training: measuring, and a progress bar."""

from collections.abc import Callable

import torch
from torch import nn
from tqdm import tqdm
from transformers import Trainer, TrainerCallback


class Milestones(TrainerCallback):
    """Calls `evaluate` before the first step and after every n-th of all steps; results go into the log."""

    def __init__(self, trainer: Trainer, evaluate: Callable | None, evaluations: int):
        self.trainer, self.evaluate, self.evaluations = trainer, evaluate, evaluations

    def _measure(self, model: nn.Module) -> None:
        model.eval()
        with torch.no_grad():
            self.trainer.log(dict(self.evaluate(model)))
        model.train()

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if self.evaluate and state.global_step == 0:
            self._measure(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        due = {round(state.max_steps * part / self.evaluations) for part in range(1, self.evaluations + 1)}
        if self.evaluate and state.global_step in due:
            logs_loss = control.should_log
            self._measure(model)
            control.should_log = logs_loss  # any log takes the request back
        if state.global_step == state.max_steps and args.save_strategy != "no":
            control.should_save = True  # the last one tells a later call that there is nothing left to do


class Bar(TrainerCallback):
    """A progress bar in tokens, with the training loss; tqdm adds tokens a second and the time that is left."""

    def __init__(self, tokens: int):
        self.tokens = tokens

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(total=self.tokens, desc="recover", unit="token", unit_scale=True, disable=None)
        self.bar.update(self.tokens * state.global_step // state.max_steps)
        self.bar.unpause()

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(self.tokens * state.global_step // state.max_steps - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}):
            self.bar.set_postfix_str(f"loss {float(logs['loss']):.4f}")

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()
