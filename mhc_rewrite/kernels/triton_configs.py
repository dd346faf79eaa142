"""How the Triton kernels are cut into programs: named configurations, a fixed default for every size, and overrides.

Nothing is tuned unless `tune` is called: the defaults follow from n, C and the number of tokens alone. Those for n = 4
were the fastest of about a thousand on an H100, bf16, at 8192 x 4 x 2560 and 4096 x 4 x 7168 (demos/gpu_all.py, part
sweep), `unmix` excepted, which is newer; those for n = 8 the fastest of about two hundred at 8192 x 8 x 2560, of those
that hardly spill; those for other numbers of streams follow from registers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Config:
    """Block sizes of one kernel.

    Attributes:
        name: what `using` calls it.
        tokens: tokens of a block.
        width: elements of C of a block; a power of two.
        warps, stages: Triton's num_warps and num_stages.
        parts: into how many parts at most what a block would otherwise do alone is cut: the tokens in `pre_parameters`
            and `boundary_parameters`, C elsewhere.
    """

    name: str
    tokens: int
    width: int
    warps: int
    stages: int = 2
    parts: int = 1


@dataclass(frozen=True)
class Launch:
    """One kernel launch as data: `run` launches it, the tests compile it for GPUs that are not there."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    config: Config

    def run(self) -> None:
        # Triton launches on the current device; the first argument of every kernel is a tensor.
        device = next(iter(self.arguments.values())).device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self._run()
        self._run()

    def _run(self) -> None:
        options = {"num_warps": self.config.warps, "num_stages": self.config.stages}
        self.kernel[self.grid](**self.arguments, **self.constants, **options)


_overrides: dict[str, str | Config] = {}


def choose(kernel: str, n: int, width: int, tokens: int) -> Config:
    """The configuration of a kernel for n streams of `width` elements."""
    chosen = _overrides.get(kernel, "default")
    return chosen if isinstance(chosen, Config) else _named(kernel, chosen, n, width, tokens, lanes())


@functools.lru_cache(maxsize=1024)  # every call of an operator asks
def _named(kernel: str, name: str, n: int, width: int, tokens: int, _lanes: int) -> Config:
    return next(config for config in configurations(kernel, n, width, tokens) if config.name == name)


def configurations(kernel: str, n: int, width: int, tokens: int) -> list[Config]:
    """Everything that can be picked for a kernel; the first is the default. The names do not depend on the sizes.

    Raises:
        KeyError: there is no such kernel.
    """
    return _TABLE[kernel](n, power_of_two(width), tokens)


def _post(n: int, width: int, tokens: int) -> list[Config]:
    # Every thread takes 8 neighbouring elements of a row: 16-byte accesses in bf16. Coefficients are the same for a
    # row; more streams leave registers for less of it.
    warps, each = (4, 8) if n <= 4 else (2, 8) if n <= 8 else (4, 4)
    columns = min(width, 256 if n <= 4 else 128 if n <= 8 else 64)
    default = Config("default", max(1, each * warps * lanes() // columns), columns, warps)
    fewer = dataclasses.replace(default, name="few_warps", tokens=max(1, default.tokens // 2), warps=warps // 2)
    return [default, fewer]


def _unmix(n: int, width: int, tokens: int) -> list[Config]:
    # As the gradient of `post`, but all streams are in registers together with all gradients.
    if n <= 4:
        return [dataclasses.replace(_post(n, width, tokens)[0], name="default")]
    each, columns = (8, min(width, 256)) if n <= 8 else (4, min(width, 64))
    return [Config("default", max(1, each * 4 * lanes() // columns), columns, 4)]


def _pre(n: int, width: int, tokens: int) -> list[Config]:
    """For many tokens cut into a few parts; for few into many; where rows are short one launch is enough."""
    # phi is read once a block of tokens: more columns of phi call for larger blocks, and shorter rows then. More than
    # 256 columns, of 16 streams, take all of a multiprocessor's shared memory, and more, at 128 tokens.
    split = Config(
        "split", 128 if n <= 15 else 64, min(max(width, 16), 64 if n <= 4 else 16), 8,
        4 if n <= 4 else 3 if n <= 8 else 2, _parts(tokens, 128, 512 if n <= 4 else 256),
    )  # fmt: skip
    block = 32 if n <= 4 else 16
    whole = Config("whole", block, min(max(width, 16), 64 if n <= 2 else 32 if n <= 8 else 16), 4)
    few = Config("few", 16, min(max(width, 16), 64 if n <= 4 else 32 if n <= 15 else 16), 8 if n <= 4 else 4, parts=64)
    chosen = whole if width < 256 else few if tokens <= 64 else split
    return [dataclasses.replace(chosen, name="default"), whole, split, few]


def _parts(tokens: int, block: int, programs: int) -> int:
    """Into how many parts C is cut, four at least: with few blocks of tokens, for about so many programs."""
    return min(64, max(4, programs * block // tokens))


def _finish(n: int, width: int, tokens: int) -> list[Config]:
    if tokens <= 64:
        return [Config("default", 16 if n <= 4 else 8, min(max(width, 16), 64), 8 if n <= 4 else 4, parts=64)]
    return [Config("default", 8, min(max(width, 16), 128), 2 if n <= 4 else 4, parts=_parts(tokens, 8, 1024))]


def _dots(n: int, width: int, tokens: int) -> list[Config]:
    return [Config("default", 1, min(width, 512), 4)]


def _coefficients(n: int, width: int, tokens: int) -> list[Config]:
    return [Config("default", 4, 1, 1 if n <= 8 else 4)]


def _state(n: int, width: int, tokens: int) -> list[Config]:
    few, small = tokens <= 64, n <= 4
    block, parts = (16, _parts(tokens, 16, 2048)) if few else (64, _parts(tokens, 64, 2048))
    columns, warps, stages = (64, 4, 1) if few else (64, 8, 1) if small else (32, 4, 3)
    default = Config("default", block, min(max(width, 16), columns), warps, stages, parts)
    return [default, dataclasses.replace(default, name="four_warps", tokens=min(block, 32), warps=4)]


def _pre_parameters(n: int, width: int, tokens: int) -> list[Config]:
    # A block holds the gradients of phi's rows for all streams, `width` rows of each: 128 in all, or 256.
    columns = max(min(width, 64 if n <= 2 else 32 if n <= 8 else 8), 16 // power_of_two(n))
    # About two programs a multiprocessor, and few more parts than that takes: each writes its sums to memory.
    small = n <= 4
    default = Config(
        "default", 64 if small else 32, columns, 4 if small else 8, 3 if n <= 8 else 2, 256 if small else 512
    )
    return [default, dataclasses.replace(default, name="few_parts", parts=default.parts // 2)]


def _boundary_parameters(n: int, width: int, tokens: int) -> list[Config]:
    wide = 64 if n <= 4 else 32 if n <= 8 else 8
    if lanes() == 64 and 2 < n <= 8:  # AMD's compiler puts hundreds of bytes aside
        wide //= 2
    columns = max(min(width, wide), 16 // power_of_two(n))
    default = Config("default", 32, columns, 4 if n <= 4 else 8, 3 if 4 < n <= 8 else 2, 256)
    return [default, dataclasses.replace(default, name="few_parts", parts=default.parts // 2)]


_TABLE: dict[str, Callable[[int, int, int], list[Config]]] = {
    "post": _post,
    "post_backward": _post,
    "unmix": _unmix,
    "pre": _pre,
    "finish": _finish,
    "dots": _dots,
    "coefficients": _coefficients,
    "state": _state,
    "pre_parameters": _pre_parameters,
    "boundary_parameters": _boundary_parameters,
}
KERNELS = tuple(_TABLE)


@contextlib.contextmanager
def using(kernel: str, name: str | Config) -> Iterator[None]:
    """Inside, a kernel takes the configuration of this name, or the one given.

    Raises:
        KeyError: there is none of this name.
    """
    before = _overrides.get(kernel)
    _override(kernel, name)
    try:
        yield
    finally:
        _overrides.pop(kernel)
        if before is not None:
            _overrides[kernel] = before


def tune(kernel: str, launches: Callable[[], list[Launch]]) -> str:
    """Times every configuration of a kernel on the GPU at hand; from then on the process takes the fastest.

    Args:
        kernel: a kernel of the table.
        launches: makes what is timed, at the sizes of interest, and asks `choose` on the way.

    Returns:
        The name of the fastest.
    """
    from triton.testing import do_bench

    def run(made: list[Launch]) -> None:
        for launch in made:
            launch.run()

    times = {}
    for name in _names(kernel):
        with using(kernel, name):
            times[name] = do_bench(functools.partial(run, launches()))
    fastest = min(times, key=times.__getitem__)
    _override(kernel, fastest)
    return fastest


def _override(kernel: str, name: str | Config) -> None:
    names = _names(kernel)
    if isinstance(name, str) and name not in names:
        raise KeyError(f"{kernel} has no configuration {name!r}; it has {', '.join(sorted(names))}.")
    _overrides[kernel] = name


def _names(kernel: str) -> list[str]:
    return [config.name for config in configurations(kernel, 4, 768, 4096)]


def power_of_two(size: int) -> int:
    """The next power of two."""
    return 1 << max(size - 1, 0).bit_length()


def padded(columns: int) -> int:
    """Columns of a tile that is given to `tl.dot`."""
    return max(16, power_of_two(columns))


def precision() -> str:
    """How `tl.dot` multiplies fp32: three tf32 products where tensor cores have them, plain fp32 on AMD, where tf32
    does not compile on every chip."""
    return "ieee" if torch.version.hip else "tf32x3"


def gradient_precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies fp32 for a gradient that is rounded to `dtype`: tf32 errs by an eighth of what bf16 does,
    and as fp16 does."""
    return precision() if dtype == torch.float32 or torch.version.hip else "tf32"


def cut(width: int, config: Config) -> tuple[int, int]:
    """How much of C a program takes where C is cut into parts, and how many programs that makes."""
    part = config.width * -(-width // (config.width * config.parts))
    return part, -(-width // part)


def lanes() -> int:
    """Threads of a warp."""
    return 64 if torch.version.hip else 32
