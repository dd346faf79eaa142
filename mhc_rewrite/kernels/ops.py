"""The operators, in the namespace `mhc_rewrite`: all that passes and sites name. Which code runs is decided here.

    pre(X, phi, alpha, bias, kind, iterations, eps) -> u, H_post, H_res, raw, r
    post(X, y, H_post, H_res) -> X'
    boundary(X, y, H_post, H_res, phi', alpha', bias', kind, iterations, eps) -> X', u', H_post', H_res', raw', r'
    post_collapse(X, y, H_post, H_res) -> mean_i X'[i]

Shapes a token: X (n, C), y and u (C,), phi (n C, n^2 + 2n), alpha (3,), bias (n^2 + 2n,), H_post (n,), H_res (n, n);
the leading axes of X are the tokens of all. A state whose streams are still equal may be given as (1, C): an expansion
then costs nothing, as C elements are read and not n C. raw and r are what `pre` keeps for its backward, nothing else
differentiates through them. Streams are fp32, bf16, fp16 or fp64; parameters and coefficients fp32, or fp64, autocast
or not. `kind` says how coefficients are made (kinds.py). Where it is a function, phi has the columns that it takes in
place of n^2 + 2n, and none without a projection. Every operator has a fake version and a gradient of its own operators,
once.

gpu.py runs them on a GPU, cpu.py on a CPU where its kernels could be built, and aten.py everything else: fp64, other
devices, no tokens (selection.py). A kind without kernels of its own runs in composed.py. In compiled graphs what a
kernel runs stays whole on a GPU, since fusing its aten would move more memory. Elsewhere an operator becomes what its
body does: views around one of cpu.py, which is called without a step through Python, or aten but for Sinkhorn-Knopp.

Expansion itself is a view and the collapse one mean: aten moves no more than they need, so they are no operators here.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import sys
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mhc_rewrite.errors import KernelError
from mhc_rewrite.kernels import aten, composed, cpu, gpu, selection, sharding
from mhc_rewrite.kernels.checks import on_one_device
from mhc_rewrite.kernels.kinds import FUNCTIONS, KINDS, is_static, name_of, norms_of, streams_of
from mhc_rewrite.torch_private import asked_for, constant_while_tracing, decompose_in_compiled_graphs, runs_again

Outputs = tuple[Tensor, ...]


# -- the operators -----------------------------------------------------------------------------------------------------


def pre(X: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, kind: str, iterations: int, eps: float) -> Outputs:
    """u, H_post, H_res, raw, r of the site whose state is X."""
    if sharding.is_dtensor(X):
        sharding.know_dtensors()
    return pre_operator(X, phi, alpha, bias, iterations, kind, eps, _code_in_graphs(kind, bias))


def post(X: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
    """X', in the wider of the dtypes of X and y."""
    if sharding.is_dtensor(X):
        sharding.know_dtensors()
    return post_operator(X, y, h_post, h_res, _code_in_graphs())


def post_collapse(X: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
    """mean_i X'[i], the last site's `post` and the collapse in one."""
    if sharding.is_dtensor(X):
        sharding.know_dtensors()
    return post_collapse_operator(X, y, h_post, h_res, _code_in_graphs())


def boundary(
    X: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor,
    kind: str, iterations: int, eps: float,
) -> Outputs:  # fmt: skip
    """X', u', H_post', H_res', raw', r': `post` of one site and `pre` of the next in one."""
    if sharding.is_dtensor(X):
        sharding.know_dtensors()
    code = _code_in_graphs(kind, bias)
    return boundary_operator(X, y, h_post, h_res, phi, alpha, bias, iterations, kind, eps, code)


def _code_in_graphs(kind: str = "", bias: Tensor | None = None) -> str:
    if not torch.compiler.is_compiling():
        return ""
    return _code() if bias is None or kind in KINDS else f"{_code()}, {_function(kind, bias.shape[-1])}"


@constant_while_tracing
def _code() -> str:
    """What an operator becomes in a compiled graph, as a name; its last argument there.

    Compiled graphs are cached on disk by the calls in them. A call of this project's operators alone would not say
    which aten stood for it when the graph was compiled, or whether a kernel did.
    """
    sources = "".join(inspect.getsource(module) for module in (aten, composed, cpu, sys.modules[__name__]))
    return f"{hashlib.sha256(sources.encode()).hexdigest()[:12]}, CPU kernels: {cpu.available()}"


@constant_while_tracing
def _function(kind: str, columns: int) -> str:
    return composed.name_of_function(kind, columns)


def _kernels(X: Tensor, y: Tensor | None, coefficients: Tensor, kind: str) -> ModuleType:
    """What runs `pre` and `boundary` of this kind."""
    return selection.kernels_for(X, y, coefficients) if kind in KINDS else composed


# -- bodies: leading axes become T tokens and come back -------------------------------------------------------


def _pre(X: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, iterations: int, kind: str, eps: float) -> Outputs:
    _check_state(X, phi, bias, kind)
    parameters = _parameters(X, phi, alpha, bias)
    return _unflat(X.shape[:-2], _kernels(X, None, phi, kind).pre(_flat(X, 2), *parameters, kind, iterations, eps))


def _pre_backward(
    g_u: Tensor, g_post: Tensor, g_res: Tensor, X: Tensor, phi: Tensor, alpha: Tensor,
    bias: Tensor, raw: Tensor, r: Tensor, iterations: int, kind: str,
) -> Outputs:  # fmt: skip
    parameters = _parameters(X, phi, alpha, bias)
    gradients = (_flat(g_u, 1), _flat(g_post, 1), _flat(g_res, 2))
    kept = (_flat(raw, 1), _flat(r, 1))
    g_X, g_phi, g_alpha, g_bias = _kernels(X, None, phi, kind).pre_backward(
        *gradients, _flat(X, 2), *parameters, *kept, kind, iterations
    )
    return g_X.view(X.shape), _per_stream(g_phi, phi), g_alpha, g_bias


def _post(X: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
    _check_branch(X, y, h_post, h_res)
    out = selection.kernels_for(X, y, h_res).post(*_branch(X, y, h_post, h_res))
    return out.view(*X.shape[:-2], *out.shape[1:])


def _post_backward(g_out: Tensor, X: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor) -> Outputs:
    operands = _branch(X, y, h_post, h_res)
    g_X, g_y, g_post, g_res = selection.kernels_for(X, y, h_res).post_backward(_flat(g_out, 2), *operands)
    return g_X.view(X.shape), g_y.view(y.shape), g_post.view(h_post.shape), _as_given(g_res, h_res)


def _post_collapse(X: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
    return _post(X, y, *_collapsed(h_post, h_res)).squeeze(-2)


def _post_collapse_backward(g_out: Tensor, X: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor) -> Outputs:
    one_row = _collapsed(h_post, h_res)
    g_X, g_y, g_post, g_res = _post_backward(g_out.unsqueeze(-2), X, y, *one_row)
    n = h_post.shape[-1]
    # Expanded before the division: one launch each, as a copy behind it would be another.
    return g_X, g_y, (g_post.expand_as(h_post) / n).contiguous(), (g_res.expand_as(h_res) / n).contiguous()


def _boundary(
    X: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor, phi: Tensor, alpha: Tensor,
    bias: Tensor, iterations: int, kind: str, eps: float,
) -> Outputs:  # fmt: skip
    _check_branch(X, y, h_post, h_res)
    given = _branch(X, y, h_post, h_res)
    made = _kernels(X, y, phi, kind).boundary(*given, *_contiguous(phi, alpha, bias), kind, iterations, eps)
    return _unflat(X.shape[:-2], made)


def _boundary_backward(
    g_state: Tensor, g_u: Tensor, g_post: Tensor, g_res: Tensor, X: Tensor, y: Tensor,
    h_post: Tensor, h_res: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, raw: Tensor, r: Tensor,
    iterations: int, kind: str,
) -> Outputs:  # fmt: skip
    gradients = (_flat(g_state, 2), _flat(g_u, 1), _flat(g_post, 1), _flat(g_res, 2))
    kept = (_flat(raw, 1), _flat(r, 1))
    g_X, g_y, g_h_post, g_h_res, *g_parameters = _kernels(X, y, phi, kind).boundary_backward(
        *gradients, *_branch(X, y, h_post, h_res), *_contiguous(phi, alpha, bias), *kept, kind, iterations
    )
    given = (g_X.view(X.shape), g_y.view(y.shape), g_h_post.view(h_post.shape), _as_given(g_h_res, h_res))
    return *given, *g_parameters


def _flat(tensor: Tensor, axes: int) -> Tensor:
    """All but the last `axes` axes as one, contiguous: copied at most once."""
    leading, kept = tensor.shape[: tensor.dim() - axes], tensor.shape[tensor.dim() - axes :]
    return tensor.contiguous().view(math.prod(leading), *kept)


def _unflat(leading: torch.Size, outputs: Outputs) -> Outputs:
    return tuple(out.view(*leading, *out.shape[1:]) for out in outputs)


def _contiguous(*tensors: Tensor) -> Outputs:
    return tuple(tensor.contiguous() for tensor in tensors)


def _parameters(X: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor) -> Outputs:
    """The parameters for a state as it is given: equal streams meet the sum of phi's rows."""
    if X.shape[-2] == 1:
        phi = phi.unflatten(0, (-1, X.shape[-1])).sum(0)
    return _contiguous(phi, alpha, bias)


def _per_stream(g_phi: Tensor, phi: Tensor) -> Tensor:
    """The gradient of phi from that of the sum of its rows, or as it is."""
    if g_phi.shape == phi.shape:
        return g_phi
    return g_phi.repeat(len(phi) // len(g_phi), 1)


def _branch(X: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Flat operands of `post`: equal streams meet the sums of H_res's rows."""
    if X.shape[-2] < h_res.shape[-1]:
        h_res = h_res.sum(-1, keepdim=True)
    return _flat(X, 2), _flat(y, 1), _flat(h_post, 1), _flat(h_res, 2)


def _collapsed(h_post: Tensor, h_res: Tensor) -> tuple[Tensor, Tensor]:
    """The coefficients of the mean of X' over its streams."""
    return h_post.mean(-1, keepdim=True), h_res.mean(-2, keepdim=True)


def _as_given(g_res: Tensor, h_res: Tensor) -> Tensor:
    return g_res.view(*h_res.shape[:-2], *g_res.shape[1:]).expand_as(h_res).contiguous()


# -- shapes -----------------------------------------------------------------------------------------------------------


def _fake_pre(X: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, iterations: int, kind: str, eps: float) -> Outputs:
    n = _check_state(X, phi, bias, kind)
    *leading, _, width = X.shape
    sizes = ((n,), (n, n), (phi.shape[1],), (norms_of(kind, n),))
    return X.new_empty([*leading, width]), *(phi.new_empty([*leading, *size]) for size in sizes)


def _fake_post(X: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
    _check_branch(X, y, h_post, h_res)
    *leading, _, width = X.shape
    return X.new_empty([*leading, h_res.shape[-2], width], dtype=torch.promote_types(X.dtype, y.dtype))


def _fake_post_collapse(X: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
    _check_branch(X, y, h_post, h_res)
    return y.new_empty(y.shape, dtype=torch.promote_types(X.dtype, y.dtype))


def _fake_boundary(
    X: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor,
    iterations: int, kind: str, eps: float,
) -> Outputs:  # fmt: skip
    state = _fake_post(X, y, h_post, h_res)
    return state, *_fake_pre(state, phi, alpha, bias, iterations, kind, eps)


def _fake_like(*places: int) -> Callable[..., Outputs]:
    """Gradients: one tensor like each of the arguments at these places."""
    return lambda *args: tuple(args[place].new_empty(args[place].shape) for place in places)


def _check_state(X: Tensor, phi: Tensor, bias: Tensor, kind: str) -> int:
    if name_of(kind) not in KINDS.keys() | FUNCTIONS.keys():
        raise KernelError(f"kind must be one of {', '.join(map(repr, (*KINDS, *FUNCTIONS)))}, not {kind!r}.")
    n = streams_of(len(bias), kind)
    columns = 0 if is_static(kind) else len(bias)
    if n == 0 or phi.dim() != 2 or phi.shape[1] != columns:
        raise KernelError(
            f"phi has the shape {tuple(phi.shape)} and bias {tuple(bias.shape)}, which no number of streams has in "
            f"{kind!r}: both have a column for each coefficient of a site."
        )
    if X.dim() < 2 or X.shape[-2] not in (1, n) or phi.shape[0] != n * X.shape[-1]:
        raise KernelError(
            f"The streams have the shape {tuple(X.shape)} and phi {tuple(phi.shape)}. For {n} streams the former must "
            f"be (..., {n}, C), or (..., 1, C) where all streams are equal, and the latter ({n} C, {phi.shape[1]})."
        )
    return n


def _check_branch(X: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor) -> None:
    rows, columns = h_res.shape[-2:]
    want = (*X.shape[:-2], X.shape[-1]), (*X.shape[:-2], rows), (*X.shape[:-2], rows, columns)
    if (y.shape, h_post.shape, h_res.shape) != want or X.shape[-2] not in (1, columns):
        raise KernelError(
            f"The streams {tuple(X.shape)}, the branch's output {tuple(y.shape)}, H_post {tuple(h_post.shape)} and "
            f"H_res {tuple(h_res.shape)} do not go together: expected (..., n, C), (..., C), (..., n) and (..., n, n)."
        )


# -- registration -----------------------------------------------------------------------------------------------------


def _define(
    arguments: str, results: int, body: Callable[..., Any], fake: Callable[..., Any],
    X: int, y: int | None, coefficients: int, in_graphs: bool = False, state_first: bool = False,
    kind: int | None = None,
) -> Any:  # fmt: skip
    """Registers one operator.

    X, y, coefficients and kind are the places of the arguments that decide what runs it. `in_graphs`: the graphs of
    Dynamo hold it, so that it takes a `code`, which nothing reads; see `_code`. `state_first`: its first result is a
    state.
    """

    def run(*args: Any) -> Any:
        with _full_precision(args[0]):
            return body(*args[:-1] if in_graphs else args)

    def shapes(*args: Any) -> Any:
        return fake(*args[:-1] if in_graphs else args)

    def whole(*args: Any) -> bool:
        if sharding.is_dtensor(args[X]):  # asked again of each shard
            return True
        operands = args[X], None if y is None else args[y], args[coefficients]
        return (selection.kernels_for(*operands) if kind is None else _kernels(*operands, args[kind])) is gpu

    name, all_arguments = body.__name__.removeprefix("_"), arguments + ", str code" * in_graphs
    sharding.OPERATORS[name] = all_arguments, results
    schema = f"({all_arguments}) -> " + ("Tensor" if results == 1 else _tensors(results))
    run = on_one_device(arguments, run)
    alone = _detachable(run) if state_first else run
    operator = torch.library.custom_op(f"mhc_rewrite::{name}", alone, mutates_args=(), schema=schema)
    operator.register_fake(on_one_device(arguments, shapes))
    decompose_in_compiled_graphs(operator, run, unless=whole)
    return operator


def _detachable(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, whose first result is no view to autograd: schedules of pipelines detach in place what leaves a stage.

    Other results stay views, which nobody may write to: a block that writes to what it reads raises so. In compiled
    graphs there is nothing of the kind.
    """

    def detachable(*args: Any) -> Any:
        results = run(*args)
        if isinstance(results, Tensor):
            return torch.ops.aten._unsafe_view(results, results.shape)
        return torch.ops.aten._unsafe_view(results[0], results[0].shape), *results[1:]

    return detachable


def _full_precision(tensor: Tensor) -> torch.autocast:
    # Autocast would round the coefficients to bf16 without a word: row sums of H_res wrong by 3e-3 a site.
    return torch.autocast(tensor.device.type, enabled=False)


_STATE = "Tensor X, Tensor phi, Tensor alpha, Tensor bias"
_BRANCH = "Tensor X, Tensor y, Tensor h_post, Tensor h_res"
_PARAMETERS = "Tensor phi, Tensor alpha, Tensor bias"
# DTensor keeps what it has found for an operator by the arguments from the first integer on: the kind, which decides
# shapes, stands behind one.
_KIND = "int iterations, str kind"
_KEPT = "Tensor raw, Tensor r"


def _tensors(count: int) -> str:
    return "(" + ", ".join(["Tensor"] * count) + ")"


pre_operator = _define(f"{_STATE}, {_KIND}, float eps", 5, _pre, _fake_pre, 0, None, 1, in_graphs=True, kind=5)
pre_backward = _define(
    f"Tensor g_u, Tensor g_post, Tensor g_res, {_STATE}, {_KEPT}, {_KIND}", 4,
    _pre_backward, _fake_like(3, 4, 5, 6), 3, None, 4, kind=10,
)  # fmt: skip
post_operator = _define(_BRANCH, 1, _post, _fake_post, 0, 1, 3, in_graphs=True, state_first=True)
post_backward = _define(f"Tensor g_out, {_BRANCH}", 4, _post_backward, _fake_like(1, 2, 3, 4), 1, 2, 4)
post_collapse_operator = _define(_BRANCH, 1, _post_collapse, _fake_post_collapse, 0, 1, 3, in_graphs=True)
post_collapse_backward = _define(
    f"Tensor g_out, {_BRANCH}", 4, _post_collapse_backward, _fake_like(1, 2, 3, 4), 1, 2, 4
)
boundary_operator = _define(
    f"{_BRANCH}, {_PARAMETERS}, {_KIND}, float eps", 6, _boundary, _fake_boundary, 0, 1, 4, in_graphs=True,
    state_first=True, kind=8,
)  # fmt: skip
boundary_backward = _define(
    f"Tensor g_state, Tensor g_u, Tensor g_post, Tensor g_res, {_BRANCH}, {_PARAMETERS}, {_KEPT}, {_KIND}", 7,
    _boundary_backward, _fake_like(4, 5, 6, 7, 8, 9, 10), 4, 5, 8, kind=14,
)  # fmt: skip


# Never decomposed: this is what keeps the iterations out of compiled graphs. aten.py calls it from the bodies above,
# below autograd, so that a gradient formula would never be used.
def _define_whole(arguments: str, body: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    operator = torch.library.custom_op(
        f"mhc_rewrite::{body.__name__}",
        on_one_device(arguments, body),
        mutates_args=(),
        schema=f"({arguments}) -> Tensor",
    )
    operator.register_fake(on_one_device(arguments, fake))
    return operator


def _like_logits(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


_LOGITS = "Tensor logits, int iterations, float eps"
sinkhorn = _define_whole(_LOGITS, aten.sinkhorn, _like_logits)
sinkhorn_backward = _define_whole(f"Tensor g_res, {_LOGITS}", aten.sinkhorn_backward, _like_logits)


# -- gradients --------------------------------------------------------------------------------------------------------


def _keep_pre(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    *tensors, iterations, kind, _, _ = inputs
    raw, r = output[-2:]
    ctx.save_for_backward(*tensors, raw, r)
    ctx.mark_non_differentiable(raw, r)
    ctx.options = iterations, kind
    ctx.distributed = sharding.is_dtensor(tensors[0])


def _pre_gradients(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    return *_in_two_runs(ctx, pre_backward, gradients[:-2]), None, None, None, None


def _boundary_gradients(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    return *_in_two_runs(ctx, boundary_backward, gradients[:-2]), None, None, None, None


_PARAMETERS_LAST = 3  # phi, alpha, bias


def _in_two_runs(ctx: Any, backward: Any, gradients: Outputs) -> tuple[Tensor | None, ...]:
    """The gradients of an operator. Where a schedule of a pipeline asks for those of the parameters in a later run, in
    which the same gradients come in, they are kept for it: they are small, and the state is not needed again."""
    kept, ctx.kept = getattr(ctx, "kept", None), None
    if kept is not None:
        came, made = kept
        same = all(
            was() is now and version == now._version for (was, version), now in zip(came, gradients, strict=True)
        )
        others = len(ctx.next_functions) - _PARAMETERS_LAST
        if same and not any(asked_for(ctx)[:others]):
            return *[None] * others, *made
    saved = ctx.saved_tensors
    if ctx.distributed:  # of results that nobody used autograd has plain zeros
        gradients = tuple(
            g if sharding.is_dtensor(g) else saved[0].new_zeros(g.shape, dtype=g.dtype) for g in gradients
        )
    made = backward(*gradients, *saved, *ctx.options)
    if type(gradients[0]) is Tensor and not torch.is_grad_enabled() and runs_again() is not None:
        came = [(weakref.ref(gradient), gradient._version) for gradient in gradients]
        ctx.kept = came, made[-_PARAMETERS_LAST:]
    return made


def asks_once(node: Any) -> bool:
    """Whether a node is one of those operators' and asks for what it has saved in the first of two runs alone."""
    return str(node.name()).startswith("GeneratedBackwardFor_mhc_rewrite_")


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:-1])


def _post_gradients(ctx: Any, g_out: Tensor) -> tuple[Tensor | None, ...]:
    return *post_backward(g_out, *ctx.saved_tensors), None


def _post_collapse_gradients(ctx: Any, g_out: Tensor) -> tuple[Tensor | None, ...]:
    return *post_collapse_backward(g_out, *ctx.saved_tensors), None


pre_operator.register_autograd(_pre_gradients, setup_context=_keep_pre)
boundary_operator.register_autograd(_boundary_gradients, setup_context=_keep_pre)
post_operator.register_autograd(_post_gradients, setup_context=_keep_inputs)
post_collapse_operator.register_autograd(_post_collapse_gradients, setup_context=_keep_inputs)
