"""Bundled probes: small lm-eval tasks made from a seed, each for one capability that a pruned model may lose.

They need no download and no licence: facts, sentences and word lists are in `probe_words.toml`.
"""

import hashlib
import json
import random
import tomllib
from collections.abc import Callable
from pathlib import Path

import yaml

from transact.cache import cache_directory
from transact.checkpoint import all_or_nothing

VERSION = 1.0
WORDS = tomllib.loads(Path(__file__).with_name("probe_words.toml").read_text(encoding="utf-8"))
Items = list[dict]


def agreement(draw: random.Random) -> Items:
    """Subject and verb agree in number, with a noun of the other number between them."""
    items = []
    for subject in WORDS["nouns"]:
        for attractor in draw.sample([noun for noun in WORDS["nouns"] if noun != subject], 5):
            for number in (0, 1):
                place = draw.choice(["near", "behind", "next to"])
                verbs = draw.choice([["is", "are"], ["was", "were"], ["has", "have"]])
                context = f"The {subject[number]} {place} the {attractor[1 - number]}"
                items.append({"context": context, "choices": verbs, "gold": number})
    return items


def grammar(draw: random.Random) -> Items:
    """Determiners, reflexive pronouns and verb forms in the one form that fits."""
    items = []
    for singular, plural in WORDS["nouns"]:
        who = draw.choice(["He", "She"])
        for number, determiner in enumerate(("this", "these")):
            items.append({"context": f"{who} looked at {determiner}", "choices": [singular, plural], "gold": number})
    for subject, pronoun in WORDS["reflexives"]:
        others = sorted({"himself", "herself", "themselves"} - {pronoun})
        for verb in WORDS["reflexive_verbs"]:
            choices = [pronoun, draw.choice(others)]
            items.append({"context": f"{subject} {verb}", "choices": choices, "gold": 0})
    for _, past, participle in WORDS["verbs"]:
        for context, gold in (
            (f"{draw.choice(WORDS['names'])} has already", 1),
            (f"Yesterday {draw.choice(WORDS['names'])}", 0),
        ):
            items.append({"context": context, "choices": [past, participle], "gold": gold})
    return [shuffled(item, draw) for item in items]


def capitals(draw: random.Random) -> Items:
    """The capital of a country, and the country of a capital, among four."""
    items = []
    for country, capital, *_ in WORDS["countries"]:
        others = draw.sample([row for row in WORDS["countries"] if row[0] != country], 3)
        choices = [capital, *(row[1] for row in others)]
        items.append({"context": f"The capital of {country} is", "choices": choices, "gold": 0})
        choices = [country, *(row[0] for row in others)]
        items.append({"context": f"{capital} is the capital of", "choices": choices, "gold": 0})
    return [shuffled(item, draw) for item in items]


def countries(draw: random.Random) -> Items:
    """The continent, language and currency of a country, among three."""
    items = []
    templates = {
        2: "{} is a country in",
        3: "The official language of {} is",
        4: "The currency of {} is the",
    }
    for row in WORDS["countries"]:
        subject = row[0][0].upper() + row[0][1:]
        for column, template in templates.items():
            others = sorted({other[column] for other in WORDS["countries"]} - {row[column]})
            if column == 2:
                others = [name for name in others if not name.endswith("America") or "America" not in row[2]]
            context = template.format(subject if column == 2 else row[0])
            items.append({"context": context, "choices": [row[column], *draw.sample(others, 2)], "gold": 0})
    return [shuffled(item, draw) for item in items]


def opposites(draw: random.Random) -> Items:
    """The opposite of a word, among four words that are opposites of something."""
    items = []
    for pair in WORDS["opposites"]:
        for word, opposite in (pair, pair[::-1]):
            others = draw.sample([other for other in WORDS["opposites"] if not set(other) & set(pair)], 3)
            choices = [opposite, *(draw.choice(other) for other in others)]
            items.append({"context": f"The opposite of {word} is", "choices": choices, "gold": 0})
    return [shuffled(item, draw) for item in items]


def copying(draw: random.Random) -> Items:
    """The next word of a list of unrelated words that is said for the second time, among four of the list."""
    items = []
    for _ in range(160):
        words = draw.sample(WORDS["unrelated"], 8)
        said = draw.randint(2, 6)
        others = draw.sample([word for word in words if word not in words[said - 1 : said + 1]], 3)
        context = f"{' '.join(words)}. {' '.join(words[:said])}"
        items.append({"context": context, "choices": [words[said], *others], "gold": 0})
    return [shuffled(item, draw) for item in items]


def recall(draw: random.Random) -> Items:
    """Which of two people named before is the other one (indirect object identification)."""
    items = []
    for _ in range(160):
        giver, taker = draw.sample(WORDS["names"], 2)
        first, second = draw.sample([giver, taker], 2)
        place, thing = draw.choice(["store", "park", "school"]), draw.choice(WORDS["objects"])
        context = f"When {first} and {second} went to the {place}, {giver} gave the {thing} to"
        items.append({"context": context, "choices": [taker, giver], "gold": 0})
    return [shuffled(item, draw) for item in items]


def sums(draw: random.Random) -> Items:
    """The sum of two small numbers among four near ones, after three examples."""
    pairs = [(a, b) for a in range(1, 16) for b in range(1, 11)]
    items = []
    for a, b in draw.sample(pairs, 150):
        examples = draw.sample([pair for pair in pairs if pair != (a, b)], 3)
        shown = "\n".join(f"{one} + {other} = {one + other}" for one, other in examples)
        wrong = draw.sample([a + b + d for d in (-3, -2, -1, 1, 2, 3) if a + b + d > 0], 3)
        items.append({"context": f"{shown}\n{a} + {b} =", "choices": [str(n) for n in (a + b, *wrong)], "gold": 0})
    return [shuffled(item, draw) for item in items]


def comparisons(draw: random.Random) -> Items:
    """Which of two digits a third one between them is greater (or less) than, after five examples of the sign."""
    items = []
    for number in range(160):
        sign = "><"[number % 2]
        shown = []
        for _ in range(5):
            low, high = sorted(draw.sample(range(1, 10), 2))
            shown.append(f"{high} > {low}" if sign == ">" else f"{low} < {high}")
        low, middle, high = sorted(draw.sample(range(1, 10), 3))
        choices = [str(low), str(high)] if sign == ">" else [str(high), str(low)]
        items.append({"context": "\n".join([*shown, f"{middle} {sign}"]), "choices": choices, "gold": 0})
    return [shuffled(item, draw) for item in items]


def counting(draw: random.Random) -> Items:
    """The next number of an even sequence, among four near ones."""
    items = []
    for start, step in draw.sample([(start, step) for start in range(1, 41) for step in (1, 2, 3, 5, 10)], 150):
        expected = start + 4 * step
        wrong = draw.sample([expected + d for d in (-2, -1, 1, 2, 3) if expected + d != expected - step], 3)
        context = ", ".join(str(start + i * step) for i in range(4)) + ","
        items.append({"context": context, "choices": [str(n) for n in (expected, *wrong)], "gold": 0})
    return [shuffled(item, draw) for item in items]


def last_word(draw: random.Random) -> Items:
    """The last word of a sentence, greedily and exactly (no choices are given)."""
    parts = (sentence.rsplit(" ", 1) for sentence in WORDS["sentences"])
    return [{"context": context, "target": word} for context, word in parts]


PROBES: dict[str, tuple[Callable[[random.Random], Items], str]] = {
    "probe_agreement": (agreement, "syntax"),
    "probe_grammar": (grammar, "syntax"),
    "probe_capitals": (capitals, "knowledge"),
    "probe_countries": (countries, "knowledge"),
    "probe_opposites": (opposites, "knowledge"),
    "probe_copying": (copying, "attention"),
    "probe_recall": (recall, "attention"),
    "probe_sums": (sums, "arithmetic"),
    "probe_comparisons": (comparisons, "arithmetic"),
    "probe_counting": (counting, "arithmetic"),
    "probe_last_word": (last_word, "prediction"),
}


def shuffled(item: dict, draw: random.Random) -> dict:
    """The item with its choices in a random order."""
    order = draw.sample(range(len(item["choices"])), len(item["choices"]))
    return item | {"choices": [item["choices"][i] for i in order], "gold": order.index(item["gold"])}


def probe_items(name: str, *, seed: int = 0) -> Items:
    """The items of a probe in a random order: `context`, and `choices` with the index `gold`, or a `target` word."""
    draw = random.Random(f"{name} {seed}")
    items = PROBES[name][0](draw)
    return draw.sample(items, len(items))


def write_probes(directory: Path, *, seed: int = 0, home: Path | None = None) -> None:
    """Every probe as an lm-eval task, a YAML and a JSONL file, into a directory; `home` is where they will lie.

    lm-eval looks for data files from where it is run, not beside the task, so the YAML names them absolutely.
    """
    for name, (make, capability) in PROBES.items():
        items = probe_items(name, seed=seed)
        lines = "".join(json.dumps(item) + "\n" for item in items)
        (directory / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        is_choice = "choices" in items[0]
        metrics = ("acc", "acc_norm") if is_choice else ("acc",)
        config = {
            "task": name,
            "tag": ["probes", capability],
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str((home or directory).resolve() / f"{name}.jsonl")}},
            "test_split": "test",
            "output_type": "multiple_choice" if is_choice else "loglikelihood",
            "doc_to_text": "{{context}}",
            "doc_to_target": "gold" if is_choice else " {{target}}",
            **({"doc_to_choice": "{{choices}}"} if is_choice else {}),
            "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in metrics],
            "metadata": {
                "version": VERSION,
                "capability": capability,
                "description": make.__doc__,
                "chance": 1 / len(items[0]["choices"]) if is_choice else 0.0,
            },
        }
        (directory / f"{name}.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def probes_directory(*, seed: int = 0) -> Path:
    """A folder of the probes of a seed in the user's cache, written on first use; named by its contents."""
    digest = hashlib.sha256()
    for path in (Path(__file__), Path(__file__).with_name("probe_words.toml")):
        digest.update(path.read_bytes())
    directory = cache_directory() / f"probes-{digest.hexdigest()[:12]}-{seed}"
    if directory.exists():
        return directory
    with all_or_nothing(directory, replace=False) as partial:
        partial.mkdir()
        write_probes(partial, seed=seed, home=directory)
    return directory
