"""Evaluation texts by name, several at once: tables compare on the first, the others say what it hides."""

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from transact.texts import TEXTS, Text, load_text

from .perplexity import Windows, evaluation_windows
from .probes import PROBES, probe_items

PROBES_TEXT = "probes"
EVALUATION_TEXTS = (*TEXTS, PROBES_TEXT)
MOST_CHARACTERS = 16  # of a token, on the average over a window


def probes_text() -> str:
    """What the bundled probes state, with the right answers: an item a paragraph, of every probe in turn."""
    rows = zip_longest(*(probe_items(name) for name in PROBES))
    return "\n\n".join(_statement(item) for row in rows for item in row if item is not None)


def _statement(item: dict) -> str:
    answer = item["target"] if "target" in item else item["choices"][item["gold"]]
    return f"{item['context']} {answer}"


def load_evaluation_text(name: str) -> Text:
    """The evaluation part of a text by name, as `transact.load_text`, or what the probes state (`probes`)."""
    if name == PROBES_TEXT:
        return Text(PROBES_TEXT, probes_text())
    try:
        return load_text(name, split="evaluation")
    except ValueError as error:
        message = str(error).replace(f"allowed: {', '.join(TEXTS)}", f"allowed: {', '.join(EVALUATION_TEXTS)}")
        raise ValueError(message) from error


def text_names(names: str) -> list[str]:
    """The texts that an option names, with commas between them; a file may have commas in its own name."""
    return [names] if Path(names).is_file() else [name.strip() for name in names.split(",")]


def load_evaluation_texts(names: str) -> list[Text]:
    """The evaluation texts that `names` lists. Raises ValueError for one that cannot be read or is there twice."""
    texts = []
    for name in text_names(names):
        if not name:
            raise ValueError(f"evaluation must be names of texts with commas between them, got {names!r}")
        text = load_evaluation_text(name)
        twin = next((other for other in texts if other.sha256 == text.sha256), None)
        if twin is not None:
            raise ValueError(f"evaluation text {name!r} is the same as {twin.name!r} before it: name each text once")
        texts.append(text)
    return texts


def windows_of(
    text: Text, tokenizer: PreTrainedTokenizerBase, *, length: int, count: int | None, windowing: str, bos: bool
) -> Windows:
    """`evaluation_windows`, without reading a long text to its end where a few windows are asked for.

    Raises ValueError, naming the text, where it is too short.
    """
    settings = {"length": length, "count": count, "windowing": windowing, "bos": bos}
    try:
        if count is not None and windowing == "blocks" and length > 1:
            enough = MOST_CHARACTERS * length * (count + 1)
            if 0 < enough < len(text.content):
                try:
                    return evaluation_windows(Text(text.name, text.content[:enough]), tokenizer, **settings)
                except ValueError:
                    pass  # longer tokens than texts have: the whole text decides
        return evaluation_windows(text, tokenizer, **settings)
    except ValueError as error:
        raise ValueError(f"evaluation text {text.name!r}: {error}") from error


def unreadable(names: Sequence[str]) -> dict[str, str]:
    """Which of the texts cannot be read, each with the reason."""
    found = {}
    for name in names:
        try:
            load_evaluation_text(name)
        except ValueError as error:
            found[name] = str(error)
    return found
