"""What the sweep builds: every model type of transformers, two models of every module of timm and of torchvision."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from conftest import define_torchvision_operators

LARGE = 25_000_000
# How models of timm are asked to be smaller, the first that they take: transformers, residual nets, what has windows.
SMALLER = ({"depth": 4, "img_size": 112}, {"layers": (1, 1, 3, 1)}, {"img_size": 112})
LIBRARIES = ("transformers", "timm", "torchvision")


def prepare(libraries: tuple[str, ...]) -> None:
    """Imports the libraries once, before the processes of the single models part from this one."""
    try:
        import torchvision
    except RuntimeError:  # its operators do not load
        define_torchvision_operators()
        import torchvision.ops.boxes

        define_torchvision_operators.library.impl("nms", _nms, "CPU")  # type: ignore[attr-defined]
        torchvision.ops.boxes._assert_has_ops = lambda: None
        align = importlib.import_module("torchvision.ops.roi_align")
        align._roi_align = align._roi_align.__wrapped__  # else it is compiled, for half a minute
    _define_grouped_matmul()
    if "transformers" in libraries:
        import transformers

        transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    if "timm" in libraries:
        import timm  # noqa: F401


_KERNELS = torch.library.Library("aten", "IMPL")  # lives as long as its kernels are to


def _define_grouped_matmul() -> None:
    """torch's own for CPUs takes no fp64, in which mixtures of experts are to run as well."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _KERNELS.impl("_grouped_mm", grouped_matmul, "CPU")


def grouped_matmul(
    left: Tensor, right: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: Any = None
) -> Tensor:
    """Rows (or, where both are matrices, columns) of `left` up to each of `offs` by a matrix of their own."""
    if offs is None:
        return torch.bmm(left, right)
    bounds = [0, *offs.tolist()]
    groups = [slice(begin, end) for begin, end in itertools.pairwise(bounds)]
    if right.dim() == 2:
        return torch.stack([left[:, group] @ right[group] for group in groups])
    result = left.new_zeros(left.shape[0], right.shape[-1])
    for group, matrix in zip(groups, right, strict=True):
        result[group] = left[group] @ matrix
    return result


def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Boxes that no better one overlaps by more than a share, best first."""
    from torchvision.ops import box_iou

    left, kept = scores.argsort(descending=True), []
    while len(left):
        kept.append(left[:1])
        left = left[1:][box_iou(boxes[left[:1]], boxes[left[1:]])[0] <= iou_threshold]
    return torch.cat(kept) if kept else left


def names(library: str) -> list[str]:
    """The models of a library that the sweep tries."""
    return {"transformers": _transformers, "timm": _timm, "torchvision": _torchvision}[library]()


def builder(library: str, name: str) -> Callable[[], nn.Module]:
    """Makes the model, small where the library lets one choose."""
    if library == "transformers":
        from mhc_rewrite.cli.small import build

        return lambda: build(name, {})
    if library == "timm":
        return lambda: _of_timm(name)
    import torchvision

    return lambda: torchvision.models.get_model(name, weights=None, **_options(name)).eval()


def _of_timm(name: str) -> nn.Module:
    """A model of timm, of fewer layers and for small pictures where it is a large one that lets one choose."""
    import timm

    with torch.device("meta"):
        large = sum(p.numel() for p in timm.create_model(name).parameters()) > LARGE
    for options in SMALLER if large else ():
        with contextlib.suppress(TypeError):  # it takes no such option
            return timm.create_model(name, **options).eval()
    return timm.create_model(name).eval()


def _options(name: str) -> dict[str, Any]:
    """No weights; and of detectors that scale their pictures, small ones, in which they look at few boxes."""
    options: dict[str, Any] = {}
    if re.search(r"rcnn|retina|fcos|ssd|fcn|deeplab|lraspp", name):
        options["weights_backbone"] = None
    if re.search(r"rcnn|retina|fcos", name):
        options |= {"min_size": 96, "max_size": 128}
    if "rcnn" in name:
        options |= {"rpn_pre_nms_top_n_test": 32, "rpn_post_nms_top_n_test": 8}
    return options


def _transformers() -> list[str]:
    from transformers import CONFIG_MAPPING

    return sorted(CONFIG_MAPPING.keys(), key=str.lower)


def _timm() -> list[str]:
    """The smallest model of each module, by the digits and words in its name, and one more of another kind."""
    import timm

    chosen: list[str] = []
    for module in timm.list_modules():
        known = timm.list_models(module=module)
        first = sorted(known, key=_by_size)
        other = next((name for name in first if name.split("_")[0] != first[0].split("_")[0]), None)
        chosen += [*first[:1], *([other] if other else first[1:2])]
    return chosen


def _by_size(name: str) -> tuple[int, float, int]:
    words = ("test", "atto", "femto", "pico", "nano", "xxt", "xxs", "xs", "tiny", "mini", "small", "s", "base", "b")
    rank = next(
        (number for number, word in enumerate(words) if re.search(rf"(^|_|\d){word}(\d|_|$)", name)), len(words)
    )
    digits = [float(digit) for digit in re.findall(r"\d+", name)]
    return rank, max(digits, default=0.0), len(name)


def _torchvision() -> list[str]:
    """The smallest model of each module of torchvision, by number, and one more of another kind."""
    import torchvision

    modules: dict[str, list[str]] = {}
    for name in torchvision.models.list_models():
        if not name.startswith("quantized_"):
            modules.setdefault(torchvision.models.get_model_builder(name).__module__, []).append(name)
    chosen: list[str] = []
    for known in modules.values():
        first = sorted(known, key=_by_size)
        chosen += [first[0], *(name for name in first if name.split("_")[0] != first[0].split("_")[0])][:2]
    return chosen
