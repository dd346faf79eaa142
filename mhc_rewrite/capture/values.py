"""What a forward holds while it is captured: values that carry both a graph node and what it is on the example.

A traced tensor is a real tensor, over the memory of the example's. So C code that asks no `__torch_function__`, an
autograd.Function or an extension say, finds valid memory whatever it does; that its result belongs to no node is found
when it comes back (`Tracer.create_arg`). Numbers and objects are proxies in plain Python.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.fx.graph import magic_methods, reflectable_magic_methods

if TYPE_CHECKING:
    from mhc_rewrite.capture.tracer import ModuleTracer

_AUGMENTED = "iadd isub imul itruediv ifloordiv imod ipow imatmul iand ior ixor".split()


class _Python:
    """What Python itself asks of a value."""

    tracer: Any
    node: fx.Node
    value: Any

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """`isinstance` answers as in life."""
        return type(self.value)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.node.name})"

    def __bool__(self) -> bool:
        return bool(self.tracer.decide(self, bool))

    def __index__(self) -> int:
        return int(self.tracer.decide(self, operator.index))

    def __int__(self) -> int:
        return int(self.tracer.decide(self, int))

    def __float__(self) -> float:
        return float(self.tracer.decide(self, float))

    def __complex__(self) -> complex:
        return complex(self.tracer.decide(self, complex))

    def __hash__(self) -> int:
        return id(self)

    def __len__(self) -> int:
        return len(self.tracer.unwrap_sized(self))

    def __iter__(self) -> Iterator[Any]:
        return iter([operator.getitem(self, index) for index in range(len(self))])  # type: ignore[call-overload]

    def __setitem__(self, key: Any, item: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, item), {})

    def __contains__(self, item: Any) -> bool:
        return any(item is mine or item == mine for mine in self)


def _read(traced: Any, name: str) -> Any:
    """An attribute or a method, as a node; torch's own argument parser, say, would take no traced size."""
    with traced.tracer.as_shadow():
        attribute = getattr(traced.value, name)  # an AttributeError here is the user's, as it would be in life
    if traced.tracer.shadowing:  # inside an object that a child got
        return attribute
    if callable(attribute) and not isinstance(attribute, Tensor):
        return lambda *args, **kwargs: traced.tracer.create_proxy("call_method", name, (traced, *args), kwargs)
    return traced.tracer.create_proxy("call_function", getattr, (traced, name), {})


class TracedValue(_Python, fx.Proxy):
    """A size, or an object from outside such as a cache."""

    def __init__(self, node: fx.Node, tracer: ModuleTracer, value: Any) -> None:
        super().__init__(node, tracer)
        self.value = value

    def __getattr__(self, name: str) -> Any:
        return _read(self, name)


class TracedTensor(_Python, Tensor):  # type: ignore[misc]
    """A tensor. `value` is the example's own; this object is another name of its memory."""

    def __getattribute__(self, name: str) -> Any:
        if name in ("node", "tracer", "value") or name[:2] == "__":
            return object.__getattribute__(self, name)
        return _read(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("node", "tracer", "value"):
            object.__setattr__(self, name, value)
        else:
            self.tracer.refuse(f"it assigns to .{name} of a tensor, which a graph would not repeat")

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self.tracer.create_proxy("call_method", "clone", (self,), {})

    @staticmethod
    def of(node: fx.Node, tracer: ModuleTracer, value: Tensor) -> TracedTensor:
        with torch._C.DisableTorchFunctionSubclass():
            other = value.detach()
            traced: TracedTensor = (
                other.as_subclass(TracedTensor) if type(other) is Tensor else
                Tensor._make_wrapper_subclass(
                    TracedShell, other.shape, dtype=other.dtype, device=other.device, layout=other.layout
                )
            )  # fmt: skip
        traced.node, traced.tracer, traced.value = node, tracer, value
        return traced

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], kinds: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Out of reach of the tracer's mode: inside an object that a child got, or in another thread."""
        kwargs = kwargs or {}
        traced = next(leaf for leaf in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(leaf, TRACED))
        return traced.tracer.outside(func, args, kwargs)


class TracedShell(TracedTensor):
    """Of a tensor of a class that has no memory to name: a fake one, while somebody exports."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise NotImplementedError(f"{func} below Python, on a tensor that has no memory")


TRACED = (TracedTensor, TracedShell, TracedValue)


def _magic(name: str, reflected: bool = False) -> Callable[..., Any]:
    function = getattr(operator, name)

    def apply(self: TracedTensor, *others: Any) -> Any:
        args = (*others, self) if reflected else (self, *others)
        if self.tracer.shadowing:
            return self.tracer.outside(function, args, {})
        return self.tracer.create_proxy("call_function", function, args, {})

    return apply


def _augmented(name: str) -> Callable[[Any, Any], Any]:
    function = getattr(operator, name)

    def apply(self: TracedTensor | TracedValue, other: Any) -> Any:
        if not isinstance(self.value, Tensor):
            return NotImplemented  # numbers are immutable: Python falls back to the plain operator
        if self.tracer.shadowing:
            return self.tracer.outside(function, (self, other), {})
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return apply


for _name in magic_methods:
    if hasattr(operator, _name):
        setattr(TracedTensor, f"__{_name.strip('_')}__", _magic(_name))
for _name in reflectable_magic_methods:
    if hasattr(operator, _name) and _name != "getitem":
        setattr(TracedTensor, f"__r{_name.strip('_')}__", _magic(_name, reflected=True))
for _name in _AUGMENTED:
    for _kind in (TracedValue, TracedTensor):
        setattr(_kind, f"__{_name}__", _augmented(_name))


def real(structure: Any) -> Any:
    """A structure with the example's values in place of the traced ones."""
    return fx.node.map_aggregate(structure, lambda leaf: leaf.value if isinstance(leaf, TRACED) else leaf)
