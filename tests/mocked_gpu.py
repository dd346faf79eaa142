"""What a compiled model launches on a GPU, counted where there is none.

    launched(model, (x,)).forward["boundary: _forward_kernel"]

The model is traced, cut into forward and backward, and run on the CPU. Both graphs are then given to Inductor once more
as graphs of an H100, and the code that it generates is run on meta tensors: a Triton kernel of Inductor's, a kernel of
an operator of this project, and any aten operator but views and allocations count as one launch each. Operators of this
project run their own bodies, so whatever they do besides their kernels counts as well. What one call of a library or
an aten operator launches inside is not seen.

For a process of its own: the mocks are taken back, what torch remembers of the device is not. All of torch that is
mocked or called here, but the modes, is private; read in torch 2.13.0 and Triton 3.7.1.
"""

from __future__ import annotations

import contextlib
import copy
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from functorch.compile import make_boxed_func
from torch import Tensor, fx, nn
from torch._dynamo import device_interface
from torch._inductor import config
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.exc import InductorError
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch.utils import _triton
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from triton.backends.compiler import GPUTarget

import mhc_rewrite
from mhc_rewrite import lowering
from mhc_rewrite.kernels import aten, gpu, ops, selection
from mhc_rewrite.kernels.triton_configs import Launch

DEVICE = torch.device("cuda", 0)
H100 = SimpleNamespace(
    name="NVIDIA H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    warp_size=32,
    total_memory=80 << 30,
    regs_per_multiprocessor=1 << 16,
    max_threads_per_block=1024,
    max_threads_per_multi_processor=2048,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10,
    L2_cache_size=50 << 20,
    gcnArchName="",
)


class Launched(NamedTuple):
    """Names of kernels -> how often they are launched. Inductor's begin with `triton_`, without the number behind."""

    forward: Counter[str]
    backward: Counter[str]


class Graph(NamedTuple):
    """What Inductor is given of one direction, and the options beside it."""

    module: fx.GraphModule
    options: dict[str, Any]


def launched(model: nn.Module, inputs: tuple[Tensor, ...], *, whole: bool = True, **options: Any) -> Launched:
    """What one training step with the backend "mhc" launches.

    Args:
        inputs: floating, on the CPU; they get gradients too.
        whole: whether compiled graphs hold the operators, as on a GPU, or their aten, as without Triton.
        options: of `mhc_rewrite.compile`.
    """
    forward, backward = _graphs(model, inputs, whole, options)
    with _h100():
        return Launched(_count(_generated(forward)), _count(_generated(backward)))


# -- the graphs, on the CPU --------------------------------------------------------------------------------------------


def _graphs(model: nn.Module, inputs: tuple[Tensor, ...], whole: bool, options: dict[str, Any]) -> list[Graph]:
    """Forward and backward as Inductor gets them, after the passes on the joint graph."""
    found: list[Graph] = []

    def keep(module: fx.GraphModule, _: Any, *, static_input_idxs: Any, is_backward: bool = False, **__: Any) -> Any:
        given = {"static_input_idxs": static_input_idxs, "is_backward": is_backward}
        found.append(Graph(copy.deepcopy(module), given))
        return make_boxed_func(module.forward)

    def inductor(mode: str | None, patches: dict[str, Any]) -> Callable[..., Any]:
        return lambda module, example: compile_fx(module, example, inner_compile=keep, config_patches=patches)

    torch._dynamo.reset()
    with (
        mock.patch.object(lowering, "inductor", inductor),
        mock.patch.object(selection, "kernels_for", _decide(selection.kernels_for, whole)),
        config.patch(fx_graph_cache=False, compile_threads=1),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        given = [tensor.detach().requires_grad_() for tensor in inputs]
        mhc_rewrite.compile(model, fullgraph=True, **options)(*given).sum().backward()
    return found


def _decide(decide: Callable[..., ModuleType], whole: bool) -> Callable[..., ModuleType]:
    """`selection.kernels_for` that takes tensors without content for such of a GPU."""

    def kernels(X: Tensor, *others: Any) -> ModuleType:
        if type(X) is Tensor and not X.is_meta:
            return decide(X, *others)
        there = SimpleNamespace(dtype=X.dtype, shape=X.shape, numel=X.numel, device=DEVICE)
        return decide(there, *others) if whole else aten

    return kernels


# -- the code, for a GPU -----------------------------------------------------------------------------------------------


class _Driver:
    """Triton's, of which Inductor asks no more than this."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return DEVICE.index

    def get_active_torch_device(self) -> torch.device:
        return DEVICE


def _answer(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


class _Interface(device_interface.CudaInterface):
    is_available = staticmethod(_answer(True))
    is_triton_capable = staticmethod(_answer(True))
    device_count = staticmethod(_answer(1))
    current_device = exchange_device = maybe_exchange_device = staticmethod(_answer(DEVICE.index))
    set_device = synchronize = staticmethod(_answer(None))
    get_device_properties = staticmethod(_answer(H100))
    get_compute_capability = staticmethod(_answer(90))

    class Worker(device_interface.CudaInterface.Worker):
        current_device = staticmethod(_answer(DEVICE.index))
        get_device_properties = staticmethod(_answer(H100))


@contextlib.contextmanager
def _h100() -> Iterator[None]:
    """Inside, torch and Triton believe in a GPU."""
    answers = {
        "is_available": True, "device_count": 1, "current_device": 0, "set_device": None, "synchronize": None,
        "get_device_properties": H100, "get_device_capability": (H100.major, H100.minor),
        "_exchange_device": 0, "_maybe_exchange_device": 0, "current_stream": SimpleNamespace(cuda_stream=0),
        "get_rng_state": torch.zeros(1), "set_rng_state": None,
    }  # fmt: skip
    device_interface.get_registered_device_interfaces()  # would register the real ones later
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, _answer(answer)))
        interfaces = {"cuda": _Interface, str(DEVICE): _Interface}
        stack.enter_context(mock.patch.dict(device_interface.device_interfaces, interfaces))
        stack.enter_context(mock.patch.object(torch._C, "_cuda_getCurrentRawStream", _answer(0), create=True))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # TF32 is there and not used
        stack.callback(_forget)
        _forget()
        stack.enter_context(mock.patch.object(triton.runtime.driver, "_active", _Driver()))
        yield


def _forget() -> None:
    for function in vars(_triton).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


def _generated(graph: Graph) -> tuple[str, list[Any]]:
    """The code that Inductor generates for a graph, and meta tensors like its inputs."""
    nodes = graph.module.graph.nodes
    mode = next(n.meta["val"].fake_mode for n in nodes if isinstance(n.meta.get("val"), Tensor))

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        with mode:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=DEVICE)

    for node in nodes:
        if "val" in node.meta:
            node.meta["val"] = tree_map(moved, node.meta["val"])
        if "device" in node.kwargs:
            node.update_kwarg("device", DEVICE)
    inputs = [node.meta["val"] for node in nodes if node.op == "placeholder"]
    meta = [_meta(t.shape, t.stride(), t.dtype) for t in inputs]
    sources: list[str] = []

    def stop(source: str) -> None:
        sources.append(source)
        raise InterruptedError

    with V.set_fake_mode(mode), config.patch(fx_graph_cache=False, compile_threads=1):
        with mock.patch.object(GraphLowering, "save_output_code", stop):
            try:
                compile_fx_inner(graph.module, inputs, **graph.options)
            except InductorError:
                if not sources:
                    raise
    return sources[0], meta


# -- the code, run -----------------------------------------------------------------------------------------------------


def _count(generated: tuple[str, list[Tensor]]) -> Counter[str]:
    """Runs the code and counts what it launches."""
    source, inputs = generated
    with counting() as launches:

        def kernel(_: Any, name: str, *args: Any, **kwargs: Any) -> Any:
            name = re.sub(r"_\d+$", "", name)
            return SimpleNamespace(run=lambda *args, **kwargs: launches.update([name]))

        with mock.patch.object(AsyncCompile, "triton", kernel), mock.patch.object(AsyncCompile, "wait"):
            module: dict[str, Any] = {"__name__": "generated"}
            exec(compile(source, "generated", "exec"), module)
        module["empty_strided_cuda"] = _meta
        module["call"](list(inputs))
    return launches


@contextlib.contextmanager
def counting() -> Iterator[Counter[str]]:
    """Inside, everything that is called with meta tensors counts; operators of this project are run by their bodies."""
    counter = _Counter()
    with (
        mock.patch.object(Launch, "run", lambda launch: counter.add(launch.kernel.fn.__name__)),
        mock.patch.object(selection, "kernels_for", _decide(selection.kernels_for, whole=True)),
        counter,
    ):
        yield counter.launches


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self._operators: list[str] = []

    def add(self, name: str) -> None:
        self.launches[": ".join([*self._operators[:1], name])] += 1

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = function.name().split("::")
        if namespace == "mhc_rewrite":
            return self._body(name, args)
        with self:
            out = function.decompose(*args, **(kwargs or {}))  # `contiguous` is a view or a copy
        if out is not NotImplemented:
            return out
        name = name.split(".")[0]
        makes = any(isinstance(result.type, torch.TensorType) for result in function._schema.returns)
        if makes and not function.is_view and not name.removeprefix("new_").startswith("empty"):
            self.add(name)
        return function(*args, **(kwargs or {}))

    def _body(self, name: str, args: tuple[Any, ...]) -> Any:
        body: Any = getattr(aten, name) if name.startswith("sinkhorn") else getattr(ops, f"_{name}", None)
        body = body or getattr(gpu, name)  # those that composed.py calls
        self._operators.append(name)
        try:
            with self:
                return body(*args[: body.__code__.co_argcount])  # in graphs `code` follows
        finally:
            self._operators.pop()


def _meta(shape: Any, stride: Any, dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta")
