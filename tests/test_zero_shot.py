"""Tasks: what lm-eval gives, what the stock client gives, what is refused; and that the probes are what they claim."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import transact
from bench.__main__ import main as bench_main
from bench.quality.perplexity import evaluation_windows, measure_perplexity
from bench.quality.probes import PROBES, probe_items, write_probes
from bench.quality.zero_shot import TaskResult, evaluate_tasks, resolve_tasks
from tests.tiny import random_plan


def write_task(folder: Path, name: str, items: list[dict], **changes) -> None:
    """A multiple-choice task of the tiny model's words."""
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    config = {
        "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": f"{folder / name}.jsonl"}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "gold",
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}
                        for metric in ("acc", "acc_norm")],
        "metadata": {"version": 2},
    }  # fmt: skip
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config | changes))


def some_items(count: int = 24) -> list[dict]:
    return [
        {
            "context": f"w{i + 1} w{2 * i + 1} w{i + 7}",
            "choices": [f"w{3 * i + 2}", f"w{i + 9} w{i + 3}"],
            "gold": i % 2,
        }
        for i in range(count)
    ]


def results_of(*arguments, **options) -> dict[str, TaskResult]:
    """All results of `evaluate_tasks`, by task."""
    return dict(evaluate_tasks(*arguments, **options))


@pytest.fixture
def tasks_path(tmp_path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    write_task(folder, "words", some_items())
    return folder


@pytest.fixture(scope="module")
def tiny(tiny_directory):
    return transact.load_model(tiny_directory, device="cpu")


def choice_losses(model, tokenizer, item: dict) -> list[float]:
    """Log-likelihood of each choice, one token at a time."""
    totals = []
    for choice in item["choices"]:
        context = tokenizer(item["context"])["input_ids"]
        ids = context + tokenizer(choice)["input_ids"]
        with torch.no_grad():
            log_probabilities = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        totals.append(sum(log_probabilities[i - 1, ids[i]].item() for i in range(len(context), len(ids))))
    return totals


def test_accuracies_are_what_a_loop_gives(tiny, tasks_path):
    model, tokenizer = tiny
    result = results_of(model, tokenizer, resolve_tasks(["words"], tasks_path))["words"]
    losses = [choice_losses(model, tokenizer, item) for item in some_items()]
    by_choice = [float(max((0, 1), key=pair.__getitem__) == item["gold"])
                 for pair, item in zip(losses, some_items(), strict=True)]  # fmt: skip
    lengths = [[len(choice) for choice in item["choices"]] for item in some_items()]
    normed = [float((a / n < b / m) == bool(item["gold"]))
              for (a, b), (n, m), item in zip(losses, lengths, some_items(), strict=True)]  # fmt: skip
    assert result.scores == {"acc": tuple(by_choice), "acc_norm": tuple(normed)}
    assert result.metrics["acc"] == pytest.approx(sum(by_choice) / 24)
    mean = sum(by_choice) / 24
    assert result.standard_errors["acc"] == pytest.approx(math.sqrt(mean * (1 - mean) / 23))
    assert (result.version, result.shots, result.items) == ("2", 0, 24)


def test_log_likelihoods_of_a_16_bit_model_are_not_rounded_to_16_bits(tiny_directory, tasks_path):
    model, tokenizer = transact.load_model(tiny_directory, device="cpu", dtype="bfloat16")
    words = [f"w{i + 1} w{5 * i + 2} w{3 * i + 4} w{2 * i + 9} w{i + 40}" for i in range(8)]
    write_task(
        tasks_path, "next", [{"context": "w1 w2", "choices": [choice], "gold": 0} for choice in words],
        output_type="loglikelihood", doc_to_target=" {{choices[0]}}", doc_to_choice=None,
        metric_list=[{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}],
    )  # fmt: skip
    result = results_of(model, tokenizer, resolve_tasks(["next"], tasks_path))["next"]
    expected = [choice_losses(model, tokenizer, {"context": "w1 w2", "choices": [choice]})[0] for choice in words]
    torch.testing.assert_close(torch.tensor(result.scores["perplexity"]), torch.tensor(expected), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("metadata", "version"),
    [(None, "none"), ({}, "none"), ({"version": None}, "none"), ({"version": "1.0.2"}, "1.0.2"),
     ({"version": 1.0}, "1"), ({"version": "v2-β"}, "v2-β")],
)  # fmt: skip
def test_versions_are_text(metadata, version, tiny, tasks_path, tiny_directory, capsys):
    write_task(tasks_path, "local", some_items(4), metadata=metadata)
    assert results_of(*tiny, resolve_tasks(["local"], tasks_path))["local"].version == version
    if version == "1.0.2":
        arguments = ["zero-shot", str(tiny_directory), "--device", "cpu", "--tasks-path", str(tasks_path)]
        assert bench_main([*arguments, "--tasks", "local"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert "version 1.0.2" in lines[0]
        assert json.loads(lines[-1])["tasks"]["local"]["version"] == "1.0.2"


def test_shots_and_limit_are_recorded_and_change_what_is_asked(tiny, tasks_path):
    write_task(tasks_path, "shown", some_items(), fewshot_split="test")
    tasks = resolve_tasks(["shown", "shown@3"], tasks_path)
    plain, shown = (results_of(*tiny, {name: tasks[name]}, limit=10)[name] for name in tasks)
    assert (plain.shots, shown.shots, shown.items) == (0, 3, 10)
    assert plain.sha256 != shown.sha256
    assert results_of(*tiny, resolve_tasks(["shown@3"], tasks_path), limit=10)["shown@3"] == shown
    again = results_of(*tiny, {"shown@3": tasks["shown@3"]}, limit=10)  # as the next model of a run is asked
    assert again["shown@3"] == shown


WITHOUT_THE_PACKAGE = """
import sys
sys.modules["transact"] = None  # any import of it fails
from lm_eval.__main__ import cli_evaluate
cli_evaluate()
"""


def test_the_stock_client_agrees(tiny, tasks_path, tmp_path):
    model, tokenizer = tiny
    plan = random_plan(model.config, drop_heads=True)
    narrowed = transact.apply_plan(model, plan)
    transact.save_checkpoint(tmp_path / "out", narrowed, plan, {}, tokenizer=tokenizer)
    ours = results_of(narrowed, tokenizer, resolve_tasks(["words"], tasks_path))["words"]
    command = [
        sys.executable, "-c", WITHOUT_THE_PACKAGE, "--model", "hf", "--model_args",
        f"pretrained={tmp_path / 'out'},trust_remote_code=True,dtype=float32", "--tasks", "words",
        "--include_path", str(tasks_path), "--device", "cpu", "--output_path", str(tmp_path / "stock"),
    ]  # fmt: skip
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    stock = json.loads(next((tmp_path / "stock").rglob("results_*.json")).read_text())["results"]["words"]
    assert {metric: stock[f"{metric},none"] for metric in ("acc", "acc_norm")} == dict(ours.metrics)
    assert stock["acc_stderr,none"] == pytest.approx(ours.standard_errors["acc"])


def test_rolling_losses_agree_with_lm_eval(tiny, tiny_text):
    model, tokenizer = tiny
    text = transact.load_text(str(tiny_text))
    stock = HFLM(pretrained=model, tokenizer=tokenizer, max_length=50, batch_size=4)

    class Request:
        args = (text.content,)

    expected = -stock.loglikelihood_rolling([Request], disable_tqdm=True)[0]
    ours = measure_perplexity(model, evaluation_windows(text, tokenizer, length=50, windowing="rolling"))
    assert ours.loss * ours.tokens == pytest.approx(expected, rel=1e-4)
    assert ours.bits_per_byte == pytest.approx(expected / math.log(2) / len(text.content.encode()), rel=1e-4)


@pytest.mark.parametrize(
    ("names", "named"),
    [
        (["probe_agrement"], "unknown task 'probe_agrement'; did you mean probe_agreement"),
        (["words@few"], "shots must be a whole number"),
        (["words@"], "shots must be a whole number"),
        (["words@24"], "'words' has 24 examples to show, 24 shots asked for"),
        (["", " "], "no tasks are named"),
        (["nothing_like_it_at_all"], "unknown task"),
        ([], "no tasks are named"),
    ],
)
def test_unknown_tasks_are_named(names, named, tasks_path, monkeypatch):
    asked = []

    def without_index(include_path, include_defaults=True):  # that of lm-eval's own tasks takes up to a minute
        asked.append(include_defaults)
        return TaskManager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr("bench.quality.zero_shot.TaskManager", without_index)
    with pytest.raises(ValueError, match=named) as caught:
        resolve_tasks(names, tasks_path)
    assert "\n" not in str(caught.value)
    assert (True in asked) == named.startswith("unknown task")  # looked up among lm-eval's own


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("task: [", "cannot be read"),
        ("just words", "is no task"),
        ("", "is no task"),
        ("task: bad\noutput_type: multiple_choice\n", "'bad' cannot be loaded"),
        ("task: bad\ndataset_path: json\ndataset_kwargs: {data_files: {test: none.jsonl}}\n", "'bad' cannot be loaded"),
    ],
)
def test_malformed_task_files_are_named(content, named, tasks_path):
    (tasks_path / "bad.yaml").write_text(content)
    with pytest.raises(ValueError, match=named) as caught:
        resolve_tasks(["bad"], tasks_path)
    assert "\n" not in str(caught.value)


def test_a_folder_without_tasks_is_named(tmp_path):
    with pytest.raises(ValueError, match="no folder with task files"):
        resolve_tasks(["words"], tmp_path)
    with pytest.raises(ValueError, match="no folder with task files"):
        resolve_tasks(["words"], tmp_path / "none")


def test_items_that_cannot_be_measured_are_named(tiny, tasks_path):
    long = {"context": " ".join(["w1"] * 140), "choices": ["w2", "w3"], "gold": 0}
    write_task(tasks_path, "long", [*some_items(3), long])
    with pytest.raises(ValueError, match=r"task 'long': the item 'w1 .*' takes 140 tokens, the model's context is 128"):
        results_of(*tiny, resolve_tasks(["long"], tasks_path))
    write_task(tasks_path, "lacking", [{"context": "w1", "choices": ["w2", "w3"]}])
    with pytest.raises(ValueError, match="task 'lacking': item 0: its answer 'gold' is none of its 2"):
        results_of(*tiny, resolve_tasks(["lacking"], tasks_path))
    write_task(tasks_path, "empty", [])
    with pytest.raises(ValueError, match="'empty' cannot be loaded"):
        resolve_tasks(["empty"], tasks_path)
    with pytest.raises(ValueError, match="limit must be at least 1"):
        results_of(*tiny, {}, limit=0)


@pytest.mark.parametrize(
    ("item", "named"),
    [
        ({"context": "w1", "choices": ["w2", "w3"], "gold": 7}, "its answer 7 is none of its 2 choices"),
        ({"context": "w1", "choices": ["w2", ""], "gold": 0}, "its choices must be texts"),
        ({"context": "w1", "choices": None, "gold": 0}, "item 1: "),
        ({"context": "w1", "choices": ["w2", "w3"], "gold": None}, "item 1: "),
    ],
)
def test_items_that_are_malformed_are_named(item, named, tiny, tasks_path):
    write_task(tasks_path, "bad", [some_items(1)[0], item])
    with pytest.raises(ValueError, match="task 'bad': item 1: ") as caught:
        results_of(*tiny, resolve_tasks(["bad"], tasks_path))
    assert named in str(caught.value)


def test_contexts_may_be_the_choices_as_in_winogrande(tiny, tasks_path):
    items = [{"contexts": [f"w{i} w3", f"w{i} w4"], "gold": i % 2, "ending": "w7 w8"} for i in range(1, 9)]
    write_task(tasks_path, "blanks", items, doc_to_text="{{gold}}", doc_to_choice="{{contexts}}",
               doc_to_target="{{ending}}")  # fmt: skip
    result = results_of(*tiny, resolve_tasks(["blanks"], tasks_path))["blanks"]
    expected = []
    for item in items:
        pair = [choice_losses(*tiny, {"context": c, "choices": [item["ending"]]})[0] for c in item["contexts"]]
        expected.append(float(pair.index(max(pair)) == item["gold"]))
    assert result.scores["acc"] == tuple(expected)


def test_room_for_generation_is_asked_for(tiny, tasks_path):
    items = [{"context": " ".join(["w1"] * 100), "answer": "w2"}]
    changes = {"output_type": "generate_until", "doc_to_target": "{{answer}}", "doc_to_choice": None,
               "generation_kwargs": {"until": ["w9"], "max_gen_toks": 8},
               "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]}  # fmt: skip
    write_task(tasks_path, "said", items, **changes)
    result = results_of(*tiny, resolve_tasks(["said"], tasks_path))["said"]
    assert result.items == 1
    changes["generation_kwargs"] = {"until": ["w9"], "max_gen_toks": 40}
    write_task(tasks_path, "said", items, **changes)
    with pytest.raises(ValueError, match="takes 140 tokens, the model's context is 128"):
        results_of(*tiny, resolve_tasks(["said"], tasks_path))


def test_tokens_beyond_the_vocabulary_are_refused(tiny_directory, tasks_path):
    model, tokenizer = transact.load_model(tiny_directory, device="cpu")
    model.resize_token_embeddings(50)
    write_task(tasks_path, "far", [{"context": "w1", "choices": ["w60", "w3"], "gold": 0}])
    with pytest.raises(ValueError, match="task 'far': token ids go from 60 to 60, the model's vocabulary has 50"):
        results_of(model, tokenizer, resolve_tasks(["far"], tasks_path))
    items = [{"context": "w60", "answer": "w2"}]
    changes = {"output_type": "generate_until", "doc_to_target": "{{answer}}", "doc_to_choice": None}
    write_task(tasks_path, "asked", items, **changes)
    with pytest.raises(ValueError, match="vocabulary has 50"):
        results_of(model, tokenizer, resolve_tasks(["asked"], tasks_path))


def test_two_tasks_of_one_name_are_refused(tasks_path):
    write_task(tasks_path, "probe_sums", some_items())
    with pytest.raises(ValueError, match="there is another task 'probe_sums'"):
        resolve_tasks(["probe_sums"], tasks_path)


def test_losses_that_are_no_numbers_are_refused(tiny_directory, tasks_path):
    model, tokenizer = transact.load_model(tiny_directory, device="cpu")
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(ValueError, match="not a number"):
        results_of(model, tokenizer, resolve_tasks(["words"], tasks_path))


def test_zero_shot_command_prints_json_last(tiny_directory, tasks_path, capsys):
    arguments = ["zero-shot", str(tiny_directory), "--device", "cpu", "--tasks-path", str(tasks_path), "--limit", "5"]
    assert bench_main([*arguments, "--tasks", "words"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])["tasks"]["words"]
    assert (result["items"], result["version"]) == (5, "2")
    assert bench_main([*arguments, "--tasks", "wordz"]) == 2
    error = capsys.readouterr().err
    assert "did you mean words" in error


@pytest.mark.parametrize("name", PROBES)
def test_probes_are_made_from_the_seed(name):
    items = probe_items(name)
    assert items == probe_items(name)
    assert items != probe_items(name, seed=1)
    assert len(items) >= 150
    assert len({json.dumps(item, sort_keys=True) for item in items}) == len(items)
    if "choices" in items[0]:
        assert all(len(set(item["choices"])) == len(item["choices"]) for item in items)
        assert all(0 <= item["gold"] < len(item["choices"]) for item in items)
        answers = [item["gold"] for item in items]  # no place is right much more often than chance
        assert max(map(answers.count, set(answers))) < len(items) * (1 / len(items[0]["choices"]) + 0.12)


def test_probes_that_are_written_are_tasks(tmp_path, capsys):
    write_probes(tmp_path)
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False).load(["probes"])["tasks"]
    assert sorted(tasks) == sorted(PROBES) == sorted(resolve_tasks(["probes"]))
    assert bench_main(["probes", str(tmp_path / "new")]) == 0
    assert "lm_eval --include_path" in capsys.readouterr().out
    assert (tmp_path / "new" / "probe_sums.yaml").exists()


@pytest.mark.slow
def test_the_embedded_model_is_well_above_chance_on_every_probe(embedded):
    results = results_of(*embedded, resolve_tasks(["probes"]), limit=60)
    for name, result in results.items():
        assert result.metrics["acc"] > result.chance + 0.12, name
        assert result.capability


def test_metadata_of_another_kind_is_left_out(tiny, tasks_path):
    for number, (chance, capability, kept) in enumerate(
        [("25%", ["a", "b"], (None, None)), ([0.5], {"a": 1}, (None, None)), (25, 5, (None, None)),
         (0.5, "words", (0.5, "words"))]
    ):  # fmt: skip
        name = f"odd{number}"
        write_task(tasks_path, name, some_items(4), metadata={"chance": chance, "capability": capability})
        [result] = results_of(*tiny, resolve_tasks([name], tasks_path)).values()
        assert (result.chance, result.capability) == kept


def test_a_task_that_measures_nothing_is_refused_before_work(tasks_path):
    write_task(tasks_path, "nothing", some_items(4), metric_list=[])
    with pytest.raises(ValueError, match="task 'nothing' measures nothing"):
        resolve_tasks(["nothing"], tasks_path)
