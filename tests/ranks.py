"""Starts a function of a test in several processes on gloo, and says what each of them said.

By itself, `python ranks.py module rank world store name ...`: one of these processes. Those that `run` starts end when
their input does, which it holds: so nothing is left of a test that is killed.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent


def run(module: str, *cases: str, folder: Path, world: int = 2, limit: float = 120.0) -> None:
    """Runs functions without arguments, in this order, in `world` processes that share a process group.

    Their current folder is `folder`, which they find again in a later run. What a function returns is there as JSON,
    in a file of its name.

    Raises:
        AssertionError: one of them raised something, or they were not done after `limit` seconds.
    """
    store = folder / f"store{len(list(folder.glob('store*')))}"  # one that was used before is no new one
    store.touch()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    logs = [folder / f"rank{rank}.log" for rank in range(world)]
    with contextlib.ExitStack() as stack:
        processes = []
        for rank in range(world):
            command = [sys.executable, __file__, module, str(rank), str(world), str(store), *cases]
            processes.append(stack.enter_context(_process(command, logs[rank], environment, folder)))
        end = time.monotonic() + limit
        while (codes := [p.poll() for p in processes]) != [0] * world:
            if any(codes) or time.monotonic() > end:
                time.sleep(0.5)  # the other one may have something to say too
                why = "failed" if any(codes) else f"were not done after {limit:.0f} s"
                said = "\n".join(f"-- rank {rank}:\n{log.read_text()[-4000:]}" for rank, log in enumerate(logs))
                raise AssertionError(f"{', '.join(cases)}: {why}\n{said}")
            time.sleep(0.05)


def torchrun(script: Path, *arguments: str, folder: Path, world: int = 2, limit: float = 300.0) -> str:
    """What a script prints that torchrun starts in several processes, in this folder.

    Raises:
        AssertionError: it failed, or was not done after `limit` seconds.
    """
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]  # any free port
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, *launch, str(script), *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, env=environment, cwd=folder,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.terminate()  # it ends those that it has started
        said, _ = process.communicate(timeout=60)
        raise AssertionError(f"{script.name}: not done after {limit:.0f} s\n{said[-6000:]}") from None
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, said[-6000:]
    return said


@contextlib.contextmanager
def _process(
    command: list[str], log: Path, environment: dict[str, str], folder: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own, which is ended with whatever it has started."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=folder,
            start_new_session=True,
        )  # fmt: skip
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            assert process.stdin is not None
            process.stdin.close()


def _end_with_the_input() -> None:
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)


def _main(module: str, rank: str, world: str, store: str, *cases: str) -> None:
    if os.getsid(0) == os.getpid():
        threading.Thread(target=_end_with_the_input, daemon=True).start()
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    functions = importlib.import_module(module)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, int(world)), rank=int(rank), world_size=int(world),
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    failed = 0
    for case in cases:
        began = time.monotonic()
        try:
            figures = getattr(functions, case)()
            if figures is not None and dist.get_rank() == 0:
                Path(f"{case}.json").write_text(json.dumps(figures))
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
