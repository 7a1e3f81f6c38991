"""Texts by name, and windows of their tokens.

The embedded ones need no hub: documentation that every installation carries (docstrings of the pinned libraries, the
interpreter's own help topics), and sources.
"""

import ast
import hashlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedTokenizerBase

from ..entry import counted, in_one_line
from ..models import hub_or_cache


@dataclass(frozen=True)
class Text:
    """A text, the name it was asked for by, and the SHA-256 of its UTF-8 bytes."""

    name: str
    content: str

    @cached_property
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

        with hub_or_cache():
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
            f"the text is too short: {counted(available, 'window')} of {length} in {counted(len(tokens), 'token')}, "
            f"{count or 'at least 1'} asked for"
        )
    windows = tokens[: available * length].view(available, length)
    if seed is None:
        return windows[:count]
    chosen = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:count]
    return windows[chosen.sort().values]
