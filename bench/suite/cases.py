"""What a case says: its recipe, its name in tables, and which other cases have the same weights as it."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, fields, replace

import torch
from transformers import PreTrainedTokenizerBase

import transact

from ..records import Case, Record


def recipe_fields(recipe: transact.Recipe) -> dict:
    """The recipe's fields as a case holds them."""
    return asdict(recipe) | {"modules": "+".join(recipe.modules)}


def recipe_of(case: Case) -> transact.Recipe:
    """The recipe of a case."""
    names = [field.name for field in fields(transact.Recipe)]
    return transact.Recipe(
        **{name: getattr(case, name) for name in names} | {"modules": tuple(case.modules.split("+"))}
    )


def method_of(case: Case) -> str:
    """What tables call a case: dense, its preset if it has one or its criterion (that of the paper's), its sparsity.

    "drops" stands behind it where modules may be dropped. Where whole layers go and it is no preset, how they are found
    and what makes up for them.
    """
    if case.criterion == "dense":
        return "dense"
    recipe = replace(recipe_of(case), sparsity="none", drop_modules=False)
    other = case.criterion if case.depth == "none" else f"{case.depth}, {case.compensation}"
    name = next((name for name, preset in transact.PRESETS.items() if preset == recipe), other)
    name = f"{name}, drops" if case.drop_modules else name
    if case.sparsity == "none":
        return name
    return f"{name}, {case.sparsity}" if is_narrowed(case) else case.sparsity


def is_narrowed(case: Case) -> bool:
    """Whether it asks for widths below the dense model's."""
    return any((case.ratio, case.kv_ratio, case.mha_dim, case.mlp_dim, case.speedup))


def failed(case: Case, error: Exception, environment: Mapping) -> Record:
    """A record without figures that names the error."""
    message = f"{type(error).__name__}: {error}"
    return Record(case, method_of(case), {}, {}, environment, status="failed", error=message)


def weights_of(case: Case) -> Case:
    """What decides a case's weights: two cases with the same differ in what is measured beside perplexity."""
    return replace(case, tasks="", task_limit=None, decode_tokens=0, other_texts="", other_sha256="", other_windows=0)


def pruning_of(case: Case) -> Case:
    """What decides a case's pruned model: two cases with the same differ in quantisation, or in what is measured."""
    return replace(weights_of(case), quantisation="")


def untrained_of(case: Case) -> Case:
    """What decides the model that training begins with; in several shots, and before zeros, it is a part of pruning."""
    case = pruning_of(case)
    if case.shots > 1 or case.sparsity != "none":
        return case
    return replace(
        case, recovery="", recovery_tokens=0, recovery_sha256=None, recovery_ids=None, learning_rate=None,
        recovery_frugal=False,
    )  # fmt: skip


def ids_hash(ids: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> str:
    """Short hash of token ids, and of the vocabulary that tasks are read with.

    Of the ids, since they are what a model is given: a tokeniser's files differ between versions of the libraries that
    make the same ids, and another version may make other ids of the same files.
    """
    vocabulary = sorted(tokenizer.get_vocab().items()), tokenizer.bos_token_id, tokenizer.eos_token_id
    return hashlib.sha256(ids.cpu().numpy().tobytes() + repr(vocabulary).encode()).hexdigest()[:16]


def is_plain_preset(case: Case) -> bool:
    """Whether it is the dense model, or a preset with the widths that a ratio gives: measured on other texts too."""
    named = case.mha_dim, case.mlp_dim, case.only_layer, case.head_multiple, case.mlp_multiple, case.speedup
    is_preset = case.criterion == "dense" or recipe_of(case) in transact.PRESETS.values()
    return is_preset and all(width is None for width in named)
