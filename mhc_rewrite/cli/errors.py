"""Errors of the command line itself, each with its exit code."""

from __future__ import annotations


class CommandError(Exception):
    """Something that the command cannot do; the message is all that is shown."""

    exit_code = 1


class UsageError(CommandError):
    """The command was called in a way that cannot be meant."""

    exit_code = 2
