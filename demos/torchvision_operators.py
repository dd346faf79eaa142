"""For a torchvision whose library does not load beside this build of torch."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch


def define_torchvision_operators() -> None:
    """timm imports torchvision, whose library does not load beside the CPU build of torch: with the two operators that
    it looks up defined, it does. Where the library loads it brings them, and a second definition would end the process.
    """
    # Kept alive on the function: a Library that is collected takes its definitions with it.
    if hasattr(define_torchvision_operators, "library") or _torchvision_loads():
        return
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    define_torchvision_operators.library = library


def _torchvision_loads() -> bool:
    found = importlib.util.find_spec("torchvision")
    folders = found.submodule_search_locations if found is not None else None
    try:
        for library in (path for folder in folders or () for path in Path(folder).glob("_C.*")):
            torch.ops.load_library(library)
            return True
    except OSError:  # it was built for another torch
        pass
    return False
