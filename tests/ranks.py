"""Starts a function of a test in several processes on gloo, and says what each of them said.

By itself, `python ranks.py module rank world folder name ...`: one of these processes.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent


def run(module: str, *cases: str, folder: Path, world: int = 2, limit: float = 120.0) -> None:
    """Runs functions without arguments, in this order, in `world` processes that share a process group.

    Raises:
        AssertionError: one of them raised something, or they were not done after `limit` seconds.
    """
    command = [sys.executable, __file__, module]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    logs = [folder / f"rank{rank}.log" for rank in range(world)]
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(
                _process([*command, str(rank), str(world), str(folder), *cases], logs[rank], environment)
            )
            for rank in range(world)
        ]
        end = time.monotonic() + limit
        while (codes := [p.poll() for p in processes]) != [0] * world:
            if any(codes) or time.monotonic() > end:
                time.sleep(0.5)  # the other one may have something to say too
                why = "failed" if any(codes) else f"were not done after {limit:.0f} s"
                said = "\n".join(f"-- rank {rank}:\n{log.read_text()[-4000:]}" for rank, log in enumerate(logs))
                raise AssertionError(f"{', '.join(cases)}: {why}\n{said}")
            time.sleep(0.05)


@contextlib.contextmanager
def _process(command: list[str], log: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def _main(module: str, rank: str, world: str, folder: str, *cases: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    functions = importlib.import_module(module)
    dist.init_process_group(
        "gloo", store=dist.FileStore(f"{folder}/store", int(world)), rank=int(rank), world_size=int(world),
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    failed = 0
    for case in cases:
        began = time.monotonic()
        try:
            getattr(functions, case)()
            dist.barrier()
        except BaseException:
            traceback.print_exc()
            failed = 1
        print(f"{case}: {'failed' if failed else 'passed'}, {time.monotonic() - began:.1f} s", flush=True)
        if failed:
            break
    os._exit(failed)  # what waits for the others in a failed collective would wait on


if __name__ == "__main__":
    _main(*sys.argv[1:])
