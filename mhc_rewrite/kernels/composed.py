"""`pre` and `boundary` of connections that are a function, and those without a projection: the function stands between
kernels that know nothing of it.

    raw, r = project(X, phi)              X', raw, r = post_project(X, y, H_post, H_res, phi)
    H_pre', H_post', H_res' = function(raw, alpha, bias)
    u = read(X, H_pre')

Forward a boundary moves (3n + 2)C a token, as H_pre is known only once all of X' is projected; a second pass over X'
reads it. Backward (4n + 5)C: the gradient of H_pre is one sweep, the function's own gradient lies between, and all that
meets X' is one more sweep.

The function's gradient is a graph of aten, which `gradients_of` makes once with autograd. The bodies of operators run
below autograd, so it could not be asked there; and compiled graphs take the graph's nodes up as they do the function's.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx

from mhc_rewrite.errors import KernelError
from mhc_rewrite.kernels import gpu, selection
from mhc_rewrite.kernels.kinds import FUNCTIONS, KINDS, Function, is_static, name_of, norms_of, streams_of
from mhc_rewrite.kernels.reference import Coefficients
from mhc_rewrite.torch_private import graph_of

Outputs = tuple[Tensor, ...]

_TOKENS = 1009  # of the trace: a number that no other axis has, so that the graph is for any


def pre(X: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, kind: str, iterations: int, eps: float) -> Outputs:
    """As in aten.py: u, H_post, H_res, raw, r."""
    inner = _inner(X, None, phi)
    raw, r = _nothing_projected(X, phi) if is_static(kind) else inner.project(X, phi, eps)
    h = _coefficients(raw, alpha, bias, kind, iterations)
    return inner.read(X, _for_given(h.pre, X)), h.post, h.res, raw, r


def pre_backward(
    g_u: Tensor, g_post: Tensor, g_res: Tensor,
    X: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, raw: Tensor, r: Tensor, kind: str, iterations: int,
) -> Outputs:  # fmt: skip
    """As in aten.py: the gradients of X, phi, alpha and bias."""
    inner = _inner(X, None, phi)
    g_pre = inner.read_products(g_u, X).expand_as(g_post)
    h_pre, g_raw, *g_scales = _gradients(g_pre, g_post, g_res, raw, alpha, bias, kind, iterations)
    return *inner.project_backward(g_u, _for_given(h_pre, X), g_raw, X, phi, raw, r), *g_scales


def boundary(
    X: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor,
    phi: Tensor, alpha: Tensor, bias: Tensor, kind: str, iterations: int, eps: float,
) -> Outputs:  # fmt: skip
    """As in aten.py: X', u', H_post', H_res', raw', r'."""
    inner = _inner(X, y, phi)
    if is_static(kind):
        state: Tensor = torch.ops.mhc_rewrite.post(X, y, h_post, h_res, "")
        raw, r = _nothing_projected(X, phi)
    else:
        state, raw, r = inner.post_project(X, y, h_post, h_res, phi, eps)
    h = _coefficients(raw, alpha, bias, kind, iterations)
    return state, inner.read(state, h.pre), h.post, h.res, raw, r


def boundary_backward(
    g_state: Tensor, g_u: Tensor, g_post: Tensor, g_res: Tensor,
    X: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor,
    phi: Tensor, alpha: Tensor, bias: Tensor, raw: Tensor, r: Tensor, kind: str, iterations: int,
) -> Outputs:  # fmt: skip
    """As in aten.py: the gradients of X, y, H_post, H_res, phi, alpha and bias."""
    inner = _inner(X, y, phi)
    g_pre = inner.post_read_products(g_u, X, y, h_post, h_res)
    h_pre, g_raw, *g_scales = _gradients(g_pre, g_post, g_res, raw, alpha, bias, kind, iterations)
    operands = (X, y, h_post, h_res, phi, raw, r)
    return *inner.post_project_backward(g_state, g_u, h_pre, g_raw, *operands), *g_scales


def name_of_function(kind: str, columns: int) -> str:
    """A name for what the function computes, for the keys of compiled graphs; empty where kernels do.

    It is that of the graph, and not of the source: a function may call what lies in any file.
    """
    name = name_of(kind)
    return "" if name in KINDS else _name_of_graph(FUNCTIONS[name], streams_of(columns, kind), columns)


@functools.cache
def _name_of_graph(function: Function, n: int, columns: int) -> str:
    def run(raw: Tensor, alpha: Tensor, bias: Tensor) -> Outputs:
        return tuple(function(raw, alpha, bias, n))

    graph = _traced(function, run, ((_TOKENS, columns), (3,), (columns,)), any_size=False)
    constants = [getattr(graph, str(node.target)).tolist() for node in graph.graph.nodes if node.op == "get_attr"]
    return hashlib.sha256(f"{graph.code}\n{constants}".encode()).hexdigest()[:12]


def _nothing_projected(X: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
    return phi.new_empty(X.shape[0], 0), phi.new_ones(X.shape[0], 1)


def _for_given(h_pre: Tensor, X: Tensor) -> Tensor:
    """H_pre for a state as it is given: equal streams meet its sum."""
    return h_pre if X.shape[1] == h_pre.shape[1] else h_pre.sum(-1, keepdim=True)


# -- the function and its gradient -------------------------------------------------------------------------------------


def _coefficients(raw: Tensor, alpha: Tensor, bias: Tensor, kind: str, iterations: int) -> Coefficients:
    """H_pre, H_post and H_res of every token, each with memory of its own."""
    name, n, tokens = name_of(kind), streams_of(len(bias), kind), len(raw)
    if name in KINDS:
        made = Coefficients(*torch.ops.mhc_rewrite.pre(*_alone(bias, n), iterations, name, 1.0, "")[:3])
    elif is_static(kind):
        made = Coefficients(*FUNCTIONS[name](bias.new_zeros(1, len(bias)), bias.new_zeros(3), bias, n))
    else:
        made = Coefficients(*FUNCTIONS[name](raw, alpha, bias, n))
    every = (h.to(bias.dtype).expand(tokens, *h.shape[1:]) for h in made)
    return Coefficients(*(h.clone(memory_format=torch.contiguous_format) for h in every))


def _gradients(
    g_pre: Tensor, g_post: Tensor, g_res: Tensor, raw: Tensor, alpha: Tensor, bias: Tensor, kind: str, iterations: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """H_pre again, and the gradients of raw, alpha and bias from those of H_pre, H_post and H_res."""
    name, n, tokens = name_of(kind), streams_of(len(bias), kind), len(raw)
    gradients: Outputs = g_pre.to(bias.dtype), g_post, g_res
    of_raw = raw
    if is_static(kind):
        gradients = tuple(g.sum(0, keepdim=True) for g in gradients)
        of_raw, alpha = bias.new_zeros(1, len(bias)), bias.new_zeros(3)
    if name in KINDS:
        site, r = _alone(bias, n), bias.new_ones(1, norms_of(name, n))
        h_pre = torch.ops.mhc_rewrite.pre(*site, iterations, name, 1.0, "")[0]
        *_, g_alpha, g_bias = torch.ops.mhc_rewrite.pre_backward(*gradients, *site, of_raw, r, iterations, name)
    else:
        graph = gradients_of(FUNCTIONS[name], n, len(bias), bias.dtype, bias.device)
        # As a function: whoever follows the calls of a model's modules (CommDebugMode) would not know this one.
        h_pre, of_raw, g_alpha, g_bias = graph.forward(*gradients, of_raw, alpha, bias)
    g_raw = torch.zeros_like(raw) if is_static(kind) else of_raw.contiguous()
    return h_pre.expand(tokens, n).contiguous(), g_raw, g_alpha, g_bias


def _alone(bias: Tensor, n: int) -> Outputs:
    """X, phi, alpha and bias by which `pre` of a kind with kernels makes coefficients of the bias alone.

    phi is zero; with the unit matrix for a state of width n, u is H_pre, and the gradient of u that of H_pre.
    """
    streams = torch.eye(n, dtype=bias.dtype, device=bias.device).unsqueeze(0)
    return streams, bias.new_zeros(n * n, len(bias)), bias.new_zeros(3), bias


@functools.cache
def gradients_of(function: Function, n: int, columns: int, dtype: torch.dtype, device: torch.device) -> fx.GraphModule:
    """(g_pre, g_post, g_res, raw, alpha, bias) -> (H_pre, g_raw, g_alpha, g_bias), as a graph of aten for any T."""

    def gradients(g_pre: Tensor, g_post: Tensor, g_res: Tensor, *given: Tensor) -> Outputs:
        raw, alpha, bias = inputs = tuple(x.detach().requires_grad_() for x in given)
        made = function(raw, alpha, bias, n)
        # One that depends on nothing has no gradient to begin with: an H_res that is always the identity.
        outputs, of_outputs = zip(*((h, g) for h, g in zip(made, (g_pre, g_post, g_res)) if h.requires_grad))
        grads = torch.autograd.grad(outputs, inputs, of_outputs, materialize_grads=True)
        return made[0].detach(), *grads

    sizes = ((_TOKENS, n), (_TOKENS, n), (_TOKENS, n, n), (_TOKENS, columns), (3,), (columns,))
    return _traced(function, gradients, sizes, dtype, device, any_size=True)


def _traced(
    function: Function, run: Callable[..., Any], sizes: Sequence[tuple[int, ...]],
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", *, any_size: bool,
) -> fx.GraphModule:  # fmt: skip
    """The graph of what `run` does with a function.

    Raises:
        KernelError: it asks for what only the tensors of one call have.
    """

    def made() -> fx.GraphModule:
        zeros = (torch.zeros(size, dtype=dtype, device=device) for size in sizes)
        graph = graph_of(run, *zeros, any_size=any_size)
        graph.graph.eliminate_dead_code()
        graph.recompile()
        return graph

    # In a thread of its own: whoever asks may be tracing, and modes of dispatch are a thread's.
    with ThreadPoolExecutor(1) as pool:
        try:
            return pool.submit(made).result()
        except KernelError:
            raise
        except Exception as error:  # torch has one for each way in which a value can be asked for
            raise KernelError(
                f"{function} can't be traced ({type(error).__name__}: {str(error).splitlines()[0]}). A connection's "
                "function is for any number of tokens, and must not look at values: write torch.where for a branch on "
                "them, and make tensors on raw's device."
            ) from error


# -- the inner operators -----------------------------------------------------------------------------------------------


def _inner(X: Tensor, y: Tensor | None, coefficients: Tensor) -> Any:
    """Who has them. On a GPU they are operators, which stay whole in compiled graphs."""
    chosen: ModuleType = selection.kernels_for(X, y, coefficients)
    return torch.ops.mhc_rewrite if chosen is gpu else chosen


def _define(name: str, arguments: str, results: int, shapes: Callable[..., Any]) -> None:
    made = "Tensor" if results == 1 else "(" + ", ".join(["Tensor"] * results) + ")"
    names = [argument.split()[1] for argument in arguments.split(", ")]

    def run(*args: Any) -> Any:
        given = dict(zip(names, args))
        coefficients = next((given[one] for one in ("phi", "h_pre", "h_post") if one in given), None)
        return getattr(selection.kernels_for(given["X"], given.get("y"), coefficients), name)(*args)

    schema = f"({arguments}) -> {made}"
    operator = torch.library.custom_op(f"mhc_rewrite::{name}", run, mutates_args=(), schema=schema)
    operator.register_fake(shapes)


def _projected(X: Tensor, phi: Tensor, eps: float) -> Outputs:
    return phi.new_empty(X.shape[0], phi.shape[1]), phi.new_empty(X.shape[0], 1)


def _post_projected(X: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor, phi: Tensor, eps: float) -> Outputs:
    dtype = torch.promote_types(X.dtype, y.dtype)
    return X.new_empty(X.shape[0], h_res.shape[1], X.shape[2], dtype=dtype), *_projected(X, phi, eps)


def _like(*places: int) -> Callable[..., Outputs]:
    """Gradients: one tensor like each of the arguments at these places."""
    return lambda *args: tuple(torch.empty_like(args[place]) for place in places)


_BRANCH = "Tensor X, Tensor y, Tensor h_post, Tensor h_res"
_KEPT = "Tensor phi, Tensor raw, Tensor r"
_READ = "Tensor g_u, Tensor h_pre, Tensor g_raw"

_define("project", "Tensor X, Tensor phi, float eps", 2, _projected)
_define("post_project", f"{_BRANCH}, Tensor phi, float eps", 3, _post_projected)
_define("read", "Tensor X, Tensor h_pre", 1, lambda X, h_pre: X.new_empty(X.shape[0], X.shape[2]))
_define("read_products", "Tensor g_u, Tensor X", 1, lambda g_u, X: X.new_empty(X.shape[:2], dtype=torch.float32))
_define("post_read_products", f"Tensor g_u, {_BRANCH}", 1, lambda *args: torch.empty_like(args[3]))
_define("project_backward", f"{_READ}, Tensor X, {_KEPT}", 2, _like(3, 4))
_define("post_project_backward", f"Tensor g_state, {_READ}, {_BRANCH}, {_KEPT}", 5, _like(4, 5, 6, 7, 8))
