"""Pictures in the one style of `pictures.mplstyle`, and their files."""

import io
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from .files import write_whole

LOOK = {**matplotlib.rc_params_from_file(Path(__file__).with_name("pictures.mplstyle"), use_default_template=False)}
INK, FAINT = LOOK["text.color"], LOOK["grid.color"]
# a method has its own wherever it is drawn: styles are not taken in turn
STYLES = [(one["color"], one["marker"], one["linestyle"]) for one in LOOK.pop("axes.prop_cycle")]


def write_figure(stem: Path, figure: Figure) -> list[Path]:
    """The figure as PNG and SVG; returns the files."""
    files = []
    for suffix in (".png", ".svg"):
        content = io.BytesIO()
        with matplotlib.rc_context(LOOK):
            figure.savefig(content, format=suffix[1:], metadata={"Date": None} if suffix == ".svg" else None)
        figure.set_layout_engine("none")  # laid out once is enough
        files.append(write_whole(stem.with_suffix(suffix), content.getvalue()))
    return files
