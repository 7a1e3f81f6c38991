"""Prune Llamas inside their modules: narrow heads and MLPs, leave the residual stream alone.

load -> calibrate -> score -> plan -> prune -> compensate. Importing this package registers the narrowed Llama with
transformers' Auto classes, so `AutoModelForCausalLM.from_pretrained` loads a pruned checkpoint.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from . import _transformers  # noqa: F401 (before anything that imports models)
from .allocate import global_widths, searched_widths
from .calibration import LayerStatistics, Statistics, calibrate
from .checkpoint import load_plan, save_checkpoint
from .configuration_transact import TransActConfig
from .criteria import CRITERIA, criterion_by_name
from .depth import without_layers
from .gradients import LayerGradients, loss_gradients
from .modeling_transact import TransActForCausalLM, TransActForSequenceClassification, TransActModel
from .models import load_model
from .pipeline import Pruned, prune
from .plan import LayerPlan, Plan, select
from .prune import apply_plan, check_prunable
from .recipe import PRESETS, Recipe, recipe_by_name
from .recovery import Recovered, Training, recover, shot_budgets
from .scores import LayerScores
from .speedup import SpeedGoal, speed_goal
from .texts import calibration_windows, cut_windows, load_text, tokenise
from .widths import (
    Widths,
    dense_widths,
    fraction_removed,
    kv_elements_per_token,
    kv_fraction_removed,
    linear_parameters,
    uniform_widths,
    widths_by_name,
    widths_of,
    widths_of_one_layer,
)

__version__ = "0.3.0"
__all__ = [
    "CRITERIA",
    "PRESETS",
    "LayerGradients",
    "LayerPlan",
    "LayerScores",
    "LayerStatistics",
    "Plan",
    "Pruned",
    "Recipe",
    "Recovered",
    "SpeedGoal",
    "Statistics",
    "Training",
    "TransActConfig",
    "TransActForCausalLM",
    "TransActForSequenceClassification",
    "TransActModel",
    "Widths",
    "apply_plan",
    "calibrate",
    "calibration_windows",
    "check_prunable",
    "criterion_by_name",
    "cut_windows",
    "dense_widths",
    "fraction_removed",
    "global_widths",
    "kv_elements_per_token",
    "kv_fraction_removed",
    "linear_parameters",
    "load_model",
    "load_plan",
    "load_text",
    "loss_gradients",
    "prune",
    "recipe_by_name",
    "recover",
    "save_checkpoint",
    "searched_widths",
    "select",
    "shot_budgets",
    "speed_goal",
    "tokenise",
    "uniform_widths",
    "widths_by_name",
    "widths_of",
    "widths_of_one_layer",
    "without_layers",
]

AutoConfig.register(TransActConfig.model_type, TransActConfig)
AutoModel.register(TransActConfig, TransActModel)
AutoModelForSequenceClassification.register(TransActConfig, TransActForSequenceClassification)
AutoModelForCausalLM.register(TransActConfig, TransActForCausalLM)
