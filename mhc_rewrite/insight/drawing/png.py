"""A picture as PNG, by matplotlib, which brings the type that it is set in; always on white."""

from __future__ import annotations

from pathlib import Path as File
from typing import Any

from mhc_rewrite.errors import DrawingError
from mhc_rewrite.insight.drawing.data import Picture
from mhc_rewrite.insight.drawing.marks import STYLES, Box, Dot, Label, Mark, Path, colour
from mhc_rewrite.insight.drawing.svg import sheet

INCH = 100.0  # pixels of the drawing
SHARP = 2  # pixels of the file for each of them
TALLEST = 2**16 // SHARP - 1  # what matplotlib's canvas holds


def save(picture: Picture, path: File) -> None:
    """Writes the file.

    Raises:
        DrawingError: it is too large to be one, or matplotlib is not there.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DrawingError(
            'A PNG is drawn by matplotlib, which is not installed: pip install "mhc-rewrite[look]". SVG and HTML do '
            "without it."
        ) from error
    drawn = sheet(picture)
    if max(drawn.width, drawn.height) > TALLEST:
        raise DrawingError(
            f"A picture of {drawn.width:.0f} x {drawn.height:.0f} is too large for a PNG. Leave the layers that are "
            "alike folded, or write .svg or .html."
        )
    figure = Figure((drawn.width / INCH, drawn.height / INCH), dpi=INCH * SHARP, facecolor=colour("paper"))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, drawn.width), ylim=(drawn.height, 0))
    axes.set_axis_off()
    for order, mark in enumerate(mark for block in drawn.blocks for mark in block.placed()):
        artist = _artist(mark, axes)
        artist.set_zorder(order)
    FigureCanvasAgg(figure).print_png(str(path))


def _artist(mark: Mark, axes: Any) -> Any:
    from matplotlib import patches
    from matplotlib.path import Path as Outline

    look = STYLES[mark.role]
    points = 72 / INCH
    if isinstance(mark, Label):
        return axes.text(
            mark.x, mark.y, mark.text.replace("$", r"\$"), color=colour(look.fill), fontsize=look.size * points,
            ha={"start": "left", "middle": "center", "end": "right"}[mark.anchor], va="baseline",
            family="DejaVu Sans Mono" if look.mono else "DejaVu Sans", weight="bold" if look.bold else "normal",
            style="italic" if look.italic else "normal",
        )  # fmt: skip
    paint: dict[str, Any] = {
        "facecolor": colour(look.fill) if look.fill else "none",
        "edgecolor": colour(look.stroke) if look.stroke else "none",
        "linewidth": look.width * points, "alpha": look.opacity, "capstyle": "round",
        "linestyle": (0, tuple(length / max(look.width, 1) for length in look.dash)) if look.dash else "-",
    }  # fmt: skip
    if isinstance(mark, Box):
        style = patches.BoxStyle.Round(pad=0, rounding_size=mark.radius)
        return axes.add_patch(patches.FancyBboxPatch((mark.x, mark.y), mark.width, mark.height, style, **paint))
    if isinstance(mark, Dot):
        return axes.add_patch(patches.Circle((mark.x, mark.y), mark.radius, **paint))
    assert isinstance(mark, Path)
    codes = {"M": [Outline.MOVETO], "L": [Outline.LINETO], "C": [Outline.CURVE4] * 3}
    vertices = [point for _, at in mark.commands for point in zip(at[::2], at[1::2])]
    outline = Outline(vertices, [code for letter, _ in mark.commands for code in codes[letter]])
    return axes.add_patch(patches.PathPatch(outline, **paint))
