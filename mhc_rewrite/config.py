"""The options of a conversion: one frozen, validated dataclass."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from mhc_rewrite.connections import STARTS, connection_of
from mhc_rewrite.errors import ConfigError
from mhc_rewrite.kernels.kinds import MAX_STREAMS

VERSION = 1
COLLAPSES = ("mean", "sum")
MAPPINGS = ("pre", "post", "res")
# Where a conversion starts, which sites it takes, what it keeps in memory: not what a site with given weights computes.
_NO_FUNCTION = frozenset({"init", "include", "exclude", "min_sites", "recompute", "learn"})

_EXAMPLE = '{"layers.0-11": 4, "layers.12-23": 2}'

Recompute = int | Literal["auto"] | None


@dataclasses.dataclass(frozen=True)
class MHCConfig:
    """How residual streams are rewritten.

    Attributes:
        n_streams: expansion rate n, an int from 1 to 16; 1 leaves the model as it is. Or n by stretches of the model,
            `{"layers.0-11": 4, "layers.12-23": 2, "*": 3}`: a mapping of patterns, as those of `include`, to ints from
            2 to 16, of which a site takes the first that matches. Between stretches streams contract or expand so that
            their mean is kept, and with `"preserve"` the function. It is held as a tuple of pairs.
        init: how sites start. `"preserve"`: the converted model computes the original function and everything in it
            learns; streams part at their first site, or, where something on the trunk is not linear, are equal as with
            `"equal"`. `"near_identity"`: equal streams and an H_res that hardly moves. `"paper"`: arXiv:2512.24880.
        connection: how H_pre, H_post and H_res are made: a name in `mhc_rewrite.connections.CONNECTIONS`.
        dynamic: whether coefficients are made from each token's streams. False takes them from the bias alone, alike
            for all tokens: sites have no phi and no alpha, and project nothing.
        learn: the mappings whose parameters get gradients; for ablations, "pre", "post" and "res" by default. Weight
            decay, which an optimizer may apply all the same, has to be off for sites, as in `parameter_groups`.
        sinkhorn_iterations: column and row normalisations of H_res, an int >= 1; the paper uses 20 [9].
        collapse: how n streams become one at the exit: `"mean"`, or `"sum"` with `init="paper"` only.
        include: patterns (`fnmatch`, and ranges such as `layers.0-11`) over site names and the modules that hold them;
            empty means every site.
        exclude: patterns of sites to leave as plain residual adds.
        min_sites: streams with fewer sites are left alone, an int >= 1.
        eps_norm: epsilon under the root of the RMS norm [14, 15].
        recompute: in eager training keep the stream state only at the first of this many consecutive sites, and make
            the rest again in backward; `"auto"` takes the number that keeps least, None keeps all. Compiled models
            take it as an option of the backend `"mhc"`.

    Raises:
        ConfigError: a value is out of range, or two options contradict each other.
    """

    n_streams: int | Mapping[str, int] | tuple[tuple[str, int], ...] = 4
    init: str = "preserve"
    connection: str = "mhc"
    dynamic: bool = True
    learn: tuple[str, ...] = MAPPINGS
    sinkhorn_iterations: int = 20
    collapse: str = "mean"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    min_sites: int = 2
    eps_norm: float = 1e-6
    recompute: Recompute = None

    def __post_init__(self) -> None:
        for field in ("include", "exclude"):
            value = getattr(self, field)
            patterns = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else (value,)
            if not all(isinstance(pattern, str) and pattern for pattern in patterns):
                raise ConfigError(f"{field} takes name patterns such as 'layers.3.*', not {value!r}.")
            object.__setattr__(self, field, patterns)
        if isinstance(self.n_streams, (Mapping, tuple, list)):
            object.__setattr__(self, "n_streams", _stretches(self.n_streams))
        else:
            self._check_int("n_streams", 1, MAX_STREAMS)
        self._check_int("sinkhorn_iterations", 1, None)
        self._check_int("min_sites", 1, None)
        self._check_choice("init", tuple(STARTS))
        self._check_choice("collapse", COLLAPSES)
        connection = connection_of(self.connection)
        for n in [n for _, n in self.stretches] or [self.n]:
            if reason := connection.refuses(n):
                raise ConfigError(f"connection={self.connection!r} with n_streams={n}: {reason}.")
        if self.stretches and self.init == "preserve" and not connection.in_halves:
            raise ConfigError(
                f"connection={self.connection!r} starts with other groups of streams than what lies between stretches "
                "of different n_streams takes them to be. Use init='equal', or one number of streams."
            )
        if not isinstance(self.dynamic, bool):
            raise ConfigError(f"dynamic must be True or False, not {self.dynamic!r}.")
        learn = (self.learn,) if isinstance(self.learn, str) else self.learn
        if not isinstance(learn, Iterable) or not set(learn := tuple(learn)) <= set(MAPPINGS) or not learn:
            raise ConfigError(f"learn takes one or more of {', '.join(map(repr, MAPPINGS))}, not {self.learn!r}.")
        object.__setattr__(self, "learn", tuple(name for name in MAPPINGS if name in learn))
        number = isinstance(self.eps_norm, (int, float)) and not isinstance(self.eps_norm, bool)
        if not (number and 0 < self.eps_norm < math.inf):
            raise ConfigError(f"eps_norm must be a positive number, not {self.eps_norm!r}.")
        check_recompute(self.recompute)
        if self.collapse == "sum" and self.init != "paper":
            raise ConfigError(
                f"collapse='sum' multiplies the output by n_streams, so it contradicts init={self.init!r}. "
                "Use collapse='mean', or init='paper'."
            )
        if self.collapse == "sum" and self.stretches:
            raise ConfigError(
                "collapse='sum' contradicts n_streams by stretches: between them the mean of the streams is kept, and "
                "not their sum. Use collapse='mean', or one number of streams."
            )
        if both := sorted(set(self.include) & set(self.exclude)):
            raise ConfigError(f"{both[0]!r} is both included and excluded. Leave it in one of the two.")

    def _check_int(self, field: str, low: int, high: int | None) -> None:
        value = getattr(self, field)
        in_range = isinstance(value, int) and not isinstance(value, bool) and low <= value
        if not in_range or (high is not None and value > high):
            bounds = f"from {low} to {high}" if high is not None else f"of at least {low}"
            raise ConfigError(f"{field} must be an int {bounds}, not {value!r}.")

    def _check_choice(self, field: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, field)
        if value not in choices:
            raise ConfigError(f"{field} must be one of {', '.join(map(repr, choices))}, not {value!r}.")

    @property
    def stretches(self) -> tuple[tuple[str, int], ...]:
        """n by pattern; empty where it is the same for all sites."""
        return self.n_streams if isinstance(self.n_streams, tuple) else ()

    @property
    def n(self) -> int:
        """The number of streams of one site.

        Raises:
            ConfigError: these are the options of a model, with n by stretches.
        """
        if not isinstance(self.n_streams, int):
            raise ConfigError(f"One site has one number of streams: n_streams={dict(self.n_streams)!r} is for a model.")
        return self.n_streams

    def streams_as_text(self) -> str:
        """`4`, or `4 at layers.0-11, 2 at layers.12-23`."""
        return ", ".join(f"{n} at {pattern}" for pattern, n in self.stretches) or str(self.n_streams)

    def function(self) -> dict[str, Any]:
        """The options that decide what sites with given weights compute."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in _NO_FUNCTION}

    def to_dict(self) -> dict[str, Any]:
        """The options as plain, JSON-ready data, with a `version`."""
        fields = dataclasses.asdict(self)
        # Stretches as pairs, not as a dict: their order counts, and who writes JSON may sort keys.
        return {"version": VERSION, **{k: _as_lists(v) for k, v in fields.items()}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MHCConfig:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: another version, or unknown fields.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"Options are a mapping of names to values, not {type(data).__name__}.")
        fields = dict(data)
        version = fields.pop("version", None)
        if version != VERSION:
            raise ConfigError(f"This is version {version!r} of the options; version {VERSION} is understood.")
        return cls.from_fields(fields)

    def save(self, file: str | os.PathLike[str]) -> None:
        """Writes the options to a JSON file."""
        Path(file).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> MHCConfig:
        """The options that `save` wrote.

        Raises:
            ConfigError: the file is not there, or holds no options of this version.
        """
        try:
            data = json.loads(Path(file).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{os.fspath(file)!r} can't be read as options: {error}.") from error
        return cls.from_dict(data)

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> MHCConfig:
        """A config from keyword fields.

        Raises:
            ConfigError: a name is not a field; the message lists those that are.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(fields) - set(known)):
            raise ConfigError(f"Unknown option {unknown[0]!r}. The options are: {', '.join(known)}.")
        return cls(**fields)


def _as_lists(value: Any) -> Any:
    return [_as_lists(item) for item in value] if isinstance(value, tuple) else value


def _stretches(given: Any) -> tuple[tuple[str, int], ...]:
    """n by pattern, checked."""
    pairs = tuple(given.items() if isinstance(given, Mapping) else given)
    if not pairs or not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs):
        raise ConfigError(f"n_streams takes an int, or pairs of a pattern and an int as in {_EXAMPLE}, not {given!r}.")
    patterns = [pattern for pattern, _ in pairs]
    for pattern, n in pairs:
        if not isinstance(pattern, str) or not pattern:
            raise ConfigError(f"n_streams takes name patterns, as in {_EXAMPLE}, not {pattern!r}.")
        if patterns.count(pattern) > 1:
            raise ConfigError(f"n_streams has {pattern!r} twice. Leave it in once.")
        if n == 1 and isinstance(n, int) and not isinstance(n, bool):
            raise ConfigError(
                f"n_streams has 1 for {pattern!r}: one stream is a plain residual. {_without(pattern, patterns)}"
            )
        if not isinstance(n, int) or isinstance(n, bool) or not 2 <= n <= MAX_STREAMS:
            raise ConfigError(f"n_streams must be ints from 2 to {MAX_STREAMS}, not {n!r} for {pattern!r}.")
    return tuple((pattern, n) for pattern, n in pairs)


def _without(pattern: str, patterns: list[str]) -> str:
    """How to leave sites as they are; those of the last pattern are those that no other one matches."""
    if len(patterns) == 1:
        return "n_streams=1 leaves the whole model as it is."
    if pattern == patterns[-1]:
        return f"Take it out of n_streams, and take in the others alone, with include={tuple(patterns[:-1])!r}."
    return f"Take it out of n_streams, and leave these sites out with exclude={(pattern,)!r}."


def check_recompute(recompute: Any) -> Recompute:
    """The option as given, if it can be used.

    Raises:
        ConfigError: it can't.
    """
    is_length = isinstance(recompute, int) and not isinstance(recompute, bool) and recompute >= 1
    if recompute is None or recompute == "auto" or is_length:
        return recompute
    raise ConfigError(f'recompute must be a number of sites from 1 on, "auto" or None, not {recompute!r}.')
