"""Everything that a GPU has to show, with one command: python demos/gpu_all.py --out FOLDER

In at most nine minutes, from a checkout, without a network. In this order, every part in processes of its own with a
limit of their own, so that a crash or a stop loses nothing: each row is on disk before the next begins.

    checks     the operators against the reference in fp64, forward and backward
    models     converted transformers: values, gradients, generation, CUDA graphs, streams, equal bits
    warm       what training and times compile, compiled once, by a process each
    compile    what the sweep will time, compiled by all cores
    sweep      every kernel in many configurations: time, bytes a second, registers, error
    training   a training step over the unconverted model's
    times      the operators beside a copy, aten and other libraries

FOLDER gets rows.jsonl (as they come), gpu.json (all of it), gpu.md (the tables of docs/gpu.md) and log.txt. With --tiny
it runs on a CPU in small sizes, which shows that it runs and nothing else; the sweep then by Triton's interpreter.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demos")]

import torch  # noqa: E402
import typer  # noqa: E402
from gpu_tables import markdown  # noqa: E402

PARTS = ("checks", "models", "warm", "compile", "sweep", "training", "times")
BESIDE = {"checks", "models", "warm", "compile"}  # share the GPU: nothing is timed


@dataclass
class Job:
    """One process: a part, or the k-th of `of` slices of one."""

    part: str
    slice: int
    of: int
    limit: float
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    log: Path | None = field(default=None)

    def __str__(self) -> str:
        return f"{self.part}:{self.slice}:{self.of}"


def main(
    out: Annotated[Path, typer.Option(help="Folder for the results.")],
    budget: Annotated[float, typer.Option(help="Seconds for all of it.")] = 530,
    parts: Annotated[str, typer.Option(help=f"Comma-separated: {', '.join(PARTS)}.")] = ",".join(PARTS),
    tiny: Annotated[bool, typer.Option("--tiny", help="On the CPU, in small sizes.")] = False,
    workers: Annotated[int, typer.Option(help="Processes at once where nothing is timed; 0: one a core.")] = 0,
    job: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Check, tune and time everything on this machine's GPU."""
    wanted = parts.split(",")
    if unknown := set(wanted) - set(PARTS):
        raise typer.BadParameter(f"no part {unknown.pop()!r}: {', '.join(PARTS)}")
    if not tiny and not torch.cuda.is_available():
        raise typer.BadParameter("torch finds no GPU; --tiny runs on the CPU")
    out.mkdir(parents=True, exist_ok=True)
    device = "cpu" if tiny else "cuda"
    if job:
        part, slice_, of = job.split(":")
        run_part(part, int(slice_), int(of), out, device, tiny, time.monotonic() + budget)
        return
    end = time.monotonic() + budget
    workers = workers or (1 if tiny else max(1, (os.cpu_count() or 2) - 1))
    from gpu_check import about

    write(out, {"part": "about", **about(device), "budget": budget, "parts": wanted, "workers": workers})
    beside = [one for part in PARTS if part in wanted and part in BESIDE for one in jobs_of(part, workers, tiny)]
    # These take longest; the others fill what is left.
    beside.sort(key=lambda one: one.part not in ("models", "warm"))
    alone = [part for part in PARTS if part in wanted and part not in BESIDE]
    run_jobs(beside, workers, out, end - (0.5 * budget if alone else 5), tiny)
    summary(out)
    for part in alone:
        run_jobs(jobs_of(part, 1, tiny), 1, out, end - 5, tiny)
        summary(out)
    rows = summary(out)
    wrong = [row for row in rows if row.get("wrong") or row.get("right") is False or row.get("rc")]
    for row in wrong:
        print(str(row)[:400])
    print(f"{len(rows)} rows, {len(wrong)} wrong; {out / 'gpu.json'}")


def jobs_of(part: str, workers: int, tiny: bool) -> list[Job]:
    # Of seven slices of the checks each has some of all four operators: what compiles long falls to none alone.
    slices = {"checks": min(7, workers), "models": 6, "warm": 4, "compile": workers}.get(part, 1)
    limit = {
        "checks": 150.0, "models": 200.0, "warm": 150.0, "compile": 100.0, "sweep": 100.0, "training": 75.0,
        "times": 120.0,
    }[part]  # fmt: skip
    if tiny:  # of models GPT-2 in fp32 and Llama under autocast, of what is compiled before its time one converted step
        slice_, of = {"models": (0, 4), "warm": (1, 4)}.get(part, (0, 1))
        return [Job(part, slice_, of, 6 * limit)]
    return [Job(part, k, slices, limit) for k in range(slices)]


def run_jobs(jobs: list[Job], at_once: int, out: Path, end: float, tiny: bool) -> None:
    """Up to `at_once` at a time; one that outlasts its limit, or the end, is ended with its children."""
    waiting, running = list(jobs), []
    while waiting or running:
        while waiting and len(running) < at_once and time.monotonic() < end - 3:
            running.append(start(waiting.pop(0), out, end, tiny))
        if not running:
            break
        time.sleep(0.1)
        for job in list(running):
            late = time.monotonic() > min(end, job.started + job.limit)
            if job.process.poll() is None and late:
                os.killpg(job.process.pid, signal.SIGKILL)
                job.process.wait()
            if job.process.poll() is not None:
                running.remove(job)
                finish(job, out)
    for job in waiting:
        write(out, {"part": "jobs", "job": str(job), "rc": "no time left"})


def start(job: Job, out: Path, end: float, tiny: bool) -> Job:
    job.started = time.monotonic()
    job.log = out / f".{job}.log".replace(":", "-")
    limit = max(1.0, min(job.limit, end - job.started) - 3)
    command = [sys.executable, str(Path(__file__)), "--out", str(out), "--job", str(job), "--budget", str(limit)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "TOKENIZERS_PARALLELISM": "false",
    }
    if job.part in BESIDE:
        environment |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "4"}
    if tiny and job.part in ("sweep", "compile"):
        environment["TRITON_INTERPRET"] = "1"
    with job.log.open("wb") as log:
        job.process = subprocess.Popen(
            [*command, *(["--tiny"] if tiny else [])], stdout=log, stderr=log, env=environment, start_new_session=True
        )
    return job


def finish(job: Job, out: Path) -> None:
    seconds = time.monotonic() - job.started
    write(out, {"part": "jobs", "job": str(job), "rc": job.process.returncode, "s": round(seconds, 1)})
    with (out / "log.txt").open("a") as log:
        log.write(f"== {job}: {job.process.returncode} after {seconds:.1f} s\n{job.log.read_text()[-6000:]}\n")
    job.log.unlink()


def write(out: Path, row: dict[str, Any]) -> None:
    with (out / "rows.jsonl").open("a") as file:  # one write of one line: processes may share the file
        file.write(json.dumps(row, default=str) + "\n")


def summary(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    (out / "gpu.json").write_text(json.dumps(rows, indent=0))
    (out / "gpu.md").write_text(markdown(rows))
    return rows


# -- the parts, each in its own process -------------------------------------------------------------------------------


def run_part(part: str, slice_: int, of: int, out: Path, device: str, tiny: bool, end: float) -> None:
    # A text model needs no torchvision, and a torchvision made for another build of torch stops transformers' import.
    sys.modules["torchvision"] = None  # type: ignore[assignment]
    from gpu_operators import Size

    sizes = [Size(8, 2, 16)] if tiny else [Size(8192, 4, 2560), Size(4096, 4, 7168)]
    dtype = torch.bfloat16

    def record(row: dict[str, Any]) -> None:
        write(out, {"part": part, **row})

    if device == "cuda":
        torch.cuda.init()
    if part in ("models", "warm", "training"):
        build_once(out)
    if part == "checks":
        from gpu_check import GIVEN, SHORT, SHORT_GIVEN, WHOLE, check_given, check_one
        from gpu_operators import OPERATORS

        cases = [(case, name) for case in (SHORT[:2] if tiny else WHOLE) for name in OPERATORS]
        for case, name in cases[slice_::of]:
            started = time.monotonic()
            row = {"case": str(case), "operator": name, **check_one(case, name, device)}
            record({**row, "s": round(time.monotonic() - started, 1)})
            _stop_after_a_fault(row["wrong"])
        for case in (SHORT_GIVEN if tiny else GIVEN)[slice_::of]:
            started = time.monotonic()
            row = check_given(case, device)
            record({**row, "s": round(time.monotonic() - started, 1)})
            _stop_after_a_fault(row["wrong"])
    elif part == "models":
        from gpu_models import TINY, Sizes, model_rows

        for row in model_rows(device, TINY if tiny else Sizes(), slice_, of):
            record(row)
            _stop_after_a_fault("" if row["right"] else row["found"])
    elif part == "compile":
        from gpu_sweep import Chains, candidates, compile_one

        if tiny:
            return
        chains = Chains(sizes[0], dtype, device, filled=False)
        failed = {}
        mine = candidates(sizes[0])[slice_::of]
        done = 0
        for candidate in mine:
            if time.monotonic() > end:
                break
            try:
                compile_one(candidate, chains)
                done += 1
            except Exception as error:
                failed[f"{candidate.job.kernel} {candidate.job.chain} {candidate.config.name}"] = str(error)[:200]
        record({"slice": slice_, "compiled": done, "of": len(mine), "failed": failed})
    elif part == "sweep":
        sweep(sizes, dtype, device, tiny, end, record)
    elif part == "training":
        from gpu_training import TINY as SHORT_STEP
        from gpu_training import Shape, training_rows

        for row in training_rows(device, SHORT_STEP if tiny else Shape(), 2 if tiny else 7):
            record(row)
    elif part == "warm":
        warm(slice_, of, sizes[0], dtype, device, tiny, record)
    elif part == "times":
        from gpu_times import measure

        more = [Size(16, 4, 7168), Size(8192, 2, 2560), Size(8192, 8, 2560), Size(16, 2, 7168), Size(16, 8, 7168)]
        rounds = 2 if tiny else 7
        # What matters most first; what others compile or do slowly last.
        measure(sizes + more * (not tiny), dtype, device, rounds, ["ours"], record)
        for others in (["Liger", "TransformerEngine"], ["compiled aten"]):
            measure(sizes[:1], dtype, device, rounds, others, record)
        measure(sizes, dtype, device, min(rounds, 3), ["eager aten"], record)


def build_once(out: Path) -> None:
    """The CPU kernels, which compiled graphs ask for: by one process, the others wait."""
    from mhc_rewrite.kernels import cpu

    with (out / "rows.jsonl").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        cpu.available()


def warm(slice_: int, of: int, size: Any, dtype: torch.dtype, device: str, tiny: bool, record: Any) -> None:
    from gpu_times import measure
    from gpu_training import TINY, VARIANTS, Shape
    from gpu_training import warm as one_step

    compiled = [variant for variant in VARIANTS if variant.compiled]
    for variant in [*compiled, None][slice_::of]:
        if variant is not None:
            record(one_step(variant, device, TINY if tiny else Shape()))
        else:
            measure([size], dtype, device, 1, ["compiled aten"])


def sweep(sizes: list[Any], dtype: torch.dtype, device: str, tiny: bool, end: float, record: Any) -> None:
    """All candidates at the first size, then the best at the others."""
    from gpu_sweep import Candidate, Sweep, candidates

    share = end - 0.3 * (end - time.monotonic()) if len(sizes) > 1 else end
    best: dict[tuple[str, str], list[tuple[float, Any]]] = {}
    for k, size in enumerate(sizes):
        timed = Sweep(size, dtype, device)
        if k == 0:
            chosen = timed.defaults() + candidates(size, few=tiny)
        else:
            ranks = range(max(map(len, best.values()), default=0))
            chosen = timed.defaults() + [
                Candidate(row[rank][1].job, row[rank][1].config, size)
                for rank in ranks[:12] for row in best.values() if rank < len(row)
            ]  # fmt: skip
        for place, candidate in enumerate(chosen):
            if time.monotonic() > (share if k == 0 else end):
                record({"size": str(size), "stopped": f"after {place} of {len(chosen)}"})
                break
            row = timed.row(candidate, 1 if tiny else 5)
            record(row)
            _stop_after_a_fault(row.get("failed", ""))
            if "us" in row and k == 0 and row["error"] < 0.05:
                best.setdefault((candidate.job.kernel, candidate.job.chain), []).append((row["us"], candidate))
        for row in best.values():
            row.sort(key=lambda one: one[0])
        del timed


def _stop_after_a_fault(said: str) -> None:
    """A fault on the device fails every later call of its process: better to end it."""
    if "CUDA error" in said or "illegal memory access" in said:
        raise SystemExit(f"a fault on the device: {said}")


if __name__ == "__main__":
    typer.run(main)
