"""Lines of source that are found again on another machine, or when the lines around them have moved.

A site is known by the line of its add. What is saved of a line is the function that it stands in and its text: they
stay when a library is installed elsewhere and when other parts of the file change.
"""

from __future__ import annotations

import ast
import functools
import linecache
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType

from torch import nn


@dataclass(frozen=True)
class SavedLine:
    """One line.

    Attributes:
        file: from the folder that its package is imported from.
        line: its number when it was saved.
        text: the code on it; "" where there is no source to read.
        function: the function around it, with its class: "Block.forward".
        nth, of: which one it is of the lines with this text in the function, and how many they are.
    """

    file: str
    line: int
    text: str
    function: str
    nth: int
    of: int


def saved_line(file: str, line: int) -> SavedLine:
    """What to save of a line."""
    text = linecache.getline(file, line).strip()
    function = max((f for f in _functions(file) if f[1] <= line <= f[2]), key=lambda f: f[1], default=("", 1, 0))
    alike = _lines_with(file, function[0], text)
    return SavedLine(short_path(file), line, text, function[0], alike.index(line) if line in alike else 0, len(alike))


def find_line(saved: SavedLine, model: nn.Module) -> tuple[str, int] | None:
    """Where a saved line stands now, in the sources of the model's classes or of what they import; None: nowhere."""
    files = source_files(model)
    suffix = Path(saved.file).parts
    imported = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
    same = [file for file in dict.fromkeys([*files, *filter(None, imported)]) if _ends_with(file, suffix)]
    for file in dict.fromkeys([*same, *files]):
        if not saved.text:
            return (file, saved.line) if file in same else None
        alike = _lines_with(file, saved.function, saved.text)
        if alike and len(alike) == saved.of:
            return file, alike[saved.nth]
    return None


def source_files(model: nn.Module) -> list[str]:
    """The files in which the methods of the model's classes stand, as their code names them."""
    classes = dict.fromkeys(
        base for module in model.modules() for base in type(module).__mro__ if base is not nn.Module
    )
    return list(dict.fromkeys(file for base in classes for file in _files_of(base)))


def short_path(file: str) -> str:
    """A file from the folder that it is imported from; its name alone where there is none."""
    path = Path(file)
    if not path.is_absolute():  # short already
        return file
    inside = [path.relative_to(folder) for folder in map(Path, sys.path) if folder.name and path.is_relative_to(folder)]
    return min(inside, key=lambda p: len(p.parts), default=Path(path.name)).as_posix()


def package_versions(files: Iterable[str]) -> dict[str, str]:
    """The versions of the packages in which short paths stand, where they have one."""
    packages = dict.fromkeys(Path(file).parts[0].removesuffix(".py") for file in files)
    versions = {name: getattr(sys.modules.get(name), "__version__", None) for name in packages}
    return {name: str(version) for name, version in versions.items() if version is not None}


def _ends_with(file: str, suffix: tuple[str, ...]) -> bool:
    return Path(file).parts[-len(suffix) :] == suffix


@functools.cache
def _files_of(kind: type) -> tuple[str, ...]:
    files = []
    for function in vars(kind).values():
        while hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        if isinstance(function, FunctionType):
            files.append(function.__code__.co_filename)
    return tuple(dict.fromkeys(files))


def _lines_with(file: str, function: str, text: str) -> list[int]:
    """Numbers of the lines with a text in the functions of a name; in the whole file without a name."""
    lines = linecache.getlines(file)
    ranges = [(first, last) for name, first, last in _functions(file) if name == function]
    if not function:
        ranges = [(1, len(lines))]
    return [n for first, last in ranges for n in range(first, last + 1) if lines[n - 1].strip() == text]


def _functions(file: str) -> tuple[tuple[str, int, int], ...]:
    return _functions_in("".join(linecache.getlines(file)))


@functools.lru_cache(maxsize=64)
def _functions_in(source: str) -> tuple[tuple[str, int, int], ...]:
    """The functions of a file: name with the classes and functions around it, first and last line."""
    found: list[tuple[str, int, int]] = []

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            name = prefix
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                name = f"{prefix}.{child.name}".lstrip(".")
                if not isinstance(child, ast.ClassDef):
                    found.append((name, child.lineno, child.end_lineno or child.lineno))
            visit(child, name)

    try:
        visit(ast.parse(source), "")
    except SyntaxError:  # no Python: nothing can be found again by its function
        return ()
    return tuple(found)
