"""The model's own samples: text to calibrate on where there is none, of all the kinds that the model knows.

Williams et al. (2410.17170) calibrate on samples from the start token. Half of the windows here begin that way, and
half with a few words of a genre each, a letter, a recipe, a proof, code: left alone, a small model seldom gets there.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm
from transformers import Cache, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from ..checkpoint import all_or_nothing, model_hash
from ..entry import undisturbed
from ..half_precision import leaving_16_bits
from ..modeling_transact import CACHE
from ..widths import kv_elements_per_token, widths_of

BATCH = 64  # windows that are sampled together; how many are asked for changes none of them
CACHE_BYTES = 2**31  # most that keys and values of a batch may take
LEAST_ENTROPY = 0.5  # nats a token; trained models of all sizes have 1.5 to 4
OPENERS = (
    "Dear Sir or Madam,\n", "Hi all,\n\nquick update on", "To whom it may concern:", "My dearest friend, it has been",
    "Monday, 14 March. This morning", "Minutes of the meeting\n\nPresent:", "PRESS RELEASE\n\nFor immediate release:",
    "By our correspondent. The government", "Weather for the weekend:", "And he shoots! The crowd",
    "Ingredients:\n- 2 cups of", "Step 1: Before you begin, unplug", "Warning: read these instructions",
    "Frequently asked questions\n\nQ:", "Review: I bought this three weeks ago and", "For sale: a well-kept house with",
    "We are hiring! The ideal candidate", "Curriculum vitae\n\nEducation:", "This agreement is made between",
    "Article 1. Every person has the right", "The defendant claims that", "Patient presents with",
    "The annual report shows that revenue", "Abstract. We present a method for",
    "Theorem. Let n be a positive integer.", "Proof. Suppose, to the contrary, that",
    "Exercise 3. A train leaves the station at", "7 + 5 = 12\n9 + 4 = 13\n6 +", "1, 2, 4, 8, 16,",
    "Question: Which of the following is true?\nA)", "Hypothesis: If the temperature rises, then",
    "Photosynthesis is the process by which", "In economics, inflation means", "Definition: to walk slowly. Synonyms:",
    "Latin: aqua. French: eau. Spanish:", "The capital of the country is", "Timeline:\n1789 -",
    "Why do people dream? Some", "First, consider the argument that freedom", "Ladies and gentlemen, today we",
    "Brothers and sisters, let us", "Roses bend beneath the rain,\n", "[Verse 1]\nI was driving",
    "INT. KITCHEN - NIGHT\n\nMARIA\n", '"Where were you?" she asked.', "The old lighthouse keeper had not spoken",
    "Interviewer: Thank you for coming.", "A: Hello, how can I help you?\nB:",
    "user: how do I fix this error?\nassistant:", "Knock, knock.\nWho's there?", "Riddle: I have hands but",
    "Rules of the game: each player", "Five tips for better sleep:\n1.", "Day 3 of our trip: we crossed",
    "Leo: this week the stars", "def merge(left, right):\n", "#include <stdio.h>\n\nint main(",
    "function render(items) {\n", "public class Account {\n", "SELECT name, COUNT(*) FROM", "#!/bin/bash\nset -e\n",
    "<html>\n<head>\n<title>", '{\n  "name": "', "date,city,temperature\n2021-01-01,",
)  # fmt: skip
STRIDE = 27  # through the openers, which lie by kind: a few of them are of many kinds


def own_samples(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int,
    length: int,
    seed: int = 0,
    cache: Path | None = None,
    progress: bool = False,
) -> torch.Tensor:
    """Windows (count, length) of token ids that the model itself writes, at temperature 1, none of its tokens barred.

    Even ones begin with the start token (which is left out), odd ones with an opener as well. Without a start token
    all begin with openers. Batches are kept in the directory `cache`, by model, openers' ids, length and seed; more
    windows begin with the fewer.

    Raises ValueError where the samples repeat themselves: a mean entropy of less than `LEAST_ENTROPY` nats a token.
    """
    context = model.config.max_position_embeddings
    if count < 1 or not 2 <= length <= context:
        raise ValueError(
            f"at least one window of 2 to {context} tokens (the model's context) is needed, got {count} of {length}"
        )
    rows = max(2, min(BATCH, CACHE_BYTES // (length * _cache_bytes_per_token(model)) // 2 * 2))
    prompts = _prompts(tokenizer)
    name = hashlib.sha256(repr((model_hash(model), prompts, length, rows, seed)).encode()).hexdigest()[:16]
    samples = []
    for batch in range(-(-count // rows)):
        path = cache / name / f"{batch:04d}.safetensors" if cache else None
        if path and path.is_file():
            samples.append(load_file(path)["ids"])
            continue
        chosen = [prompts[(batch * rows + row) % len(prompts)] for row in range(rows)]
        generator = torch.Generator(model.device).manual_seed(seed * 100_003 + batch)
        with undisturbed(model), leaving_16_bits(model):
            ids, entropy = _sampled(model, chosen, length, generator, progress)
        if entropy < LEAST_ENTROPY:
            raise ValueError(
                f"the model's own samples repeat themselves ({entropy:.2f} nats a token, {LEAST_ENTROPY} at least are "
                "needed): name a text to calibrate on"
            )
        if path:
            with all_or_nothing(path, replace=False) as partial:
                save_file({"ids": ids}, partial)
        samples.append(ids)
    return torch.cat(samples)[:count]


def _cache_bytes_per_token(model: nn.Module) -> int:
    return kv_elements_per_token(widths_of(model.config)) * next(model.parameters()).element_size()


def _prompts(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids that windows begin with, in turn: the start token alone, and with an opener after it."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    begin = [] if start is None else [start]
    spread = [OPENERS[index * STRIDE % len(OPENERS)] for index in range(len(OPENERS))]
    openers = [begin + tokenizer(opener, add_special_tokens=False)["input_ids"] for opener in spread]
    return [ids for opener in openers for ids in ((begin, opener) if begin else (opener,))]


class _RoomyLayer(DynamicLayer):
    """Keys and values of one layer in memory that is taken once: appending copies nothing that is there already."""

    def __init__(self, room: int):
        super().__init__()
        self.room, self.used = room, 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.memory = [x.new_empty(*x.shape[:2], self.room, x.shape[3]) for x in (key_states, value_states)]
        before, self.used = self.used, self.used + key_states.shape[2]
        for memory, new in zip(self.memory, (key_states, value_states), strict=True):
            memory[:, :, before : self.used] = new
        self.keys, self.values = (memory[:, :, : self.used] for memory in self.memory)
        return self.keys, self.values


@torch.inference_mode()
def _sampled(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    length: int,
    generator: torch.Generator,
    progress: bool = False,
) -> tuple[torch.Tensor, float]:
    """Windows (prompts, length) that go on from the prompts, their first token left out, and nats a sampled token.

    All rows take one step at a time; while a row's prompt lasts its own next token is taken.
    """
    given = torch.full((len(prompts), length + 1), -1)
    for row, prompt in zip(given, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt[: length + 1])
    given = given.to(model.device)
    cache = Cache(layers=[_RoomyLayer(length) for _ in model.model.layers])
    ids, entropy, sampled = given[:, :1], 0.0, 0
    bar = {"desc": f"own samples, {len(prompts)} at once", "unit": "token", "disable": None if progress else True}
    for position in tqdm(range(1, length + 1), **bar):
        logits = model(input_ids=ids[:, -1:], **{CACHE: cache}, use_cache=True).logits[:, -1].float()
        log_probabilities = logits.log_softmax(dim=-1)
        drawn = torch.multinomial(log_probabilities.exp(), 1, generator=generator)
        is_free = given[:, position : position + 1] < 0
        entropy -= log_probabilities.gather(1, drawn)[is_free].sum().item()
        sampled += int(is_free.sum())
        ids = torch.cat((ids, torch.where(is_free, drawn, given[:, position : position + 1])), dim=1)
    return ids[:, 1:].cpu().contiguous(), entropy / max(1, sampled)
