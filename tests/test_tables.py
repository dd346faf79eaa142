"""Plans and reports as tables: what is folded, what must never be lost."""

from __future__ import annotations

import io
import itertools
import re

import pytest
from expecttest import TestCase
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from mhc_rewrite.config import MHCConfig
from mhc_rewrite.plans import (
    Rejection,
    ResidualSite,
    ResidualStream,
    RewritePlan,
    RewriteReport,
    SourceLine,
    short_source,
)
from mhc_rewrite.printing import as_text, fold

INSTALLED = "/opt/env/lib/python3.11/site-packages/llama/modeling_llama.py"
ADD = SourceLine(INSTALLED, 310, "hidden_states = residual + hidden_states")
ADD_MLP = SourceLine(INSTALLED, 316, "hidden_states = residual + hidden_states")
ROPE = SourceLine(INSTALLED, 130, "q_embed = (q * cos) + (rotate_half(q) * sin)")


def site(layer: int, k: int = 0, **changes: object) -> ResidualSite:
    name = f"model.layers.{layer}"
    fields = dict(name=f"{name}.mhc_{k}", holder=name, carrier=name, branch=("self_attn", "mlp")[k], width=64)
    fields |= dict(channel_dim=-1, dtype="torch.float32", source=(ADD, ADD_MLP)[k])
    return ResidualSite(**{**fields, **changes})  # type: ignore[arg-type]


def plan_of(*sites: ResidualSite, lifted: tuple[str, ...] = (), **fields: object) -> RewritePlan:
    stream = ResidualStream(sites, sites[0].carrier, sites[-1].carrier, "model", lifted)
    return RewritePlan("LlamaForCausalLM", MHCConfig(), (stream,), **fields)  # type: ignore[arg-type]


def layers(count: int) -> RewritePlan:
    sites = [site(layer, k) for layer in range(count) for k in (0, 1)]
    rejections = [
        Rejection(f"model.layers.{i}.self_attn", ROPE, "no-mixing", f"no branch in model.layers.{i}.self_attn")
        for i in range(count)
    ]
    return plan_of(*sites, rejections=tuple(rejections))


def rendered(renderable: object, **options: object) -> str:
    console = Console(file=io.StringIO(), **{"width": 120, "force_terminal": True, **options})  # type: ignore[arg-type]
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined]


FOLDS = {
    "one": (["norm"], ["norm"]),
    "empty name": (["", "h.0"], ["", "h.0"]),
    "run": ([f"h.{i}.mlp" for i in range(48)], ["h.{0..47}.mlp"]),
    "two": (["h.0", "h.1"], ["h.{0,1}"]),
    "gap": (["h.0", "h.1", "h.2", "h.5", "h.7", "h.8"], ["h.{0..2,5,7,8}"]),
    "step": (["h.1", "h.3", "h.5", "h.7"], ["h.{1..7..2}"]),
    "grid": ([f"s.{i}.b.{j}" for i in range(3) for j in range(2)], ["s.{0..2}.b.{0,1}"]),
    "pyramid": (
        [f"s.{i}.b.{j}" for i, depth in enumerate((2, 2, 6, 2)) for j in range(depth)],
        ["s.{0,1,3}.b.{0,1}", "s.2.b.{0..5}"],
    ),
    "suffix is no layer": (["layer1.0.mhc_0", "layer2.0.mhc_0"], ["layer1.0.mhc_0", "layer2.0.mhc_0"]),
    "other shapes": (["h.0.a", "h.1.b", "h.2.a"], ["h.{0,2}.a", "h.1.b"]),
    "leading zero": (["h.1", "h.01"], ["h.1", "h.01"]),
    "first part": (["0", "1", "2"], ["{0..2}"]),
}


@pytest.mark.parametrize("case", FOLDS)
def test_fold(case: str) -> None:
    names, expected = FOLDS[case]
    assert list(fold(names)) == expected


def expanded(pattern: str) -> list[str]:
    """What a shell makes of a folded name."""
    choices = []
    for part in re.findall(r"\{[^}]*\}|[^.{}]+", pattern):
        values: list[str] = []
        for run in part.strip("{}").split(",") if part.startswith("{") else []:
            start, stop, step = (*run.split(".."), "", "")[:3]
            values += map(str, range(int(start), int(stop or start) + 1, int(step or 1)))
        choices.append(values or [part])
    return [".".join(parts) for parts in itertools.product(*choices)]


@given(st.lists(st.lists(st.sampled_from(["h", "mlp", *map(str, range(12))]), min_size=1, max_size=4), max_size=40))
def test_fold_loses_nothing_and_adds_nothing(names: list[list[str]]) -> None:
    dotted = [".".join(parts) for parts in names]
    folded = fold(dotted)
    for pattern, covered in folded.items():
        assert sorted(expanded(pattern)) == sorted(covered)
    assert sorted(itertools.chain(*folded.values())) == sorted(set(dotted))


class TestGolden(TestCase):
    def test_plan(self) -> None:
        sites = [site(layer, k) for layer in range(3) for k in (0, 1)]
        sites[3] = site(1, 1, excluded=True)
        plan = plan_of(
            *sites,
            lifted=("model.layers.0: dropout", "model.layers.1: dropout", "model.layers.2: dropout"),
            rejections=layers(3).rejections,
            notes=("the train mode was not run",),
        )
        self.assertExpectedInline(
            str(plan),
            """\
LlamaForCausalLM: 5 sites and 1 excluded in 1 stream (n = 4, mhc, init preserve)

stream 0: 5 sites and 1 excluded, C = 64, float32
  entry model.layers.0, exit model.layers.2, within model
  lifted to every stream: model.layers.{0..2}: dropout
  site                                  branch      C  source
  ---------------------------------------------------------------------------------------------
  model.layers.{0..2}.mhc_0         x3  self_attn  64  modeling_llama.py:310
  in model.layers.{0..2}                               hidden_states = residual + hidden_states
  model.layers.{0,2}.mhc_1          x2  mlp        64  modeling_llama.py:316
  in model.layers.{0,2}                                hidden_states = residual + hidden_states
  model.layers.1.mhc_1                  mlp        64  modeling_llama.py:316
  in model.layers.1                                    hidden_states = residual + hidden_states
  excluded: stays a plain residual

left alone: 3 places
  rule           place                                         reason
  --------------------------------------------------------------------------------------------------
  no-mixing  x3  model.layers.{0..2}.self_attn                 no branch in model.layers.#.self_attn
                 modeling_llama.py:130
                 q_embed = (q * cos) + (rotate_half(q) * sin)

notes
  - the train mode was not run""",
        )

    def test_report(self) -> None:
        plan = plan_of(site(0), site(1, source=ADD_MLP))
        calls = {"model.layers.0": ("eval", "train"), "model.layers.1": ("eval", "train")}
        self.assertExpectedInline(
            str(RewriteReport(plan, 1_000_000, (12_345,), calls)),
            """\
LlamaForCausalLM: 2 sites in 1 stream (n = 4, mhc, init preserve): converted
12,345 parameters added (1.23 % of its own 1,000,000)

stream 0: 2 sites, C = 64, float32, 12,345 parameters added
  entry model.layers.0, exit model.layers.1, within model
  site                    branch      C  source
  -------------------------------------------------------------------------------
  model.layers.0.mhc_0    self_attn  64  modeling_llama.py:310
  in model.layers.0                      hidden_states = residual + hidden_states
  model.layers.1.mhc_0    self_attn  64  modeling_llama.py:316
  in model.layers.1                      hidden_states = residual + hidden_states

carrier             calls captured
----------------------------------
model.layers.{0,1}  eval
                    train""",
        )


def test_a_deep_model_fits_a_screen() -> None:
    lines = str(layers(48)).splitlines()
    assert len(lines) <= 20
    assert max(map(len, lines)) <= 120
    text = "\n".join(lines)
    assert "model.layers.{0..47}.mhc_0" in text and "model.layers.{0..47}.mhc_1" in text
    assert text.count("x48") == 3  # two rows of sites, one of rejections
    assert "96 sites" in text and "48 places" in text


DIFFERENT = {
    "width": dict(width=128),
    "source": dict(source=SourceLine(INSTALLED, 999, "x = x + y")),
    "branch": dict(branch="conv"),
    "excluded": dict(excluded=True),
    "carrier": dict(carrier="model"),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_sites_that_differ_are_not_folded(what: str) -> None:
    alike, other = str(plan_of(site(0), site(1))), str(plan_of(site(0), site(1, **DIFFERENT[what])))
    assert "model.layers.{0,1}.mhc_0" in alike
    assert "model.layers.0.mhc_0" in other and "model.layers.1.mhc_0" in other
    assert "{0,1}.mhc_0" not in other


def test_a_layer_that_is_called_three_times_counts_three() -> None:
    text = str(plan_of(site(0), site(0), site(0)))
    assert re.search(r"model\.layers\.0\.mhc_0 +x3\b", text)
    assert "1 site in 3 calls" in text


def test_reasons_that_differ_by_more_than_a_number_stay_apart() -> None:
    rejections = tuple(Rejection(f"h.{i}", None, "rule", f"gate is {i / 10 + 0.5}") for i in range(2))
    text = str(plan_of(site(0), rejections=rejections))
    assert "gate is 0.5" in text and "gate is 0.6" in text


def test_long_names_are_not_wrapped() -> None:
    name = ".".join(["encoder"] * 30)
    long = plan_of(site(0, name=f"{name}.mhc_0", carrier=name), site(1))
    assert f"{name}.mhc_0" in str(long)


def test_nothing_to_rewrite_says_why() -> None:
    text = str(RewritePlan("GPT", MHCConfig(n_streams=1), (), notes=("n_streams = 1 rewrites nothing",)))
    assert "0 sites in 0 streams" in text and "n_streams = 1 rewrites nothing" in text


def test_the_users_brackets_are_not_markup() -> None:
    source = SourceLine("/home/u/model.py", 3, "x = x + [bold]f[/bold](x)[0]")
    assert "[bold]f[/bold](x)[0]" in str(plan_of(site(0, source=source), site(1)))


def test_plain_text_has_no_colour_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b" not in as_text(layers(2))
    assert "\x1b" in rendered(layers(2))


@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_narrow_terminal_keeps_every_character_of_a_name(width: int) -> None:
    shown = rendered(plan_of(site(0), site(5)), width=width, color_system=None)
    first_column = "".join(re.findall(r"^  (\S+)", shown, re.MULTILINE))
    assert "model.layers.{0,5}.mhc_0" in first_column
    assert max(map(len, shown.splitlines())) <= width


def test_short_source(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.chdir(str(tmp_path))
    cases = {
        INSTALLED: "modeling_llama.py:7",
        f"{tmp_path}/src/net.py": "src/net.py:7",
        "/elsewhere/net.py": "/elsewhere/net.py:7",
        "<string>": "<string>:7",
    }
    assert {file: short_source(SourceLine(file, 7, "")) for file in cases} == cases
