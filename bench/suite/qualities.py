"""How good models are on the evaluation texts, and how near to the dense one; what was measured last is kept."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from statistics import fmean, stdev

from torch import nn

from transact.texts import Text

from ..quality.fidelity import Comparison, DenseReference, GreedyReference
from ..quality.perplexity import Perplexity, Windows, measure_perplexity
from ..records import Case
from .cases import weights_of


@dataclass(frozen=True)
class TextQuality:
    """A model on one text. `losses`, `kl_nats` and `top1_agreement` are means of each window, the latter two of the
    first few: how near the model is to the dense one (see `bench.quality.fidelity.Fidelity`)."""

    name: str
    sha256: str
    tokens: int
    loss_nats: float
    losses: tuple[float, ...]
    kl_nats: tuple[float, ...]
    top1_agreement: tuple[float, ...]


class Qualities:
    """Models beside the `dense` one on windows of `texts`; on the first `compared_windows` of each (0: all) predictions
    are compared."""

    def __init__(self, dense: nn.Module, texts: Sequence[tuple[Text, Windows]], compared_windows: int):
        self.dense, self.texts, self.compared_windows = dense, texts, compared_windows
        self._kept: tuple[Case, list[tuple[TextQuality, Perplexity, float]]] | None = None
        self._greedy: tuple[Case, tuple[float, ...], float] | None = None
        self._references: dict[str, DenseReference] = {}

    @cached_property
    def _greedy_reference(self) -> GreedyReference:
        return GreedyReference(self.dense, self.texts[0][1])

    def greedy_agreement(self, model: nn.Module, case: Case) -> tuple[tuple[float, ...], float]:
        """How far a case's model continues each prompt as the dense one does; and the seconds; kept as in `of`."""
        made = weights_of(case)
        if self._greedy is None or self._greedy[0] != made:
            reference, start = self._greedy_reference, time.perf_counter()
            self._greedy = made, reference.agreement(model), time.perf_counter() - start
        return self._greedy[1:]

    def of(self, model: nn.Module, case: Case) -> list[tuple[TextQuality, Perplexity, float]]:
        """A case's model on each of its evaluation texts, and the seconds; kept for cases of the same weights."""
        made = weights_of(case)
        if self._kept is None or self._kept[0] != made:
            self._kept = made, []
        kept, texts = self._kept[1], self.texts[: None if case.other_texts else 1]
        kept += [self._measured(model, *text) for text in texts[len(kept) :]]
        return kept[: len(texts)]

    def _measured(self, model: nn.Module, text: Text, windows: Windows) -> tuple[TextQuality, Perplexity, float]:
        start = time.perf_counter()
        if text.sha256 not in self._references:
            count = self.compared_windows or len(windows.ids)
            self._references[text.sha256] = DenseReference(self.dense, windows, count)
        comparison = Comparison(self._references[text.sha256])
        measured = measure_perplexity(model, windows, on_logits=comparison.add, progress=True)
        quality = TextQuality(
            text.name, text.sha256, measured.tokens, measured.loss, measured.losses, **asdict(comparison.fidelity())
        )
        return quality, measured, time.perf_counter() - start

    def figures(self, model: nn.Module, case: Case) -> tuple[dict, dict[str, float]]:
        """What a record says of a case's model by its quality, as fields of `Record`, and the seconds of measuring."""
        qualities = self.of(model, case)
        main, quality, perplexity_s = qualities[0]
        seconds = {"perplexity_s": perplexity_s}
        if len(qualities) > 1:
            seconds["other_texts_s"] = sum(one for _, _, one in qualities[1:])
        nearness, greedy_agreement = {"kl_nats": main.kl_nats, "top1_agreement": main.top1_agreement}, ()
        if len(qualities) == len(self.texts):  # it takes as long as the first text, and serves the same comparisons
            greedy_agreement, seconds["greedy_s"] = self.greedy_agreement(model, case)
            nearness["greedy_agreement"] = greedy_agreement
        metrics = {
            "perplexity": quality.perplexity,
            "bits_per_byte": quality.bits_per_byte,
            "loss_nats": quality.loss,
            "tokens": quality.tokens,
            **{name: fmean(values) for name, values in nearness.items()},
        }
        standard_errors = {
            "loss_nats": quality.standard_error,
            "perplexity": quality.perplexity * quality.standard_error,  # delta method: perplexity is exp(loss)
            "bits_per_byte": quality.bits_per_byte * quality.standard_error / quality.loss,
            **{name: stdev(values) / len(values) ** 0.5 for name, values in nearness.items() if len(values) > 1},
        }
        return {
            "metrics": metrics, "standard_errors": standard_errors, "losses": quality.losses,
            "texts": tuple(asdict(one) for one, _, _ in qualities), "greedy_agreement": greedy_agreement,
        }, seconds  # fmt: skip
