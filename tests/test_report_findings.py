"""What a report says of a run: each sentence on a run that has what it tells of, and none on one that has not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import report_runs

pytest.importorskip("plotly")
pytest.importorskip("numpy")

from mhc_rewrite.insight.report.findings import differences, findings, in_words, ranges
from mhc_rewrite.insight.report.reading import shown
from mhc_rewrite.insight.watching.format import SiteCall

LAYERS, SAMPLES = 6, 60  # of two sites; ten steps apart
LATE = 24  # the sample from which something is the matter
MIDDLE = (6, 7, 8, 9)  # the sites of layers 3 and 4


def said(file: Path, **more: Any) -> list[str]:
    """All that harms, of a run with these changes."""
    run = shown(report_runs.write(file, **{"layers": LAYERS, "samples": SAMPLES, **more}))
    return [one.text for one in findings(run) if one.bad]


def stay(mapping: str, since: int, sites: tuple[int, ...] = MIDDLE, dead: bool = False) -> report_runs.Change:
    """The mapping of these sites is from a sample on what it was at it."""

    def change(sample: dict[str, Any], k: int, of: int) -> None:
        if k >= since:
            then = report_runs.sample(since, of, len(sample["maps"]["res"]))
            for site in sites:
                sample["maps"][mapping][site] = then["maps"][mapping][site]
            sample["dead"][mapping] = list(sites) if dead else []

    return change


def put(name: str, value: float | None, sites: tuple[int, ...] = MIDDLE, since: int = LATE) -> report_runs.Change:
    """A figure of these sites is this from a sample on."""

    def change(sample: dict[str, Any], k: int, of: int) -> None:
        if k >= since:
            for site in sites:
                sample["figures"][name][site] = value

    return change


def gain(way: str) -> report_runs.Change:
    """A composite gain that is 1 at first and 60 at the end, after 12 sites; 10 between samples 33 and 34."""

    def change(sample: dict[str, Any], k: int, of: int) -> None:
        largest = 60 ** (k / (of - 1))
        depth = [largest ** ((site + 1) / 12) for site in range(12)]
        sample["figures"][f"composite_{way}_99"] = depth if way == "forward" else depth[::-1]

    return change


def lose(values: dict[int, float | None]) -> report_runs.Change:
    def change(sample: dict[str, Any], k: int, of: int) -> None:
        sample["loss"] = values.get(k, sample["loss"])

    return change


def no_gradient(sample: dict[str, Any], k: int, of: int) -> None:
    sample["dead"]["res"] = [2, 3] if k >= LATE else []


def steep(sample: dict[str, Any], k: int, of: int) -> None:
    sites = len(sample["maps"]["res"])
    sample["figures"]["state_gradient"] = [10.0 ** (1 - 4 * site / (sites - 1)) for site in range(sites)]


CASES: dict[str, tuple[report_runs.Change, str]] = {
    "still": (stay("res", LATE), "H_res of layers 3 and 4 has not moved since step 240."),
    "never": (stay("pre", 0), "H_pre of layers 3 and 4 has not moved at all."),
    "still, dead": (stay("post", LATE, dead=True), "H_post of layers 3 and 4 has not moved since step 240: its "
                    "gradient is below 1e-08."),
    "still, a single site": (stay("res", LATE, (5,)), "H_res of `model.layers.2.mhc_1` has not moved since step 240."),
    "dead, and moves": (no_gradient, "H_res of layer 1 has had no gradient above 1e-08 since step 240."),
    "gain forward": (gain("forward"), "The composite gain passes 10 at step 340, forward, in 1 % of the tokens; at the "
                     "end it is 60."),
    "gain backward": (gain("backward"), "The composite gain passes 10 at step 340, backward, in 1 % of the tokens; at "
                      "the end it is 60."),
    "averaged": (put("second_singular", 0.01), "H_res of layers 3 and 4 averages the streams away since step 240: its "
                 "second singular value is 0.01 or less."),
    "equal": (put("spread", 2e-4), "The streams are all but equal after layers 3 and 4 since step 240: apart by 0.0002 "
              "of their mean or less."),
    "equal from the start": (put("spread", 2e-4, since=0), "The streams are all but equal after layers 3 and 4: apart "
                             "by 0.0002 of their mean or less."),
    "one stream": (put("dominant", 0.97), "One stream is nearly all of the state after layers 3 and 4 since step 240: "
                   "97% of its squares or more."),
    "columns": (put("column_error_99", 0.4), "The columns of H_res of layers 3 and 4 do not sum to 1 since step 240: "
                "off by up to 0.4."),
    "rows": (put("row_error_99", 0.2), "The rows of H_res of layers 3 and 4 do not sum to 1 since step 240: off by up "
             "to 0.2."),
    "steep": (steep, "The gradient of the state is 10,000 times as large at `model.layers.0.mhc_0` as at "
              "`model.layers.5.mhc_1`, at step 590."),
    "loss breaks": (lose({k: None for k in range(50, 60)}), "The loss is no finite number from step 500 to the end."),
    "loss gaps": (lose({50: None, 52: None}), "The loss is no finite number at step 500 and in 1 later sample."),
    "loss jumps": (lose({40: 5.5}), "The loss jumps to 5.5 at step 400, after 2.29."),
}  # fmt: skip


@pytest.mark.parametrize("change, text", CASES.values(), ids=CASES)
def test_it_is_said_of_a_run_that_has_it(change: report_runs.Change, text: str, tmp_path: Path) -> None:
    assert said(tmp_path / "run.jsonl", change=change) == [text]


@pytest.mark.parametrize("layers, samples", [(6, 60), (1, 60), (48, 30), (2, 1), (2, 2), (2, 500)])
def test_nothing_is_said_of_one_in_good_health(layers: int, samples: int, tmp_path: Path) -> None:
    run = shown(report_runs.write(tmp_path / "run.jsonl", layers, samples))
    texts = [one.text for one in findings(run)]
    assert not any(one.bad for one in findings(run)), texts
    assert any(text.startswith("No figure is beyond its bounds.") for text in texts)
    assert any(re.match("The loss (falls from 6 at step 0|is 6 at step 0)", text) for text in texts)


NOT_YET: dict[str, report_runs.Change] = {
    "still for too short": stay("res", 50),
    "a moment's gain": lambda sample, k, of: None if k else gain("forward")(sample, 0, of),
    "gone again": lambda sample, k, of: put("spread", 2e-4)(sample, k, of) if k < SAMPLES - 1 else None,
    "dead for a while": lambda sample, k, of: no_gradient(sample, k, of) if k < 40 else None,
    "a loss that was not told at first": lose({0: None, 1: None}),
    "not known": put("second_singular", None),
    "noise in the loss": lose({40: 2.7}),
    "equal streams are not mixed": stay("res", 0, (0,), dead=True),
}


@pytest.mark.parametrize("change", NOT_YET.values(), ids=NOT_YET)
def test_nothing_is_said_too_early(change: report_runs.Change, tmp_path: Path) -> None:
    assert said(tmp_path / "run.jsonl", change=change) == []


def test_what_is_not_learned_need_not_move(tmp_path: Path) -> None:
    for options in ({"connection": "identity"}, {"learn": ["pre", "post"]}):
        head = report_runs.header(LAYERS, **options)
        assert said(tmp_path / f"{len(options)}{options}.jsonl", change=stay("res", 0), head=head) == []


def test_long_runs_say_the_same(tmp_path: Path) -> None:
    """Of many samples several lie together; what is told of a time is told to such a span."""
    (text,) = said(tmp_path / "run.jsonl", samples=700, change=gain("forward"))
    # 60 ** (k / 699) > 10 from k = 394 on: the gain is kept of every sample.
    assert text.startswith("The composite gain passes 10 at step 3,940, forward")
    (text,) = said(tmp_path / "still.jsonl", samples=700, change=stay("res", 300))
    step = int(re.findall(r"since step ([\d,]+)", text)[0].replace(",", ""))
    assert abs(step - 3000) <= 2 * 7000 / 200


def test_an_error_that_ended_the_run(tmp_path: Path) -> None:
    text = said(tmp_path / "run.jsonl", end="RuntimeError: out of memory")[0]
    assert text == "The run ended after step 590 with an error: RuntimeError: out of memory"


def test_two_runs(tmp_path: Path) -> None:
    one = shown(report_runs.write(tmp_path / "a.jsonl", LAYERS, SAMPLES))

    def better(sample: dict[str, Any], k: int, of: int) -> None:
        sample["loss"] -= 0.5

    head = report_runs.header(LAYERS, connection="hc")
    two = shown(report_runs.write(tmp_path / "b.jsonl", LAYERS, 80, better, head=head))
    texts = [one.text for one in differences(one, two, ("a", "b"))]
    assert texts[0] == "Their options differ: connection mhc and hc."
    assert re.fullmatch(r"Up to step 590, .* in a and to .* in b: 0\.\d+ less in b\.", texts[1])
    other = shown(report_runs.write(tmp_path / "c.jsonl", 2, SAMPLES))
    assert "the same model with other sites" in differences(one, other, ("a", "c"))[0].text
    assert len(differences(one, one, ("a", "a2"))) == 1  # no difference in loss, and that is all


def sites(*names: str) -> tuple[SiteCall, ...]:
    return tuple(SiteCall(0, name, 0, "", 4, 8) for name in names)


@pytest.mark.parametrize(
    "names, chosen, text",
    [
        (["h.0.mhc_0", "h.1.mhc_0", "h.2.mhc_0"], [1, 2], "layers 1 and 2"),
        (["h.0.mhc_0", "h.1.mhc_0", "h.2.mhc_0"], [0, 1, 2], "all sites"),
        (["h.0.mhc_0", "h.0.mhc_1", "h.1.mhc_0"], [0], "`h.0.mhc_0`"),
        (["enc.0.mhc_0", "enc.1.mhc_0", "dec.0.mhc_0"], [0, 2], "layer 0 of `enc` and layer 0 of `dec`"),
        (["s.0.b.0.mhc_0", "s.0.b.1.mhc_0", "s.1.b.0.mhc_0"], [0, 1], "`s.0.b.{0,1}.mhc_0`"),
        (["norm.mhc_0", "h.1.mhc_0"], [0], "`norm.mhc_0`"),
        ([f"transformer.layers.{k}.mhc_{j}" for k in range(60) for j in (0, 1)], [k * k for k in range(1, 11)],
         "10 of 120 sites, `transformer.layers.0.mhc_1` the first,"),
    ],
)  # fmt: skip
def test_sites_in_words(names: list[str], chosen: list[int], text: str, tmp_path: Path) -> None:
    head = report_runs.header(1)
    head = type(head)(head.model, head.config, head.settings, sites(*names))
    assert in_words(shown(report_runs.write(tmp_path / "run.jsonl", samples=1, head=head)), chosen) == text


def test_ranges() -> None:
    assert ranges([2, 9, 10, 11, 15]) == "2, 9 to 11 and 15"
    assert ranges([3, 4]) == "3 and 4"
    assert ranges([0]) == "0"
