"""Converts every model that three libraries can build, without example inputs, and writes down what came of it.

    python tests/sweep.py [transformers|timm|torchvision ...] [--only NAME] [--jobs N] [--out FILE] [--resume]

One process a model, with a time limit. FILE has one line of JSON a model; --only runs a model again that FILE has. At
the end of a run without it docs/coverage.md is written from FILE. This is no part of `make test`: it takes hours.

What is checked of each model, in fp64 where the model runs in it: the converted model against the original, in
evaluation mode and in training mode from one random state; and, with every site's parameters perturbed at random, its
outputs and the gradients of those parameters against `sweep_oracle.replay`, which runs the torch calls of the original
again with n streams and imports nothing of the package.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import re
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import oracle  # noqa: E402
import sweep_models  # noqa: E402
import sweep_oracle  # noqa: E402

LIMIT = 60  # seconds for mhcify(); the checks have as many again
START, PERTURBED = 1e-5, 1e-6  # relative errors that pass, in fp64; models keep parts in fp32
IN_FP32 = 100.0  # by how much more a model may be off that does not run in fp64
# What is off by more is held against what the model itself does when its parameters' last digits change, so often:
# parts in fp32 round the other way then, and sharp layers behind them make much of it. UNDETERMINED is wrong anyway.
LAST_DIGITS, OFTEN, TIMES, UNDETERMINED = 1e-15, 3, 5.0, 1e-3
COVERAGE = Path(__file__).parents[1] / "docs" / "coverage.md"


class Broken(Exception):
    """The model, not its conversion, is at fault: `verdict` says in what way."""

    def __init__(self, verdict: str, reason: str) -> None:
        super().__init__(reason)
        self.verdict = verdict


def examine(build: Callable[[], nn.Module], row: dict[str, Any]) -> None:
    """Converts one model and puts into `row` what the table says of it."""
    from mhc_rewrite import mhcify, report
    from mhc_rewrite.capture.examples import example_call
    from mhc_rewrite.errors import ExampleInputsError, MHCError, NoResidualError

    torch.manual_seed(0)
    try:
        model = build()
    except Exception as error:
        raise Broken("does not build", _first_line(error)) from error
    row["class"] = type(model).__name__
    row["parameters"] = sum(p.numel() for p in model.parameters())
    try:
        args, kwargs = example_call(model, None)
    except ExampleInputsError as error:
        raise Broken("no example", _first_line(error)) from error
    model, args, kwargs = _in_fp64(model, args, kwargs)
    row["fp64"] = all(p.dtype == torch.float64 for p in model.parameters())
    row["inputs"] = {str(name): _form(value) for name, value in (*enumerate(args), *kwargs.items())}
    original = copy.deepcopy(model)
    torch.manual_seed(3)  # some models draw numbers in evaluation mode too
    try:
        run = sweep_oracle.Run(original, args, kwargs)
    except Exception as error:
        raise Broken("does not run", _first_line(error)) from error
    residuals = run.residuals()
    row["adds"] = len(residuals)
    began = time.monotonic()
    try:
        mhcify(model)
        planned = report(model).plan
        row["sites"], row["streams"] = len(planned.sites), len(planned.streams)
    except NoResidualError as error:
        raise Broken(
            "refused" if any(one.length > 1 for one in residuals) else "no residual", _first_line(error)
        ) from error
    except MHCError as error:
        raise Broken("refused", f"{type(error).__name__}: {_first_line(error)}") from error
    finally:
        row["seconds"] = round(time.monotonic() - began, 1)
    for training in (False, True):
        mode = "training" if training else "evaluation"
        row[mode] = _at_the_start(original, model, args, kwargs, training)
    row["perturbed"], row["gradients"], row["note"] = _perturbed(run, model, planned, args, kwargs)
    within = 1.0 if row["fp64"] else IN_FP32
    limits = {"evaluation": START, "training": START, "perturbed": PERTURBED, "gradients": PERTURBED}
    off = {key for key, limit in limits.items() if row[key] is not None and not row[key] <= within * limit}
    if off and row["fp64"] and all(row[key] < UNDETERMINED for key in off):
        rounding = _by_rounding(off, model, original, args, kwargs)
        worst = max(rounding[key] for key in off)
        off = {key for key in off if row[key] > TIMES * rounding[key]}
        if not off:
            row["note"] = row["note"] or f"held to its own rounding: its last digits move it by {worst:.0e}"
    row["verdict"] = "wrong" if off else "exact"


def _in_fp64(model: nn.Module, args: Any, kwargs: Any) -> tuple[nn.Module, Any, Any]:
    """The model and its example in fp64, or as they were where the model does not run in it."""
    from mhc_rewrite.capture.examples import example_call

    wide = copy.deepcopy(model).double().eval()
    try:
        wide_args, wide_kwargs = example_call(wide, None)
        if {k: _form(v) for k, v in wide_kwargs.items()} != {k: _form(v) for k, v in kwargs.items()}:
            return model.eval(), args, kwargs
        with torch.no_grad():
            results = sweep_oracle.tensors_of(
                copy.deepcopy(wide)(*copy.deepcopy(wide_args), **copy.deepcopy(wide_kwargs))
            )
        if all(bool(t.isfinite().all()) for t in results):
            return wide, wide_args, wide_kwargs
    except Exception:
        pass
    return model.eval(), args, kwargs


def _at_the_start(original: nn.Module, model: nn.Module, args: Any, kwargs: Any, training: bool) -> float | None:
    """Relative error of the outputs in one mode, from one random state; None where the original does not run in it.

    Where dropouts draw in another order, as in another layout of memory, without them.
    """
    error = _from_one_state(original, model, args, kwargs, training)
    if training and error is not None and error > START:
        with _WithoutDropout():
            error = _from_one_state(original, model, args, kwargs, training)
    return error


class _WithoutDropout(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if "dropout" in getattr(func, "__name__", "") else func(*args, **(kwargs or {}))


def _from_one_state(original: nn.Module, model: nn.Module, args: Any, kwargs: Any, training: bool) -> float | None:
    results = []
    for one in (original, model):
        torch.manual_seed(1)
        random.seed(1)
        numpy.random.seed(1)
        one.train(training)
        buffers = [(b, b.clone()) for b in one.buffers()]  # statistics of BatchNorm, say
        try:
            with torch.no_grad():
                results.append(sweep_oracle.tensors_of(one(*copy.deepcopy(args), **copy.deepcopy(kwargs))))
        except Exception:
            if one is original:
                return None
            raise
        finally:
            one.eval()
            for buffer, value in buffers:
                buffer.copy_(value)
    return _error(results[1], results[0])


def _perturbed(run: Any, model: nn.Module, plan: Any, args: Any, kwargs: Any) -> tuple[Any, Any, str]:
    """Errors of outputs and of the sites' gradients against the oracle, or None and why it does not apply."""
    oracle.perturb(model)
    named = dict(model.named_parameters())
    names = dict.fromkeys(site.name for site in plan.sites)
    torch.manual_seed(3)
    got = sweep_oracle.tensors_of(model(*copy.deepcopy(args), **copy.deepcopy(kwargs)))
    if not all(bool(t.isfinite().all()) for t in got):
        return None, None, "not held against the oracle: the result is not finite"
    try:
        parameters = {name: oracle.site_params(named, name) for name in names}
        torch.manual_seed(3)
        want = sweep_oracle.tensors_of(run.replay(plan.streams, parameters, plan.config.n_streams, 1e-6))
    except Exception as error:  # the oracle's, not the conversion's
        return None, None, f"not held against the oracle: {type(error).__name__}: {_first_line(error)}"
    error = _error(got, want)
    tensors = [p for site in parameters.values() for p in site]
    try:
        wanted = _gradients(want, tensors)
    except RuntimeError as failure:  # the original writes in place to what its backward needs
        return error, None, f"no gradients: {_first_line(failure)[:120]}"
    gradients = [_gradients(got, tensors), wanted]
    if not all(bool(g.isfinite().all()) for g in gradients[1]):
        return error, None, "gradients are not finite"
    return error, _off(*gradients), ""


def _by_rounding(what: set[str], converted: nn.Module, original: nn.Module, args: Any, kwargs: Any) -> dict[str, float]:
    """How far some of what is compared moves by the last digits of the parameters, in a model's fp64."""
    moved = dict.fromkeys(what, 0.0)
    at_the_start = [(mode, mode == "training") for mode in ("evaluation", "training") if mode in what]
    for seed in range(OFTEN):
        other = copy.deepcopy(original)
        _change_last_digits(other, seed)
        for mode, training in at_the_start:
            moved[mode] = max(moved[mode], _at_the_start(original, other, args, kwargs, training) or 0.0)
    if what > {mode for mode, _ in at_the_start}:
        kept = [p.detach().clone() for p in converted.parameters()]
        want = _outputs_and_gradients(converted, args, kwargs)
        for seed in range(OFTEN):
            _change_last_digits(converted, seed)
            got = _outputs_and_gradients(converted, args, kwargs)
            for name, error in (("perturbed", _error(got[0], want[0])), ("gradients", _off(got[1], want[1]))):
                moved[name] = max(moved.get(name, 0.0), error)
            with torch.no_grad():
                for p, value in zip(converted.parameters(), kept, strict=True):
                    p.copy_(value)
    return moved


def _outputs_and_gradients(converted: nn.Module, args: Any, kwargs: Any) -> tuple[list[Tensor], list[Tensor]]:
    torch.manual_seed(3)
    outputs = sweep_oracle.tensors_of(converted(*copy.deepcopy(args), **copy.deepcopy(kwargs)))
    return outputs, _gradients(outputs, [p for _, p in oracle.site_parameters(converted)])


@torch.no_grad()
def _change_last_digits(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.is_floating_point():
            p.mul_(1 + LAST_DIGITS * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype))


def _off(got: list[Tensor], want: list[Tensor]) -> float:
    """The largest difference of gradients, relative to the largest of them."""
    scale = max((float(g.abs().max()) for g in want), default=0.0)
    off = max((float((a - b).abs().max()) for a, b in zip(got, want, strict=True)), default=0.0)
    return off / max(scale, 1e-12)


def _gradients(results: list[Tensor], parameters: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in results]
    loss = sum((t * w / max(1, t.numel()) ** 0.5).sum() for t, w in zip(results, weights) if t.requires_grad)
    if not isinstance(loss, Tensor):
        return [torch.zeros_like(p) for p in parameters]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]


def _error(got: list[Tensor], want: list[Tensor]) -> float:
    if [t.shape for t in got] != [t.shape for t in want]:
        return float("inf")
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        a, b = a.detach().double(), b.detach().double()
        same = (a == b) | (a.isnan() & b.isnan())
        if b.numel() and not bool(same.all()):
            if not bool((a[~same].isfinite() & b[~same].isfinite()).all()):
                return float("inf")
            # What is smaller is rounding: the gradients of sites around blocks that begin at zero, say.
            worst = max(worst, float((a - b)[~same].abs().max() / b[b.isfinite()].abs().max().clamp_min(1e-12)))
    return worst


def _form(value: Any) -> Any:
    return list(value.shape) if isinstance(value, Tensor) else type(value).__name__


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:400]


# -- one process a model -----------------------------------------------------------------------------------------------


def row_of(library: str, name: str) -> dict[str, Any]:
    """The row of one model, made in this process."""
    row: dict[str, Any] = {"library": library, "name": name, "verdict": "crashed"}
    began = time.monotonic()
    try:
        examine(sweep_models.builder(library, name), row)
    except Broken as broken:
        row.update(verdict=broken.verdict, reason=str(broken))
    except Exception as error:
        row["reason"] = f"{type(error).__name__}: {_first_line(error)}"
        row["trace"] = traceback.format_exc()[-1500:]
    row["whole_seconds"] = round(time.monotonic() - began, 1)
    return row


def _child(library: str, name: str) -> tuple[int, int]:
    """A process that makes one row; its id, and where it writes the row to."""
    reader, writer = os.pipe()
    if (process := os.fork()) == 0:
        status = 1
        try:
            os.close(reader)
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1)
            os.dup2(silent, 2)
            with os.fdopen(writer, "w") as out:
                json.dump(row_of(library, name), out)
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    return process, reader


def sweep(models: Iterable[tuple[str, str]], jobs: int) -> Iterator[dict[str, Any]]:
    """Rows as they are done, at most `jobs` processes at a time."""
    todo = iter(models)
    running: dict[int, tuple[int, str, str, float]] = {}
    while True:
        while len(running) < jobs and (following := next(todo, None)) is not None:
            process, reader = _child(*following)
            running[process] = (reader, *following, time.monotonic())
        if not running:
            return
        for process, (reader, library, name, began) in list(running.items()):
            done, status = os.waitpid(process, os.WNOHANG)
            late = time.monotonic() - began > 3 * LIMIT
            if not done and not late:
                continue
            if late and not done:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
            with os.fdopen(reader) as written:
                text = written.read()
            row = {"library": library, "name": name, "verdict": "timed out" if late else "crashed"}
            if text and not late:
                row = json.loads(text)
            elif not late:
                row["reason"] = f"the process ended with status {status}"
            del running[process]
            yield row
        time.sleep(0.02)


# -- the table ---------------------------------------------------------------------------------------------------------

_HEAD = """# Coverage

What `mhcify(model)`, without example inputs, makes of the models that other libraries can build: every model type of
transformers, small and with random weights; two models of every module of timm; one of every family of torchvision.
`python tests/sweep.py` makes this page; its docstring says what is checked. {versions}.

A model counts as *exact* if the converted one equals the original in evaluation and in training mode (relative error
up to {start:.0e}), and if with every site's parameters perturbed at random it equals an n-stream model (outputs, and
gradients of the sites; up to {perturbed:.0e}) that the sweep makes from the original's recorded torch calls without the
package. Where that model's own rule does not apply, the column *perturbed* has a dash, and the last column says why:
there only the start was compared. A model that is off by more, and moves as much when the last digits of its parameters
do, is held to that, and the last column says so. Inputs are the package's own guess. *adds* are those that the sweep
counts by its own rule, in one call: layers that are called again count again, and skips over whole stages count too.
Rows that `--resume` keeps are of the code that they ran on.

"""


def write_coverage(rows: list[dict[str, Any]], file: Path) -> None:
    """docs/coverage.md from the rows of a sweep."""
    import importlib.metadata as metadata

    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", *sweep_models.LIBRARIES))
    text = [_HEAD.format(versions=versions, start=START, perturbed=PERTURBED)]
    ran = {row["library"]: sum(other["library"] == row["library"] for other in rows) for row in rows}
    whole = {library: len(sweep_models.names(library)) for library in ran}
    if ran != whole:
        parts = ", ".join(f"{ran[library]} of {whole[library]} of {library}" for library in ran)
        text += [f"Not every model has run: {parts}.", ""]
    verdicts = list(dict.fromkeys([*_VERDICTS, *(row["verdict"] for row in rows)]))
    text += [f"| library | models | {' | '.join(verdicts)} |", "|---" * (2 + len(verdicts)) + "|"]
    for library in sweep_models.LIBRARIES:
        mine = Counter(row["verdict"] for row in rows if row["library"] == library)
        text.append(f"| {library} | {mine.total()} | {' | '.join(str(mine[verdict]) for verdict in verdicts)} |")
    for library in sweep_models.LIBRARIES:
        text += ["", f"## {library}", "", _COLUMNS, "|---" * 11 + "|"]
        mine = sorted((row for row in rows if row["library"] == library), key=lambda row: row["name"].lower())
        text += [_line(row) for row in mine if row["verdict"] not in _SHORT]
        for verdict in _SHORT:
            if of_it := [row for row in mine if row["verdict"] == verdict]:
                text += ["", f"### {library}: {verdict}", ""]
                text += [f"- {row['name']}: {_clean(row.get('reason', ''))}" for row in of_it]
    file.write_text("\n".join(text) + "\n")


_COLUMNS = "| model | inputs | sites | streams | adds | evaluation | training | perturbed | gradients | s | verdict |"
_VERDICTS = (
    "exact",
    "refused",
    "no example",
    "wrong",
    "crashed",
    "timed out",
    "no residual",
    "does not run",
    "does not build",
)
_SHORT = ("refused", "no example", "no residual", "does not run", "does not build")


def _line(row: dict[str, Any]) -> str:
    inputs = ", ".join(f"{name} {'x'.join(map(str, form)) if isinstance(form, list) else form}"
                       for name, form in row.get("inputs", {}).items())  # fmt: skip
    errors = [_number(row.get(key)) for key in ("evaluation", "training", "perturbed", "gradients")]
    counts = [str(row.get(key, "-")) for key in ("sites", "streams", "adds")]
    why = row.get("reason") or row.get("note")
    verdict = row["verdict"] + (f": {_clean(why)}" if why else "")
    return f"| {' | '.join([row['name'], inputs, *counts, *errors, str(row.get('seconds', '-')), verdict])} |"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0e}" if value else "0"


def _clean(text: str) -> str:
    """A reason for a table: without the paths of this machine."""
    text = text.replace("|", "/").split(" Pass example inputs for one call")[0]
    text = re.sub(r"/\S*/(?:site|dist)-packages/", "", text)
    for folder in sys.path:
        text = text.replace(folder + "/", "") if folder else text
    return text[:300]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("libraries", nargs="*", choices=[*sweep_models.LIBRARIES, []], help="all, if none is named")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="only these models")
    parser.add_argument("--every", type=int, default=1, metavar="K", help="a sample: every K-th model")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("sweep.jsonl"), metavar="FILE")
    parser.add_argument("--resume", action="store_true", help="keep the rows that FILE has")
    options = parser.parse_args()
    libraries = tuple(options.libraries) or sweep_models.LIBRARIES
    torch.set_num_threads(1)  # before the processes part from this one
    sweep_models.prepare(libraries)
    lines = options.out.read_text().splitlines() if options.resume and options.out.exists() else []
    rows = {(row["library"], row["name"]): row for row in map(json.loads, lines)}  # of a model that ran again the last
    models = [(library, name) for library in libraries for name in sweep_models.names(library)[:: options.every]
              if (name in options.only if options.only else (library, name) not in rows)]  # fmt: skip
    with options.out.open("a" if options.resume else "w") as out:
        for count, row in enumerate(sweep(models, options.jobs), 1):
            rows[row["library"], row["name"]] = row
            out.write(json.dumps(row) + "\n")
            out.flush()
            print(f"{count}/{len(models)} {row['library']} {row['name']}: {row['verdict']} "
                  f"{_clean(row.get('reason', row.get('note', '')))[:120]}", flush=True)  # fmt: skip
    if not options.only:
        write_coverage(list(rows.values()), COVERAGE)
    print(dict(Counter(row["verdict"] for row in rows.values())))


if __name__ == "__main__":
    main()
