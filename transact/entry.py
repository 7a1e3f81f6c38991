"""What is made sure of before work with a model begins: what it is, what it is given, and what the caller has set."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from transformers import PretrainedConfig

from .widths import widths_of

PROBED = 32  # tokens that two models are compared on
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "transact_llama")


def check_model(model: nn.Module) -> None:
    """Raise ValueError unless `model` is of the Llama family, dense or narrowed, and carries no adapters."""
    for name, module in model.named_modules():
        if type(module).__module__.partition(".")[0] == "peft":
            where = f"{name} is {type(module).__name__}" if name else type(module).__name__
            raise ValueError(f"the model carries adapters of peft ({where}): merge them into its weights first")
    if model_type_of(model) not in MODEL_TYPES:
        raise ValueError(f"the model is of type {model_type_of(model)!r}, allowed: {', '.join(MODEL_TYPES)}")


def model_type_of(model: nn.Module) -> str:
    """The type that its configuration names; the class's name where it has none, as wrappers have."""
    return getattr(getattr(model, "config", None), "model_type", type(model).__name__)


def has_own_head(model: nn.Module) -> bool:
    """Whether the language-model head is not the embedding: the weights know, `tie_word_embeddings` only says so."""
    return model.lm_head.weight is not model.model.embed_tokens.weight


Shapes = dict[str, tuple[int, ...]]


def shapes_of(model: nn.Module) -> Shapes:
    """The shapes of a model's weights and persistent buffers, by name."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def odd_weight(found: Shapes, wanted: Shapes) -> str | None:
    """The first name, in order, whose shape is not the same in both, or that only one has; None where there is none."""
    return next((name for name in sorted(wanted.keys() | found.keys()) if found.get(name) != wanted.get(name)), None)


def check_unquantised(model: nn.Module) -> None:
    """Raise ValueError where a weight is kept in another way than as floating-point numbers."""
    for name, parameter in model.named_parameters():
        kind = type(parameter.data)  # torchao has tensors of its own
        if kind is not torch.Tensor or not parameter.is_floating_point():
            raise ValueError(
                f"{name} is quantised ({kind.__name__}, {parameter.dtype}): prune and train the model first, quantise "
                "it afterwards"
            )


def check_trainable(model: nn.Module) -> None:
    """Raise ValueError where gradients cannot be taken since the weights were made in inference mode."""
    name = next((name for name, parameter in model.named_parameters() if parameter.is_inference()), None)
    if name is not None:
        raise ValueError(f"{name} was made inside torch.inference_mode() and takes no gradients: load it outside")


def check_nothing_dropped(model: nn.Module) -> None:
    """Raise ValueError, naming the layer, where modules were dropped: what is measured of modules is of all."""
    for layer, one in enumerate(widths_of(model.config)):
        if one.missing:
            raise ValueError(f"layer {layer} has no {one.missing}, which was dropped: measure the dense model")


def check_in_one_place(model: nn.Module, device: torch.device | None) -> None:
    """Raise ValueError where a `device` is named to compute blocks on, of a model that is spread over several."""
    spread = set((getattr(model, "hf_device_map", None) or {}).values())
    if device is not None and len(spread) > 1:
        raise ValueError(
            f"device {str(device)!r} is for a model in one place, this one is spread over "
            f"{', '.join(sorted(map(str, spread)))}: leave the device out, or load the model into host memory"
        )


def checked_windows(model: nn.Module, windows: torch.Tensor | Sequence) -> torch.Tensor:
    """The windows (samples, length) as int64, from a tensor of any integers, rows of them, or an array.

    Raises ValueError unless they are a non-empty matrix of ids of the model's vocabulary within its context.
    """
    if not isinstance(windows, torch.Tensor):
        try:
            windows = torch.stack([torch.as_tensor(row) for row in windows])
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"windows must be a (samples, length) matrix of token ids, got {type(windows).__name__}: {error}"
            ) from error
    if windows.is_meta or windows.layout != torch.strided:
        raise ValueError(f"windows hold no numbers at hand: {windows.device} tensor, {windows.layout}")
    if windows.dtype.is_floating_point or windows.dtype.is_complex or windows.dtype == torch.bool:
        raise ValueError(f"windows must be token ids (integers), got {windows.dtype}")
    if windows.ndim != 2 or windows.numel() == 0:
        raise ValueError(
            f"windows must be a non-empty (samples, length) matrix of token ids, got {tuple(windows.shape)}"
        )
    context = model.config.max_position_embeddings
    if windows.shape[1] > context:
        raise ValueError(f"seq-len {windows.shape[1]} is longer than the model's context of {context}")
    windows = windows.long()
    check_vocabulary(model.config, windows)
    return windows.clone() if windows.is_inference() else windows


def check_seed(seed: int) -> None:
    """Raise ValueError for what does not seed every generator."""
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"seed must be a whole number between 0 and {2**32 - 1}, got {seed!r}")


def check_vocabulary(config: PretrainedConfig, ids: torch.Tensor) -> None:
    """Raise ValueError where token ids lie outside of the model's vocabulary."""
    if ids.min() < 0 or ids.max() >= config.vocab_size:
        raise ValueError(
            f"token ids go from {ids.min()} to {ids.max()}, the model's vocabulary has {config.vocab_size}: "
            "is the tokeniser the model's own?"
        )


@contextmanager
def undisturbed(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode, named outputs and torch's own defaults meanwhile, whatever is set; afterwards as before.

    The defaults: gradients, no autocast, float32, and the CPU for tensors that name no device.
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    answers = [(model.config, model.config.return_dict) for model in models]
    dtype = torch.get_default_dtype()
    kinds = {"cpu"} | {parameter.device.type for model in models for parameter in model.parameters()}
    with ExitStack() as stack:
        stack.callback(torch.clear_autocast_cache)  # the caller's own, of weights that were changed meanwhile
        stack.callback(torch.set_default_dtype, dtype)
        stack.callback(lambda: [setattr(module, "training", mode) for module, mode in modes])
        stack.callback(lambda: [setattr(config, "return_dict", value) for config, value in answers])
        torch.set_default_dtype(torch.float32)
        for model in models:
            model.eval().config.return_dict = True
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in kinds - {"meta"}:  # no cache: inside of another autocast it outlives steps that change weights
            stack.enter_context(torch.autocast(kind, enabled=False, cache_enabled=False))
        if torch.get_default_device().type != "cpu":  # looks at every call of torch
            stack.enter_context(torch.device("cpu"))
        yield


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all values are; those that other processes have included.

    A sum is not where any element is not, and needs no mask as large as the tensor.
    """
    total = tensor.detach().sum(dtype=torch.float64)
    return bool((total.full_tensor() if hasattr(total, "full_tensor") else total).isfinite())


def check_same_function(model: nn.Module, other: nn.Module, complaint: str) -> None:
    """Raise ValueError, with this complaint, where the two give other logits for a few tokens, beyond rounding."""
    with undisturbed(model, other), torch.no_grad():
        ids = torch.arange(min(PROBED, model.config.max_position_embeddings)) % model.config.vocab_size
        try:
            wanted, given = (
                one(input_ids=ids[None].to(one.model.embed_tokens.weight.device), use_cache=False).logits.float()
                for one in (model, other)
            )
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # models that do not fit together raise whatever their modules raise
            raise ValueError(f"the model does not run: {type(error).__name__}: {error}") from error
    off = ((given.to(wanted.device) - wanted).norm() / wanted.norm()).item()
    if off > torch.finfo(model.dtype).eps ** 0.5:  # not so where nothing is finite: that is said with the layer's name
        raise ValueError(f"{complaint}: its logits are {off:.1%} off")


def counted(number: int, noun: str) -> str:
    """ "1 window", "2,000 windows"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def in_one_line(error: Exception) -> str:
    """The error's message without line ends, cut where it gets long."""
    message = " ".join((str(error) or type(error).__name__).split())
    if isinstance(error, KeyError):  # says the key alone
        message = f"KeyError: {message}"
    return message if len(message) <= 300 else f"{message[:300]} ..."
