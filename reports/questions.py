"""The questions of the ablation suite, one for each of its files; `reports.answers` says what they are made of."""

from functools import partial

from bench.records import Case, Record

from . import findings, front, plots
from .answers import Question, counted
from .rises import ON, text_named
from .sets import ASIDE, CALIBRATION, SHARED, SPEEDUP, is_timed

RECIPE = ("criterion", "granularity", "modules", "allocation", "compensation", "output_bias", "rope", "shots",
          "measurements", "depth")  # fmt: skip
PAPER = {"granularity": ("dims",), "allocation": ("uniform",), "compensation": ("none",), "rope": ("pairs",),
         "shots": (1,)}  # fmt: skip
IN_TURN = ("decode_speedup", "decode_speedup_low", "decode_speedup_high")  # with the dense model
PREFILL_IN_TURN = ("prefill_speedup", "prefill_speedup_low", "prefill_speedup_high")
TRAINED = ("full", "lora", "distillation", "lora-distillation")


def is_preset(record: Record) -> bool:
    """Whether its recipe has a name of its own."""
    return record.method not in ("dense", record.case.criterion)


def is_allocated(record: Record) -> bool:
    """Whether it is of the recipe whose allocation is compared, or FLAP's, which has an allocation of its own."""
    case = record.case
    recipe = (case.criterion, case.granularity, case.compensation)
    return recipe == (
        ("fluctuation", "heads", "bias") if case.allocation == "global" else ("predicted-loss", "dims", "dense")
    )


def allocation_label(record: Record) -> str:
    case = record.case
    return case.allocation if case.engine == "transformers" else f"{case.allocation} for {case.engine}"


WAYS = {"best": "widths", "shortgpt": "whole layers", "best, drops": "widths and modules"}  # by methods


def method(record: Record) -> str:
    return record.method


def calibration_label(record: Record) -> str:
    case = record.case
    return f"{counted(case.calibration_samples, 'window')} of {case.calibration_seq_len:,}"


def ridge_label(record: Record) -> str:
    case = record.case
    return case.compensation if case.ridge is None else f"{case.compensation}, ridge {case.ridge:g}"


def multiples_label(record: Record) -> str:
    multiples = (record.case.head_multiple, record.case.mlp_multiple)
    return "heads {}, MLP {}".format(*("as fits" if one is None else f"by {one}" for one in multiples))


def widths_label(record: Record) -> str:
    widths = (record.case.mha_dim, record.case.mlp_dim)
    return "A {}, M {}".format(*("whole" if one is None else one for one in widths))


def recovery_label(record: Record) -> str:
    case = record.case
    if not case.recovery:
        return "untrained"
    rate = "" if case.learning_rate is None else f", rate {case.learning_rate:.3g}"
    frugal = ", one window at once" if case.recovery_frugal else ""
    return f"{case.recovery}, {counted(case.recovery_tokens, 'token')}{rate}{frugal}"


TRAINING = ("recovery", "recovery_tokens", "recovery_sha256", "recovery_ids", "learning_rate", "recovery_frugal")
# all that makes a model smaller or faster without training it
SHRINKING = tuple(name for name in Case.__dataclass_fields__ if name not in {*SHARED, *CALIBRATION, *ASIDE, *TRAINING})
FRONT = Question(
    "front", SHRINKING, front.plot_front, front.front, along=(), label=front.label,
    belongs=lambda record: record.metrics.get(SPEEDUP) is not None,
    columns=("family", "ratio", "kv_ratio", "speedup", *IN_TURN, *PREFILL_IN_TURN, "weight_mib"), alone=True,
)  # fmt: skip
QUESTIONS = (
    Question("preset", RECIPE, plots.plot_lines, findings.alternatives, along=("ratio", "kv_ratio"),
             belongs=is_preset, label=method),
    FRONT,
    Question("criterion", ("criterion",), plots.plot_lines, findings.alternatives, where=PAPER),
    Question("granularity", ("granularity",), plots.plot_lines, findings.alternatives),
    Question("redundancy", ("mha_dim", "mlp_dim"), plots.plot_heat_map, findings.redundancy, along=(),
             belongs=lambda record: record.case.mha_dim is not None or record.case.mlp_dim is not None,
             label=widths_label, columns=("attention_removed", "mlp_removed")),
    Question("layer", ("only_layer",), plots.plot_layers, findings.layers,
             belongs=lambda record: record.case.only_layer is not None),
    Question("shots", ("shots",), plots.plot_lines, findings.alternatives,
             label=lambda record: counted(record.case.shots, "shot")),
    Question("calibration",
             ("calibration_samples", "calibration_seq_len", "calibration_sha256", "calibration_ids"),
             plots.plot_budget, findings.budget, label=calibration_label,
             belongs=lambda record: record.case.calibration_sha256 is not None,
             columns=("calibration_tokens",)),
    Question("domain", ("calibration_text", "calibration_sha256", "calibration_ids"), plots.plot_lines,
             findings.alternatives, label=lambda record: text_named(record.case.calibration_text),
             belongs=lambda record: record.case.calibration_sha256 is not None),
    Question("transfer", ("calibration_text", "calibration_sha256", "calibration_ids"), plots.plot_transfer,
             findings.transfer, label=lambda record: text_named(record.case.calibration_text), columns=(ON,),
             belongs=lambda record: record.case.calibration_sha256 is not None and len(record.texts) > 1),
    Question("drops", ("criterion", "allocation", "compensation", "measurements", "depth", "drop_modules"),
             plots.plot_lines, partial(findings.ways, labels=tuple(WAYS.values())),
             belongs=lambda record: record.method in WAYS,
             label=lambda record: WAYS[record.method]),
    Question("rope", ("rope",), plots.plot_lines, findings.alternatives),
    Question("compensation", ("compensation", "ridge"), plots.plot_lines, findings.alternatives, label=ridge_label),
    Question("allocation", ("allocation", "engine", "criterion", "granularity", "compensation"), plots.plot_trade_off,
             findings.trade_off, along=("ratio", "kv_ratio"), belongs=is_allocated,
             label=allocation_label, columns=("parameters", "kv_bytes_per_token")),
    Question("measurements", ("measurements",), plots.plot_lines, findings.alternatives,
             belongs=lambda record: record.case.allocation == "searched",
             label=lambda record: counted(record.case.measurements, "round")),
    Question("alignment", ("head_multiple", "mlp_multiple"),
             partial(plots.plot_dots, metrics=("perplexity", "decode_tokens_per_s")), findings.alternatives,
             label=multiples_label, columns=(*IN_TURN, "decode_tokens_per_s", "decode_tokens_per_s_standard_error")),
    Question("speed", RECIPE, plots.plot_speed, findings.speed, along=("ratio", "kv_ratio"), belongs=is_timed,
             label=method, columns=(*IN_TURN, "decode_tokens_per_s", "decode_tokens_per_s_standard_error",
                                    "weight_mib", "kv_bytes_per_token")),
    Question("budget", ("budget",), plots.plot_dots, findings.budgets, along=("speedup",),
             belongs=lambda record: record.case.speedup is not None, label=lambda record: record.case.budget,
             columns=(*IN_TURN, "decode_tokens_per_s")),
    Question("recovery", TRAINING, plots.plot_training, findings.training, label=recovery_label,
             columns=("recovery_tokens", "recovery_peak_mib")),
    Question("recovery_shots", ("shots",), plots.plot_lines, findings.alternatives, where={"recovery": TRAINED},
             label=lambda record: counted(record.case.shots, "shot")),
    Question("recovery_criterion", ("criterion",), plots.plot_lines, findings.alternatives,
             where={"recovery": TRAINED}),
    Question("sparsity", ("sparsity",), plots.plot_lines, findings.alternatives,
             label=lambda record: "narrowed only" if record.case.sparsity == "none" else record.case.sparsity,
             columns=("zeros",)),
    Question("quantisation", ("quantisation",),
             partial(plots.plot_dots, metrics=("perplexity", "weight_mib", "decode_tokens_per_s")),
             findings.alternatives, along=(), label=lambda record: record.case.quantisation or record.case.dtype,
             columns=("weight_mib", "packed_weight_mib", "decode_tokens_per_s",
                      "decode_tokens_per_s_standard_error")),
)  # fmt: skip
