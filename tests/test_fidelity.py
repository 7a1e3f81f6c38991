"""Divergence, agreement and flips against values by hand, greedy agreement against generation; several texts."""

import math
from dataclasses import replace
from functools import partial
from itertools import islice
from types import SimpleNamespace

import pytest
import torch

import transact
from bench.efficiency.continuations import agreement, transformers_stream
from bench.quality.fidelity import Comparison, DenseReference, GreedyReference, divergence, greedy_continuations
from bench.quality.flips import Flips, flips
from bench.quality.perplexity import Windows, evaluation_windows, measure_perplexity
from bench.quality.texts import load_evaluation_texts, probes_text, windows_of
from bench.suite.workbench import Workbench
from tests.tiny import random_plan, tiny_llama
from transact import Recipe


def test_divergence_of_known_distributions():
    dense = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.3, 0.5], [0.1, 0.1, 0.8]]).log() + 3.0  # logits need no sum of 1
    other = torch.tensor([[0.25, 0.5, 0.25], [0.2, 0.3, 0.5], [1 / 3, 1 / 3, 1 / 3]]).log()
    kl, same = divergence(dense, other)
    by_hand = [0.25 * math.log(2), 0.0, 0.2 * math.log(0.3) + 0.8 * math.log(2.4)]
    assert kl.tolist() == pytest.approx(by_hand, abs=1e-6)
    assert same[:2].tolist() == [False, True]


def comparison_of(dense, model, windows, *, count, tokens_per_batch=64):
    compared = Comparison(DenseReference(dense, windows, count, tokens_per_batch=tokens_per_batch))
    measure_perplexity(model, windows, on_logits=compared.add, tokens_per_batch=tokens_per_batch)
    return compared.fidelity()


@pytest.fixture(scope="module")
def pair():
    """A tiny dense model and a narrowed one."""
    dense = tiny_llama("gqa")
    return dense, transact.apply_plan(dense, random_plan(dense.config))


@pytest.fixture(scope="module")
def windows(tiny_directory, tiny_text):
    _, tokenizer = transact.load_model(tiny_directory, device="cpu")
    tokens = transact.tokenise(transact.load_text(str(tiny_text)), tokenizer)
    return Windows(transact.cut_windows(tokens, length=30, count=7), in_last=29, bytes=1)


def test_a_model_is_as_far_from_the_dense_one_as_a_loop_says(pair, windows):
    dense, narrow = pair
    found = comparison_of(dense, narrow, windows, count=5)
    assert len(found.kl_nats) == len(found.top1_agreement) == 5
    with torch.no_grad():
        for ids, kl, same in zip(windows.ids, found.kl_nats, found.top1_agreement, strict=False):
            logs = [model(ids[None, :-1]).logits[0].double().log_softmax(-1) for model in (dense, narrow)]
            assert kl == pytest.approx(torch.nn.functional.kl_div(
                logs[1], logs[0], log_target=True, reduction="batchmean").item(), rel=1e-4)  # fmt: skip
            assert same == (logs[0].argmax(-1) == logs[1].argmax(-1)).double().mean().item()
    assert min(found.kl_nats) > 0.01
    assert 0 < sum(found.top1_agreement) < 5


def test_the_dense_model_is_itself(pair, windows):
    found = comparison_of(pair[0], pair[0], windows, count=7)
    assert found.kl_nats == (0.0,) * 7
    assert found.top1_agreement == (1.0,) * 7
    assert GreedyReference(pair[0], windows).agreement(pair[0]) == (1.0,) * 7


def test_of_a_window_that_reads_more_than_it_predicts_only_what_is_predicted_counts(pair, windows):
    dense, narrow = pair
    partly = Windows(windows.ids, in_last=3, bytes=1)
    last = comparison_of(dense, narrow, partly, count=7).kl_nats[-1]
    with torch.no_grad():
        logits = [model(windows.ids[-1:, :-1]).logits[0, -3:] for model in (dense, narrow)]
    assert last == pytest.approx(divergence(*logits)[0].mean().item(), rel=1e-4)
    assert comparison_of(dense, narrow, partly, count=6).kl_nats == comparison_of(
        dense, narrow, windows, count=6
    ).kl_nats  # fmt: skip


def test_greedy_agreement_is_that_of_real_generation(windows):
    windows = replace(windows, ids=windows.ids[:4])
    dense, other = tiny_llama("gqa"), tiny_llama("gqa")
    with torch.no_grad():
        other.lm_head.weight.add_(torch.randn_like(other.lm_head.weight) * 0.03)  # differs soon, not at once
    reference = GreedyReference(dense, windows)
    prompts = windows.ids[:, :30]
    said = [[list(islice(transformers_stream(model, prompt), reference.new)) for prompt in prompts.tolist()]
            for model in (dense, other)]  # fmt: skip
    assert greedy_continuations(dense, prompts, reference.new).tolist() == said[0]
    found = reference.agreement(other)
    assert found == pytest.approx([agreement([one], [two]) for one, two in zip(*said, strict=True)])
    assert 0 < sum(found) < len(found)


def test_a_short_context_bounds_what_is_generated():
    dense = tiny_llama("gqa")
    dense.config.max_position_embeddings = 40
    reference = GreedyReference(dense, SimpleNamespace(ids=torch.randint(1, 97, (3, 40))))
    assert reference.sequences.shape == (3, 40)
    assert reference.new == 20


def test_flips_of_known_items():
    before, after = [1, 1, 1, 0, 0, 1, 0], [1, 0, 0, 1, 0, 0, 0]
    found = flips(after, before)
    assert found == Flips(items=7, lost=3, won=1)
    assert found.p_value == 2 * (1 + 4) / 2**4
    assert flips([0.5, 1], [1, 1]) is None
    assert found + found == Flips(14, 6, 2)
    with pytest.raises(ValueError, match="2 and 1 scores cannot be paired"):
        flips([1, 0], [1])


@pytest.mark.parametrize(
    ("lost", "won", "p"),
    [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 2 / 32), (0, 5, 2 / 32), (10, 2, 2 * (1 + 12 + 66) / 4096), (4, 4, 1.0),
     (2000, 1000, 0.0)],
)  # fmt: skip
def test_the_p_of_known_counts(lost, won, p):
    assert Flips(5000, lost, won).p_value == pytest.approx(p, abs=1e-12)


def test_the_probes_state_what_is_right():
    text = probes_text()
    for statement in ("The capital of Jamaica is Kingston", "James gave the lamp to John", "\n4 + 9 = 13\n"):
        assert statement in text
    assert text == probes_text()


@pytest.fixture
def other_text(tmp_path):
    path = tmp_path / "other.txt"
    path.write_text(" ".join(f"w{i * i % 31 + 1}" for i in range(900)), encoding="utf-8")
    return path


def test_a_long_text_is_read_as_far_as_its_windows_go(tiny_directory, tiny_text, monkeypatch):
    _, tokenizer = transact.load_model(tiny_directory, device="cpu")
    [text] = load_evaluation_texts(str(tiny_text))
    settings = {"length": 16, "count": 3, "windowing": "blocks", "bos": False}
    read = []

    def counting(text, *arguments, **options):
        read.append(len(text.content))
        return evaluation_windows(text, *arguments, **options)

    monkeypatch.setattr("bench.quality.texts.evaluation_windows", counting)
    part = windows_of(text, tokenizer, **settings)
    whole = evaluation_windows(text, tokenizer, **settings)
    assert torch.equal(part.ids, whole.ids)
    assert (part.in_last, part.bytes) == (whole.in_last, whole.bytes)
    assert read == [16 * 16 * 4]
    long_words = replace(text, content="x" * 5000 + " " + text.content)
    assert torch.equal(
        windows_of(long_words, tokenizer, **settings).ids, evaluation_windows(long_words, tokenizer, **settings).ids
    )


@pytest.fixture
def workbench(tiny_directory, tiny_text, other_text):
    def made(**changes) -> Workbench:
        return Workbench(str(tiny_directory), **{
            "calibration": str(tiny_text), "samples": 4, "calibration_seq_len": 32, "windows": 6,
            "evaluation": f"{tiny_text},{other_text}", "evaluation_seq_len": 32, "other_windows": 5,
            "compared_windows": 4, "dtype": "float32", "device": "cpu"} | changes)  # fmt: skip

    return made


@pytest.mark.filterwarnings("ignore:.* calibration tokens are few")
def test_records_carry_every_text(workbench, tiny_text, other_text):
    bench = workbench()
    case = bench.case("transact", 0.3)
    dense, record = bench.measure(bench.dense_case), bench.measure(case)
    assert [one["name"] for one in record.texts] == ["words.txt", "other.txt"]
    assert [len(one["losses"]) for one in record.texts] == [6, 5]
    assert [len(one["kl_nats"]) for one in record.texts] == [4, 4]
    assert record.texts[0]["losses"] == record.losses
    assert record.texts[1]["sha256"] == transact.load_text(str(other_text)).sha256 == case.other_sha256
    alone = workbench(evaluation=str(other_text), windows=5)
    assert alone.measure(alone.case("transact", 0.3)).losses == pytest.approx(record.texts[1]["losses"])
    assert record.metrics["kl_nats"] == pytest.approx(sum(record.texts[0]["kl_nats"]) / 4)
    assert record.metrics["top1_agreement"] == pytest.approx(sum(record.texts[0]["top1_agreement"]) / 4)
    assert record.metrics["greedy_agreement"] == pytest.approx(sum(record.greedy_agreement) / 6)
    assert {"kl_nats", "top1_agreement", "greedy_agreement"} <= record.standard_errors.keys()
    assert (dense.metrics["kl_nats"], dense.metrics["top1_agreement"], dense.metrics["greedy_agreement"]) == (0, 1, 1)


@pytest.mark.filterwarnings("ignore:.* calibration tokens are few")
def test_other_texts_are_for_presets_or_for_every_case(workbench):
    bench = workbench()
    varied = bench.case(Recipe(criterion="wanda"), 0.3), bench.case("transact", 0.3, head_multiple=2)
    for case in varied:
        assert (case.other_texts, case.other_sha256, case.other_windows) == ("", "", 0)
        assert [one["name"] for one in bench.measure(case).texts] == ["words.txt"]
    for case in (bench.dense_case, bench.case("flap", 0.3), bench.case("best", 0.3, quantisation="")):
        assert (case.other_texts, case.other_windows) == ("other.txt", 5)
    assert bench.case(Recipe(criterion="wanda"), 0.3, everywhere=True).other_windows == 5
    assert workbench(other_texts_everywhere=True).case(Recipe(criterion="wanda"), 0.3).other_windows == 5


@pytest.mark.filterwarnings("ignore:.* calibration tokens are few")
def test_weights_are_measured_once_on_each_text(workbench, monkeypatch):
    bench, counted = workbench(), []
    measured = partial(measure_perplexity)
    monkeypatch.setattr(
        "bench.suite.qualities.measure_perplexity", lambda *given, **o: counted.append(1) or measured(*given, **o)
    )
    first = bench.measure(bench.case("transact", 0.3))
    assert len(counted) == 2
    timed = bench.measure(bench.case("transact", 0.3, decode_tokens=2))
    assert len(counted) == 2
    assert timed.texts == first.texts


def test_texts_that_cannot_be_used_are_named(workbench, tiny_text, other_text, tmp_path):
    copy = tmp_path / "copy.txt"
    copy.write_text(other_text.read_text())
    for changes, message in (
        ({"evaluation": f"{tiny_text},nofile"}, r"no text 'nofile', allowed: embedded, .*probes, or a text file"),
        ({"evaluation": f"{tiny_text},{tiny_text}"}, "evaluation text '.*words.txt' is the same as 'words.txt' before"),
        ({"evaluation": f"{tiny_text},{other_text},{copy}"}, "copy.txt' is the same as 'other.txt' before it"),
        ({"evaluation": f"{tiny_text},"}, "evaluation must be names of texts with commas between them"),
        ({"other_windows": 1000}, "evaluation text 'other.txt': .*28 windows of 32 in 900 tokens, 1000 asked for"),
        ({"windows": 1000}, "evaluation text 'words.txt': .*125 windows of 32 in 4,000 tokens, 1000 asked for"),
        ({"other_windows": 0}, "evaluation text 'other.txt': at least one window is needed, got 0"),
        ({"compared_windows": 0}, "compared-windows must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message) as refused:
            workbench(**changes)
        assert "\n" not in str(refused.value)


def test_a_file_may_have_a_comma_in_its_name(workbench, tmp_path, tiny_text):
    path = tmp_path / "a, b.txt"
    path.write_text(tiny_text.read_text())
    assert [text.name for text, _ in workbench(evaluation=str(path)).evaluation_texts] == ["a, b.txt"]
