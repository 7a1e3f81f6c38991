"""Recovery: train a narrowed model, between shots of pruning or after them, on transformers' Trainer.

Legend: N windows, T tokens of a window, V vocabulary, L layers, D hidden size.
"""

import hashlib
import json
import math
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from .checkpoint import model_hash, plain_generation
from .configuration_transact import TransActConfig
from .entry import check_model, check_trainable, check_unquantised, checked_windows, undisturbed
from .modeling_transact import TransActForCausalLM

WAYS = ("distillation", "full", "lora", "lora-distillation")
SETTINGS = "recovery.json"  # what the checkpoints of a run belong to


class NonFiniteLossError(ValueError):
    """Training has diverged: the loss or a weight is NaN or infinite."""


@dataclass(frozen=True)
class Training:
    """Everything that decides how a model is trained, but for text and teacher.

    `way`: "distillation" moves all weights towards the dense model's predictions, "full" towards the text, "lora" and
    "lora-distillation" do so in low-rank adapters of `rank`, merged at the end. `tokens` is the budget, in tokens of
    text seen, repetitions included. `learning_rate` None is `default_learning_rate`. A step takes `batch` windows,
    `device_batch` of them at once on each device. `layer_weight` adds to a distillation the relative squared error of
    every layer's output, which pruning inside modules leaves as wide as the dense model's. `bf16` None: where there is
    a CUDA device.
    """

    tokens: int
    way: str = "distillation"
    learning_rate: float | None = None
    batch: int = 8
    device_batch: int = 8
    layer_weight: float = 0.0
    rank: int = 16
    bf16: bool | None = None
    gradient_checkpointing: bool = False
    seed: int = 0

    def check(self) -> None:
        """Raise ValueError for a value that is not allowed."""
        if self.way not in WAYS:
            raise ValueError(f"unknown way {self.way!r}, allowed: {', '.join(WAYS)}")
        for name, least in {"tokens": 1, "batch": 1, "device_batch": 1, "rank": 1, "seed": 0}.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name.replace('_', '-')} must be a whole number of at least {least}, got {value!r}")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning-rate must be positive and finite, got {self.learning_rate}")
        if not 0 <= self.layer_weight < math.inf:
            raise ValueError(f"layer-weight must be at least 0, got {self.layer_weight}")
        if self.layer_weight and not self.needs_teacher():
            raise ValueError(f"layer-weight compares layers with the dense model's: way {self.way!r} has no teacher")

    def needs_teacher(self) -> bool:
        return "distillation" in self.way

    def steps(self, length: int) -> int:
        """How many steps the budget makes of windows of `length` tokens."""
        return math.ceil(self.tokens // length / self.batch)

    def with_rate(self, hidden_size: int, length: int) -> "Training":
        """The same, with the default rate for a model of this size and windows of `length` where it names none."""
        if self.learning_rate is not None:
            return self
        return replace(self, learning_rate=default_learning_rate(hidden_size, self.way, self.steps(length)))


@dataclass
class Recovered:
    """The trained model, the tokens and epochs that it saw, seconds, and what was measured on the way.

    `history` holds, in order, rows of `tokens` with the training `loss` since the last one, or with what `evaluate`
    gave. `is_main` is False in all but one of several processes: only that one should save.
    """

    model: TransActForCausalLM
    tokens: int
    epochs: float
    seconds: float
    history: list[dict[str, float]] = field(default_factory=list)
    is_main: bool = True


def default_learning_rate(hidden_size: int, way: str, steps: float = math.inf) -> float:
    """The paper's 5e-5 at the hidden size of its 7B model, and in inverse proportion to it elsewhere (as muP has it).

    Adapters, whose product starts from zero, take four times as much. Fewer than 30 steps take less, by the square
    root of their share: Adam's first steps move every weight by about the rate, and the few that follow do not mend
    that (found on held-out windows of training text, with 2 to 100 steps, at hidden sizes 64 and 576).
    """
    return 0.2048 / hidden_size * (4 if "lora" in way else 1) * math.sqrt(min(1.0, steps / 30))


def shot_budgets(tokens: int, shots: int, learning_rate: float) -> list[tuple[int, float]]:
    """Tokens and learning rate after each shot (the paper, "Iterative schedule"); they add up to `tokens`.

    With T = tokens / shots, shot k trains T/2 + T (k - 1)/(shots - 1) tokens at learning_rate x 2 k / shots. One shot
    takes the whole budget at the learning rate itself, where the paper trains nothing.
    """
    if shots == 1:
        return [(tokens, learning_rate)]
    share = tokens / shots
    ends = [share * (k / 2 + k * (k - 1) / 2 / (shots - 1)) for k in range(shots + 1)]  # sums of the first k shots
    return [(round(ends[k]) - round(ends[k - 1]), learning_rate * 2 * k / shots) for k in range(1, shots + 1)]


def shot_trainings(training: Training, shots: int) -> list[Training]:
    """The training after each shot: a part of the budget and of the learning rate, which must be named."""
    budgets = shot_budgets(training.tokens, shots, training.learning_rate)
    return [replace(training, tokens=tokens, learning_rate=rate) for tokens, rate in budgets]


def rate_of_step(step: int, steps: int) -> float:
    """Learning rate of a step (counted from 0) as a fraction of the highest: a tenth of the steps up, a cosine down."""
    rising = math.ceil(steps / 10)
    if step < rising:
        return (step + 1) / rising
    return (1 + math.cos(math.pi * (step + 1 - rising) / (steps + 1 - rising))) / 2


def epoch_order(epoch: int, available: int, seed: int) -> torch.Tensor:
    """Indices (available,) of windows: every epoch sees all of them, in an order of its own."""
    return torch.randperm(available, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def check_recoverable(model: nn.Module, training: Training, teacher: nn.Module | None) -> None:
    """Raise ValueError unless this is a narrowed model that can be trained so, by this teacher."""
    training.check()
    check_model(model)
    if model.config.model_type != TransActConfig.model_type:
        raise ValueError(f"the model is not pruned (type {model.config.model_type!r}): prune it first")
    check_unquantised(model)
    check_trainable(model)
    if not training.needs_teacher():
        return
    if teacher is None:
        raise ValueError(f"way {training.way!r} needs the dense model as teacher")
    if teacher.config.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"the teacher's vocabulary has {teacher.config.vocab_size} tokens, the model's {model.config.vocab_size}: "
            "they must be of one family"
        )
    if training.layer_weight and (teacher.config.num_hidden_layers, teacher.config.hidden_size) != (
        model.config.num_hidden_layers, model.config.hidden_size,
    ):  # fmt: skip
        raise ValueError("layer-weight needs a teacher with the model's layers and hidden size")


def recover(
    model: TransActForCausalLM,
    windows: torch.Tensor,
    training: Training,
    *,
    teacher: nn.Module | None = None,
    checkpoints: Path | None = None,
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    evaluations: int = 4,
    progress: bool = False,
) -> Recovered:
    """Train a narrowed model on windows (N, T) of token ids; the model given is changed, and in evaluation mode after.

    AdamW with betas 0.9 and 0.95, gradients clipped at 1, a tenth of the steps to warm up, then a cosine down to
    nothing; weights are kept in float32 meanwhile unless they are only adapted. Runs wherever Trainer does: one device,
    or several under `accelerate launch`. With a directory for `checkpoints`, ten are written on the way (the last two
    kept), and the same call goes on from the newest one to the same result. `evaluate` is called before training and
    at `evaluations` equal distances.

    Raises ValueError for what cannot be trained so, or checkpoints of another run, and NonFiniteLossError where
    training diverges, with the last good checkpoint left where it is.
    """
    check_recoverable(model, training, teacher)
    with undisturbed(model, *([] if teacher is None else [teacher])):
        windows = checked_windows(model, windows)
        recovered = _train(model, windows, training, teacher, checkpoints, evaluate, evaluations, progress)
    recovered.model.eval()
    return recovered


def _train(
    model: TransActForCausalLM,
    windows: torch.Tensor,
    training: Training,
    teacher: nn.Module | None,
    checkpoints: Path | None,
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None,
    evaluations: int,
    progress: bool,
) -> Recovered:
    if windows.shape[1] < 2:
        raise ValueError("windows must hold at least 2 tokens each: the second is predicted from the first")
    training = training.with_rate(model.config.hidden_size, windows.shape[1])
    count = training.tokens // windows.shape[1]
    if count == 0:
        raise ValueError(f"tokens {training.tokens} are less than one window of {windows.shape[1]}")
    if not training.needs_teacher():
        teacher = None
    resumed = None
    if checkpoints is not None:
        resumed = _last_checkpoint(Path(checkpoints), _settings(model, windows, training, teacher))
    before, student = model.dtype, model
    # Trainer and adapters seed globally, and Trainer makes its directory even where nothing is saved
    with torch.random.fork_rng(), tempfile.TemporaryDirectory() as scratch:
        if training.gradient_checkpointing:
            _checkpointing(model, "enable")({"use_reentrant": False})
        if "lora" in training.way:
            student = _with_adapters(model, training)
        else:
            _cast_parameters(model, torch.float32)
        trainer = _RecoveryTrainer(
            model=student,
            args=_arguments(model, training, checkpoints or scratch, saves=checkpoints is not None),
            train_dataset=_Windows(windows, count, training.seed), teacher=teacher,
            layer_weight=training.layer_weight,
        )  # fmt: skip
        if trainer.is_fsdp_enabled and student is not model:
            raise ValueError(
                f"way {training.way!r} merges its adapters, which FSDP has in pieces: full or distillation"
            )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_Milestones(trainer, evaluate, evaluations))
        if progress and trainer.is_world_process_zero():
            trainer.add_callback(_Bar(count * windows.shape[1]))
        start = time.perf_counter()
        with plain_generation(model):
            trainer.train(resume_from_checkpoint=resumed)
    seconds = time.perf_counter() - start
    if student is not model:
        model = student.merge_and_unload()
    elif trainer.is_fsdp_enabled:
        generation = model.generation_config
        model = gathered(trainer.model_wrapped, model.config)
        model.generation_config = generation
    _cast_parameters(model, before)
    if training.gradient_checkpointing:
        _checkpointing(model, "disable")()
    model.requires_grad_(True)
    tokens_per_step = training.batch * windows.shape[1]
    history = [
        {"tokens": min(row["step"] * tokens_per_step, count * windows.shape[1])}
        | {name: value for name, value in row.items() if name not in ("step", "epoch")}
        for row in trainer.state.log_history
        if "train_runtime" not in row
    ]
    return Recovered(
        model, count * windows.shape[1], count / len(windows), seconds, history, trainer.is_world_process_zero()
    )


def gathered(model: nn.Module, config: TransActConfig) -> TransActForCausalLM:
    """The whole model, in float32 on the CPU of every process, from one that FSDP (1 or 2) has spread over them."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    whole = TransActForCausalLM(config).float()
    whole.load_state_dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))
    return whole


def is_finite(parameter: torch.Tensor) -> bool:
    """Whether all values are; those that other processes have included."""
    total = parameter.detach().sum(dtype=torch.float64)
    return bool((total.full_tensor() if hasattr(total, "full_tensor") else total).isfinite())


def _checkpointing(model: nn.Module, verb: str) -> Callable:
    """transformers' method that enables or disables recomputing activations; newer releases have another name."""
    new, old = f"activation_checkpointing_{verb}", f"gradient_checkpointing_{verb}"
    return getattr(model, new if hasattr(model, new) else old)


def _with_adapters(model: nn.Module, training: Training) -> nn.Module:
    from peft import LoraConfig, get_peft_model  # takes a second to import

    torch.manual_seed(training.seed)
    adapters = LoraConfig(r=training.rank, lora_alpha=2 * training.rank, target_modules="all-linear")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks for names that new transformers call otherwise
        return get_peft_model(model, adapters)


def _cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    for parameter in model.parameters():  # not `model.to`: it would round the RoPE frequencies as well
        parameter.data = parameter.data.to(dtype)


def _arguments(model: nn.Module, training: Training, directory: str | Path, *, saves: bool) -> TrainingArguments:
    on_cpu = model.device.type == "cpu"
    arguments = TrainingArguments(
        output_dir=str(directory), num_train_epochs=1, train_sampling_strategy="sequential",
        learning_rate=training.learning_rate, adam_beta1=0.9, adam_beta2=0.95, weight_decay=0.0,
        max_grad_norm=1.0, bf16=not on_cpu if training.bf16 is None else training.bf16, seed=training.seed,
        use_cpu=on_cpu, report_to="none", disable_tqdm=True, ddp_find_unused_parameters=False,
        save_strategy="steps" if saves else "no", save_steps=0.1, save_total_limit=2,
        logging_steps=0.01, remove_unused_columns=False, dataloader_pin_memory=not on_cpu,
    )  # fmt: skip
    if arguments.n_gpu > 1:  # one process, one GPU: several are for `accelerate launch`, not for DataParallel
        arguments._n_gpu = 1
    shares = arguments.world_size
    if training.batch % shares:
        raise ValueError(f"batch {training.batch} does not divide among {shares} processes")
    at_once = math.gcd(training.batch // shares, training.device_batch)
    arguments.per_device_train_batch_size = at_once
    arguments.gradient_accumulation_steps = training.batch // shares // at_once
    return arguments


def parse_tokens(text: str) -> int:
    """A number of tokens such as 500000, 500k, 2M or 1.5B. Raises ValueError for anything else."""
    units = {"k": 10**3, "m": 10**6, "b": 10**9}
    number, unit = (text[:-1], units[text[-1].lower()]) if text[-1:].lower() in units else (text, 1)
    try:
        tokens = float(number) * unit
    except ValueError:
        tokens = math.nan
    if not 1 <= tokens < math.inf:
        raise ValueError(f"tokens must be a number such as 500000, 500k, 2M or 1.5B, at least 1, got {text!r}")
    return round(tokens)


def hold_out(windows: torch.Tensor, every: int = 16, most: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows to train on, and every 16th, at most 32, to judge by. Raises ValueError for fewer than 16 windows."""
    if len(windows) < every:
        raise ValueError(
            f"the text is too short: {len(windows)} windows of {windows.shape[1]} tokens, at least {every} are needed, "
            "of which one is held out"
        )
    held_out = torch.arange(len(windows)) % every == every - 1
    held_out &= held_out.cumsum(dim=0) <= most
    return windows[~held_out], windows[held_out]


@torch.no_grad()
def held_out_loss(model: nn.Module, windows: torch.Tensor) -> dict[str, float | None]:
    """Mean loss of the next token in windows (N, T), in nats, and the perplexity it is (None: no float holds it)."""
    total = 0.0
    for ids in windows.split(4):
        ids = ids.to(next(model.parameters()).device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        total += functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").double().item()
    loss = total / windows[:, 1:].numel()
    perplexity = torch.tensor(loss, dtype=torch.float64).exp().item()
    return {"held_out_loss": loss, "held_out_perplexity": perplexity if perplexity < math.inf else None}


class _Windows(torch.utils.data.Dataset):
    """`count` windows in the order in which they are trained on, epoch after epoch."""

    def __init__(self, windows: torch.Tensor, count: int, seed: int):
        self.windows, self.count, self.seed, self.epoch = windows.cpu(), count, seed, None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, position: int) -> dict[str, torch.Tensor]:
        epoch, place = divmod(position, len(self.windows))
        if epoch != self.epoch:  # positions come in order: an epoch's order is drawn once
            self.epoch, self.order = epoch, epoch_order(epoch, len(self.windows), self.seed)
        return {"input_ids": self.windows[self.order[place]]}


class _RecoveryTrainer(Trainer):
    """Trainer with the losses of recovery, which refuses what is not finite."""

    def __init__(self, *, teacher: nn.Module | None, layer_weight: float, **options):
        super().__init__(**options)
        self.model_accepts_loss_kwargs = False  # losses are means: Trainer divides by the accumulated batches
        self.layer_weight = layer_weight
        self.teacher = teacher.to(self.args.device).eval() if teacher is not None else None

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """`rate_of_step` in place of transformers' schedules, whose first step has rate 0 and changes nothing."""
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.optimizer, lambda step: rate_of_step(step, num_training_steps)
        )
        return self.lr_scheduler

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean over the batch: KL from the teacher's predictions (plus layers), or cross-entropy of the next token."""
        ids, with_layers = inputs["input_ids"], self.layer_weight > 0
        outputs = model(input_ids=ids, use_cache=False, output_hidden_states=with_layers)
        if self.teacher is None:
            loss = functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        else:
            with torch.no_grad():
                wanted = self.teacher(input_ids=ids, use_cache=False, output_hidden_states=with_layers)
            loss = divergence(outputs.logits, wanted.logits)
            if with_layers:
                pairs = zip(outputs.hidden_states[1:], wanted.hidden_states[1:], strict=True)
                errors = [(mine - its).float().square().mean() / its.float().square().mean() for mine, its in pairs]
                loss = loss + self.layer_weight * torch.stack(errors).mean()
        if not loss.isfinite():
            raise NonFiniteLossError(f"the loss is {loss.item()} in step {self.state.global_step + 1}")
        return (loss, outputs) if return_outputs else loss

    def _save_checkpoint(self, model, trial):
        for name, parameter in self.model.named_parameters():
            if not is_finite(parameter):
                raise NonFiniteLossError(f"{name} is not finite after step {self.state.global_step}")
        super()._save_checkpoint(model, trial)


def divergence(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Mean over all tokens of KL(wanted || given), in nats, of logits (batch, T, V)."""
    given, wanted = (functional.log_softmax(one.float(), dim=-1).flatten(0, 1) for one in (logits, wanted))
    return functional.kl_div(given, wanted, log_target=True, reduction="batchmean")


class _Milestones(TrainerCallback):
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


class _Bar(TrainerCallback):
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


def _settings(model: nn.Module, windows: torch.Tensor, training: Training, teacher: nn.Module | None) -> dict:
    """What must be the same for a run to go on from its checkpoints."""
    return {
        **asdict(training),
        "windows": list(windows.shape),
        "text": hashlib.sha256(windows.cpu().numpy().tobytes()).hexdigest()[:16],
        "weights": model_hash(model),
        "teacher": None if teacher is None else model_hash(teacher),
    }


def _last_checkpoint(directory: Path, settings: dict) -> str | None:
    """The newest whole checkpoint of the run with these settings; the directory is made where there is none.

    Raises ValueError where it holds those of another run, or anything else. What a killed run left half-written is
    deleted, and what a run without any checkpoint was set to does not bind the next.
    """
    check_checkpoints(directory)
    directory.mkdir(parents=True, exist_ok=True)
    found = checkpoints_in(directory)
    whole = [path for path in found if _is_whole(path)]
    for path in set(found) - set(whole):
        shutil.rmtree(path, ignore_errors=True)  # another process may be at it
    settings_file = directory / SETTINGS
    if not whole:  # several processes may do this at the same time, with the same content
        partial = directory.parent / f".{directory.name}-{SETTINGS}-{os.getpid()}"
        partial.write_text(json.dumps(settings), encoding="utf-8")
        partial.replace(settings_file)
        return None
    try:
        kept = json.loads(settings_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(settings_file)!r} cannot be read ({error}): delete {str(directory)!r}") from error
    other = [f"{name} {kept.get(name)} (now {new})" for name, new in settings.items() if kept.get(name) != new]
    if other:
        raise ValueError(f"{str(directory)!r} holds checkpoints of another run: {', '.join(other)}; delete it first")
    return str(whole[-1])


def check_checkpoints(directory: Path, allowed: Sequence[str] = (SETTINGS, "checkpoint-*")) -> None:
    """Raise ValueError where a directory for checkpoints is a file or holds anything but such."""
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{str(directory)!r}, where checkpoints go, is a file: move it, or name another output")
    names = sorted(path.name for path in directory.iterdir()) if directory.exists() else []
    others = [name for name in names if not any(fnmatch(name, pattern) for pattern in allowed)]
    if others:
        raise ValueError(
            f"{str(directory)!r}, where checkpoints go, holds something else ({others[0]}): move it, or name another "
            "output"
        )


def checkpoints_in(directory: Path) -> list[Path]:
    """What Trainer has saved there, the newest last."""
    return sorted(directory.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def _is_whole(checkpoint: Path) -> bool:
    try:  # Trainer writes its state last
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
