"""Models, texts and tasks of a hub, which runs on loopback: as they come, refused, torn, and out of reach."""

import gzip
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import transformers

from tests.hub import running_hub
from transact.models import load_model
from transact.texts import load_text

SOON = 10  # seconds: a second or two on a machine that does nothing else, and half a minute where it is tried again
WORDS = [f"w{(i * i) % 96 + 1}" for i in range(4000)]


def data_set(root: Path, config: str, splits: dict[str, pd.DataFrame]) -> None:
    """A data set of Parquet files, with the page whose head says which are of which part."""
    (root / config).mkdir(parents=True)
    for split, frame in splits.items():
        frame.to_parquet(root / config / f"{split}-00000-of-00001.parquet")
    parts = "".join(f"  - split: {split}\n    path: {config}/{split}-*\n" for split in splits)
    head = f"---\nconfigs:\n- config_name: {config}\n  data_files:\n{parts}---\n"
    (root / "README.md").write_text(head, encoding="utf-8")


def sentences(first: int) -> list[str]:
    return [" ".join(WORDS[place : place + 20]) for place in range(first, 3000, 20)]


def questions(column: str) -> pd.DataFrame:
    """Questions with four choices of words, the right one named by a letter."""
    choices = [{"text": WORDS[i : i + 4], "label": ["A", "B", "C", "D"]} for i in range(12)]
    return pd.DataFrame(
        {column: sentences(0)[:12], "choices": choices, "answerKey": ["ABCD"[i % 4] for i in range(12)]}
    )


@pytest.fixture(scope="module")
def hub(tiny_directory, tmp_path_factory):
    """Where a hub answers that has a tiny model, the texts of the paper and two of its tasks."""
    folder = tmp_path_factory.mktemp("hub")
    models, data = folder / "models" / "org", folder / "datasets"
    for name in ("tiny", "torn", "gated"):
        (models / name).mkdir(parents=True)
        for file in tiny_directory.iterdir():
            os.link(file, models / name / file.name)
    (models / "torn" / "model.safetensors.torn").touch()
    for name, config, column, rows in (
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "text", {"train": 0, "test": 7}),
        ("ptb-text-only/ptb_text_only", "default", "sentence", {"train": 1, "test": 2}),
    ):
        frames = {split: pd.DataFrame({column: sentences(first)}) for split, first in rows.items()}
        data_set(data / name, config, frames)
    (data / "allenai/c4/en").mkdir(parents=True)
    for name, first in (("c4-train.00000-of-01024", 3), ("c4-validation.00000-of-00008", 4)):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in sentences(first))
        (data / "allenai/c4/en" / f"{name}.json.gz").write_bytes(gzip.compress(lines.encode()))
    parts = ("train", "validation", "test")
    data_set(data / "allenai/ai2_arc", "ARC-Easy", dict.fromkeys(parts, questions("question")))
    data_set(data / "allenai/openbookqa", "main", dict.fromkeys(parts, questions("question_stem")))
    with running_hub(folder) as running:
        yield running


@pytest.fixture
def paths(hub):
    """The paths that the hub is asked for in this test."""
    hub[1].clear()
    return hub[1]


@pytest.fixture
def environment(hub, tmp_path):
    """Variables of a process that knows this hub only, with a cache of its own."""
    return {**os.environ, "HF_ENDPOINT": hub[0], "HF_HOME": str(tmp_path / "hub_cache"), "HF_HUB_DISABLE_XET": "1",
            "TRANSACT_CACHE": str(tmp_path / "cache"), "HF_HUB_DISABLE_TELEMETRY": "1"}  # fmt: skip


def python(environment, *arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True)


TEXTS_OF_THE_HUB = """
import json, sys
from transact.texts import load_text
texts = {f"{name} {split}": load_text(name, split=split).content
         for name in ("wikitext2", "ptb", "c4") for split in ("calibration", "evaluation")}
print(json.dumps(texts))
"""


def test_texts_are_the_parts_that_they_should_be(environment):
    ran = python(environment, "-c", TEXTS_OF_THE_HUB)
    assert ran.returncode == 0, ran.stderr
    texts = json.loads(ran.stdout.splitlines()[-1])
    for name, joined, first in (("wikitext2", "\n\n", (0, 7)), ("ptb", "\n", (1, 2)), ("c4", "\n\n", (3, 4))):
        assert texts[f"{name} calibration"] == joined.join(sentences(first[0]))
        assert texts[f"{name} evaluation"] == joined.join(sentences(first[1]))


def test_a_model_of_the_hub_is_pruned_on_a_text_of_the_hub(environment, tmp_path):
    out = tmp_path / "pruned"
    ran = python(
        environment, "-m", "transact", "prune", "org/tiny", out, "--ratio", "0.3", "--preset", "transact",
        "--calibration", "wikitext2", "--samples", "8", "--seq-len", "32",
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert load_model(out)[0].config.model_type == "transact_llama"


def test_profile_paper_runs_to_its_end(environment, tmp_path):
    ran = python(
        environment, "-m", "pytest", "ablations/ablate_capability.py", "--profile", "paper", "--model", "org/tiny",
        "--presets", "flap", "--ratios", "0.3", "--samples", "8", "--seq-len", "32", "--windows", "4",
        "--other-windows", "2", "--compared", "2", "--tasks", "arc_easy,openbookqa@2", "--limit", "6",
        "--evaluation", "wikitext2,c4", "--results", tmp_path / "results", "--dtype", "float32", "-q",
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    lines = (tmp_path / "results" / "records.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["method"] for record in records] == ["dense", "flap"]
    assert all({*record["tasks"]} == {"arc_easy", "openbookqa@2"} for record in records)
    assert records[1]["case"]["calibration_text"].startswith("wikitext2")
    assert (tmp_path / "results" / "report.html").exists()


ASKED = """
import json, sys, time
from transact.models import load_model
for name in sys.argv[1:]:
    start, said = time.monotonic(), ""
    try:
        load_model(name)
    except ValueError as error:
        said = str(error)
    print(json.dumps([said, time.monotonic() - start]), flush=True)
"""


def asked(environment, *names) -> list[tuple[str, float]]:
    """What is said of each name that cannot be loaded ("" of one that can), and after how many seconds."""
    ran = python(environment, "-c", ASKED, *names)
    assert ran.returncode == 0, ran.stderr
    return [tuple(json.loads(line)) for line in ran.stdout.splitlines()]


def test_what_cannot_be_had_is_one_line_soon(environment):
    names = "org/tiny", "org/missing", "org/gated", "org/torn"
    (tiny, _), *others = asked(environment, *names)
    assert tiny == ""
    for name, (said, seconds) in zip(names[1:], others, strict=True):
        assert said.startswith((f"no model {name!r} (", f"model {name!r} cannot be read: "))
        assert "\n" not in said
        assert seconds < SOON
    # without a hub what lies in the cache is used; half a model is none
    gone = {**environment, "HF_ENDPOINT": "http://127.0.0.1:9"}  # nobody listens there
    (tiny, _), (torn, _), (said, seconds) = asked(gone, "org/tiny", "org/torn", "org/other")
    assert tiny == ""
    assert torn.startswith("model 'org/torn' cannot be read: ")
    assert said.startswith("no model 'org/other' (")
    assert seconds < SOON


def test_a_model_is_asked_for_once(environment, paths):
    [(said, _)] = asked(environment, "org/tiny")
    assert said == ""
    times = Counter(paths)
    assert times["/"] == 1, times
    asks = not transformers.__version__.startswith("5.17.")
    assert times["/api/models/org/tiny"] == asks, times
    assert max(times.values()) == 2  # what a file is, and the file


def test_a_text_out_of_reach_is_one_line_soon(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"data set 'Salesforce/wikitext' cannot be loaded \(.+\); it needs"):
        load_text("wikitext2")
    assert time.monotonic() - start < SOON
