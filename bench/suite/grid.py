"""Many cells: the order that makes each thing once, a shard of them, and what they will cost."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from transact.entry import counted
from transact.recipe import SCORED_SHARE

from ..quality.fidelity import NEW_TOKENS, PROMPT_TOKENS, PROMPTS
from ..records import Case, Record
from .cases import pruning_of, recipe_of, untrained_of, weights_of
from .training import EVALUATIONS

OPERATIONS_PER_SECOND = {"cpu": 2.4e11, "cuda": 3e13}  # of two CPU cores in float32, of a GPU in bfloat16; stated low
# how many forward passes over the calibration text each step costs (measured on two CPU cores with SmolLM2-135M)
PASSES = {"first moments": 1.0, "second moments": 1.5, "outputs": 0.5, "weights": 4.0}
SCORING_PASSES = {"obs": 2.0, "predicted-loss": 0.2, "leverage": 0.4}
TRAINING_PASSES = 6.0  # over the text trained on: forward, backward, the teacher's, and their vocabularies
COMPENSATING_PASSES = {"dense": 0.4, "pruned": 2.8}
MEASURING_PASSES = 0.4  # of each round
# where whole layers go: passes whatever the ratio, and for the whole ratio, of models of about 30 layers
DEPTH_PASSES = {"influence": (0.0, 16.0), "run": (2.0, 0.0), "clusters": (1.0, 0.0)}
COMPARING_PASSES = 0.3  # over windows that are compared with the dense model: its head, two softmaxes
WINDOWS_WITHOUT_A_LIMIT = 1000
GREEDY_TOKENS = PROMPTS * (PROMPT_TOKENS + NEW_TOKENS)
SECONDS_OF_A_CELL = 1.5  # whatever its model
TOKENS_OF_AN_ITEM = 60  # of a task, over all its choices
ITEMS_WITHOUT_A_LIMIT = 170
DECODING_FORWARDS = 8 * 40  # a token decoded alone costs as much as so many in a batch, and is repeated


def calibration_of(case: Case) -> tuple | None:
    """What decides the calibration windows of a case: text, samples, length and seed; None where it takes no text."""
    if case.calibration_sha256 is None:
        return None
    return case.calibration_sha256, case.calibration_samples, case.calibration_seq_len, case.seed


def in_order(cases: Iterable[Case]) -> list[Case]:
    """Distinct cases in the order that calibrates each text once and prunes each model once.

    Cases of the same windows follow each other, first one that needs second moments, which serve all others; but where
    some are scored on a part of them, those that need second moments of all come last: both at once take memory. So do
    cases of the same pruning, trained ones after those that are not, and of the same weights. Beyond that, and for the
    texts, first come, first served.
    """
    cases = list(dict.fromkeys(cases))
    calibrations = list(dict.fromkeys([None, *map(calibration_of, cases)]))
    untrained = {made: rank for rank, made in enumerate(dict.fromkeys(map(untrained_of, cases)))}
    prunings = {made: rank for rank, made in enumerate(dict.fromkeys(map(pruning_of, cases)))}
    weights = {made: rank for rank, made in enumerate(dict.fromkeys(map(weights_of, cases)))}

    in_part = {calibration_of(case) for case in cases if _of_moments(case) == "in part"}

    def comes_last(case: Case) -> bool:
        return _of_moments(case) == "of all" and calibration_of(case) in in_part

    serve_others = {}  # of each windows the pruning that makes their second moments
    for case in cases:
        if _of_moments(case) and not comes_last(case):
            serve_others.setdefault(calibration_of(case), untrained_of(case))

    def rank(case: Case) -> tuple[int, bool, bool, int, int, int]:
        calibration, pruning, before = calibration_of(case), pruning_of(case), untrained_of(case)
        comes_later = serve_others.get(calibration, before) != before
        places = untrained[before], prunings[pruning], weights[weights_of(case)]
        return calibrations.index(calibration), comes_last(case), comes_later, *places

    return sorted(cases, key=rank)


def _of_moments(case: Case) -> str | None:
    """Whether a case needs second moments "of all" windows, or "in part"; None where it needs none."""
    if case.criterion == "dense" or not (recipe := recipe_of(case)).needs_moments():
        return None
    return "in part" if recipe.is_scored_in_part() else "of all"


def parse_shard(text: str) -> tuple[int, int]:
    """The shard i of n that "i/n" names, counted from 1. Raises ValueError for anything else."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise ValueError(f"shard must be i/n with 1 <= i <= n, as in 2/5, got {text!r}")
    return int(index), int(count)


def shard_of(cases: Sequence[Case], index: int, count: int) -> list[Case]:
    """Every `count`-th distinct case from the `index`-th (from 1) on: the shards together are all cases, each once."""
    return list(dict.fromkeys(cases))[index - 1 :: count]


@dataclass(frozen=True)
class Estimate:
    """Cells of a grid, how many have records, and seconds for the others: `measured` of these are from like records."""

    cells: int
    recorded: int
    measured: int
    seconds: float

    def __str__(self) -> str:
        left, cells = self.cells - self.recorded, counted(self.cells, "cell")
        if not left:
            return f"{cells}, all measured already"
        time = counted(round(self.seconds), "second") if self.seconds < 90 else f"{self.seconds / 60:.3g} minutes"
        return (
            f"{cells}, {self.recorded} with records; the other {left} take{'s' * (left == 1)} about {time} "
            f"({self.measured} by the recorded seconds of like cells, {left - self.measured} by a stated rate)"
        )


def estimate(cases: Sequence[Case], records: Sequence[Record], parameters: int) -> Estimate:
    """What the cases without a successful record will cost; of a model with so many parameters."""
    succeeded = [record for record in records if record.status == "success"]
    done = {record.case for record in succeeded}
    left = [case for case in in_order(cases) if case not in done]
    seconds_by_kind: dict[tuple, list[float]] = {}
    for record in succeeded:
        if "cell_s" in record.metrics:
            seconds_by_kind.setdefault(kind_of(record.case), []).append(record.metrics["cell_s"])
    seconds, measured, made = 0.0, 0, set()
    for case in left:
        like = seconds_by_kind.get(kind_of(case))
        if like:
            seconds += statistics.fmean(like)  # a whole grid measured anew costs what it did
            measured += 1
        else:
            tokens = _forward_tokens(case, made)
            seconds += SECONDS_OF_A_CELL + tokens * 2 * parameters / OPERATIONS_PER_SECOND.get(
                case.device, OPERATIONS_PER_SECOND["cpu"]
            )
    return Estimate(len(set(cases)), len(set(cases) & done), measured, seconds)


def kind_of(case: Case) -> tuple:
    """What two cases share that take about as long."""
    return (
        case.model_hash, case.criterion, case.allocation, case.compensation, case.shots, case.calibration_samples,
        case.calibration_seq_len, case.evaluation_windows, case.evaluation_seq_len, case.other_texts,
        case.other_windows, case.compared_windows, case.tasks, case.task_limit, case.decode_tokens, case.recovery,
        case.recovery_tokens, case.quantisation, case.dtype, case.device, case.depth,
    )  # fmt: skip


def _evaluation_tokens(case: Case) -> float:
    """Tokens of forward passes that cost as much as measuring on all texts, beside the dense model and greedily."""
    others = len(case.other_texts.split("+")) if case.other_texts else 0
    windows = case.evaluation_windows + others * (case.other_windows or WINDOWS_WITHOUT_A_LIMIT)
    compared = (1 + others) * case.compared_windows or windows
    greedy = GREEDY_TOKENS if others else 0
    return (windows + COMPARING_PASSES * min(compared, windows)) * case.evaluation_seq_len + greedy


def _forward_tokens(case: Case, made: set) -> float:
    """Tokens of forward passes that cost as much as the case; what is in `made` is made already, and it is added to."""
    items = (case.task_limit or ITEMS_WITHOUT_A_LIMIT) * len(case.tasks.split("+")) if case.tasks else 0
    beside = case.decode_tokens * DECODING_FORWARDS + items * TOKENS_OF_AN_ITEM
    if weights_of(case) in made:
        return beside
    made.add(weights_of(case))
    evaluation = _evaluation_tokens(case)
    on_the_way = (EVALUATIONS + 1) * case.evaluation_windows * case.evaluation_seq_len
    training = TRAINING_PASSES * case.recovery_tokens + on_the_way if case.recovery else 0
    pruning = "pruning", pruning_of(case)
    if case.calibration_sha256 is None or pruning in made:
        return beside + evaluation
    made.add(pruning)
    recipe, calibration_tokens = recipe_of(case), case.calibration_samples * case.calibration_seq_len
    steps = ["second moments" if recipe.needs_moments() else "first moments", recipe.gradients()]
    if not recipe.needs_statistics():
        fixed, whole = DEPTH_PASSES[case.depth]
        return beside + evaluation + training + (fixed + whole * case.ratio) * calibration_tokens
    part = SCORED_SHARE if recipe.is_scored_in_part() else 1.0
    passes = [part * PASSES[step] for step in steps if step] * (case.shots - 1)
    for step in steps:
        served = {(calibration_of(case), part, step)}
        if step == "first moments":
            served.add((calibration_of(case), part, "second moments"))
        if step and not served & made:
            passes.append(part * PASSES[step])
            made.add((calibration_of(case), part, step))
    passes += [SCORING_PASSES.get(case.criterion, 0) * case.shots, COMPENSATING_PASSES.get(case.compensation, 0)]
    passes.append(MEASURING_PASSES * case.measurements * (case.allocation == "searched"))
    return beside + evaluation + training + sum(passes) * calibration_tokens
