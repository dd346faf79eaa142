"""Which sites `include`, `exclude` and the patterns of `n_streams` mean, by the names of sites and modules.

A pattern is `fnmatch`'s, and means what is below a module that it matches too. `3-7`, where a module's name has a part
that is a number, means the numbers from 3 to 7.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

from mhc_rewrite.config import MHCConfig
from mhc_rewrite.errors import ConfigError
from mhc_rewrite.plans import ResidualSite

EVERYTHING = "*"
_RANGE = re.compile(r"(?:^|(?<=\.))(\d+)-(\d+)(?=\.|$)")


def matches_module(name: str, patterns: Iterable[str]) -> bool:
    """Whether a module's name is meant by one of the patterns."""
    return any(
        fnmatchcase(name, spelled) or name.startswith(spelled + ".")
        for pattern in patterns
        for spelled in _spelled(pattern, name)
    )


def _spelled(pattern: str, name: str) -> Iterator[str]:
    """A pattern as it is, and with the numbers of a name in place of the ranges that they lie in."""
    yield pattern
    found = _RANGE.search(pattern)
    if found is not None:
        low, high = int(found[1]), int(found[2])
        for number in dict.fromkeys(part for part in name.split(".") if part.isdecimal()):
            if low <= int(number) <= high:
                yield from _spelled(pattern[: found.start()] + number + pattern[found.end() :], name)


def matches(site: ResidualSite, patterns: Iterable[str]) -> bool:
    """Whether a site is meant: by its own name, or by that of a module whose forward holds or is rewritten for it."""
    patterns = tuple(patterns)
    return any(matches_module(name, patterns) for name in (site.name, site.holder, site.carrier))


def wanted(site: ResidualSite, config: MHCConfig, filter_fn: Callable[[ResidualSite], bool] | None) -> bool:
    """Whether a site is to be rewritten."""
    included = not config.include or matches(site, config.include)
    return included and not matches(site, config.exclude) and (filter_fn is None or bool(filter_fn(site)))


def streams_at(site: ResidualSite, config: MHCConfig) -> int | None:
    """n of a site that is to be rewritten, where the options give n by stretches; None where it is the same for all.

    Raises:
        ConfigError: no pattern means the site.
    """
    if not config.stretches or site.excluded:
        return None
    for pattern, n in config.stretches:
        if matches(site, (pattern,)):
            return n
    patterns = ", ".join(repr(pattern) for pattern, _ in config.stretches)
    raise ConfigError(
        f"n_streams says nothing of site {site.name!r} ({site.source}): none of its patterns matches ({patterns}). "
        f"Add {EVERYTHING!r}: 4, as the last one, for all others."
    )


def check_patterns(config: MHCConfig, sites: Sequence[ResidualSite], modules: set[str]) -> None:
    """Refuses patterns that mean nothing.

    Args:
        sites: all that were found.
        modules: names of all modules that ran. One whose forward can't be captured may be excluded without a site.

    Raises:
        ConfigError: a pattern matches nothing, or nothing that patterns before it have not taken.
    """
    stretches = tuple(pattern for pattern, _ in config.stretches)
    for option, patterns in (("include", config.include), ("exclude", config.exclude), ("n_streams", stretches)):
        for pattern in patterns:
            uncaptured = option == "exclude" and any(matches_module(name, (pattern,)) for name in modules)
            if not any(matches(site, (pattern,)) for site in sites) and not uncaptured and pattern != EVERYTHING:
                names = [name for site in sites for name in (site.name, site.holder)]
                near = difflib.get_close_matches(pattern, dict.fromkeys(names), 3, 0.4) or names[:3]
                raise ConfigError(f"{option}={pattern!r} matches no site. Near: {', '.join(map(repr, near))}.")
    for index, pattern in enumerate(stretches):
        before = stretches[:index]
        if pattern != EVERYTHING and all(matches(site, before) for site in sites if matches(site, (pattern,))):
            raise ConfigError(
                f"n_streams={pattern!r} is of no effect: every site that it matches is taken by a pattern before it "
                f"({', '.join(map(repr, before))}), and the first one that matches decides. Put it before them."
            )
