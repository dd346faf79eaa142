"""What is said in words: of a step its operator, shape, cost and line, of a group its name and cost."""

from __future__ import annotations

from mhc_rewrite.insight.drawing.data import Figures, Group, Step
from mhc_rewrite.plans import short_source
from mhc_rewrite.printing import module_name

Facts = tuple[tuple[str, str], ...]

WHAT = {
    "site": "site: x + F(x) becomes H_res X + H_post F(H_pre X)",
    "excluded": "excluded: every stream gets F of their mean added, nothing is learned",
    "operation": "operation on the trunk, which acts on every stream",
    "resize": "the streams become another number of them, with the same mean",
    "left alone": "left alone",
}
OPERATORS = {
    "site": "mhc_rewrite::pre, the block, mhc_rewrite::post; between two sites in one: mhc_rewrite::boundary",
    "excluded": "mean over streams, the block, add",
}


def facts(step: Step) -> Facts:
    """Label and text, without the step's name, which layers that are alike do not share."""
    figures = step.figures
    found = [
        ("what", WHAT[step.kind]),
        ("operator", OPERATORS.get(step.kind, step.label if step.kind == "operation" else "")),
        ("block", _block(step)),
        ("beside", ", ".join(step.beside)),
        ("rule", step.rule),
        ("reason", step.reason),
        ("state", step.shape),
        ("moves", _moved(step)),
        ("keeps", f"{amount(figures.kept, 'B')} a token for backward" if figures.kept else ""),
        ("adds", f"{figures.parameters:,} parameters" if figures.parameters else _shared(step)),
        ("source", source_text(step)),
    ]
    return tuple((label, text) for label, text in found if text)


def _block(step: Step) -> str:
    if step.kind not in ("site", "excluded"):
        return ""
    what = ", ".join(
        filter(None, (step.block, f"{step.block_parameters:,} parameters" if step.block_parameters else ""))
    )
    return step.label + (f" ({what})" if what else "")


def _moved(step: Step) -> str:
    figures = step.figures
    if not figures.forward:
        return ""
    return f"{amount(figures.forward, 'B')} forward and {amount(figures.backward, 'B')} backward, a token"


def _shared(step: Step) -> str:
    return "no more parameters: its site was called before" if step.kind == "site" and step.figures.forward else ""


def source_text(step: Step) -> str:
    """`file:line  code`."""
    if step.source is None:
        return ""
    return f"{short_source(step.source)}  {step.source.text}".rstrip()


def plain(step: Step) -> str:
    """All of it as lines of text."""
    return "\n".join([module_name(step.name), *(f"{label}: {text}" for label, text in facts(step))])


def amount(number: float, unit: str = "") -> str:
    """`1.2 MB`, `340`, `24.6 k`."""
    for prefix, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= factor:
            return f"{number / factor:.3g} {prefix}{unit}".rstrip()
    return f"{number:.0f} {unit}".rstrip()


def costs(figures: Figures) -> str:
    """What a token costs, in a line."""
    return (
        f"+{figures.parameters:,} parameters; a token moves {amount(figures.forward, 'B')} forward, "
        f"{amount(figures.backward, 'B')} backward, keeps {amount(figures.kept, 'B')}"
    )


def count_text(group: Group) -> str:
    return f"× {group.count}" if group.count > 1 else ""


def head_texts(group: Group) -> tuple[str, str, str]:
    """Name, class, and what the group costs."""
    return group.title, group.kinds, costs(group.figures) if group.sites else "no sites"


def site_text(step: Step, layer: str) -> str:
    """What stands below a block that has a site: the site's name in its layer, and how many numbers it adds."""
    name = step.name.removeprefix(f"{layer}.")
    return f"{name}  +{step.figures.parameters:,}" if step.figures.parameters else name


def block_text(step: Step) -> str:
    """What stands below a block: its class, and how many numbers it has itself."""
    return step.block + (f", {amount(step.block_parameters)}" if step.block_parameters else "")
