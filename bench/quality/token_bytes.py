"""How many bytes of a text each of its tokens stands for."""

import re

import numpy as np
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerBase

from transact._transformers import without_logs

LETTERS = sorted(ByteLevel.alphabet())  # of byte-level pieces: Latin-1's that can be printed, and others for the rest
BYTE_OF = {letter: ord(letter) for letter in LETTERS if ord(letter) < 256}
BYTE_OF |= zip(
    (letter for letter in LETTERS if letter not in BYTE_OF),
    [byte for byte in range(256) if chr(byte) not in BYTE_OF], strict=True,
)  # fmt: skip
BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")


def token_bytes(text: str, tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor) -> torch.Tensor | None:
    """UTF-8 bytes (tokens,) of each token of a whole text, together those of the text; None where they are not known.

    The tokens' own bytes where these, put together, are the text: a character may be split between tokens. Where they
    are not (unknown words, a normaliser, spaces thrown away) a token stands for the text from the end of the token
    before to its own end, which fast tokenisers tell in characters.
    """
    own = _own_bytes(text.encode(), tokenizer, ids)
    if own is not None or not tokenizer.is_fast:
        return own
    with without_logs():  # the text is longer than the context by design
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    ends = np.maximum.accumulate([end for _, end in offsets])
    ends[-1] = len(text)
    bytes_before = np.cumsum([0, *(len(character.encode()) for character in text)])
    return torch.from_numpy(np.diff(bytes_before[ends], prepend=0))


def _own_bytes(encoded: bytes, tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor) -> torch.Tensor | None:
    """The bytes that the pieces of the vocabulary spell, in one of the two ways that are known, if they are the text's.

    A space that the tokeniser puts before the text is not counted.
    """
    distinct, added = ids.unique().tolist(), tokenizer.get_added_vocab()
    pieces = dict(zip(distinct, tokenizer.convert_ids_to_tokens(distinct), strict=True))
    for spelt in (_byte_level, _with_byte_fallback):
        parts = {index: piece.encode() if piece in added else spelt(piece) for index, piece in pieces.items()}
        own = [parts[index] for index in ids.tolist()]
        joined = b"".join(own)
        before = int(joined != encoded)
        if joined == b" " * before + encoded:
            lengths = torch.tensor([len(part) for part in own])
            lengths[0] -= before
            return lengths
    return None


def _byte_level(piece: str) -> bytes:
    return bytes(BYTE_OF[letter] for letter in piece if letter in BYTE_OF)


def _with_byte_fallback(piece: str) -> bytes:
    byte = BYTE_PIECE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()
