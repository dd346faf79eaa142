"""The plain data that flows between the rooms: sites, rejections, streams, plans, reports, listed graphs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from mhc_rewrite.config import MHCConfig


@dataclass(frozen=True)
class SourceLine:
    """A line of the user's source."""

    file: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" + (f" `{self.text}`" if self.text else "")


@dataclass(frozen=True)
class ResidualSite:
    """One residual add `x + F(x)`.

    Attributes:
        name: `<holder>.mhc_<k>`, the name of the site's own module after conversion.
        holder: module whose forward holds the add ("" is the model itself).
        carrier: module whose forward is rewritten for it: the holder, or the parent in which trunk and branch part.
        branch: the first mixing operation of the branch, for a reader: a child's name or a function.
        width: C, the size of the axis that the branch mixes.
        channel_dim: that axis: -1, or 1 in a channels-first trunk.
        dtype: dtype of the trunk, as in `str(torch.float32)`.
        source: where the add stands.
        excluded: the user left this site out; on the streams it stays a plain residual, without parameters.
    """

    name: str
    holder: str
    carrier: str
    branch: str
    width: int
    channel_dim: int
    dtype: str
    source: SourceLine
    excluded: bool = False


@dataclass(frozen=True)
class Rejection:
    """An add, or a stream, that was left alone.

    Attributes:
        module: where it stands.
        source: the line, where one is known.
        rule: short name of the rule that refused it, e.g. `"no-mixing"`.
        reason: the same for a person.
    """

    module: str
    source: SourceLine | None
    rule: str
    reason: str


@dataclass(frozen=True)
class ResidualStream:
    """Sites that pass one trunk from each to the next, in execution order.

    Attributes:
        sites: the sites, first to last.
        entry: where one stream becomes n: `<carrier>` of the first site.
        exit: where n become one: `<carrier>` of the last site.
        scope: the innermost module whose call runs the whole stream.
        lifted: operations on the trunk that act on every stream, `<module>: <operation>`.
    """

    sites: tuple[ResidualSite, ...]
    entry: str
    exit: str
    scope: str
    lifted: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        """C of the stream."""
        return self.sites[0].width


@dataclass(frozen=True)
class RewritePlan:
    """What a conversion would do: pure data, the same for a dry run and for the real one.

    Attributes:
        model: class name of the model.
        config: the options it was made with.
        streams: the residual streams to be rewritten, in execution order.
        rejections: adds and streams left alone, each with its reason.
        notes: other things a user should know, e.g. a mode that could not be run.
    """

    model: str
    config: MHCConfig
    streams: tuple[ResidualStream, ...]
    rejections: tuple[Rejection, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def sites(self) -> tuple[ResidualSite, ...]:
        """All sites of all streams, in execution order, each once."""
        return tuple(dict.fromkeys(site for stream in self.streams for site in stream.sites))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data."""
        data = dataclasses.asdict(dataclasses.replace(self, config=None))  # type: ignore[arg-type]
        return {**data, "config": self.config.to_dict()}

    def __str__(self) -> str:
        from mhc_rewrite.tables import as_text

        return as_text(self)

    def __rich__(self) -> Any:
        from mhc_rewrite.tables import plan_table

        return plan_table(self)


@dataclass(frozen=True)
class RewriteReport:
    """What a conversion did.

    Attributes:
        plan: the plan that was carried out.
        parameters_before: number of the model's own parameters.
        parameters_added: number of parameters in the sites, per stream.
        calls: call variants captured so far, as text, per carrier.
    """

    plan: RewritePlan
    parameters_before: int
    parameters_added: tuple[int, ...]
    calls: dict[str, tuple[str, ...]]

    def __str__(self) -> str:
        from mhc_rewrite.tables import as_text

        return as_text(self)

    def __rich__(self) -> Any:
        from mhc_rewrite.tables import report_table

        return report_table(self)


@dataclass(frozen=True)
class ListedNode:
    """One node of a graph, for display.

    Attributes:
        name: unique in its graph.
        op: FX opcode.
        target: operator or module as text.
        inputs: names of the nodes it reads.
        arguments: its arguments as text.
        shape: of its result, streams included, or None where it is no tensor.
        dtype: of its result, or None.
        source: line of the user's code that it comes from.
        role: `"trunk"`, `"residual add"`, `"expand"`, `"pre"`, `"post"`, `"boundary"`, `"collapse"`, or "".
    """

    name: str
    op: str
    target: str
    inputs: tuple[str, ...]
    arguments: str
    shape: tuple[int, ...] | None
    dtype: str | None
    source: SourceLine | None
    role: str = ""


@dataclass(frozen=True)
class ListedGraph:
    """A carrier's forward before and after the rewrite, for display.

    Attributes:
        module: the carrier's name.
        kind: its class name.
        call: the variant shown, e.g. `"eval"`.
        original: nodes before.
        rewritten: nodes after.
    """

    module: str
    kind: str
    call: str
    original: tuple[ListedNode, ...]
    rewritten: tuple[ListedNode, ...]
