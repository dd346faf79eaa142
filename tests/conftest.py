"""What all tests share: one thread a worker, timm's import, and the table of model families at the end of a run."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

sys.path.append(str(Path(__file__).resolve().parents[1] / "demos"))

from torchvision_operators import define_torchvision_operators

MINUTES = ("test_kernels_interpreted", "test_gpu_all", "test_launches")
COLUMNS = ("sites", "streams", "preserve_fp64", "preserve_fp32", "perturbed", "gradient", "moved")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: left out of `make test-fast`")
    define_torchvision_operators()
    # The tests are tiny: a second thread, or one for each worker, only waits.
    torch.set_num_threads(1)
    # No test depends on how fast a machine is.
    settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("any machine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes minutes in one test begins first, or the other processes would wait for it in the end."""
    items.sort(key=lambda item: item.path.stem not in MINUTES)


def pytest_collection_finish() -> None:
    """What was imported stays: it is no more looked at by the garbage collector, nor by whoever walks its objects."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line a family: what the tests recorded of it (`family.record`)."""
    rows: dict[str, dict[str, object]] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", None) != "call":
                continue
            for key, value in report.user_properties:
                if key == "family":
                    rows.setdefault(value["name"], {}).update(value)
    if not rows:
        return
    terminalreporter.section("model families")
    width = max(len(name) for name in rows) + 2
    terminalreporter.write_line("".ljust(width) + "".join(column.rjust(15) for column in COLUMNS))
    for name in sorted(rows, key=str.lower):
        terminalreporter.write_line(name.ljust(width) + "".join(_cell(rows[name].get(c)).rjust(15) for c in COLUMNS))


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.1e}" if isinstance(value, float) else str(value)
