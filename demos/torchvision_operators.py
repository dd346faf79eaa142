"""For a torchvision whose library does not load beside this build of torch."""

from __future__ import annotations

import torch

OPERATORS = ("nms", "qnms")


def define_torchvision_operators() -> None:
    """timm imports torchvision, whose library does not load beside the CPU build of torch: with the two operators that
    it looks up defined, it does. Where the library loads it brings them, and a second definition would end the process.

    Torchvision is asked to load it, since the library's name is its own business.
    """
    try:
        import torchvision  # noqa: F401
    except ImportError:  # there is none
        return
    except RuntimeError:  # "operator torchvision::nms does not exist"
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in OPERATORS:
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        # Kept alive on the function: a Library that is collected takes its definitions with it.
        define_torchvision_operators.library = library  # type: ignore[attr-defined]
