"""Frames of records, of their tasks, and of every two methods: what tables and overviews are made of."""

from collections.abc import Sequence
from itertools import combinations

import pandas as pd

from bench.quality.flips import flips
from bench.quality.significance import Difference
from bench.quality.significance import differences as task_differences
from bench.records import Record

from .rises import differences, other_rises, with_interval
from .sets import comparable, is_reference, newest_by_case, quality

COLUMNS = ["model", "method", "ratio", "kv_ratio", "fraction_removed", "kv_fraction_removed", "perplexity",
           "perplexity_standard_error", "times_dense", "loss_over_dense", "other_texts_rise_nats", "kl_nats",
           "top1_agreement", "greedy_agreement", "bits_per_byte", "parameters", "weight_mib",
           "kv_bytes_per_token", "prune_s", "perplexity_s", "peak_memory_mib", "dtype", "device"]  # fmt: skip


def records_frame(records: Sequence[Record]) -> pd.DataFrame:
    """One row for each successful case, the newest record of it, sorted by method and ratio.

    `times_dense` is the perplexity over that of the dense model measured on the same text in the same way, and
    `loss_over_dense` by how many nats its loss is higher, with the paired interval at 95 %; both are left
    empty where there is none.
    """
    newest = newest_by_case(records)
    dense = {comparable(r): r for r in sorted(newest, key=lambda one: len(one.texts)) if is_reference(r)}
    references = [dense.get(comparable(record)) for record in newest]
    changes = differences(newest, references)
    others = [other_rises([one], reference)[0] for one, reference in zip(newest, references, strict=True)]
    rows = []
    for record, reference, change, rise in zip(newest, references, changes, others, strict=True):
        rows.append({
            **vars(record.case),
            "method": record.method,
            **record.metrics,
            "perplexity_standard_error": record.standard_errors.get("perplexity"),
            "times_dense": record.metrics["perplexity"] / reference.metrics["perplexity"] if reference else None,
            "loss_over_dense": with_interval(change) if change else None,
            "other_texts_rise_nats": rise,
            "weight_mib": record.metrics["weight_bytes"] / 2**20,
        })  # fmt: skip
    frame = pd.DataFrame(rows)
    for column in COLUMNS:
        if column not in frame:
            frame[column] = None
    return frame.sort_values(["model", "method", "ratio"], key=_dense_first, kind="stable", ignore_index=True)


def tasks_frame(records: Sequence[Record]) -> pd.DataFrame:
    """One row for each newest case, task and metric that has scores; `over_dense` as in `records_frame`.

    `lost` and `won` count answers that were right and are wrong, and the other way round, `mcnemar_p` says how likely
    so uneven a change is by chance: where each item is right or wrong.

    Only records with the tasks, and the items, of the last one that has any.
    """
    with_tasks = [record for record in records if record.status == "success" and record.tasks]
    if not with_tasks:
        return pd.DataFrame()
    last = with_tasks[-1].case
    same = {r.case: r for r in with_tasks if (r.case.tasks, r.case.task_limit) == (last.tasks, last.task_limit)}
    dense = next((record for record in reversed(same.values()) if record.method == "dense"), None)
    rows = []
    for record in same.values():
        changes = _task_changes(record, dense)
        for task, result in record.tasks.items():
            for metric, value in result["metrics"].items():
                change = changes.get(f"{task} {metric}") if metric != "perplexity" else None
                flipped = None
                if change is not None:
                    flipped = flips(result["scores"][metric], dense.tasks[task]["scores"][metric])
                rows.append({
                    "capability": result["capability"], "task": task, "version": result["version"],
                    "shots": result["shots"], "items": result["items"], "metric": metric, "chance": result["chance"],
                    "method": record.method, "ratio": record.case.ratio, "value": value,
                    "fraction_removed": record.metrics["fraction_removed"],
                    "standard_error": result["standard_errors"][metric],
                    "over_dense": with_interval(change) if change else None,
                    "lost": flipped.lost if flipped else None, "won": flipped.won if flipped else None,
                    "mcnemar_p": flipped.p_value if flipped else None,
                    "over_dense_mean": change.mean if change else None,
                    "over_dense_high": change.high if change else None,
                })  # fmt: skip
    frame = pd.DataFrame(rows).astype({"lost": "Int64", "won": "Int64"})
    order = {task: position for position, task in enumerate(with_tasks[-1].tasks)}

    def in_order(column: pd.Series) -> pd.Series:
        return column.map(order) if column.name == "task" else _dense_first(column)

    columns = ["task", "metric", "method", "ratio"]
    return frame.sort_values(columns, key=in_order, kind="stable", ignore_index=True)


def _task_changes(record: Record, dense: Record | None) -> dict[str, Difference]:
    """`record` less `dense` on each task and metric; nothing where they were asked other items or in another way."""
    if dense is None or record is dense:
        return {}
    try:
        return task_differences(record, dense)
    except ValueError:
        return {}


def pairs_frame(records: Sequence[Record]) -> pd.DataFrame:
    """Every two methods at the same ratios: by how many nats the loss of the first is higher, and is it chance?"""
    by_ratio: dict[tuple, list[Record]] = {}
    for record in newest_by_case(records):
        by_ratio.setdefault((record.case.ratio, record.case.kv_ratio or 0), []).append(record)
    pairs = []
    for _, group in sorted(by_ratio.items()):
        pairs += combinations(sorted(group, key=quality), 2)
    changes = differences([worse for _, worse in pairs], [better for better, _ in pairs])
    return pd.DataFrame([
        {
            "ratio": worse.case.ratio, "kv_ratio": worse.case.kv_ratio, "method": worse.method, "than": better.method,
            "loss_higher_by": with_interval(change),
            "perplexity_times": worse.metrics["perplexity"] / better.metrics["perplexity"],
            "verdict": "too few to tell" if change.is_unknown else "within noise" if change.is_noise
            else f"{better.method} is better",
        }
        for (better, worse), change in zip(pairs, changes, strict=True) if change
    ])  # fmt: skip


def _dense_first(column: pd.Series) -> pd.Series:
    return column.where(column != "dense", "") if column.name == "method" else column
