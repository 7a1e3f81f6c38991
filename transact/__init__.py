"""Prune Llamas inside their modules: narrow heads and MLPs, leave the residual stream alone.

load -> calibrate -> score -> plan -> prune. Importing this package registers the narrowed Llama with transformers'
Auto classes, so `AutoModelForCausalLM.from_pretrained` loads a pruned checkpoint.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from .calibration import LayerStatistics, Statistics, calibrate
from .checkpoint import load_plan, save_checkpoint
from .configuration_transact import TransActConfig
from .criteria import CRITERIA, LayerScores, criterion_by_name
from .inputs import cut_windows, load_model, load_text, tokenise
from .modeling_transact import TransActForCausalLM
from .plan import (
    LayerPlan,
    Plan,
    Widths,
    dense_widths,
    fraction_removed,
    kv_elements_per_token,
    linear_parameters,
    select,
    uniform_widths,
    widths_by_name,
    widths_of,
)
from .prune import apply_plan, check_prunable, prune, score

__version__ = "0.1.0"
__all__ = [
    "CRITERIA",
    "LayerPlan",
    "LayerScores",
    "LayerStatistics",
    "Plan",
    "Statistics",
    "TransActConfig",
    "TransActForCausalLM",
    "Widths",
    "apply_plan",
    "calibrate",
    "check_prunable",
    "criterion_by_name",
    "cut_windows",
    "dense_widths",
    "fraction_removed",
    "kv_elements_per_token",
    "linear_parameters",
    "load_model",
    "load_plan",
    "load_text",
    "prune",
    "save_checkpoint",
    "score",
    "select",
    "tokenise",
    "uniform_widths",
    "widths_by_name",
    "widths_of",
]

AutoConfig.register(TransActConfig.model_type, TransActConfig)
AutoModelForCausalLM.register(TransActConfig, TransActForCausalLM)
