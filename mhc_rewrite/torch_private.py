"""The places where no public PyTorch API exists, and what differs between its versions: there is no other such place.

Each was read in the sources of torch 2.11.0, 2.13.0 and 2.14.1, and is the same in all three where no more is said.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn


class KeepsPrecision(nn.Module):
    """A module whose parameters never become narrower than 32 bits.

    `Module.half()`, `.bfloat16()` and `.to(dtype)` all go through `Module._apply`; no public hook sees them. Should
    `_apply` go, every caller of `.to(dtype)` has to cast the sites back, and tests/test_model_stays.py fails first.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KeepsPrecision:
        def keep_wide(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.is_floating_point() and torch.finfo(moved.dtype).bits < 32:
                return tensor.to(moved.device) if not tensor.is_meta else torch.empty_like(tensor, device=moved.device)
            return moved

        return super()._apply(keep_wide, recurse)


def apply_as_now() -> Callable[..., Any]:
    """`torch.autograd.Function.apply` as it is now, as a function whose first argument is the class.

    A method of Python in torch 2.11 and 2.13, and one of C in 2.14, which holds no function. Should it go, what
    autograd applies is not seen: tests/test_forms.py.
    """
    method: Any = torch.autograd.Function.__dict__["apply"]
    return lambda kind, *args, **kwargs: method.__get__(None, kind)(*args, **kwargs)


def python_of(function: torch.jit.ScriptFunction) -> Callable[..., Any] | None:
    """The Python function that `torch.jit.script` compiled; None for others.

    A traced function is another one than its Python, whose branches it has frozen: only the cache of compiled functions
    tells them apart. Both names are kept for torch itself. Should they go, residual adds in scripted functions are not
    seen, and tests/test_forms.py fails first.
    """
    python = getattr(function, "_torchdynamo_inline", None)
    scripted = None if python is None else torch.jit._state._try_get_jit_cached_function(python)
    return python if scripted is not None and scripted.qualified_name == function.qualified_name else None


@functools.cache
def scripted_calls_take(read: Callable[[Any], Any]) -> None:
    """Makes TorchScript's functions and methods take `read(arguments)`: they look at a tensor's memory alone.

    They ask no `__torch_function__`, so a tensor of a class of its own is to them what lies in its memory. Should the
    calls no longer be patchable, scripted code in a converted model's own forward sees streams: tests/test_readers.py.
    """
    for kind in (torch.jit.ScriptFunction, torch._C.ScriptMethod):
        kind.__call__ = _reading(kind.__call__, read)  # type: ignore[method-assign]


def _reading(original: Callable[..., Any], read: Callable[[Any], Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        return original(function, *read(args), **read(kwargs))

    return call


@functools.cache
def shards_take(read: Callable[[Any], Any]) -> None:
    """Makes `DTensor.from_local` take `read(tensor)`: it looks at a tensor's memory alone, as TorchScript does.

    Parallel styles call it on what modules get, so also on the trunk between layers. Dynamo knows the function by its
    identity and has to have noted it before. Should that go, compiled models with such a module between their layers
    see streams there: tests/test_distributed_tensor.py.
    """
    if not torch.distributed.is_available():
        return
    from torch._dynamo import trace_rules
    from torch.distributed.tensor import DTensor

    trace_rules.get_torch_obj_rule_map()
    original = DTensor.from_local

    @functools.wraps(original)
    def from_local(
        local_tensor: Any, device_mesh: Any = None, placements: Any = None, *args: Any, **kwargs: Any
    ) -> DTensor:
        value = read(local_tensor)
        if isinstance(value, DTensor):  # the caller could not see that it is one
            return value.redistribute(device_mesh, placements)
        return original(value, device_mesh, placements, *args, **kwargs)

    DTensor.from_local = staticmethod(from_local)  # type: ignore[method-assign]


@contextlib.contextmanager
def without_hooks(*roots: nn.Module) -> Iterator[None]:
    """Inside, the forward hooks of modules and all below them do not run: a capture is no call that a user made.

    Hooks can be removed in public, but only by who holds their handles. Should the attributes go, captures run hooks.
    """
    names = ("_forward_hooks", "_forward_pre_hooks")
    modules = dict.fromkeys(child for root in roots for child in root.modules())
    kept = [(child, name, getattr(child, name)) for child in modules for name in names]
    try:
        for child, name, _ in kept:
            setattr(child, name, OrderedDict())
        yield
    finally:
        for child, name, hooks in kept:
            setattr(child, name, hooks)


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module would run forward hooks. Should the attributes go, nobody is told of those that a
    converted model leaves out: tests/test_readers.py."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def decompose_in_compiled_graphs(
    operator: torch.library.CustomOpDef, body: Callable[..., Any], *, unless: Callable[..., bool]
) -> None:
    """Makes AOTAutograd trace through `body` instead of recording the operator, unless `unless` of its arguments.

    Graphs that Dynamo hands to a backend still hold the operator, so that passes can name it. `torch.library` lets an
    operator have a rule for a dispatch mode, but the mode that AOTAutograd runs under is not public. Should it go,
    compiled graphs keep the operators whole: right, and slower on a CPU.
    """
    from torch._subclasses.functional_tensor import FunctionalTensorMode

    def rule(mode: Any, function: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if unless(*args):
            return mode.__torch_dispatch__(function, types, args, kwargs)
        with mode:
            return body(*args, **kwargs)

    operator.register_torch_dispatch(FunctionalTensorMode, rule)


def graph_of(function: Callable[..., Any], *example: Tensor, any_size: bool) -> torch.fx.GraphModule:
    """What `function` does to these tensors, or to such of any sizes, as a graph of aten, with gradients that it asks
    autograd for.

    `torch.export` takes modules, and no calls of autograd in them. `make_fx` is what it is made of, and not promised to
    stay. Should it go, connections without kernels of their own have no gradients, and tests/test_connections.py fails
    first. While `torch.export` traces, in whatever thread, its own mode takes symbolic sizes for its own: only graphs
    for the example's sizes can be had then.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(function, tracing_mode="symbolic" if any_size else "real")(*example)


def never_an_input_of_graphs(kind: type[Tensor]) -> None:
    """Makes Dynamo take tensors of this class that reach a frame for Python objects, whose attributes it reads.

    As tensors they would be inputs of graphs, which run as if no class had another view of their memory. Should the
    setting go, layers that are compiled one by one fail, and tests/test_readers.py first.
    """
    from torch._dynamo import config

    config.nontraceable_tensor_subclasses.add(kind)


def outside_graphs(function: Callable[..., Any], why: str) -> Callable[..., Any]:
    """`function`, where Dynamo's graph breaks: it is run, and not traced."""
    return torch.compiler.disable(function, reason=why)


def constant_while_tracing(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which Dynamo calls while it traces and whose result it takes for a constant.

    As torch.compiler.assume_constant_result, which imports Dynamo for it, a second or more. Should the attribute go,
    compiled graphs break at these functions: tests/test_ops.py.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_while_tracing
def optimizers_sum_shares() -> bool:
    """Whether optimizers take a gradient that is each rank's share of a sum (`Partial`) for the sum.

    In torch 2.11 AdamW squares the shares, of norms under SequenceParallel too. Nothing public tells; what came with
    the mending is an argument of `DTensor.from_local`. Should that go, gradients of sites are summed in backward:
    right, and a collective more for each.
    """
    from torch.distributed.tensor import DTensor

    return "grad_placements" in inspect.signature(DTensor.from_local).parameters


class MadeWhileTracing:
    """Holds what was made while Dynamo traced, as attributes: unlike a dict's items, these may come in the meantime."""

    @constant_while_tracing
    def name_of_last(self) -> str:
        return list(self.__dict__)[-1]


def while_tracing(holder: MadeWhileTracing, function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, called once, when Dynamo traces this; the compiled code finds the result in `holder`.

    Tensors are zeros of their form there (booleans True), other objects as they have become in the trace. None where
    that can't be had. `torch._dynamo.comptime` is how Dynamo runs code of others while it traces; the values that it
    has then (VariableTracker) are its own business. Should they go, None is right: the graph breaks in that place.
    In torch 2.11 a function whose result is taken for constant gets no objects as arguments, but a method may
    be one's own; what tracks a set is a kind of what tracks a dict; and the flag that `torch.compiler.is_compiling`
    reads is not set while Dynamo traces, as it is in 2.13 and 2.14.
    """
    from torch._dynamo.comptime import comptime

    comptime(_call_now)
    return getattr(holder, holder.name_of_last())


def _call_now(context: Any) -> None:
    scope = context._i_will_not_complain_if_bc_breaks_InstructionTranslator()
    stand_ins = _StandIns(scope.output.side_effects)
    holder = stand_ins.of(scope.symbolic_locals["holder"])
    made = None
    try:
        function, args = (stand_ins.of(scope.symbolic_locals[name]) for name in ("function", "args"))
        with mock.patch.object(torch.compiler, "_is_compiling_flag", True):
            made = function(*args)
    except _NoStandIn as error:
        why = f"The graph breaks at a kind of call that is new to a converted module, since {error}."
        warnings.warn(f"{why} Call the model once in this way without torch.compile first.", stacklevel=2)
    setattr(holder, f"_{len(holder.__dict__)}", made)


class _NoStandIn(Exception):
    pass


class _StandIns:
    """Python values for what Dynamo tracks."""

    def __init__(self, side_effects: Any) -> None:
        self.side_effects = side_effects
        self.made: dict[int, Any] = {}

    def of(self, tracked: Any) -> Any:
        tracked = tracked.realize()
        if id(tracked) not in self.made:
            self.made[id(tracked)] = self._make(tracked)
        return self.made[id(tracked)]

    def _make(self, tracked: Any) -> Any:
        from torch._dynamo import variables

        if tracked.is_tensor():
            return self._tensor(tracked.as_proxy().node.meta["example_value"])
        if isinstance(tracked, variables.SymNodeVariable):
            return tracked.sym_num.node.hint
        if isinstance(tracked, variables.ConstDictVariable) and issubclass(tracked.python_type(), dict):
            return {key.vt.as_python_constant(): self.of(value) for key, value in tracked.items.items()}
        if isinstance(tracked, variables.BaseListVariable) and not isinstance(tracked, variables.RangeVariable):
            return tracked.python_type()(self.of(item) for item in tracked.items)
        if isinstance(tracked, variables.UserDefinedObjectVariable):
            return self._object(tracked)
        try:
            return tracked.as_python_constant()
        except NotImplementedError as error:
            raise _NoStandIn(f"{type(tracked).__name__} has no value while it is traced") from error

    @staticmethod
    def _tensor(fake: Tensor) -> Tensor:
        sizes = [size if isinstance(size, int) else size.node.hint for size in fake.shape]
        fill = torch.ones if fake.dtype == torch.bool else torch.zeros
        return fill(sizes, dtype=fake.dtype, device=fake.device)

    def _object(self, tracked: Any) -> Any:
        """As the trace has left it: a copy where it was changed, the object itself otherwise."""
        changes = self.side_effects.store_attr_mutations.get(tracked, {})
        if isinstance(tracked.value, nn.Module) or not self.side_effects.is_modified(tracked):
            return tracked.value
        made = self.made[id(tracked)] = copy.copy(tracked.value)
        for name, value in changes.items():
            object.__setattr__(made, name, self.of(value))
        return made


def frees_parameters(module: nn.Module) -> bool:
    """Whether FSDP keeps the module's parameters, so that their memory is freed behind the module it was gathered for.

    While a module runs nothing public tells its gathered parameters from any others. The mark is for Dynamo, and is set
    on every module whose parameters FSDP2 or FSDP1 manages. Should it go, recomputation refuses in backward, and
    tests/test_distributed.py fails first.
    """
    return bool(getattr(module, "_is_fsdp_managed_module", False))


def inside_function_transform() -> bool:
    """Whether `torch.func.grad`, `vmap` or the like is being traced, which custom operators have no rules for.

    Should the call go, `False` is right but for those transforms, which then raise.
    """
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def saved_tensors_hooks_on_top() -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """The pair of hooks that autograd asks about what it saves now: the innermost; None without any.

    torch.autograd.graph sets such hooks and torch.utils.checkpoint works by them; neither says whether they are set.
    Should the call go, `None` is right but for those, which would then be bypassed.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def inductor(mode: str | None, options: dict[str, Any]) -> Callable[..., Any]:
    """Inductor as a backend of `torch.compile` with these options, checked as `torch.compile` checks them.

    The class is what `torch.compile` itself uses; in torch 2.13 and 2.14 it takes a name too, which need not be given.
    Should it go, `torch._inductor.compile_fx.compile_fx(graph, inputs, config_patches=options)` is what it calls, and
    `torch._inductor.list_mode_options(mode)` are a mode's options.
    """
    return torch._TorchCompileInductorWrapper(mode, options, None)


def joint_graph_pass(run: Callable[[torch.fx.Graph], None], uuid: str, options: dict[str, Any]) -> Any:
    """`run` as a pass on Inductor's joint graph, behind those that the user has asked for, here or in Inductor's own
    configuration. `uuid` becomes part of the key of the caches of compiled graphs; passes without one switch them off.

    The option that takes it is `joint_custom_pre_pass`: one pass in torch 2.11, one or a list in 2.13 and 2.14, so that
    this is one. Should either go, annotations of the joint graph have to find another hook, and tests/test_recompute.py
    fails first.
    """
    from torch._inductor import config
    from torch._inductor.custom_graph_pass import CustomGraphPass

    asked = options.get("joint_custom_pre_pass", config.joint_custom_pre_pass)
    earlier = list(asked) if isinstance(asked, (list, tuple)) else [asked] if asked is not None else []

    class JointGraphPass(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            for one in (*earlier, run):
                one(graph)

        def uuid(self) -> Any:
            known = [one.uuid() if isinstance(one, CustomGraphPass) else None for one in earlier]
            return None if None in known else (*known, uuid)

    return JointGraphPass()


def asked_for(node: Any) -> tuple[bool | None, ...]:
    """While `node` runs backward: for each of its inputs, whether its gradient is asked for now; None if it has none.

    Should the call go, all True is right: what is computed once in two runs would be computed in both again.
    """
    found: list[bool | None] = []
    for behind, _ in node.next_functions:
        try:
            found.append(None if behind is None else torch._C._will_engine_execute_node(behind))
        except RuntimeError:  # a leaf whose gradient is what is asked for
            found.append(True)
    return tuple(found)


def runs_again() -> Any:
    """The node that runs backward now, if the graph is kept and a gradient is left for another run; None otherwise.

    Schedules of pipelines run backward twice, for the gradients of what came in and for those of parameters. Should the
    calls go, None is right.
    """
    node = torch._C._current_autograd_node()
    if node is None or torch._C._current_graph_task_id() == -1:
        return None
    kept = torch._C._autograd._get_current_graph_task_keep_graph()
    return node if kept and False in asked_for(node) else None
