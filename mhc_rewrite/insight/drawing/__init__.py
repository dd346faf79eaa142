"""A model, drawn: before and after the conversion, as SVG, HTML, PNG, or text for Graphviz."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

import mhc_rewrite
from mhc_rewrite.conversion.converted import find_converted
from mhc_rewrite.errors import DrawingError
from mhc_rewrite.insight.drawing.data import Picture
from mhc_rewrite.insight.drawing.reading import picture
from mhc_rewrite.plans import RewritePlan, RewriteReport


@dataclass(frozen=True)
class Drawing:
    """A picture of a model. In a notebook it shows itself.

    Attributes:
        picture: what is drawn.
        folded: layers that are alike are drawn once. A page begins so, and unfolds them.
    """

    picture: Picture
    folded: bool = True

    @property
    def _shown(self) -> Picture:
        return self.picture if self.folded else self.picture.unfolded()

    def svg(self) -> str:
        """One picture, light or dark as the reader's screen is."""
        from mhc_rewrite.insight.drawing.svg import svg

        return svg(self._shown)

    def html(self) -> str:
        """A page of its own, that fetches nothing: layers unfold, names are searched for, hovering tells the rest."""
        from mhc_rewrite.insight.drawing.html import html

        return html(self.picture, self.folded)

    def dot(self) -> str:
        """Text for Graphviz."""
        from mhc_rewrite.insight.drawing.dot import dot

        return dot(self._shown)

    def save(self, path: str | Path) -> Path:
        """Writes the file that the name's ending says: .svg, .html, .png, .dot; or .json for Model Explorer, and beside
        it one for each figure of the sites.

        Raises:
            DrawingError: another ending, a place that can't be written to, or a library that is not there.
        """
        path = check_path(path)
        try:
            FORMATS[path.suffix.lower()](self, path)
        except OSError as error:
            raise DrawingError(f"{path} can't be written: {error.strerror or error}.") from error
        return path

    def _repr_svg_(self) -> str:
        return self.svg()


def _png(drawing: Drawing, path: Path) -> None:
    from mhc_rewrite.insight.drawing.png import save

    save(drawing._shown, path)


def _explorer(drawing: Drawing, path: Path) -> None:
    from mhc_rewrite.insight.drawing.explorer import save

    save(drawing.picture, path)


FORMATS: dict[str, Callable[[Drawing, Path], Any]] = {
    ".svg": lambda drawing, path: path.write_text(drawing.svg() + "\n", encoding="utf-8"),
    ".html": lambda drawing, path: path.write_text(drawing.html(), encoding="utf-8"),
    ".png": _png,
    ".dot": lambda drawing, path: path.write_text(drawing.dot(), encoding="utf-8"),
    ".json": _explorer,
}


def check_path(path: str | Path) -> Path:
    """The path, if a drawing can go there: asked before a model is planned for it.

    Raises:
        DrawingError: its ending is none of `FORMATS`, or its folder is not there.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise DrawingError(f"{path.name!r} does not say what to draw: a name ends in {', '.join(FORMATS)}.")
    if not path.parent.is_dir():
        raise DrawingError(f"{path} can't be written: there is no folder {str(path.parent)!r}.")
    return path


def draw(
    model: nn.Module | RewritePlan | RewriteReport,
    example_inputs: Mapping[str, Any] | tuple[Any, ...] | None = None,
    *,
    of: nn.Module | None = None,
    folded: bool = True,
    **options: Any,
) -> Drawing:
    """Draws what a conversion does to a model, or would do: the trunk of each stream before, and its n streams after.

    Args:
        model: a converted model, perhaps in wrappers; one that is not, which is planned for it; a plan; or a report.
        example_inputs: as for `mhcify`, where a model has to be planned.
        of: the model that a plan or a report is about, for the classes and the sizes of its blocks.
        folded: layers that are alike are drawn once, with their number.
        options: as for `mhcify`, where a model has to be planned.

    Raises:
        DrawingError: there is nothing to draw it from.
        MHCError: as `plan`.
    """
    if isinstance(model, nn.Module):
        if mhc_rewrite.is_converted(model):
            _no_more(model, example_inputs, options, "is converted already, and drawn as it is")
            _, inner, conversion = find_converted(model)
            return Drawing(picture(conversion.plan, inner, True), folded)
        return Drawing(picture(mhc_rewrite.plan(model, example_inputs, **options), model), folded)
    if isinstance(model, (RewritePlan, RewriteReport)):
        _no_more(model, example_inputs, options, "is drawn as it is")
        done = isinstance(model, RewriteReport)
        return Drawing(picture(model.plan if isinstance(model, RewriteReport) else model, of, done), folded)
    raise DrawingError(f"draw takes a model, a plan or a report, not {type(model).__name__}.")


def _no_more(given: Any, example_inputs: Any, options: Mapping[str, Any], why: str) -> None:
    names = [*(["example_inputs"] if example_inputs is not None else []), *options]
    if names:
        raise DrawingError(f"This {type(given).__name__} {why}: leave out {', '.join(names)}.")
