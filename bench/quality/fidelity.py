"""What perplexity hides: how near a model's own predictions stay to the dense model's, whatever the text says next.

KL divergence of the dense model's next-token distribution from the model's, top-1 agreement, and how far both continue
a prompt greedily with the same tokens.
"""

from dataclasses import dataclass

import torch
from torch import nn

from transact.modeling_transact import CACHE

from .perplexity import Windows

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 16, 32, 64


@dataclass(frozen=True)
class Fidelity:
    """How near a model is to the dense one on windows of a text: means over their predicted tokens, (windows,) each.

    `kl_nats` is KL(dense, model) in nats, `top1_agreement` the share of tokens where both find the same one likeliest.
    """

    kl_nats: tuple[float, ...]
    top1_agreement: tuple[float, ...]


def divergence(dense_logits: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(dense, model) in nats, and whether both have the same largest logit, at each place: (places,) of float, bool.

    Logits are (places, vocabulary); sums are in float32. Kullback and Leibler 1951.
    """
    expected, found = dense_logits.float().log_softmax(-1), logits.float().log_softmax(-1)
    same = expected.argmax(-1) == found.argmax(-1)
    return torch.linalg.vecdot(expected.exp(), expected - found), same


class DenseReference:
    """The dense model on the first `count` windows of a text.

    Its last hidden states are kept on the CPU, and its head makes logits of them window by window: those of all would
    take as many times more room as the vocabulary is larger than the hidden size.
    """

    @torch.no_grad()
    def __init__(self, dense: nn.Module, windows: Windows, count: int, *, tokens_per_batch: int = 2048):
        self.dense, ids = dense.eval(), windows.ids[:count]
        length = ids.shape[1] - 1
        self.predicted = [length] * len(ids)
        if len(ids) == len(windows.ids):
            self.predicted[-1] = windows.in_last
        batches = ids[:, :-1].to(dense.device).split(max(1, tokens_per_batch // length))
        states = [dense.model(input_ids=batch, use_cache=False).last_hidden_state.cpu() for batch in batches]
        self.states = torch.cat(states)

    def logits(self, window: int) -> torch.Tensor:
        """The dense model's logits of a window, (tokens, vocabulary): those that predict a token, and no others."""
        return self.dense.lm_head(self.states[window, -self.predicted[window] :].to(self.dense.device))


class Comparison:
    """A model's logits beside the dense model's, in the batches and the order that perplexity is measured in."""

    def __init__(self, reference: DenseReference):
        self.reference = reference
        self.kl: list[float] = []
        self.same: list[float] = []

    @torch.no_grad()
    def add(self, logits: torch.Tensor) -> None:
        """Compare the next windows' logits (windows, tokens, vocabulary); those beyond the reference's are left out."""
        for mine in logits[: len(self.reference.states) - len(self.kl)]:
            window = len(self.kl)
            kl, same = divergence(self.reference.logits(window), mine[-self.reference.predicted[window] :])
            self.kl.append(kl.double().mean().item())
            self.same.append(same.double().mean().item())

    def fidelity(self) -> Fidelity:
        return Fidelity(tuple(self.kl), tuple(self.same))


class GreedyReference:
    """How the dense model continues the beginnings of windows greedily: `PROMPTS` prompts of at most `PROMPT_TOKENS`.

    `NEW_TOKENS` tokens are generated, fewer where the model's context is too short for both.
    """

    def __init__(self, dense: nn.Module, windows: Windows):
        context = dense.config.max_position_embeddings
        prompts = windows.ids[:PROMPTS, : min(PROMPT_TOKENS, context // 2)].to(dense.device)
        self.new = min(NEW_TOKENS, context - prompts.shape[1])
        self.sequences = torch.cat((prompts, greedy_continuations(dense, prompts, self.new)), dim=1)
        # not the continuations themselves: read at once, a near tie may fall otherwise than with a cache
        self.said = said_at_the_end(dense, self.sequences, self.new)

    def agreement(self, model: nn.Module) -> tuple[float, ...]:
        """The share of each continuation's tokens, up to the first difference, that the model generates as well.

        It reads the dense model's continuation at once: up to the first difference that is its own, and what it would
        say after that does not count.
        """
        same = said_at_the_end(model, self.sequences, self.new) == self.said
        return tuple(same.cumprod(dim=1).double().mean(dim=1).tolist())


@torch.no_grad()
def greedy_continuations(model: nn.Module, prompts: torch.Tensor, new: int) -> torch.Tensor:
    """`new` greedy tokens after each prompt (prompts, tokens), all of one length: (prompts, new)."""
    ids, cache, said = prompts, None, []
    for _ in range(new):
        output = model.eval()(input_ids=ids, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
        ids, cache = output.logits[:, -1].argmax(dim=-1, keepdim=True), getattr(output, CACHE)
        said.append(ids)
    return torch.cat(said, dim=1)


@torch.no_grad()
def said_at_the_end(model: nn.Module, sequences: torch.Tensor, new: int) -> torch.Tensor:
    """The likeliest token at each of the last `new` places, given the true ones before: (sequences, new)."""
    logits = model.eval()(input_ids=sequences[:, :-1], use_cache=False, logits_to_keep=new).logits
    return logits.argmax(dim=-1)
