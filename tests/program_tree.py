"""The tree that a random residual program is: statements on a trunk, in which residual adds are planted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from program_ops import OPS


@dataclass(eq=False)
class Expr:
    """An operation with its arguments; `attributes` are names in the module that holds it.

    `inline`: written inside the expression around it where that is possible. `once`: written once, read from a name.
    """

    op: str
    args: tuple[Expr, ...] = ()
    attributes: tuple[str, ...] = ()
    inline: bool = True
    once: bool = False

    def ops(self) -> Iterator[str]:
        yield self.op
        for arg in self.args:
            yield from arg.ops()


READ = Expr("read")


@dataclass(frozen=True)
class Sum:
    """left + right * alpha. Leaves are 0 for the trunk and k for the k-th branch."""

    style: str  # "+", "torch.add" or ".add"
    left: Sum | int
    right: Sum | int
    alpha: float = 1.0
    split: bool = False  # written on a line of its own

    def weights(self) -> dict[int, float]:
        """Leaf -> its factor."""
        right = {leaf: w * self.alpha for leaf, w in weights(self.right).items()}
        return weights(self.left) | right


def weights(tree: Sum | int) -> dict[int, float]:
    return {tree: 1.0} if isinstance(tree, int) else tree.weights()


@dataclass(eq=False)
class Site:
    """A planted residual add: weight_0 * t(x) + sum_k weight_k * branch_k(x).

    Attributes:
        branches: expressions over the trunk.
        trunk: t, an expression over the trunk that the branches do not read.
        tree: the sum; of the branches alone in the forms `iadd` and `add_`.
        form: "rebind", "iadd" (x += ...), "add_" (x.add_(...)), "branch_iadd" (h = f(x); h += x), "child" (the add is
            in a child module, which projects the branch first and may normalise the sum).
        alpha: factor of the right-hand side of `add_`.
        naming: where the branches are written: "inline", "named" (names first), "overwrite" (`r = x`, x = the branch,
            then the sum of r and x).
        target: name that a rebinding form assigns to.
        aliases: which of the trunk's names is used where (modulo their number).
        child: attribute of the child module of the form "child".
        child_class: its class, one of those in program_text.py.
    """

    branches: tuple[Expr, ...]
    trunk: Expr
    tree: Sum | int
    form: str = "rebind"
    alpha: float = 1.0
    naming: str = "inline"
    target: str = "x"
    aliases: tuple[int, int] = (0, 0)
    child: str = ""
    child_class: str = ""

    @property
    def in_place(self) -> bool:
        return self.form in ("iadd", "add_")

    def factors(self) -> dict[int, float]:
        if self.in_place:
            return {0: 1.0} | {leaf: self.alpha * w for leaf, w in weights(self.tree).items()}
        return weights(self.tree)


@dataclass(eq=False)
class Lift:
    """An operation on the trunk. `fused`: on the line of the site before it, as post-norms are written."""

    expr: Expr
    target: str = "x"
    fused: bool = False


@dataclass(eq=False)
class Boundary:
    """A projection shortcut d(x) + f(x): one stream ends, another begins."""

    d: Expr
    f: Expr
    flipped: bool = False


@dataclass(eq=False)
class Alias:
    """`name = x`."""

    name: str


@dataclass(eq=False)
class Aux:
    """A side reader of the trunk, returned as a further output: the trunk itself (no probe), or a projection of it."""

    probe: Expr | None


@dataclass(eq=False)
class Layers:
    """A list of modules called one after the other.

    Attributes:
        bodies: one class each.
        made_of: instance -> index of its class.
        calls: instances in the order of their calls.
        style: "loop", "tuple" (each returns a tuple), "sequential", or "inline" (the body stands in the parent's loop).
        between: operation of the parent on the trunk after every layer (reads the trunk), or None.
        collect: the trunk before this call is a further output, or None.
    """

    bodies: tuple[Body, ...]
    made_of: tuple[int, ...]
    calls: tuple[int, ...]
    style: str
    between: Expr | None = None
    collect: int | None = None


@dataclass(eq=False)
class Body:
    """The statements of one forward, and the attributes that they need."""

    name: str
    items: list[Any] = field(default_factory=list)
    makes: list[str] = field(default_factory=list)

    @property
    def sites(self) -> list[Site]:
        """Those in this forward."""
        return [item for item in self.items if isinstance(item, Site)]

    def make(self, constructor: str) -> str:
        """A new attribute's name."""
        self.makes.append(constructor)
        return f"m{len(self.makes) - 1}"

    def expr(self, op: str, *args: Expr, inline: bool = True, once: bool = False) -> Expr:
        attributes = tuple(self.make(constructor) for constructor in OPS[op].makes)
        return Expr(op, args, attributes, inline, once)
