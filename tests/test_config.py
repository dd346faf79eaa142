"""MHCConfig: every field's limits, contradictions, and its way to data and back."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from typing import Any

import pytest

from mhc_rewrite import MHCConfig
from mhc_rewrite.connections import CONNECTIONS
from mhc_rewrite.errors import ConfigError, MHCError

NAMES = [field.name for field in dataclasses.fields(MHCConfig)]
CHANGED = MHCConfig(
    n_streams=3,
    init="paper",
    connection="hc",
    dynamic=False,
    learn=("post",),
    sinkhorn_iterations=7,
    collapse="sum",
    include=("layers.*",),
    exclude=("layers.0", "layers.1.mhc_0"),
    min_sites=5,
    eps_norm=1e-20,
    recompute=3,
)


def test_defaults() -> None:
    assert dataclasses.asdict(MHCConfig()) == {
        "n_streams": 4,
        "init": "preserve",
        "connection": "mhc",
        "dynamic": True,
        "learn": ("pre", "post", "res"),
        "sinkhorn_iterations": 20,
        "collapse": "mean",
        "include": (),
        "exclude": (),
        "min_sites": 2,
        "eps_norm": 1e-6,
        "recompute": None,
    }


def test_changed_has_no_default() -> None:
    """So that the round trips below would notice a field that gets lost."""
    assert not [name for name in NAMES if getattr(CHANGED, name) == getattr(MHCConfig(), name)]


# -- single fields ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"n_streams": 1},
        {"n_streams": 16},
        {"sinkhorn_iterations": 1},
        {"sinkhorn_iterations": 1000},
        {"min_sites": 1},
        {"min_sites": 1000},
        {"init": "paper"},
        {"collapse": "sum", "init": "paper"},
        *({"connection": name} for name in CONNECTIONS),
        {"eps_norm": 1},
        {"eps_norm": 1e-20},
    ],
    ids=str,
)
def test_allowed(fields: dict[str, Any]) -> None:
    config = MHCConfig(**fields)
    assert {name: getattr(config, name) for name in fields} == fields


NOT_INTS = (0, -1, 2.0, "4", None, True, math.nan)


@pytest.mark.parametrize(
    "field,value,expected",
    [
        *(("n_streams", value, "an int from 1 to 16") for value in (*NOT_INTS, 17)),
        *(("sinkhorn_iterations", value, "an int of at least 1") for value in NOT_INTS),
        *(("min_sites", value, "an int of at least 1") for value in NOT_INTS),
        *(("init", value, "'preserve', 'equal', 'near_identity', 'paper'") for value in ("Preserve", "", None, 1)),
        *(("collapse", value, "'mean', 'sum'") for value in ("max", None)),
        *(("connection", value, "'mhc', 'deepseek_v4', 'hc'") for value in ("mhc2", None)),
        *(("eps_norm", value, "a positive number") for value in (0, 0.0, -1e-6, "1e-6", None, True, math.nan)),
        *(("include", value, "name patterns") for value in (("",), (1,), ("a", None))),
        *(("exclude", value, "name patterns") for value in (("",), [2])),
        *((field, value, "name patterns") for field in ("include", "exclude") for value in (None, 3)),
        ("eps_norm", math.inf, "a positive number"),
    ],
)
def test_refused(field: str, value: Any, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        MHCConfig(**{field: value})
    message = str(caught.value)
    assert field in message and expected in message and repr(value) in message


def test_errors_are_the_packages_own_and_value_errors() -> None:
    for kind in (MHCError, ValueError):
        with pytest.raises(kind):
            MHCConfig(n_streams=0)


@pytest.mark.parametrize("field", ["include", "exclude"])
def test_patterns_become_a_tuple(field: str) -> None:
    for given, kept in (("layers.3.*", ("layers.3.*",)), (["a", "b"], ("a", "b")), (("a",), ("a",))):
        assert getattr(MHCConfig(**{field: given}), field) == kept


def test_frozen_and_hashable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        MHCConfig().n_streams = 2  # type: ignore[misc]
    assert len({MHCConfig(), MHCConfig(n_streams=4), MHCConfig(n_streams=2), CHANGED}) == 3
    assert pickle.loads(pickle.dumps(CHANGED)) == CHANGED


# -- contradictions --------------------------------------------------------------------------------------------------


def test_sum_contradicts_preserve() -> None:
    with pytest.raises(ConfigError, match=r"collapse='sum'.*contradicts init='preserve'.*Use collapse='mean', or init"):
        MHCConfig(collapse="sum")


def test_included_and_excluded() -> None:
    with pytest.raises(ConfigError, match=r"'layers\.0' is both included and excluded.*one of the two"):
        MHCConfig(include=("layers.0", "x"), exclude=("y", "layers.0"))


# -- data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [MHCConfig(), CHANGED], ids=["defaults", "changed"])
def test_round_trip_by_json(config: MHCConfig) -> None:
    data = json.loads(json.dumps(config.to_dict()))
    assert set(data) == {"version", *NAMES}
    assert data["version"] == 1
    again = MHCConfig.from_dict(data)
    assert again == config and hash(again) == hash(config)
    assert type(again.include) is tuple and type(again.exclude) is tuple


def test_from_dict_leaves_its_argument_alone() -> None:
    data = CHANGED.to_dict()
    before = dict(data)
    MHCConfig.from_dict(data)
    assert data == before


def test_missing_fields_have_their_defaults() -> None:
    assert MHCConfig.from_dict({"version": 1, "n_streams": 2}) == MHCConfig(n_streams=2)


@pytest.mark.parametrize("version", [None, 0, 2, "1"])
def test_other_versions_are_refused(version: Any) -> None:
    data = MHCConfig().to_dict()
    if version is None:
        del data["version"]
    else:
        data["version"] = version
    with pytest.raises(ConfigError, match=f"version {version!r}.*version 1 is understood"):
        MHCConfig.from_dict(data)


@pytest.mark.parametrize("make", [MHCConfig.from_fields, lambda fields: MHCConfig.from_dict({"version": 1, **fields})])
def test_unknown_names_are_refused(make: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        make({"n_streams": 2, "streams": 4})
    assert "'streams'" in str(caught.value)
    assert all(name in str(caught.value) for name in NAMES)


def test_from_fields_validates() -> None:
    assert MHCConfig.from_fields({}) == MHCConfig()
    assert MHCConfig.from_fields({"n_streams": 2, "exclude": "a"}) == MHCConfig(n_streams=2, exclude=("a",))
    with pytest.raises(ConfigError, match="n_streams must be an int from 1 to 16, not 'two'"):
        MHCConfig.from_fields({"n_streams": "two"})
