"""Bytes of tokens: together the text's, whatever the tokeniser does to it; characters may be split between tokens."""

import math

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import transact
from bench.quality.perplexity import Windows, evaluation_windows, measure_perplexity
from bench.quality.token_bytes import token_bytes
from tests.tiny import tiny_llama
from transact.texts import Text

JAPANESE = "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。" * 8
TEXTS = {
    "Japanese": JAPANESE,
    "mixed": "  a tab\t, naïve “quotes” and 😀👩‍👩‍👧 emoji,\n\n  a<tool>b  İstanbul STRASSE ﬁ ½ <0x41> ▁ \n",
    "é as two": "e\N{COMBINING ACUTE ACCENT}te\N{COMBINING ACUTE ACCENT} é",
    "one letter": "x",
}


def wrapped(tokenizer: Tokenizer, **options) -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", **options)
    made.add_tokens([AddedToken("<tool>", lstrip=True, rstrip=True, normalized=False)])
    return made


def byte_level(*, merges=(), prefix: bool = False) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merged = ["".join(pair) for pair in merges]
    vocabulary = {piece: index for index, piece in enumerate([*alphabet, *merged])}
    tokenizer = Tokenizer(models.BPE(vocabulary, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    return wrapped(tokenizer)


def byte_fallback(*, prepended: bool) -> PreTrainedTokenizerFast:
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghij吾輩は"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if prepended:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    return wrapped(tokenizer, unk_token="<unk>")


def words(*, changed: bool) -> PreTrainedTokenizerFast:
    vocabulary = {"[unk]": 0, "x": 1, "strasse": 2, "emoji": 3}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[unk]"))
    if changed:
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return wrapped(tokenizer, unk_token="[unk]")


def byte_level_in_small_letters() -> PreTrainedTokenizerFast:
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    return tokenizer


TOKENISERS = {
    "byte-level": byte_level(),
    "byte-level with merges": byte_level(merges=[("ã", "ģ"), ("ģ", "ª"), ("Ġ", "a")]),
    "byte-level with a space before": byte_level(prefix=True),
    "byte-level in small letters": byte_level_in_small_letters(),
    "byte fallback": byte_fallback(prepended=True),
    "byte fallback, metaspace": byte_fallback(prepended=False),
    "words": words(changed=False),
    "words in small letters": words(changed=True),
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("tokenizer", TOKENISERS.values(), ids=TOKENISERS)
def test_all_tokens_are_all_bytes_of_the_text(tokenizer, text):
    ids = transact.tokenise(Text("text", text), tokenizer)
    lengths = token_bytes(text, tokenizer, ids)
    assert lengths.shape == ids.shape
    assert (lengths >= 0).all()
    assert lengths.sum() == len(text.encode())


@pytest.mark.parametrize("name", ["byte-level", "byte fallback", "byte fallback, metaspace"])
def test_a_character_that_is_split_is_counted_where_its_bytes_are(name):
    tokenizer, text = TOKENISERS[name], "名前はまだ"
    lengths = token_bytes(text, tokenizer, transact.tokenise(Text("text", text), tokenizer))
    whole = {"byte-level": [1] * 15, "byte fallback": [0, *[1] * 6, 3, *[1] * 6]}
    assert lengths.tolist() == whole[name.removesuffix(", metaspace")]


@pytest.mark.parametrize("length", [8, 16])
@pytest.mark.parametrize("name", ["byte-level", "byte-level with merges", "byte fallback"])
def test_windows_divide_the_bytes_between_them(name, length):
    tokenizer, text = TOKENISERS[name], Text("text", JAPANESE)
    ids = transact.tokenise(text, tokenizer)
    exact = token_bytes(JAPANESE, tokenizer, ids)
    windows = evaluation_windows(text, tokenizer, length=length)
    used = exact[: windows.ids.numel()].view_as(windows.ids)
    assert windows.bytes == used[:, 1:].sum()
    some = evaluation_windows(text, tokenizer, length=length, count=5, windowing="rolling")
    assert some.bytes == exact[: 5 * length].sum()
    tokenizer.bos_token = "<end>"
    with_first = evaluation_windows(text, tokenizer, length=length, bos=True)
    tokenizer.bos_token = None
    assert with_first.bytes == used.sum()


def test_words_own_the_space_before_them():
    lengths = token_bytes(" ab  cd ", TOKENISERS["words"], torch.tensor([0, 0]))
    assert lengths.tolist() == [3, 5]  # what follows the last word is its too


class WithoutOffsets:
    """A tokeniser in Python whose pieces are not the text."""

    is_fast = False

    def convert_ids_to_tokens(self, ids):
        return ["?"] * len(ids)

    def get_added_vocab(self):
        return {}


def test_bytes_that_cannot_be_known_are_not_made_up():
    assert token_bytes("ab cd", WithoutOffsets(), torch.tensor([1, 2])) is None
    windows = Windows.of_blocks(torch.ones(2, 8, dtype=torch.int64))
    result = measure_perplexity(tiny_llama(), windows)
    assert result.bytes is None
    assert math.isnan(result.bits_per_byte)
    assert math.isfinite(result.perplexity)
