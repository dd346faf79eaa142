"""The operators as demos/gpu_check.py takes them: their operands, what they must move, and who else implements them.

Beside this package's operators stand aten.py eager and compiled, and, where installed, Liger's and TransformerEngine's.
The last two are called as their documentation says, each in its own layout, prepared before the clock starts. How they
order Sinkhorn-Knopp's passes is their own. TransformerEngine was not there when this ran on a GPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mhc_rewrite.kernels import aten, ops, reference

ITERATIONS, EPS = 20, 1e-6
STATE, BRANCH = ("X", "phi", "alpha", "bias"), ("X", "y", "h_post", "h_res")
Outputs = tuple[Tensor, ...]


class Size(NamedTuple):
    """`given`: streams in memory, 1 where all are equal still."""

    tokens: int
    n: int
    width: int
    given: int | None = None

    def __str__(self) -> str:
        return f"{self.tokens} x {self.n} x {self.width}" + (f", {self.given} given" if self.given else "")


class Operator(NamedTuple):
    """`outputs`: those that have gradients; `raw` and `r` come behind them."""

    run: Callable[..., Any]
    truth: Callable[..., Any]
    operands: tuple[str, ...]
    outputs: int

    def options(self, kind: str) -> tuple[Any, ...]:
        return (kind, ITERATIONS, EPS) if "phi" in self.operands else ()


OPERATORS = {
    "pre": Operator(ops.pre, reference.pre, STATE, 3),
    "post": Operator(ops.post, reference.post, BRANCH, 1),
    "post_collapse": Operator(ops.post_collapse, lambda *args: reference.post(*args).mean(-2), BRANCH, 1),
    "boundary": Operator(ops.boundary, reference.boundary, (*BRANCH, "phi", "alpha", "bias"), 4),
}


def operands(size: Size, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """By name: streams in `dtype`, coefficients and parameters in fp32. The same numbers on every device."""
    tokens, n, width, given = size
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    values = {
        "X": random(tokens, given or n, width).to(dtype),
        "y": random(tokens, width).to(dtype),
        "h_post": 2 * random(tokens, n).sigmoid(),
        "h_res": random(tokens, n, n).softmax(-1),
        "phi": random(n * width, n * n + 2 * n) / (n * width) ** 0.5,
        "alpha": torch.tensor([0.7, -0.4, 1.3]),
        "bias": random(n * n + 2 * n),
    }
    return {name: value.to(device) for name, value in values.items()}


def bytes_moved(name: str, size: Size, dtype: torch.dtype, backward: bool) -> int:
    """What the operator must read and write, forward, or forward and backward; parameters and their gradients apart.

    With n streams in memory: pre reads nC and writes C, post (n + 1)C and nC, boundary (n + 1)C and (n + 1)C; the
    gradients (n + 1)C and nC, (2n + 1)C and (n + 1)C, (2n + 2)C and (n + 1)C. Coefficients, raw and r are fp32.
    """
    tokens, n, width, _ = size
    made = n + n * n
    kept = n * n + 2 * n + 1
    streams, coefficients = {
        "pre": (n + 1, made + kept),
        "post": (2 * n + 1, made),
        "post_collapse": (n + 2, made),
        "boundary": (2 * n + 2, 2 * made + kept),
    }[name]
    if backward:
        more_streams, more_coefficients = {
            "pre": (2 * n + 1, made + kept),
            "post": (3 * n + 2, 2 * made),
            "post_collapse": (2 * n + 3, 2 * made),
            "boundary": (3 * n + 3, 3 * made + kept),
        }[name]
        streams, coefficients = streams + more_streams, coefficients + more_coefficients
    return tokens * (streams * width * dtype.itemsize + 4 * coefficients)


def distance(got: Tensor, truth: Tensor) -> float:
    """NaN where a shape is wrong or an element was never written."""
    return float((got.double() - truth).norm()) if got.shape == truth.shape else float("nan")


# -- who computes it --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    """One operator on prepared operands.

    Attributes:
        forward: runs it; the first output comes first.
        both: forward and the gradients of all operands.
        layout: brings the first output into this project's layout.
    """

    forward: Callable[[], Outputs]
    both: Callable[[], Any]
    layout: Callable[[Tensor], Tensor] = lambda out: out


class NotHere(Exception):
    """Why a contender does not take part."""


def _as_tuple(out: Any) -> Outputs:
    return (out,) if isinstance(out, Tensor) else tuple(out)


def _by_autograd(
    run: Callable[..., Any], values: list[Tensor], count: int, layout: Callable[[Tensor], Tensor] = lambda out: out
) -> Contender:
    leaves = [value.detach().clone().requires_grad_() for value in values]

    def forward() -> Outputs:
        with torch.no_grad():
            return _as_tuple(run(*leaves))

    weights = [torch.randn_like(out) for out in forward()[:count]]
    return Contender(
        forward, lambda: torch.autograd.grad(_as_tuple(run(*leaves))[:count], leaves, weights), layout
    )  # fmt: skip


def ours(name: str, values: dict[str, Tensor]) -> Contender:
    operator = OPERATORS[name]
    options = operator.options("mhc")
    given = [values[operand] for operand in operator.operands]
    return _by_autograd(lambda *args: operator.run(*args, *options), given, operator.outputs)


def eager(name: str, values: dict[str, Tensor], change: Callable[..., Any] = lambda function: function) -> Contender:
    """aten.py's own gradients, not autograd's; `change` is applied to forward and backward."""
    operator = OPERATORS[name]
    own, own_backward = {
        "pre": (aten.pre, aten.pre_backward),
        "post": (aten.post, aten.post_backward),
        "post_collapse": (_collapse, _collapse_backward),
        "boundary": (aten.boundary, aten.boundary_backward),
    }[name]
    run, run_backward = change(own), change(own_backward)
    given, options = [values[operand] for operand in operator.operands], operator.options("mhc")

    def forward() -> Outputs:
        return _as_tuple(run(*given, *options))

    first = forward()
    weights = [torch.randn_like(out) for out in first[: operator.outputs]]

    def both() -> Any:
        kept = forward()[operator.outputs :]
        return run_backward(*weights, *given, *kept, *options[:2])

    return Contender(forward, both, lambda out: out.squeeze(1) if name == "post_collapse" else out)


def _collapse(X: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
    return aten.post(X, y, h_post.mean(-1, keepdim=True), h_res.mean(-2, keepdim=True))


def _collapse_backward(g: Tensor, X: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor) -> Outputs:
    return aten.post_backward(g, X, y, h_post.mean(-1, keepdim=True), h_res.mean(-2, keepdim=True))


def compiled(name: str, values: dict[str, Tensor]) -> Contender:
    """Sinkhorn-Knopp stays one eager operator in these graphs: unrolled it takes a minute to compile."""
    return eager(name, values, lambda function: torch.compile(function, dynamic=False, fullgraph=True))


def liger(name: str, values: dict[str, Tensor]) -> Contender:
    """liger_kernel: coefficients, the sum over streams and post are a function each; phi in the streams' dtype."""
    functional = _imported("liger_kernel.transformers.functional", "liger_mhc_coeffs")
    dtype = values["X"].dtype

    def pre(X: Tensor, phi: Tensor, bias: Tensor, *alphas: Tensor) -> Outputs:
        h_pre, h_post, h_res = functional.liger_mhc_coeffs(
            X, phi, bias, *alphas, allow_fp32=dtype == torch.float32, tmax=ITERATIONS, rms_eps=EPS
        )
        return functional.liger_mhc_pre(X, h_pre), h_post, h_res

    def boundary(X: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor, *parameters: Tensor) -> Outputs:
        state = functional.liger_mhc_post_res(X, y, h_post, h_res)
        return state, *pre(state, *parameters)

    branch = [values[operand] for operand in BRANCH]
    parameters = [values["phi"].to(dtype), values["bias"], *values["alpha"]]
    return {
        "pre": lambda: _by_autograd(pre, [values["X"], *parameters], 3),
        "post": lambda: _by_autograd(functional.liger_mhc_post_res, branch, 1),
        "post_collapse": lambda: _by_autograd(lambda *args: functional.liger_mhc_post_res(*args).mean(-2), branch, 1),
        "boundary": lambda: _by_autograd(boundary, [*branch, *parameters], 4),
    }[name]()


def transformer_engine(name: str, values: dict[str, Tensor]) -> Contender:
    """TransformerEngine: four streams, the streams' axis last, phi transposed, H_res as [in, out]."""
    mhc = _imported("transformer_engine.pytorch.triton.mhc", "mhc_generate_mix_and_aggregate")
    _, n, width = values["X"].shape
    if n != 4:
        raise NotHere("four streams only")
    last = values["X"].mT.contiguous().unsqueeze(1)  # (tokens, 1, C, n)
    phi = values["phi"].unflatten(0, (n, width)).transpose(0, 1).flatten(0, 1).T.contiguous()
    parameters = [phi, values["alpha"], values["bias"].unsqueeze(0)]
    branch = [
        values["y"].unsqueeze(1), values["h_post"].unsqueeze(1), last, values["h_res"].mT.contiguous().unsqueeze(1),
    ]  # fmt: skip

    def post(y: Tensor, h_post: Tensor, X: Tensor, h_res: Tensor) -> Tensor:
        return mhc.mhc_fused_expand_combine(y, None, h_post, X, h_res)

    def boundary(y: Tensor, h_post: Tensor, X: Tensor, h_res: Tensor, *parameters: Tensor) -> Outputs:
        state = post(y, h_post, X, h_res)
        return state, *mhc.mhc_generate_mix_and_aggregate(state, *parameters)

    def layout(out: Tensor) -> Tensor:
        return out.squeeze(1).mT if out.dim() == 4 else out.squeeze(1)

    return {
        "pre": lambda: _by_autograd(mhc.mhc_generate_mix_and_aggregate, [last, *parameters], 3, layout),
        "post": lambda: _by_autograd(post, branch, 1, layout),
        "post_collapse": lambda: _by_autograd(lambda *args: post(*args).mean(-1), branch, 1, layout),
        "boundary": lambda: _by_autograd(boundary, [*branch, *parameters], 4, layout),
    }[name]()


def _imported(module: str, function: str) -> Any:
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError:
        raise NotHere("not installed") from None
    except Exception as error:
        raise NotHere(f"its import fails: {error}") from error
    if not hasattr(found, function):
        raise NotHere(f"the installed version has no {function}")
    return found


CONTENDERS: dict[str, Callable[[str, dict[str, Tensor]], Contender]] = {
    "ours": ours,
    "eager aten": eager,
    "compiled aten": compiled,
    "Liger": liger,
    "TransformerEngine": transformer_engine,
}
