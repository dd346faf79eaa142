"""Exported graphs that run where this package is not installed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from mhc_rewrite.sites.hyper_connection import Portable


@contextlib.contextmanager
def portable() -> Iterator[None]:
    """Inside, sites are made of torch's own operators, the iterations of Sinkhorn-Knopp one by one.

        with mhc_rewrite.portable():
            program = torch.export.export(model, args)

    So the program, and what AOTInductor makes of it, loads without this package; it runs slower than with it.
    `torch.onnx.export` needs no such word.
    """
    before, Portable.on = Portable.on, True
    try:
        yield
    finally:
        Portable.on = before
