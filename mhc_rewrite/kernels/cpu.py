"""The operators on CPU tensors by cpp/operators.cpp. torch's extension tooling builds it at the first call that can
use it.

Nothing depends on it: where it cannot be built, a warning says why, once, and aten.py runs instead. The library is kept
with torch's extensions under a name that says what it was built from, so that later processes only load it; or in the
folder that MHC_REWRITE_CACHE or TORCH_EXTENSIONS_DIR names; or, where nothing can be written there, in a folder of the
user's own for temporary files.

Same functions, shapes and results as aten.py, for T >= 1 tokens in fp32, bf16 or fp16 with fp32 parameters. Each calls
an operator of its name in `mhc_rewrite_cpu`, declared below, which is what compiled graphs hold.
"""

from __future__ import annotations

import contextlib
import functools
import getpass
import hashlib
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mhc_rewrite.errors import KernelError
from mhc_rewrite.kernels.checks import on_one_device
from mhc_rewrite.kernels.kinds import KINDS, streams_of

Outputs = tuple[Tensor, ...]

SOURCE = Path(__file__).parent / "cpp" / "operators.cpp"
FLAGS = ("-O3", "-march=native", "-std=c++17")
# Compilers older than the processor do not find all of it by themselves.
NEWER = {"avx512_f": "-mavx512f", "avx512_bw": "-mavx512bw", "avx512_dq": "-mavx512dq", "avx512_vl": "-mavx512vl",
         "avx512_bf16": "-mavx512bf16"}  # fmt: skip
ROOM = 32 * 2**20  # bytes; what a build needs


@functools.cache
def available() -> bool:
    """Whether the kernels can be had on this machine; builds them if that was not tried yet."""
    try:
        torch.ops.load_library(built())
    except Exception as error:  # no compiler, no ninja, a read-only cache: all of them leave a slower, right way
        warnings.warn(
            f"The CPU kernels could not be built, so mHC sites run slower, in plain PyTorch. They need a C++ compiler "
            f"(g++ 12 or newer) and ninja (`pip install ninja`). What was said: {error}",
            stacklevel=2,
        )
        return False
    return True


class Library(NamedTuple):
    """The file that this machine's processor and torch need: where it belongs, and where it is put if it can't be."""

    name: str
    flags: tuple[str, ...]
    folders: tuple[Path, ...]

    @property
    def files(self) -> list[Path]:
        return [folder / f"{self.name}.so" for folder in self.folders]


def library() -> Library:
    """What is built here, and where."""
    processor = torch.cpu.get_capabilities()
    flags = (*FLAGS, *(flag for feature, flag in NEWER.items() if processor.get(feature)))
    sources = [file.read_bytes() for file in sorted(SOURCE.parent.iterdir())]
    # Another processor needs another library, be it in the same home directory.
    made_from = repr((sources, flags, torch.__version__, sorted(processor.items())))
    chosen = os.environ.get("MHC_REWRITE_CACHE") or os.environ.get("TORCH_EXTENSIONS_DIR")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "torch_extensions"
    folders = (Path(chosen) if chosen else cache, *_spare())
    return Library(f"mhc_rewrite_cpu_{hashlib.sha256(made_from.encode()).hexdigest()[:16]}", flags, folders)


def _spare() -> list[Path]:
    """The user's own folder for temporary files. Code is loaded from there: one that another user made will not do."""
    owners = hasattr(os, "getuid")
    # By number: in a container a user need not have a name.
    folder = Path(tempfile.gettempdir()) / f"mhc_rewrite-{os.getuid() if owners else getpass.getuser()}"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        if not owners or folder.stat().st_uid == os.getuid():
            return [folder]
    return []


def built() -> Path:
    """The library's file, built if it is not there.

    Raises:
        OSError: nothing can be written in any folder.
        RuntimeError: what the compiler says.
    """
    wanted = library()
    file, *spare = wanted.files
    if file.exists():
        return file
    try:
        return _built_in(file.parent, wanted)
    except OSError as error:  # read-only, or full
        if not spare:
            raise
        if not spare[0].exists():
            print(f"mhc_rewrite: {file.parent} can't be used ({error}); {spare[0].parent} instead.", file=sys.stderr)
            _built_in(spare[0].parent, wanted)
        return spare[0]


def _built_in(folder: Path, wanted: Library) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    # In a folder of its own, then moved: two processes that build at once do not wait for one another's locks.
    with tempfile.TemporaryDirectory(dir=folder) as build, _ninja_beside_python():
        if shutil.disk_usage(build).free < ROOM:
            raise OSError(f"less than {ROOM >> 20} MB are free")
        from torch.utils import cpp_extension  # brings setuptools along: half a second that loading does without

        print("mhc_rewrite: building the CPU kernels, once (about 20 seconds) ...", file=sys.stderr)
        flags = list(wanted.flags)
        cpp_extension.load(
            wanted.name, [str(SOURCE)], extra_cflags=flags, build_directory=build, is_python_module=False
        )
        os.replace(Path(build) / f"{wanted.name}.so", folder / f"{wanted.name}.so")
    return folder / f"{wanted.name}.so"


def programs() -> str:
    """Where programs are looked for: those of this Python's environment too, activated or not; `pip install ninja` puts
    it there."""
    return os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])


@contextlib.contextmanager
def _ninja_beside_python() -> Iterator[None]:
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = programs()
    try:
        yield
    finally:
        os.environ["PATH"] = before


# -- operators, where `available()` ------------------------------------------------------------------------------------


def pre(
    X: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, kind: str, iterations: int, eps: float
) -> tuple[Tensor, ...]:
    """As in aten.py: u, H_post, H_res, raw, r."""
    return torch.ops.mhc_rewrite_cpu.pre(X, phi, alpha, bias, *_rules(kind), iterations, eps)


def pre_backward(
    g_u: Tensor, g_post: Tensor, g_res: Tensor,
    X: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, raw: Tensor, r: Tensor, kind: str, iterations: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """As in aten.py: the gradients of X, phi, alpha and bias."""
    return torch.ops.mhc_rewrite_cpu.pre_backward(
        g_u, g_post, g_res, X, phi, alpha, bias, raw, r, *_rules(kind), iterations
    )


def post(X: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
    """As in aten.py: X' (T, rows, C)."""
    return torch.ops.mhc_rewrite_cpu.post(_wide(X, y), y, h_post, h_res)


def post_backward(g_out: Tensor, X: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor) -> tuple[Tensor, ...]:
    """As in aten.py: the gradients of X, y, H_post and H_res."""
    g_X, *rest = torch.ops.mhc_rewrite_cpu.post_backward(g_out, X.to(g_out.dtype), y, h_post, h_res)
    return g_X.to(X.dtype), *rest


def boundary(
    X: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor,
    phi: Tensor, alpha: Tensor, bias: Tensor, kind: str, iterations: int, eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """As in aten.py: X', u', H_post', H_res', raw', r'."""
    return torch.ops.mhc_rewrite_cpu.boundary(
        _wide(X, y), y, h_post, h_res, phi, alpha, bias, *_rules(kind), iterations, eps
    )


def boundary_backward(
    g_state: Tensor, g_u: Tensor, g_post: Tensor, g_res: Tensor,
    X: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor,
    phi: Tensor, alpha: Tensor, bias: Tensor, raw: Tensor, r: Tensor, kind: str, iterations: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """As in aten.py: the gradients of X, y, H_post, H_res, phi, alpha and bias."""
    g_X, *rest = torch.ops.mhc_rewrite_cpu.boundary_backward(
        g_state, g_u, g_post, g_res, X.to(g_state.dtype), y, h_post, h_res, phi, alpha, bias, raw, r,
        *_rules(kind), iterations,
    )  # fmt: skip
    return g_X.to(X.dtype), *rest


def project(X: Tensor, phi: Tensor, eps: float) -> tuple[Tensor, ...]:
    """As in aten.py: raw and r."""
    return torch.ops.mhc_rewrite_cpu.project(X, phi, eps)


def project_backward(
    g_u: Tensor, h_pre: Tensor, g_raw: Tensor, X: Tensor, phi: Tensor, raw: Tensor, r: Tensor
) -> tuple[Tensor, ...]:
    """As in aten.py: the gradients of X and phi."""
    return torch.ops.mhc_rewrite_cpu.project_backward(g_u, h_pre, g_raw, X, phi, raw, r)


def read(X: Tensor, h_pre: Tensor) -> Tensor:
    """As in aten.py: u (T, C)."""
    return torch.ops.mhc_rewrite_cpu.read(X, h_pre)


def read_products(g_u: Tensor, X: Tensor) -> Tensor:
    """As in aten.py: the gradient of H_pre (T, S)."""
    return torch.ops.mhc_rewrite_cpu.read_products(g_u, X)


def post_project(X: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor, phi: Tensor, eps: float) -> tuple[Tensor, ...]:
    """As in aten.py: X', raw, r."""
    return torch.ops.mhc_rewrite_cpu.post_project(_wide(X, y), y, h_post, h_res, phi, eps)


def post_read_products(g_u: Tensor, X: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
    """As in aten.py: the gradient of H_pre (T, n)."""
    return torch.ops.mhc_rewrite_cpu.post_read_products(g_u, _wide(X, y), y, h_post, h_res)


def post_project_backward(
    g_state: Tensor, g_u: Tensor, h_pre: Tensor, g_raw: Tensor,
    X: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor, phi: Tensor, raw: Tensor, r: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """As in aten.py: the gradients of X, y, H_post, H_res and phi."""
    g_X, *rest = torch.ops.mhc_rewrite_cpu.post_project_backward(
        g_state, g_u, h_pre, g_raw, _wide(X, y), y, h_post, h_res, phi, raw, r
    )
    return g_X.to(X.dtype), *rest


def _wide(X: Tensor, y: Tensor) -> Tensor:
    """The streams in the wider dtype of the two, so that what is not written out in operators.cpp never arises."""
    return X.to(torch.promote_types(X.dtype, y.dtype))


def _rules(kind: str) -> tuple[bool, bool, float]:
    rules = KINDS[kind]
    return rules.constrained, rules.transposed, rules.eps


# -- declarations of what operators.cpp defines ------------------------------------------------------------------------


def _declare(name: str, arguments: str, results: int, shapes: Callable[..., Tensor | Outputs]) -> None:
    made = "Tensor" if results == 1 else "(" + ", ".join(["Tensor"] * results) + ")"
    torch.library.define(
        f"mhc_rewrite_cpu::{name}", f"({arguments}) -> {made}", tags=torch.Tag.needs_contiguous_strides
    )
    torch.library.register_fake(f"mhc_rewrite_cpu::{name}", on_one_device(arguments, shapes))

    def load_and_call(*args: Any) -> Any:
        if not available():
            raise KernelError("This graph was made for the CPU kernels, which can't be had here: make it again here.")
        return getattr(torch.ops.mhc_rewrite_cpu, name)(*args)

    # What was compiled or exported in another process comes here once: the library's own rule goes before this one.
    torch.library.impl(f"mhc_rewrite_cpu::{name}", "default", load_and_call)


def _shapes_of_post(X: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
    return X.new_empty(X.shape[0], h_res.shape[1], X.shape[2])


def _shapes_of_pre(X: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, constrained: bool, *_: Any) -> Outputs:
    tokens, width, columns = X.shape[0], X.shape[2], phi.shape[1]
    n, norms = streams_of(columns), 1 if constrained else streams_of(columns)
    shapes = (tokens, n), (tokens, n, n), (tokens, columns), (tokens, norms)
    return X.new_empty(tokens, width), *map(phi.new_empty, shapes)


def _shapes_of_boundary(X: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor, *site: Any) -> Outputs:
    state = _shapes_of_post(X, y, h_post, h_res)
    return state, *_shapes_of_pre(state, *site)


def _shapes_of_project(X: Tensor, phi: Tensor, eps: float) -> Outputs:
    return phi.new_empty(X.shape[0], phi.shape[1]), phi.new_empty(X.shape[0], 1)


def _shapes_of_post_project(X: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor, phi: Tensor, eps: float) -> Outputs:
    return _shapes_of_post(X, y, h_post, h_res), *_shapes_of_project(X, phi, eps)


def _shapes_of_read(X: Tensor, h_pre: Tensor) -> Tensor:
    return X.new_empty(X.shape[0], X.shape[2])


def _shapes_of_read_products(g_u: Tensor, X: Tensor) -> Tensor:
    return X.new_empty(X.shape[:2], dtype=torch.float32)


def _shapes_of_post_read_products(g_u: Tensor, X: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
    return h_post.new_empty(h_post.shape)


def _like(first: int, last: int) -> Callable[..., Outputs]:
    """Gradients: one tensor like each of the arguments at these places."""
    return lambda *args: tuple(map(torch.empty_like, args[first:last]))


_SITE = "Tensor phi, Tensor alpha, Tensor bias"
_BRANCH = "Tensor X, Tensor y, Tensor h_post, Tensor h_res"
_GRADIENTS = "Tensor g_u, Tensor g_post, Tensor g_res"
_KEPT = "Tensor raw, Tensor r"
_RULES = "bool constrained, bool transposed, float eps_kind, int iterations"

_declare("pre", f"Tensor X, {_SITE}, {_RULES}, float eps", 5, _shapes_of_pre)
_declare("pre_backward", f"{_GRADIENTS}, Tensor X, {_SITE}, {_KEPT}, {_RULES}", 4, _like(3, 7))
_declare("post", _BRANCH, 1, _shapes_of_post)
_declare("post_backward", f"Tensor g_out, {_BRANCH}", 4, _like(1, 5))
_declare("boundary", f"{_BRANCH}, {_SITE}, {_RULES}, float eps", 6, _shapes_of_boundary)
_declare(
    "boundary_backward", f"Tensor g_state, {_GRADIENTS}, {_BRANCH}, {_SITE}, {_KEPT}, {_RULES}", 7,
    _like(4, 11),
)  # fmt: skip
_declare("project", "Tensor X, Tensor phi, float eps", 2, _shapes_of_project)
_declare("project_backward", f"Tensor g_u, Tensor h_pre, Tensor g_raw, Tensor X, Tensor phi, {_KEPT}", 2, _like(3, 5))
_declare("post_project", f"{_BRANCH}, Tensor phi, float eps", 3, _shapes_of_post_project)
_declare(
    "post_project_backward",
    f"Tensor g_state, Tensor g_u, Tensor h_pre, Tensor g_raw, {_BRANCH}, Tensor phi, {_KEPT}", 5, _like(4, 9),
)  # fmt: skip
_declare("read", "Tensor X, Tensor h_pre", 1, _shapes_of_read)
_declare("read_products", "Tensor g_u, Tensor X", 1, _shapes_of_read_products)
_declare("post_read_products", f"Tensor g_u, {_BRANCH}", 1, _shapes_of_post_read_products)
