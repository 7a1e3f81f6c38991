"""A tokeniser as llama.cpp has it: what it would do otherwise is refused."""

import json
import warnings

import gguf
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import PreTrainedTokenizerBase

END_KEYS = ("eos", "eot", "eom")  # where a GGUF file can name tokens that end a generation


def _split(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _bytes(use_regex: bool) -> dict:
    return {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}


def _words(digits: str) -> dict:
    """The split of Llama 3 and of those after it, which differ in how many digits stay together."""
    return _split(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
        r"\s+(?!\S)|\s+"
    )


# llama.cpp's names for how text is cut before tokens merge, by all that each does: normalisers, pre-tokenisers, whether
# a word that is a token is taken whole. A part of one would be a part of others too.
PRE_TOKENIZERS = {
    "llama-bpe": ([], [_words(r"\p{N}{1,3}"), _bytes(False)], True),
    "smaug-bpe": ([], [_words(r"\p{N}{1,3}"), _bytes(False)], False),
    "qwen2": ([], [_words(r"\p{N}"), _bytes(False)], False),
    "smollm": ([], [{"type": "Digits", "individual_digits": True}, _bytes(True)], False),
    "gpt-2": ([], [_bytes(True)], False),
}
COMPOSED = {"type": "NFC"}  # llama.cpp leaves it out: that is said where the file is written


def pre_tokenizer_of(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> str:
    """llama.cpp's name for how this tokeniser cuts text.

    Raises ValueError where it has none, or where it would tokenise otherwise for another reason.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    description = json.loads(backend.to_str()) if backend is not None else {"model": {"type": type(tokenizer).__name__}}
    model = description["model"]
    decoders = _steps(description.get("decoder"), "decoders")
    if model["type"] != "BPE" or model.get("byte_fallback") or [step["type"] for step in decoders] != ["ByteLevel"]:
        raise ValueError("GGUF files are written for byte-level BPE tokenisers (Llama 3, SmolLM, Qwen), not for others")
    normalizers = [step for step in _steps(description["normalizer"], "normalizers") if step != COMPOSED]
    steps = normalizers, _steps(description["pre_tokenizer"], "pretokenizers"), model.get("ignore_merges", False)
    name = next((name for name, known in PRE_TOKENIZERS.items() if known == steps), None)
    if name is None:
        raise ValueError(
            f"this tokeniser splits text in none of the ways known here ({', '.join(PRE_TOKENIZERS)}): llama.cpp would "
            "tokenise otherwise"
        )
    knows_all_bytes = model["vocab"].keys() >= set(ByteLevel.alphabet())  # then nothing is unknown
    for setting in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "unk_token"):
        if model.get(setting) and not (setting == "unk_token" and knows_all_bytes):
            raise ValueError(f"the tokeniser's {setting} is {model[setting]!r}: llama.cpp would tokenise otherwise")
    for token in description["added_tokens"]:
        rule = next((rule for rule in ("lstrip", "rstrip", "single_word") if token[rule]), None)
        if rule:
            raise ValueError(f"the token {token['content']!r} is matched with {rule}: llama.cpp has no such rule")
    if (most := max(tokenizer.get_vocab().values())) >= vocabulary:
        raise ValueError(f"the tokeniser has a token {most}, the model's vocabulary ends at {vocabulary - 1}")
    return name


def _steps(description: dict | None, parts: str) -> list[dict]:
    """The steps of a normaliser, pre-tokeniser or decoder, nested ones in a row; offsets do not change tokens."""
    if description is None:
        return []
    if description["type"] == "Sequence":
        return [step for part in description[parts] for step in _steps(part, parts)]
    return [{name: value for name, value in description.items() if name != "trim_offsets"}]


def end_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that end a generation: the tokeniser's first, then the model's.

    Raises ValueError where a GGUF file cannot name them: where there is none, llama.cpp would end at token 11.
    """
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    ids = list(dict.fromkeys(index for index in (tokenizer.eos_token_id, *own) if index is not None))
    if not 1 <= len(ids) <= len(END_KEYS) or not all(0 <= index < model.config.vocab_size for index in ids):
        raise ValueError(
            f"a generation ends at tokens {ids}: a GGUF file names 1 to {len(END_KEYS)} of the vocabulary's "
            f"{model.config.vocab_size}"
        )
    return ids


def _added_around(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether the tokeniser puts BOS before a text, and EOS behind it; ValueError where it adds anything else."""
    inside = tokenizer("a", add_special_tokens=False)["input_ids"]
    text = tokenizer("a")["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for before, after in (([], []), ([bos], []), ([], [eos]), ([bos], [eos])):
        if text == [*before, *inside, *after]:
            return bool(before), bool(after)
    raise ValueError(f"the tokeniser makes {text} of {inside}: llama.cpp adds nothing but BOS before and EOS behind")


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> None:
    """Raise ValueError where llama.cpp, by a GGUF file, would tokenise otherwise, or end at other tokens."""
    pre_tokenizer_of(tokenizer, model.config.vocab_size)
    _added_around(tokenizer)
    end_tokens(model, tokenizer)


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> None:
    vocabulary, (add_bos, add_eos) = model.config.vocab_size, _added_around(tokenizer)
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    if _steps(description["normalizer"], "normalizers"):
        warnings.warn("llama.cpp does not compose characters (NFC) before it tokenises, as this tokeniser does",
                      stacklevel=3)  # fmt: skip
    special = {token["id"] for token in description["added_tokens"] if token["special"]}
    added = {token["id"] for token in description["added_tokens"]}
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    kinds, filler = gguf.TokenType, "unused"
    while any(token.startswith(f"[{filler}") for token in by_id.values()):  # llama.cpp wants every text once
        filler += "_"
    tokens = [by_id.get(index, f"[{filler}{index}]") for index in range(vocabulary)]
    types = [
        kinds.UNUSED if index not in by_id else kinds.CONTROL if index in special
        else kinds.USER_DEFINED if index in added else kinds.NORMAL
        for index in range(vocabulary)
    ]  # fmt: skip
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in description["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_of(tokenizer, vocabulary))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_add_bos_token(add_bos)
    writer.add_add_eos_token(add_eos)
    for name in ("bos", "pad", "unk"):
        if (index := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    for name, index in zip(END_KEYS, end_tokens(model, tokenizer), strict=False):
        getattr(writer, f"add_{name}_token_id")(index)
    templates = tokenizer.chat_template
    if isinstance(templates, dict):
        templates = [{"name": name, "template": template} for name, template in templates.items()]
    if templates:
        writer.add_chat_template(templates)
