"""The model's own samples: what is sampled, kept and refused; and sources of windows in turn."""

import pytest
import torch

import transact
from transact.texts import calibration_sources, calibration_windows, mixed, samples, source_names
from transact.texts.samples import LEAST_ENTROPY, OPENERS, own_samples


@pytest.fixture
def model(tiny_directory, device):
    """A tiny model of small weights: its predictions are nearly even."""
    model = transact.load_model(tiny_directory, device=str(device))[0]
    with torch.no_grad():
        model.lm_head.weight.mul_(0.05)
    return model


@pytest.fixture
def tokenizer(tiny_directory):
    return transact.load_model(tiny_directory, device="cpu")[1]


def test_fewer_samples_are_the_first_of_more(model, tokenizer):
    few = own_samples(model, tokenizer, count=3, length=12)
    more = own_samples(model, tokenizer, count=70, length=12)
    assert few.shape == (3, 12)
    assert torch.equal(few, more[:3])
    assert len({tuple(row) for row in more.tolist()}) == 70
    assert not torch.equal(few, own_samples(model, tokenizer, count=3, length=12, seed=1))


def test_the_callers_state_changes_no_samples(model, tokenizer):
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.9
    expected = own_samples(model.eval(), tokenizer, count=4, length=100)
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        samples_in_training = own_samples(model, tokenizer, count=4, length=100)
    assert torch.equal(samples_in_training, expected)
    assert model.training


def test_odd_windows_begin_with_openers_of_many_kinds(model, tokenizer):
    windows = own_samples(model, tokenizer, count=8, length=12)
    first = [tokenizer(opener, add_special_tokens=False)["input_ids"] for opener in (OPENERS[0], OPENERS[27])]
    assert windows[1, : len(first[0])].tolist() == first[0]
    assert windows[3, : len(first[1])].tolist() == first[1]
    assert len(set(OPENERS)) == len(OPENERS) == len({index * samples.STRIDE % len(OPENERS) for index in range(64)})


def test_entropy_is_that_of_a_plain_forward_pass(model):
    """What the roomy cache computes step by step is what the model computes at once."""
    prompts = [[5], [5, 7, 8]]
    windows, entropy = samples._sampled(model, prompts, 20, torch.Generator(model.device).manual_seed(0))
    ids = torch.cat((torch.tensor([[5], [5]]), windows), dim=1).to(model.device)
    with torch.no_grad():
        log_probabilities = model(ids[:, :-1]).logits.log_softmax(dim=-1)
    nats = -log_probabilities.gather(2, ids[:, 1:, None]).squeeze(2)
    assert windows[1, :2].tolist() == [7, 8]
    assert entropy == pytest.approx((nats.sum() - nats[1, :2].sum()).item() / (20 + 18), rel=1e-5)


def test_samples_follow_the_models_distribution(model):
    windows, _ = samples._sampled(model, [[5]] * 4000, 2, torch.Generator(model.device).manual_seed(0))
    with torch.no_grad():
        expected = model(torch.tensor([[5]], device=model.device)).logits[0, -1].softmax(dim=-1).cpu()
    seen = torch.bincount(windows[:, 0], minlength=len(expected)) / 4000
    assert (seen - expected).abs().sum() < 0.2


def test_kept_samples_are_not_made_again(model, tokenizer, tmp_path, monkeypatch):
    made = own_samples(model, tokenizer, count=5, length=12, cache=tmp_path)
    monkeypatch.setattr(samples, "_sampled", None)
    assert torch.equal(own_samples(model, tokenizer, count=5, length=12, cache=tmp_path), made)
    with torch.no_grad():
        model.lm_head.weight.add_(0.01)
    with pytest.raises(TypeError):  # another model: they are made anew
        own_samples(model, tokenizer, count=5, length=12, cache=tmp_path)


def test_a_model_that_repeats_itself_is_refused(model, tokenizer, tmp_path):
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
    with pytest.raises(ValueError, match=f"repeat themselves.*{LEAST_ENTROPY}.*name a text"):
        own_samples(model, tokenizer, count=2, length=12, cache=tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(("count", "length"), [(0, 12), (2, 1), (2, 129)])
def test_windows_that_cannot_be_sampled_are_refused(model, tokenizer, count, length):
    with pytest.raises(ValueError, match="2 to 128 tokens"):
        own_samples(model, tokenizer, count=count, length=length)


def test_sources_take_turns(model, tokenizer, tiny_text):
    sources = calibration_sources(f"self,{tiny_text},self", model, tokenizer, count=8, length=12)
    assert [(source.name, len(source.windows)) for source in sources] == [("self", 5), (tiny_text.name, 3)]
    windows = mixed(sources)
    assert windows.shape == (8, 12)
    assert {tuple(row) for row in windows.tolist()} == {tuple(row) for one in sources for row in one.windows.tolist()}
    assert torch.equal(windows, calibration_windows(model, tokenizer, f"self,{tiny_text},self", count=8, length=12))


def test_one_source_keeps_its_order(model, tokenizer, tiny_text):
    tokens = transact.tokenise(transact.load_text(str(tiny_text)), tokenizer)
    expected = transact.cut_windows(tokens, length=12, count=5, seed=3)
    assert torch.equal(calibration_windows(model, tokenizer, str(tiny_text), count=5, length=12, seed=3), expected)


def test_a_file_may_have_commas_in_its_name(tmp_path, tiny_text):
    path = tmp_path / "a,b.txt"
    path.write_text("w1", encoding="utf-8")
    assert source_names(str(path)) == [str(path)]
    assert source_names(f"self, {tiny_text}") == ["self", str(tiny_text)]


def test_bad_sources_are_named(model, tokenizer, tiny_text, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("w1 w2 w3", encoding="utf-8")
    for calibration, count, complaint in (
        (f"self,{short}", 4, "short.txt': the text is too short: 0 windows of 12 in 3 tokens, 2 asked for"),
        ("self,,embedded", 6, "no text '' in 'self,,embedded', allowed: self"),
        ("self,nowhere.txt", 4, "no text 'nowhere.txt' in .*allowed: self"),
        (f"self,{tiny_text}", 1, "2 turns need more than 1 window: none would be of"),
    ):
        with pytest.raises(ValueError, match=complaint):
            calibration_windows(model, tokenizer, calibration, count=count, length=12)
