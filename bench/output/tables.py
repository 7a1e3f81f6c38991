"""One frame, three tables: Markdown, CSV and LaTeX with the same figures."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from .files import write_whole

TABLE_FORMATS = {
    "fraction_removed": "{:.3f}", "kv_fraction_removed": "{:.3f}", "attention_removed": "{:.3f}",
    "mlp_removed": "{:.3f}", "perplexity": "{:,.2f}", "perplexity_standard_error": "{:,.2f}",
    "times_dense": "{:,.2f}", "perplexity_times": "{:,.3f}", "value": "{:.3f}", "standard_error": "{:.3f}",
    "chance": "{:.2f}", "latency_s": "{:.3f}", "prefill_s": "{:.3f}", "decode_s": "{:.3f}",
    "decode_tokens_per_s": "{:,.1f}", "prefill_roofline_fraction": "{:.2f}", "decode_roofline_fraction": "{:.2f}",
    "decode_speedup": "{:.2f}", "decode_speedup_low": "{:.2f}", "decode_speedup_high": "{:.2f}",
    "prefill_speedup": "{:.2f}", "prefill_speedup_low": "{:.2f}", "prefill_speedup_high": "{:.2f}",
    "decode_tokens_per_s_standard_error": "{:,.1f}", "warm_up_s": "{:.1f}", "kv_bytes_per_token": "{:,.0f}",
    "tokens_per_s": "{:.1f}", "mib": "{:.0f}", "same_tokens": "{:.3f}", "bits_per_byte": "{:.3f}",
    "parameters": "{:,.0f}", "weight_mib": "{:.1f}", "packed_weight_mib": "{:.1f}", "prune_s": "{:.2f}",
    "perplexity_s": "{:.1f}",
    "peak_memory_mib": "{:,.0f}", "calibration_tokens": "{:,.0f}", "recovery_tokens": "{:,.0f}", "ratio": "{:g}",
    "recovery_peak_mib": "{:,.0f}", "zeros": "{:.3f}",
    "kv_ratio": "{:g}", "other_texts_rise_nats": "{:.3f}", "mean_rise_nats": "{:.3f}", "kl_nats": "{:.3f}",
    "kl_nats_standard_error": "{:.3f}", "top1_agreement": "{:.3f}", "top1_agreement_standard_error": "{:.3f}",
    "calibrate_s": "{:.1f}", "plan_s": "{:.1f}", "narrow_s": "{:.1f}", "compensate_s": "{:.1f}",
    "total_s": "{:.1f}",
    "weight_gib": "{:.1f}", "device_gib": "{:.1f}", "host_gib": "{:.1f}", "first_token_ms": "{:,.0f}",
    "greedy_agreement": "{:.3f}", "greedy_agreement_standard_error": "{:.3f}", "mcnemar_p": "{:.2g}",
}  # fmt: skip
LATEX = str.maketrans({
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "≈": r"$\approx$", "±": r"$\pm$",
    "[": "{[}",  # a bracket that begins a row would be read as an option of the line break before it
})  # fmt: skip
MARKDOWN = str.maketrans({"|": r"\|", "<": "&lt;", "\n": " "})


def cells_of(frame: pd.DataFrame, columns: Sequence[str]) -> list[list[str]]:
    """Each row's values of these columns as text; what is missing is empty."""

    def cell(name, value):
        if pd.isna(value) or value == np.inf:
            return ""
        if isinstance(value, float) and abs(value) >= 1e9:  # of a model that is broken: its digits say nothing
            return f"{value:.3g}"
        return TABLE_FORMATS.get(name, "{}").format(value)

    values = (frame[name].tolist() for name in columns)
    texts = [[cell(name, value) for value in column] for name, column in zip(columns, values, strict=True)]
    return [list(row) for row in zip(*texts, strict=True)]


def csv_of(frame: pd.DataFrame) -> str:
    """The frame as CSV; what is missing, or more than a float holds, is empty."""
    return frame.replace(np.inf, np.nan).to_csv(index=False)


def text_columns(frame: pd.DataFrame, columns: Sequence[str]) -> list[bool]:
    """Which columns hold words and stand to the left; figures stand to the right."""
    return [all(isinstance(value, str) or pd.isna(value) for value in frame[name].tolist()) for name in columns]


def markdown_table(frame: pd.DataFrame, columns: Sequence[str]) -> str:
    """The columns as a Markdown table, aligned so that it reads in a terminal as well."""
    rows = [list(columns), *([value.translate(MARKDOWN) for value in row] for row in cells_of(frame, columns))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    is_text = text_columns(frame, columns)
    rows.insert(
        1, ["-" * width if text else "-" * (width - 1) + ":" for width, text in zip(widths, is_text, strict=True)]
    )
    return "\n".join(
        "| " + " | ".join(value.ljust(width) if text else value.rjust(width)
                          for value, width, text in zip(row, widths, is_text, strict=True)) + " |"
        for row in rows
    )  # fmt: skip


def latex_table(title: str, note: str, frame: pd.DataFrame, columns: Sequence[str]) -> str:
    """The columns as a LaTeX table (package booktabs), its caption the title and the note."""
    alignment = "".join("l" if text else "r" for text in text_columns(frame, columns))
    # pandas' own writer gives the same bytes and takes eleven times as long: of ten thousand records a quarter minute
    head, *rows = (
        " & ".join(value.translate(LATEX) for value in row) + r" \\"
        for row in ([name.replace("_", " ") for name in columns], *cells_of(frame, columns))
    )
    caption = f"{title} {note}".translate(LATEX)
    return "\n".join([
        r"\begin{table}", r"\centering", rf"\caption{{{caption}}}", rf"\begin{{tabular}}{{{alignment}}}", r"\toprule",
        head, r"\midrule", *rows, r"\bottomrule", r"\end{tabular}", r"\end{table}", "",
    ])  # fmt: skip


def write_table(stem: Path, title: str, note: str, frame: pd.DataFrame, columns: Sequence[str]) -> list[Path]:
    """The columns as Markdown under their title and note, as CSV and as LaTeX; returns the files."""
    return [
        write_whole(stem.with_suffix(".md"), f"# {title}\n\n{note}\n\n{markdown_table(frame, columns)}\n"),
        write_whole(stem.with_suffix(".csv"), csv_of(frame[list(columns)])),
        write_whole(stem.with_suffix(".tex"), latex_table(title, note, frame, columns)),
    ]
