"""Which lines of a user's source only check something: they raise or do nothing, so a graph may do without them."""

from __future__ import annotations

import ast
import functools
import linecache
import re

from mhc_rewrite.plans import SourceLine

_CHECKS = re.compile(r"(^|_)(check|assert)")


def only_checks(source: SourceLine | None) -> bool:
    """Whether the statement at a line is an `assert`, an `if` that can only raise, or a bare call of a check.

    What such a statement asks of a tensor's content decides nothing that is computed.
    """
    statement = _statements(source.file).get(source.line) if source is not None else None
    if isinstance(statement, ast.If):
        return not statement.orelse and all(isinstance(part, ast.Raise) for part in statement.body)
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        called = statement.value.func
        name = called.attr if isinstance(called, ast.Attribute) else called.id if isinstance(called, ast.Name) else ""
        return bool(_CHECKS.search(name))
    return isinstance(statement, ast.Assert)


@functools.cache
def _statements(file: str) -> dict[int, ast.stmt]:
    """The innermost statement at each line; of one with a body, the lines of its head."""
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except (SyntaxError, ValueError):
        return {}
    found: dict[int, ast.stmt] = {}
    for node in ast.walk(tree):  # outer statements come first
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None)
            last = body[0].lineno - 1 if body else node.end_lineno or node.lineno
            for line in range(node.lineno, max(last, node.lineno) + 1):
                found[line] = node
    return found
