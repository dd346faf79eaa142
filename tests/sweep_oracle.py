"""The sweep's own view of a model, which imports nothing of the package: a flat list of the torch calls of one run.

It counts residual adds by a rule of its own, and runs the list again with n streams where a plan says that sites are
(`replay`): adds become H_res X + H_post y, what a block reads becomes H_pre X, and whoever else reads a trunk gets the
mean. Its rule for which operand is the trunk and where the block reads it is dataflow on the flat list; no forward is
traced, no module is looked into, and nothing of the original is changed.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

import oracle

_ADD = {"add", "__add__", "__radd__", "__iadd__", "add_"}
_MIXES = re.compile(
    r"linear|matmul|^b?mm$|addmm|baddbmm|^mv$|^dot$|conv|einsum|attention|^fft|rfft|pool|interpolate|cumsum|scan|tensordot"
    r"|lstm|gru|rnn|fold|grid_sample|bilinear|kron|outer|cdist|autograd"
)
_CUTS = {"__getitem__", "narrow", "select", "index_select"}  # a stream goes on behind `x[:, :k]`
_FORM = {"__get__", "size", "dim", "numel", "is_floating_point", "is_complex", "__len__", "device", "dtype", "shape"}
_TORCH = str(Path(torch.__file__).parent)
_HERE = __file__


_CONTENT = frozenset({"item", "tolist", "__bool__", "__int__", "__float__", "__index__"})


_LONG = 300  # steps of a recurrence over time, rather than what lies between two sums on a trunk


class Unclear(Exception):
    """The oracle's rule does not say what n streams mean here."""


@dataclass(frozen=True)
class Value:
    """A tensor in the arguments of a recorded call."""

    number: int


@dataclass
class Op:
    """One torch call."""

    function: Callable[..., Any]
    args: Any
    kwargs: Any
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    name: str
    mixes: bool
    module: str
    visit: int  # which call of the module
    lines: frozenset[tuple[str, int]] = frozenset()
    gradients: bool = True  # whether they were recorded


@dataclass
class Residual:
    """An add of a trunk and a branch, by the numbers of their values. `chain` leads from the sum's operand back."""

    op: int
    trunk: int
    branches: list[int]
    sum: int
    absorbed: set[int] = field(default_factory=set)
    length: int = 1  # of the chain of adds, each on the one before, that ends here


class Run(TorchFunctionMode):
    """A run of a model, call by call."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.asked: dict[int, list[tuple[int, str, Any]]] = {}  # op that follows -> what Python made of contents
        self.tensors: list[Tensor | None] = []  # of constants; None for what an op makes
        self.shapes: list[torch.Size] = []
        self.floats: list[bool] = []
        self.numbers: dict[int, int] = {}
        self.kept: list[Tensor] = []
        self.stack: list[tuple[str, int]] = [("", 0)]
        self.visits = 0
        handles = []
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(self._entering(name)))
            handles.append(module.register_forward_hook(self._left, always_call=True))
        method = torch.autograd.Function.__dict__["apply"]  # of Python or, in torch 2.14, of C

        def applied(kind: Any, *given: Any, **options: Any) -> Any:
            """A function with a backward of its own is one call; torch's, checkpoints say, are seen through."""
            call = method.__get__(None, kind)
            if kind.__module__.startswith("torch."):
                return call(*given, **options)
            with torch._C.DisableTorchFunction():
                result = call(*given, **options)
            self._write(call, "autograd", self._values(given, options), tree_leaves(result))
            return result

        try:
            with self, mock.patch.object(torch.autograd.Function, "apply", classmethod(applied)):
                self.result = model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()

    def _entering(self, name: str) -> Callable[..., None]:
        def enter(*_: Any) -> None:
            self.visits += 1
            self.stack.append((name, self.visits))

        return enter

    def _left(self, *_: Any) -> None:
        self.stack.pop()

    def _number(self, tensor: Tensor, made: bool = False) -> int:
        known = self.numbers.get(id(tensor))
        if known is not None and not made:
            return known
        self.numbers[id(tensor)] = number = len(self.shapes)
        self.kept.append(tensor)
        # A copy: the model may write into its buffers.
        self.tensors.append(None if made else tensor.detach() if isinstance(tensor, nn.Parameter) else tensor.clone())
        self.shapes.append(tensor.shape)
        self.floats.append(tensor.is_floating_point())
        return number

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        form = name in _FORM and not (name == "__get__" and _of_values(func))
        given = None if form else self._values(args, kwargs)
        result = func(*args, **kwargs)
        if form:
            return result
        if name in _CONTENT and self.tensors[given[0][0].number] is None:
            self.asked.setdefault(len(self.ops), []).append((given[0][0].number, name, result))
        written = [args[0]] if name in ("__setitem__", "copy_") else tree_leaves(result)
        self._write(func, name, given, written)
        return result

    def _values(self, args: Any, kwargs: Any) -> Any:
        return tree_map(lambda x: Value(self._number(x)) if isinstance(x, Tensor) else x, (args, dict(kwargs)))

    def _write(self, func: Any, name: str, given: Any, written: list[Any]) -> None:
        outputs = tuple(self._number(x, made=True) for x in written if isinstance(x, Tensor))
        if outputs:
            inputs = tuple(leaf.number for leaf in tree_leaves(given) if isinstance(leaf, Value))
            module, visit = self.stack[-1]
            lines = frozenset(_lines()) if name in _ADD else frozenset()
            gradients, mixes = torch.is_grad_enabled(), bool(_MIXES.search(name))
            self.ops.append(Op(func, *given, inputs, outputs, name, mixes, module, visit, lines, gradients))

    # -- residuals ---------------------------------------------------------------------------------------------------

    def residuals(self) -> list[Residual]:
        """The adds of two tensors of one shape of which one is computed from where the other comes from, by mixing."""
        self.producer = {value: number for number, op in enumerate(self.ops) for value in op.outputs}
        self.above = [0] * len(self.shapes)  # ancestors, as bits
        self.mixed = [0] * len(self.shapes)  # ancestors with mixing on the way
        found: dict[int, Residual] = {}
        users: dict[int, int] = {}
        for op in self.ops:
            for value in set(op.inputs):
                users[value] = users.get(value, 0) + 1
        for number, op in enumerate(self.ops):
            above = mixed = 0
            for value in op.inputs:
                mine = self.above[value] | 1 << value
                above |= mine
                mixed |= mine if op.mixes else self.mixed[value]
            for value in op.outputs:
                self.above[value], self.mixed[value] = above, mixed
            if residual := self._residual(number, op, found, users):
                before = [found[value].length for value in self._near(residual.trunk, found) if value in found]
                residual.length = 1 + max(before, default=0)
                found[residual.sum] = residual
        return list(found.values())

    def _residual(self, number: int, op: Op, found: dict[int, Residual], users: dict[int, int]) -> Residual | None:
        if op.name not in _ADD or len(op.inputs) != 2 or len(op.outputs) != 1 or op.inputs[0] == op.inputs[1]:
            return None
        left, right = op.inputs
        if _without_ones(self.shapes[left]) != _without_ones(self.shapes[right]) or not (
            self.floats[left] and self.floats[right]
        ):
            return None
        for trunk, branch in ((left, right), (right, left)):
            chain = self._near(trunk, found)
            bits = sum(1 << value for value in chain)
            if bits & self.mixed[branch] and not self.above[trunk] >> branch & 1:
                return Residual(number, trunk, [branch], op.outputs[0])
            inner = found.get(trunk)
            if inner is not None and users.get(trunk) == 1:
                bits = sum(1 << value for value in self._near(inner.trunk, found))
                if bits & self.mixed[branch]:
                    del found[trunk]
                    return Residual(number, inner.trunk, [*inner.branches, branch], op.outputs[0],
                                    inner.absorbed | {trunk})  # fmt: skip
        return None

    def _near(self, start: int, found: Mapping[int, Residual]) -> list[int]:
        """`start` and the values that it comes from without mixing, in its size, up to and with an earlier sum."""
        seen, todo = {start: None}, [start]  # in the order in which they are met
        while todo and len(seen) < _LONG:
            value = todo.pop()
            if value in found or value not in self.producer:
                continue
            op = self.ops[self.producer[value]]
            if op.mixes:
                continue
            for source in op.inputs:
                if (
                    self.floats[source]
                    and source not in seen
                    and self.shapes[source].numel() == self.shapes[start].numel()
                ):
                    seen[source] = None
                    todo.append(source)
        return list(seen)

    # -- n streams ---------------------------------------------------------------------------------------------------

    def replay(self, streams: Sequence[Any], parameters: Mapping[str, oracle.Params], n: int, eps: float) -> Any:
        """The result with n streams at the sites of a plan's streams; a site tells its name, holder, source and axis.

        Raises:
            Unclear: the list does not say which add a site is, or what its trunk is.
        """
        of_stream = {site.name: number for number, stream in enumerate(streams) for site in stream.sites}
        once = {site.name: site for stream in streams for site in stream.sites}  # a layer that is called again
        matched = self._matched(list(once.values()))
        return _Replay(self, matched, of_stream, parameters, n, eps).run()

    def _matched(self, sites: Sequence[Any]) -> dict[int, tuple[Residual, Any]]:
        """The residual of each site by the number of its op; a holder that is called again has its sites again."""
        matched: dict[int, tuple[Residual, Any]] = {}
        by_visit: dict[tuple[str, int], list[Residual]] = {}
        for residual in self.residuals():
            op = self.ops[residual.op]
            by_visit.setdefault((op.module, op.visit), []).append(residual)
        wanted: dict[str, list[Any]] = {}
        for site in sites:
            wanted.setdefault(site.holder, []).append(site)
        seen = set()
        for (module, _), residuals in by_visit.items():
            mine = sorted(wanted.get(module, []), key=lambda site: int(site.name.rpartition("_")[2]))
            pairs = [(mine, residuals)]
            if len(mine) != len(residuals):  # adds that are no sites: the lines tell them apart
                lines = {(site.source.file, site.source.line) for site in mine}
                pairs = [
                    (
                        [site for site in mine if (site.source.file, site.source.line) == line],
                        [residual for residual in residuals if line in self.ops[residual.op].lines],
                    )
                    for line in lines
                ]
            for here, there in pairs:
                if len(here) != len(there):
                    raise Unclear(f"{len(there)} adds and {len(here)} sites in {module}")
                for site, residual in zip(here, there, strict=True):
                    matched[residual.op] = residual, site
                    seen.add(site.name)
        if lost := {site.name for site in sites} - seen:
            raise Unclear(f"no add found for {', '.join(sorted(lost)[:3])}")
        return matched


class _Replay:
    def __init__(
        self,
        run: Run,
        sites: dict[int, tuple[Residual, Any]],
        of_stream: Mapping[str, int],
        parameters: Mapping[str, oracle.Params],
        n: int,
        eps: float,
    ) -> None:
        self.run_, self.sites, self.parameters, self.n, self.eps = run, sites, parameters, n, eps
        self.sums = {residual.sum: of_stream[site.name] for residual, site in sites.values()}
        self.residual_of = {residual.sum: residual for residual, _ in sites.values()}
        self.values: dict[int, Tensor] = {}
        self.streams: dict[int, list[Tensor]] = {}  # of values on a trunk
        self.lifted: dict[int, int] = {}  # ops that run once a stream -> the value on the trunk
        self.reads: dict[tuple[int, int], int] = {}  # (op, value) -> the op of the site whose block reads there
        self.begins: dict[int, int] = {}  # value -> op of the first site of a stream
        self.coefficients: dict[int, tuple[Tensor, Tensor]] = {}
        self.read_point: dict[int, int] = {}
        self.skipped = {run.producer[value] for residual, _ in sites.values() for value in residual.absorbed}
        for op, (residual, _) in sorted(sites.items()):
            self._plan(op, residual, of_stream[sites[op][1].name])

    def _plan(self, op: int, residual: Residual, stream: int) -> None:
        """Where the block of a site reads its trunk, and which ops stand on the trunk before its add."""
        run = self.run_
        chain, steps = [residual.trunk], []
        while chain[-1] not in self.sums and chain[-1] in run.producer:
            step = run.producer[chain[-1]]
            if run.ops[step].mixes:
                break
            cut = run.ops[step].name in _CUTS and len(run.ops[step].outputs) == 1
            sources = run.ops[step].inputs[:1] if cut else dict.fromkeys(run.ops[step].inputs)
            near = [v for v in sources if run.floats[v] and v in run.producer
                    and (cut or run.shapes[v].numel() == run.shapes[chain[-1]].numel())]  # fmt: skip
            if len(near) > 1:  # the one that comes from the latest site of this stream; older states are read
                earlier = [total for total, its_stream in self.sums.items() if its_stream == stream]
                last = [max((t for t in earlier if v == t or run.above[v] >> t & 1), default=-1) for v in near]
                near = [v for v, total in zip(near, last, strict=True) if total == max(last) > -1]
            if len(near) != 1:
                break
            steps.append(step)
            chain.append(near[0])
        block, on_chain = self._block(residual.branches, set(chain)), set(steps)
        readers = {
            value: [k for k in self._users(value) if k not in on_chain and k != op and k not in self.skipped
                    and not block.isdisjoint(run.ops[k].outputs)]
            for value in chain
        }  # fmt: skip
        points = [value for value in chain if readers[value]]
        if not points:
            raise Unclear("a block that reads no trunk")
        point = points[0]
        goes_on = self.sums.get(chain[-1]) == stream
        if len(points) > 1 and goes_on:
            raise Unclear("a block that reads its trunk at two points")
        self.read_point[op] = point
        for reader in readers[point]:
            self.reads[reader, point] = op
        at = chain.index(point)
        if goes_on:
            self.lifted.update(zip(steps, chain[1:], strict=True))
        else:
            self.begins[point] = op
            self.lifted.update(zip(steps[:at], chain[1 : at + 1], strict=True))

    def _block(self, branches: Sequence[int], chain: set[int]) -> set[int]:
        """The values that a block with these results computes.

        A trunk within the block comes from the block's own, and its blocks belong to it; one from elsewhere brings no
        more than itself.
        """
        found = self._behind(branches, min(chain))
        opened: set[int] = set()
        while inside := {
            total for total in found & self.residual_of.keys() - opened
            if not chain.isdisjoint(self._behind([self.residual_of[total].trunk], min(chain)))
        }:  # fmt: skip
            opened |= inside
            for total in inside:
                found |= self._behind(self.residual_of[total].branches, min(chain))
        return found

    def _behind(self, values: Sequence[int], oldest: int) -> set[int]:
        """What values are computed from, back to the oldest, of a site's sum by its trunk alone."""
        found, todo = set(values), list(values)
        while todo:
            value = todo.pop()
            residual, producer = self.residual_of.get(value), self.run_.producer.get(value)
            inputs = [residual.trunk] if residual else () if producer is None else self.run_.ops[producer].inputs
            further = [source for source in inputs if source >= oldest and source not in found]
            found.update(further)
            todo += further
        return found

    def _users(self, value: int) -> Iterator[int]:
        if not hasattr(self, "users"):
            self.users: dict[int, list[int]] = {}
            for number, op in enumerate(self.run_.ops):
                for source in dict.fromkeys(op.inputs):
                    self.users.setdefault(source, []).append(number)
        yield from self.users.get(value, ())

    def run(self) -> Any:
        run = self.run_
        for number, tensor in enumerate(run.tensors):
            if tensor is not None:
                self.values[number] = tensor.clone() if not tensor.requires_grad else tensor
        for number, op in enumerate(run.ops):
            if any(getattr(self.read(value), name)() != answer for value, name, answer in run.asked.get(number, ())):
                raise Unclear("what is run depends on what tensors contain")
            if number not in self.skipped:
                with torch.set_grad_enabled(op.gradients):
                    self._again(number, op)

        def replayed(leaf: Any) -> Any:
            number = run.numbers.get(id(leaf)) if isinstance(leaf, Tensor) else None
            return leaf if number is None else self.read(number)

        return tree_map(replayed, _plain(run.result))

    def _again(self, number: int, op: Op) -> None:
        if number in self.sites:
            self._site(number, *self.sites[number])
        elif number in self.lifted:
            trunk = self.lifted[number]
            results = [self._call(number, op, {trunk: part}) for part in self.streams[trunk]]
            self.streams[op.outputs[0]] = [next(_tensors(result)) for result in results]
        else:
            for value, tensor in zip(op.outputs, self._results(number, op), strict=True):
                self.values[value] = tensor
        for value in op.outputs:
            self._begin(value)

    def _results(self, number: int, op: Op) -> list[Tensor]:
        result = self._call(number, op, {})
        if op.name in ("__setitem__", "copy_"):
            return [self.values[op.inputs[0]]]
        return list(_tensors(result))

    def _begin(self, value: int) -> None:
        if value in self.begins and value not in self.streams:
            self.streams[value] = [self.values[value].clone() for _ in range(self.n)]

    def read(self, value: int) -> Tensor:
        """What whoever is no block of a site gets: of a trunk the mean."""
        if value in self.streams:
            return torch.stack(self.streams[value]).mean(0)
        return self.values[value]

    def _call(self, number: int, op: Op, given: Mapping[int, Tensor]) -> Any:
        def real(leaf: Any) -> Any:
            if not isinstance(leaf, Value):
                return leaf
            if leaf.number in given:
                return given[leaf.number]
            if (number, leaf.number) in self.reads:
                return self._block_reads(self.reads[number, leaf.number], leaf.number)
            return self.read(leaf.number)

        args, kwargs = tree_map(real, (op.args, op.kwargs))
        return op.function(*args, **kwargs)

    def _block_reads(self, site_op: int, value: int) -> Tensor:
        self._begin(value)
        _, site = self.sites[site_op]
        axis = _axis(site, self.streams[value][0])
        X = torch.stack(self.streams[value], _stream_dim(axis))
        u, H_post, H_res = oracle.site(self.parameters[site.name], X, axis, eps=self.eps)
        self.coefficients[site_op] = H_post, H_res
        return u

    def _site(self, number: int, residual: Residual, site: Any) -> None:
        op = self.run_.ops[number]
        if op.kwargs.get("alpha", 1) != 1:
            raise Unclear("an add with a factor")
        self._begin(residual.trunk)
        if number not in self.coefficients:
            self._block_reads(number, self.read_point[number])
        H_post, H_res = self.coefficients[number]
        if residual.trunk not in self.streams:
            raise Unclear("a trunk that does not come from where its stream begins")
        axis = _axis(site, self.streams[residual.trunk][0])
        dim = _stream_dim(axis)
        y = self.read(residual.branches[0])
        for branch in residual.branches[1:]:
            y = y + self.read(branch)
        y = y.reshape(self.streams[residual.trunk][0].shape)
        new = oracle.apply(torch.stack(self.streams[residual.trunk], dim), y, H_post, H_res, axis)
        self.streams[residual.sum] = [one.clone() for one in new.unbind(dim)]  # some are changed in place


def _axis(site: Any, trunk: Tensor) -> int:
    """Where the features are at one site: a stream may go from images to tokens and back."""
    axis: int = site.channel_dim
    return axis if trunk.shape[axis] == site.width else -1 if axis == 1 else 1


def _without_ones(shape: torch.Size) -> tuple[int, ...]:
    """A shape without leading axes of size 1, which one operand of a sum may lack."""
    return tuple(itertools.dropwhile(lambda size: size == 1, shape))


def _stream_dim(channel_dim: int) -> int:
    return -2 if channel_dim == -1 else channel_dim


def _tensors(result: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))


def _plain(result: Any) -> Any:
    """A model's result as lists and dicts."""
    if isinstance(result, Tensor) or result is None:
        return result
    if hasattr(result, "to_tuple"):
        return _plain(result.to_tuple())
    if isinstance(result, dict):
        return [_plain(value) for value in result.values()]
    if isinstance(result, (list, tuple)):
        return [_plain(value) for value in result]
    return None


def tensors_of(result: Any) -> list[Tensor]:
    """The floating tensors of what a model returned."""
    return [leaf for leaf in tree_leaves(_plain(result)) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _of_values(getter: Any) -> bool:
    """Whether an attribute of a tensor is a tensor with its values: `x.T`, not `x.shape`."""
    return getattr(getattr(getter, "__self__", None), "__name__", "") in ("T", "mT", "H", "mH", "real", "imag", "data")


def _lines() -> Iterator[tuple[str, int]]:
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if file != _HERE:
            yield file, frame.f_lineno
        if file.startswith(_TORCH) and frame.f_code.co_name == "_call_impl":
            return
        frame = frame.f_back
