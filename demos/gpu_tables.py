"""The tables of docs/gpu.md from the rows of demos/gpu_all.py: python demos/gpu_tables.py gpu.json ... > docs/gpu.md

Of several files the later ones' parts stand for those of the earlier.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def markdown(rows: list[Row]) -> str:
    """Every part that has rows."""
    of = {part: [row for row in rows if row["part"] == part] for part in dict.fromkeys(row["part"] for row in rows)}
    parts = [_about(of["about"][-1])] if "about" in of else []
    for part, title, make in (
        ("checks", "Operators against the reference in fp64", _checks),
        ("models", "Converted models", _models),
        ("training", "A training step", _training),
        ("times", "Times", _times),
        ("sweep", "Configurations", _sweep),
    ):
        if part in of:
            parts.append(f"## {title}\n\n{make(of[part])}")
    return "\n\n".join(parts) + "\n"


def table(head: Iterable[str], lines: Iterable[Iterable[Any]]) -> str:
    head = list(head)
    rows = [head, ["---"] * len(head), *([str(cell).replace("|", "/") for cell in line] for line in lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _about(row: Row) -> str:
    return f"""# On a GPU

What `python demos/gpu_all.py --out FOLDER` found on one {row["device"]}; torch {row["torch"]}, Triton {row["Triton"]}.
`python demos/gpu_tables.py FOLDER/gpu.json` prints this page. Errors are relative, of the worst of the outputs and
gradients. Times are medians on the device, with nothing of what is read in its cache; a fraction is the time of a
`copy_` of as many bytes as the operator must move, over its own."""


def _checks(rows: list[Row]) -> str:
    given = [[row["case"], _error(row)] for row in rows if row["operator"] == "given"]
    rows = [row for row in rows if row["operator"] != "given"]
    operators = list(dict.fromkeys(row["operator"] for row in rows))
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        found = {row["operator"]: row for row in rows if row["case"] == case}
        lines.append([case, *(_error(found.get(operator)) for operator in operators)])
    tables = [table(["tokens x n x C, dtype, kind: worst relative error", *operators], lines)]
    if given:
        tables.append(table(["tokens x n x C, columns, dtype: operators with given coefficients", "error"], given))
    return "\n\n".join(tables)


def _error(row: Row | None) -> str:
    if row is None:
        return "not run"
    return f"WRONG: {row['wrong']}" if row["wrong"] else f"{row['error']:.1e}"


def _models(rows: list[Row]) -> str:
    columns = list(dict.fromkeys((row["model"], row["precision"]) for row in rows))
    lines = []
    for check in dict.fromkeys(row["check"] for row in rows):
        found = {(row["model"], row["precision"]): row for row in rows if row["check"] == check}
        cells = (found.get(column) for column in columns)
        lines.append(
            [check, *("not run" if c is None else ("" if c["right"] else "WRONG: ") + c["found"] for c in cells)]
        )
    return table(["check", *(", ".join(column) for column in columns)], lines)


def _times(rows: list[Row]) -> str:
    text = []
    for size in dict.fromkeys(row["size"] for row in rows):
        mine = _joined([row for row in rows if row["size"] == size])
        names = list(dict.fromkeys(who for row in mine for who in row["seconds"] if who != "copy"))
        lines = []
        for row in mine:
            copy = row["seconds"]["copy"]
            cells = [
                f"{1e6 * row['seconds'][who]:.0f} ({copy / row['seconds'][who]:.2f})" if who in row["seconds"] else "-"
                for who in names
            ]
            host = f"{1e6 * row['host']['ours']:.0f}" if "ours" in row["host"] else "-"
            kind = "and backward" if row["backward"] else "forward"
            lines.append([f"{row['operator']} {kind}", f"{row['bytes'] / 1e6:.0f}", f"{1e6 * copy:.0f}", *cells, host])
        absent = {who: why for row in mine for who, why in row["absent"].items()}
        said = "".join(f"\n{who}: {why}." for who, why in absent.items())
        head = ["us on the device (fraction of copy)", "MB", "copy", *names, "ours, us in Python"]
        text.append(f"### {size}, bf16\n\n{table(head, lines)}\n{said}")
    return "\n\n".join(text)


def _joined(rows: list[Row]) -> list[Row]:
    """One row for each operator and pass: contenders may have been measured one after the other."""
    joined: dict[tuple[str, bool], Row] = {}
    for row in rows:
        first = joined.setdefault((row["operator"], row["backward"]), {**row, "seconds": {}, "host": {}, "absent": {}})
        for key in ("seconds", "host", "absent"):
            first[key] = {**row[key], **first[key]}
    return list(joined.values())


def _sweep(rows: list[Row]) -> str:
    """The default's place, and the five fastest of each."""
    text = []
    timed = [row for row in rows if "us" in row and row["error"] < 0.05]
    for size in dict.fromkeys(row["size"] for row in timed):
        lines = []
        mine = [row for row in timed if row["size"] == size]
        for kernel in dict.fromkeys((row["kernel"], row["chain"]) for row in mine):
            found = sorted((row for row in mine if (row["kernel"], row["chain"]) == kernel), key=lambda row: row["us"])
            default = [row for row in found if row["config"]["name"] in ("default", "whole", "split")]
            for row in [*default[:1], *found[:5]]:
                config = " ".join(str(row["config"][key]) for key in ("tokens", "width", "warps", "stages", "parts"))
                name = "default: " if row in default else ""
                resources = f"{row.get('registers', '-')} / {row.get('spills', '-')}"
                figures = f"{row['us']:.0f}", f"{row['GBps']:.0f}", resources, f"{row['error']:.0e}"
                lines.append([" of ".join(kernel), name + config, *figures])
        head = ["kernel", "tokens width warps stages parts", "us", "GB/s", "registers / spills", "error"]
        text.append(f"### {size}, bf16\n\n{table(head, lines)}")
    failed = {f"{row['kernel']} {row['config']['name']}: {row['failed'][:80]}" for row in rows if "failed" in row}
    return "\n\n".join([*text, f"{len(timed)} timed, {len(failed)} failed."])


def _training(rows: list[Row]) -> str:
    base = next((row["ms"] for row in rows if row["variant"] == "original, eager" and "ms" in row), None)
    lines = []
    for row in rows:
        if "failed" in row:
            lines.append([row["variant"], row["failed"][:200], *[""] * 4])
            continue
        over = f"{row['ms'] / base:.2f}" if base else "-"
        memory = f"{row['peak_MB'] / 1024:.2f}" if "peak_MB" in row else "-"
        device = f"{row['device_ms']:.1f}" if "device_ms" in row else "-"
        lines.append([row["variant"], f"{row['ms']:.1f}", over, device, memory, row.get("launches", "-")])
    head = ["variant", "ms a step", "over original, eager", "ms of kernels", "peak, GiB", "launches"]
    return table(head, lines)


if __name__ == "__main__":
    files = [json.loads(Path(file).read_text()) for file in sys.argv[1:]]
    last = {row["part"]: k for k, rows in enumerate(files) for row in rows}
    print(markdown([row for k, rows in enumerate(files) for row in rows if last[row["part"]] == k]), end="")
