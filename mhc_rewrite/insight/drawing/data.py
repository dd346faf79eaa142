"""What is drawn: parts, layers and steps. reading.py makes them; how they look is decided elsewhere.

The plan knows the sites in the order of their calls, the operations on the trunk, n of every stretch, and what was left
alone. The classes and parameters of blocks are the model's, and are left out without one; costs are cost.py's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from mhc_rewrite.plans import ResidualStream, RewritePlan, SourceLine
from mhc_rewrite.printing import fold, module_name, plural

Kind = Literal["site", "excluded", "operation", "resize", "left alone"]


@dataclass(frozen=True)
class Figures:
    """What a step costs one token, as cost.py counts it; parameters stand by themselves.

    Attributes:
        forward: bytes moved.
        backward: the same.
        kept: bytes kept from forward to backward where nothing is recomputed.
        parameters: of the site, and 0 at a later call of it.
    """

    forward: int = 0
    backward: int = 0
    kept: int = 0
    parameters: int = 0

    def __add__(self, other: Figures) -> Figures:
        mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return Figures(*(a + b for a, b in zip(mine, theirs)))


@dataclass(frozen=True)
class Step:
    """One thing that stands on a trunk.

    Attributes:
        kind: what it is.
        name: of the site, of the operation, or of the module that something was left alone in.
        label: the block or the operation, for a reader.
        n: streams that come in.
        out: streams that go on.
        shape: of the state behind it, as text.
        block: class of the block, where the model says it.
        block_parameters: of the block; None where the model does not say.
        beside: operations on the trunk between what the site reads and what it writes.
        source: line of the add, where one is known.
        figures: what the step costs.
        rule: of what was left alone.
        reason: the same for a person.
        number: of what was left alone, in the list of all of it; from 1.
    """

    kind: Kind
    name: str
    label: str
    n: int
    out: int
    shape: str = ""
    block: str = ""
    block_parameters: int | None = None
    beside: tuple[str, ...] = ()
    source: SourceLine | None = None
    figures: Figures = Figures()
    rule: str = ""
    reason: str = ""
    number: int = 0


@dataclass(frozen=True)
class Layer:
    """Consecutive steps of one layer.

    Attributes:
        name: of its module.
        kind: its class, where the model says it.
        steps: in order.
    """

    name: str
    kind: str
    steps: tuple[Step, ...]

    @property
    def figures(self) -> Figures:
        return sum((step.figures for step in self.steps), Figures())


@dataclass(frozen=True)
class Group:
    """Layers that are alike, one after the other.

    Attributes:
        pattern: what repeats: one layer, or several where they alternate. With all that was left alone in the group.
        layers: all of them.
    """

    pattern: tuple[Layer, ...]
    layers: tuple[Layer, ...]

    @property
    def count(self) -> int:
        """How often the pattern comes."""
        return len(self.layers) // len(self.pattern)

    @property
    def title(self) -> str:
        """`transformer.h.{0..11}`."""
        return ", ".join(fold(dict.fromkeys(module_name(layer.name) for layer in self.layers)))

    @property
    def kinds(self) -> str:
        """The classes of the pattern."""
        return ", ".join(dict.fromkeys(layer.kind for layer in self.pattern if layer.kind))

    @property
    def sites(self) -> int:
        """Calls of sites that are not excluded."""
        return sum(step.kind == "site" for layer in self.layers for step in layer.steps)

    @property
    def figures(self) -> Figures:
        return sum((layer.figures for layer in self.layers), Figures())


@dataclass(frozen=True)
class Part:
    """One residual stream.

    Attributes:
        number: of the stream in the plan.
        stream: the stream.
        ahead: what was left alone before its entry.
        groups: its layers, folded.
        behind: what was left alone behind its exit, or ended it.
        streams: n at the entry and at the exit.
        collapse: how n become one: `mean` or `sum`.
    """

    number: int
    stream: ResidualStream
    ahead: tuple[Step, ...]
    groups: tuple[Group, ...]
    behind: tuple[Step, ...]
    streams: tuple[int, int]
    collapse: str

    @property
    def title(self) -> str:
        """`stream 0: encoder`."""
        return f"stream {self.number}: {module_name(self.stream.scope)}"

    @property
    def about(self) -> str:
        """Its sizes."""
        sites = [site for site in self.stream.sites if not site.excluded]
        numbers = dict.fromkeys(step.out for step in self.steps() if step.kind != "left alone")
        dtypes = ", ".join(dict.fromkeys(site.dtype.removeprefix("torch.") for site in self.stream.sites))
        text = (
            f"{plural(len(sites), 'site')}, n = {' then '.join(map(str, numbers))}, C = {self.stream.width}, {dtypes}"
        )
        if self.stream.reads:
            text += f"; reads the result of stream {' and '.join(map(str, self.stream.reads))}"
        return text

    @property
    def figures(self) -> Figures:
        return sum((group.figures for group in self.groups), Figures())

    @property
    def widest(self) -> int:
        """The largest n."""
        return max(step.n for step in self.steps())

    def steps(self) -> Iterator[Step]:
        """All of them, unfolded, in order."""
        yield from self.ahead
        for group in self.groups:
            for layer in group.layers:
                yield from layer.steps
        yield from self.behind


@dataclass(frozen=True)
class Picture:
    """All that is drawn.

    Attributes:
        plan: what it is drawn from.
        converted: whether that has been done.
        parts: stream by stream.
    """

    plan: RewritePlan
    converted: bool
    parts: tuple[Part, ...]

    @property
    def title(self) -> str:
        return self.plan.model

    @property
    def about(self) -> str:
        """What is, or would be, done."""
        config, sites = self.plan.config, self.plan.sites
        left_out = sum(site.excluded for site in sites)
        what = plural(len(sites) - left_out, "site") + (f" and {left_out} excluded" if left_out else "")
        state = "converted" if self.converted else "a plan: nothing is converted"
        if config.n_streams == 1:
            state = "one stream is the model as it is, and nothing would be rewritten"
        how = f"n = {config.streams_as_text()}, {config.connection}, init {config.init}" + ", static" * (
            not config.dynamic
        )
        return f"{what} in {plural(len(self.parts), 'stream')} ({how}); {state}"

    def unfolded(self) -> Picture:
        """The same with every layer by itself."""
        parts = (
            dataclasses.replace(part, groups=tuple(
                Group((layer,), (layer,)) for group in part.groups for layer in group.layers
            ))
            for part in self.parts
        )  # fmt: skip
        return dataclasses.replace(self, parts=tuple(parts))

    def left_alone(self) -> list[Step]:
        """In the order of their numbers."""
        steps = (step for part in self.parts for step in part.steps() if step.kind == "left alone")
        return sorted(steps, key=lambda step: step.number)
