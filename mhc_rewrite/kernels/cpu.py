"""The operators on CPU tensors by cpp/operators.cpp. torch's extension tooling builds it at the first call that can
use it.

Nothing depends on it: where it cannot be built, a warning says why, once, and aten.py runs instead. The library is kept
in torch's extension cache under a name that says what it was built from, so that later processes only load it.

Same functions, shapes and results as aten.py, for T >= 1 tokens in fp32, bf16 or fp16 with fp32 parameters.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mhc_rewrite.kernels.kinds import KINDS, streams_of

SOURCE = Path(__file__).parent / "cpp" / "operators.cpp"
FLAGS = ("-O3", "-march=native", "-std=c++17")
# Compilers older than the processor do not find all of it by themselves.
NEWER = {"avx512_f": "-mavx512f", "avx512_bw": "-mavx512bw", "avx512_dq": "-mavx512dq", "avx512_vl": "-mavx512vl",
         "avx512_bf16": "-mavx512bf16"}  # fmt: skip
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def available() -> bool:
    """Whether the kernels can be had on this machine; builds them if that was not tried yet."""
    return _library() is not None


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(str(_built()))
    except Exception as error:  # no compiler, no ninja, a read-only cache: all of them leave a slower, right way
        warnings.warn(
            f"The CPU kernels could not be built, so mHC sites run slower, in plain PyTorch. They need a C++ compiler "
            f"(g++ 12 or newer) and ninja (`pip install ninja`). What was said: {error}",
            stacklevel=2,
        )
        return None
    library.mhc_forward.argtypes = _types("IIIIIIII D I D PPPPP PPP PPPPP")
    library.mhc_backward.argtypes = _types("IIIIIIII D I PPPP PPPP PPP PP PPPP PPP")
    library.mhc_post.argtypes = _types("IIIIII PPPPP")
    library.mhc_post_backward.argtypes = _types("IIIIII PPPPP PPPP")
    return library


def _types(letters: str) -> list[Any]:
    kinds = {"I": ctypes.c_int64, "D": ctypes.c_double, "P": ctypes.c_void_p}
    return [kinds[letter] for letter in letters if letter != " "]


def _built() -> Path:
    """The library's file, built if it is not there."""
    from torch.utils import cpp_extension

    processor = torch.cpu.get_capabilities()
    flags = [*FLAGS, *(flag for feature, flag in NEWER.items() if processor.get(feature))]
    sources = [file.read_bytes() for file in sorted(SOURCE.parent.iterdir())]
    # Another processor needs another library, be it in the same home directory.
    made_from = repr((sources, flags, torch.__version__, sorted(processor.items())))
    name = f"mhc_rewrite_cpu_{hashlib.sha256(made_from.encode()).hexdigest()[:16]}"
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    library = folder / f"{name}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        print("mhc_rewrite: building the CPU kernels, once (about 20 seconds) ...", file=sys.stderr)
        # In a folder of its own, then moved: two processes that build at once do not wait for one another's locks.
        with tempfile.TemporaryDirectory(dir=folder) as build, _ninja_beside_python():
            cpp_extension.load(name, [str(SOURCE)], extra_cflags=flags, build_directory=build, is_python_module=False)
            os.replace(Path(build) / f"{name}.so", library)
    return library


@contextlib.contextmanager
def _ninja_beside_python() -> Iterator[None]:
    """Inside, programs of this Python's environment are found, activated or not: `pip install ninja` puts it there."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([before, str(Path(sys.executable).parent)])
    try:
        yield
    finally:
        os.environ["PATH"] = before


# -- operators --------------------------------------------------------------------------------------------------------


def pre(
    X: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, kind: str, iterations: int, eps: float
) -> tuple[Tensor, ...]:
    """As in aten.py: u, H_post, H_res, raw, r."""
    return _forward(X, (), (), phi, alpha, bias, kind, iterations, eps)


def boundary(
    X: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor,
    phi: Tensor, alpha: Tensor, bias: Tensor, kind: str, iterations: int, eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """As in aten.py: X', u', H_post', H_res', raw', r'."""
    X = X.to(torch.promote_types(X.dtype, y.dtype))
    state = X.new_empty((X.shape[0], h_res.shape[1], X.shape[2]))
    return state, *_forward(X, (y, h_post, h_res), (state,), phi, alpha, bias, kind, iterations, eps)


def _forward(
    X: Tensor, mix: tuple[Tensor, ...], state: tuple[Tensor, ...],
    phi: Tensor, alpha: Tensor, bias: Tensor, kind: str, iterations: int, eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    (tokens, streams, width), n, rules = X.shape, streams_of(phi.shape[1]), KINDS[kind]
    u = X.new_empty((tokens, width))
    sizes = ((tokens, n), (tokens, n, n), (tokens, phi.shape[1]), (tokens, 1 if rules.constrained else n))
    outputs = tuple(phi.new_empty(size) for size in sizes)
    _call().mhc_forward(
        *_dtypes(X, *mix[:1]), tokens, width, streams, n, rules.constrained, rules.transposed, rules.eps, iterations,
        eps, _at(X), *_some(3, mix), *_some(1, state), *map(_at, (phi, alpha, bias)), *map(_at, (u, *outputs)),
    )  # fmt: skip
    return u, *outputs


def pre_backward(
    g_u: Tensor, g_post: Tensor, g_res: Tensor,
    X: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, raw: Tensor, r: Tensor, kind: str, iterations: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """As in aten.py: the gradients of X, phi, alpha and bias."""
    return _backward((), (g_u, g_post, g_res), X, (), (phi, alpha, bias), (raw, r), kind, iterations)


def boundary_backward(
    g_state: Tensor, g_u: Tensor, g_post: Tensor, g_res: Tensor,
    X: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor,
    phi: Tensor, alpha: Tensor, bias: Tensor, raw: Tensor, r: Tensor, kind: str, iterations: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """As in aten.py: the gradients of X, y, H_post, H_res, phi, alpha and bias."""
    mix = (y, h_post, h_res)
    g_X, *rest = _backward(
        (g_state,), (g_u, g_post, g_res), X.to(g_state.dtype), mix, (phi, alpha, bias), (raw, r), kind, iterations
    )
    return g_X.to(X.dtype), *rest


def _backward(
    g_state: tuple[Tensor, ...], given: tuple[Tensor, ...], X: Tensor, mix: tuple[Tensor, ...],
    parameters: tuple[Tensor, ...], kept: tuple[Tensor, ...], kind: str, iterations: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    (tokens, streams, width), n, rules = X.shape, streams_of(parameters[0].shape[1]), KINDS[kind]
    g_X, g_mix = torch.empty_like(X), tuple(torch.empty_like(operand) for operand in mix)
    g_parameters = tuple(torch.empty_like(parameter) for parameter in parameters)
    _call().mhc_backward(
        *_dtypes(X, *mix[:1]), tokens, width, streams, n, rules.constrained, rules.transposed, rules.eps, iterations,
        *_some(1, g_state), *map(_at, given), _at(X), *_some(3, mix), *map(_at, parameters), *map(_at, kept),
        _at(g_X), *_some(3, g_mix), *map(_at, g_parameters),
    )  # fmt: skip
    return g_X, *g_mix, *g_parameters


def post(X: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
    """As in aten.py: X' (T, rows, C)."""
    X = X.to(torch.promote_types(X.dtype, y.dtype))
    (tokens, streams, width), rows = X.shape, h_res.shape[1]
    out = X.new_empty((tokens, rows, width))
    operands = map(_at, (X, y, h_post, h_res, out))
    _call().mhc_post(*_dtypes(X, y), tokens, width, streams, rows, *operands)
    return out


def post_backward(g_out: Tensor, X: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor) -> tuple[Tensor, ...]:
    """As in aten.py: the gradients of X, y, H_post and H_res."""
    (tokens, streams, width), rows = X.shape, h_res.shape[1]
    given = X.to(g_out.dtype), y, h_post, h_res
    made = tuple(torch.empty_like(operand) for operand in given)
    operands = map(_at, (g_out, *given, *made))
    _call().mhc_post_backward(*_dtypes(*given[:2]), tokens, width, streams, rows, *operands)
    return made[0].to(X.dtype), *made[1:]


def _call() -> ctypes.CDLL:
    library = _library()
    assert library is not None, "called where `available()` is false"
    return library


def _dtypes(X: Tensor, y: Tensor | None = None) -> tuple[int, int]:
    """X has the wider of the two dtypes, so that what is not written out in operators.cpp never arises."""
    return TYPES[X.dtype], TYPES[X.dtype if y is None else y.dtype]


def _some(count: int, tensors: tuple[Tensor, ...]) -> Sequence[int | None]:
    """Addresses of tensors that are there together or not at all."""
    return [*map(_at, tensors)] or [None] * count


def _at(tensor: Tensor) -> int:
    assert tensor.is_contiguous()
    return tensor.data_ptr()
