"""The one style of all pictures, and their files: colour-blind-safe, markers and dashes for print."""

import io
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from .files import write_whole

INK, FAINT = "#1f2328", "#808080"  # the page turns ink into the colour of its text; the grey suits light and dark
# Okabe and Ito's colour-blind-safe colours; markers and dashes tell the lines apart in print
STYLES = [("#0072B2", "o", "-"), ("#D55E00", "s", "--"), ("#009E73", "^", "-."), ("#CC79A7", "D", ":"),
          ("#E69F00", "v", "-"), ("#56B4E9", "P", "--"), (INK, "X", "-."), ("#A6761D", "<", ":"),
          ("#808080", ">", "-"), ("#7A68C8", "h", "--")]  # fmt: skip
LOOK = {"text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
        "axes.facecolor": "none", "figure.facecolor": "#ffffff", "axes.spines.top": False, "axes.spines.right": False,
        "axes.titlesize": 10, "legend.frameon": False, "svg.hashsalt": "transact", "grid.color": FAINT,
        "grid.alpha": 0.25, "axes.axisbelow": True}  # fmt: skip


def write_figure(stem: Path, figure: Figure) -> list[Path]:
    """The figure as PNG and SVG; returns the files."""
    files = []
    for suffix in (".png", ".svg"):
        content = io.BytesIO()
        with matplotlib.rc_context(LOOK):  # the same records give the same file
            figure.savefig(
                content, format=suffix[1:], dpi=160, metadata={"Date": None} if suffix == ".svg" else None,
            )  # fmt: skip
        figure.set_layout_engine("none")  # laid out once is enough
        files.append(write_whole(stem.with_suffix(suffix), content.getvalue()))
    return files
