"""Which figures of a run a report shows, in which order, and what is said of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """One thing to look at: lines over the steps of the run, and a heat map over steps and depth.

    Attributes:
        key: its place in the page.
        section: under which it stands.
        title: of it.
        what: how to read it.
        lines: figure -> its name in the legend; over all sites.
        of: "median" over sites, or "largest".
        grid: the figure by site, or None.
        log: whether its axis is logarithmic.
    """

    key: str
    section: str
    title: str
    what: str
    lines: dict[str, str]
    of: str = "median"
    grid: str | None = None
    log: bool = False


TRAINING, GAINS, MIXING, READING, STREAMS = (
    "Training", "Gains", "H_res: how streams are mixed", "H_pre and H_post: how streams are read and written",
    "The streams",
)  # fmt: skip


def _gradient(parameter: str, what: str) -> Card:
    names = {f"{parameter}_{mapping}_gradient": f"H_{mapping}" for mapping in ("pre", "post", "res")}
    return Card(
        f"{parameter}_gradient", TRAINING, f"Gradient of {parameter}", f"Norm of the gradient of {what}, by what it "
        "makes; below, that of H_res.", names, grid=f"{parameter}_res_gradient", log=True,
    )  # fmt: skip


CARDS = (
    Card(
        "state_gradient", TRAINING, "Gradient of the state", "Norm of the gradient of what each site reads, of all "
        "streams and of their sum, the trunk's. It should be much the same at all depths.",
        {"state_gradient": "all streams", "trunk_gradient": "the trunk"}, grid="state_gradient", log=True,
    ),
    _gradient("phi", "phi, which makes the mappings from the state"),
    _gradient("bias", "the bias of the mappings"),
    _gradient("alpha", "alpha, the weight of what phi makes"),
    Card(
        "composite_forward", GAINS, "Composite gain, forward", "Largest absolute row sum of the product of H_res from "
        "the first site to each: how much a signal can grow on its way. 1 where all are doubly stochastic.",
        {"composite_forward": "median token", "composite_forward_99": "99 % quantile"}, "largest",
        "composite_forward_99", True,
    ),
    Card(
        "composite_backward", GAINS, "Composite gain, backward", "Largest absolute column sum of the product from each "
        "site to the last: how much a gradient can grow on its way back.",
        {"composite_backward": "median token", "composite_backward_99": "99 % quantile"}, "largest",
        "composite_backward_99", True,
    ),
    Card(
        "forward_gain", GAINS, "Gain of each H_res, forward", "Its largest absolute row sum.",
        {"forward_gain": "median token", "forward_gain_99": "99 % quantile"}, "largest", "forward_gain_99",
    ),
    Card(
        "backward_gain", GAINS, "Gain of each H_res, backward", "Its largest absolute column sum.",
        {"backward_gain": "median token", "backward_gain_99": "99 % quantile"}, "largest", "backward_gain_99",
    ),
    Card(
        "errors", MIXING, "Is H_res doubly stochastic?", "The largest difference of a row's or a column's sum from 1, "
        "99 % quantile over tokens; below, that of columns.",
        {"row_error_99": "rows", "column_error_99": "columns"}, "largest", "column_error_99", True,
    ),
    Card(
        "second_singular", MIXING, "Second singular value", "1: what tells streams apart is kept whole. 0: the site "
        "averages it away.", {"second_singular": "second singular value"}, grid="second_singular",
    ),
    Card(
        "from_identity", MIXING, "Distance from the identity", "Frobenius norm of H_res − I: 0 where streams are not "
        "mixed.", {"from_identity": "distance"}, grid="from_identity",
    ),
    Card(
        "from_uniform", MIXING, "Distance from uniform", "Frobenius norm of its difference from the matrix of 1/n: 0 "
        "where every stream becomes the mean.", {"from_uniform": "distance"}, grid="from_uniform",
    ),
    Card(
        "pre_entropy", READING, "Entropy of H_pre", "Over log n: 1 where all streams are read alike, 0 where one is.",
        {"pre_entropy": "entropy"}, grid="pre_entropy",
    ),
    Card(
        "pre_argmax_share", READING, "Tokens that agree on a stream", "The share of tokens that read most of the same "
        "stream; below, which stream that is.", {"pre_argmax_share": "share"}, grid="pre_argmax",
    ),
    Card(
        "post_spread", READING, "Spread of H_post", "Its standard deviation over streams: 0 where a block's result is "
        "written to all alike.", {"post_spread": "spread"}, grid="post_spread",
    ),
    Card(
        "spread", STREAMS, "How far streams are apart", "Root mean square of their differences from their mean, over "
        "that of the mean, after each site.", {"spread": "apart"}, grid="spread",
    ),
    Card(
        "rank", STREAMS, "Effective rank", "1 where all streams are equal, n where they are orthogonal and as large.",
        {"rank": "rank"}, grid="rank",
    ),
    Card(
        "dominant", STREAMS, "The largest stream's share", "Of the sum of squares: 1/n where all are as large.",
        {"dominant": "share"}, grid="dominant",
    ),
)  # fmt: skip
