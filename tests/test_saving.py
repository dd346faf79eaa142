"""Sites and their options outlive the process: state dicts, files of sites alone, what stands around a model."""

from __future__ import annotations

import copy
import functools
import importlib.util
import io
import json
import os
import pickle
import re
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from family import output, seeded
from mhc_rewrite import (
    HyperConnection,
    MHCConfig,
    is_converted,
    load_sites,
    mhcify,
    report,
    save_sites,
    site_parameters,
    unmhcify,
)
from mhc_rewrite.errors import ConfigError, MHCError, SitesError
from oracle import perturb, site_names
from stays import GPT, GPT_CASE, WIDTH, gpt2, ids

ROOT = Path(__file__).parents[1]


def in_a_fresh_process(script: str, *arguments: object) -> str:
    """What a script prints that knows nothing of this process."""
    prelude = "import sys, torch\nfrom conftest import define_torchvision_operators as define\ndefine()\n"
    command = [sys.executable, "-W", "error::UserWarning:__main__", "-c", prelude + textwrap.dedent(script)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@functools.cache
def _gpt(fields: tuple[tuple[str, Any], ...]) -> nn.Module:
    return GPT_CASE.converted(torch.float32, **dict(fields))


def gpt(**fields: Any) -> nn.Module:
    """Converted and perturbed; the same original each time."""
    return copy.deepcopy(_gpt(tuple(fields.items())))


def original() -> nn.Module:
    return GPT_CASE.original(torch.float32)


def example() -> dict[str, Any]:
    return GPT_CASE.example(torch.float32)


# -- options go with the weights ---------------------------------------------------------------------------------------

OTHERS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"eps_norm": 1e-3}, "eps_norm"),
    ({}, {"sinkhorn_iterations": 2}, "sinkhorn_iterations"),
    ({}, {"connection": "deepseek_v4"}, "connection"),
    ({"connection": "hc"}, {"connection": "hc", "eps_norm": 1e-3}, "eps_norm"),
    ({"init": "paper"}, {"init": "paper", "collapse": "sum"}, "collapse"),
]


def by_safetensors(model: nn.Module, state: dict[str, Tensor], tmp_path: Path) -> None:
    safetensors.torch.save_file({key: value.clone() for key, value in state.items()}, tmp_path / "w.safetensors")
    safetensors.torch.load_model(model, str(tmp_path / "w.safetensors"))


def by_torch(model: nn.Module, state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(state, tmp_path / "w.pt")
    model.load_state_dict(torch.load(tmp_path / "w.pt", weights_only=True))


WAYS: dict[str, Callable[[nn.Module, dict[str, Tensor], Path], Any]] = {
    "strict": lambda model, state, _: model.load_state_dict(state),
    "not strict": lambda model, state, _: model.load_state_dict(state, strict=False),
    "assigned": lambda model, state, _: model.load_state_dict(state, assign=True),
    "torch.save": by_torch,
    "safetensors": by_safetensors,
    "one site": lambda model, state, _: model.get_submodule("blocks.1.mhc_0").load_state_dict(
        {key.rpartition(".")[2]: value for key, value in state.items() if "blocks.1.mhc_0" in key}
    ),
    "one block": lambda model, state, _: model.blocks[1].load_state_dict(
        {key.removeprefix("blocks.1."): value for key, value in state.items() if key.startswith("blocks.1.")}
    ),
    "in bf16": lambda model, state, _: model.load_state_dict({key: v.bfloat16() for key, v in state.items()}),
    "averaged": lambda model, state, _: model.load_state_dict({key: (v + v + v) / 3 for key, v in state.items()}),
}


@pytest.mark.filterwarnings("ignore:init='paper'")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("one", "other", "named"), OTHERS, ids=[named for _, _, named in OTHERS])
def test_other_options_are_refused(
    one: dict[str, Any], other: dict[str, Any], named: str, way: str, tmp_path: Path
) -> None:
    state = gpt(**one).state_dict()
    with pytest.raises(SitesError, match=rf"{named}=.*has {named}=.*another function"):
        WAYS[way](gpt(**other), state, tmp_path)


@pytest.mark.parametrize("way", WAYS)
def test_the_same_options_are_not(way: str, tmp_path: Path) -> None:
    """Other ways to start, to choose sites and to keep memory do not change the function."""
    model = gpt(eps_norm=1e-5)
    WAYS[way](mhcify(original(), example(), eps_norm=1e-5, init="preserve", recompute=1), model.state_dict(), tmp_path)


def test_options_survive_what_is_done_to_state_dicts() -> None:
    state = gpt().state_dict()
    average = {key: 0.999 * value + 0.001 * value for key, value in state.items()}
    half = {key: value.half() for key, value in state.items()}
    for changed in (average, half, {key: value.double() for key, value in state.items()}):
        gpt().load_state_dict(changed)


def test_mixed_options_are_no_options() -> None:
    """An average of two kinds of sites is neither."""
    one, other = gpt().state_dict(), gpt(eps_norm=1e-3).state_dict()
    with pytest.raises(SitesError, match=r"can't be read|another function"):
        gpt().load_state_dict({key: (value + other[key]) / 2 for key, value in one.items()})


def test_without_options_a_strict_load_says_so() -> None:
    state = {key: value for key, value in gpt().state_dict().items() if "_extra_state" not in key}
    with pytest.raises(RuntimeError, match=r"Missing key.*mhc_0\._extra_state"):
        gpt().load_state_dict(state)


def test_options_on_meta() -> None:
    """The options of a site without storage are known, and hold what is loaded into it."""
    site = HyperConnection(WIDTH, device="meta")
    with pytest.raises(SitesError, match="eps_norm"):
        site.load_state_dict(HyperConnection(WIDTH, MHCConfig(eps_norm=1.0)).state_dict(), assign=True)
    HyperConnection(WIDTH).load_state_dict(site.state_dict(), strict=False, assign=True)


def test_channels_first_is_another_function() -> None:
    with pytest.raises(SitesError, match=r"channel_dim=-1.*channel_dim=1"):
        HyperConnection(WIDTH, channel_dim=1).load_state_dict(HyperConnection(WIDTH).state_dict())


def test_base_weights_into_a_conversion() -> None:
    """The sites are as they start; what is missing are the sites and nothing else."""
    model, base = mhcify(GPT().eval(), example()), original()
    missing, unexpected = model.load_state_dict(base.state_dict(), strict=False)
    assert not unexpected and all(".mhc_" in key for key in missing) and len(missing) == 4 * 6
    assert torch.allclose(model(**example()), base(**example()), atol=1e-5)


# -- the config as a file ----------------------------------------------------------------------------------------------


def test_config_as_a_file(tmp_path: Path) -> None:
    config = MHCConfig(n_streams=3, exclude=("blocks.0.*",), eps_norm=1.2345678901e-7, recompute="auto")
    config.save(tmp_path / "options.json")
    assert json.loads((tmp_path / "options.json").read_text())["version"] == 1
    assert MHCConfig.load(tmp_path / "options.json") == config
    assert MHCConfig.load(str(tmp_path / "options.json")) == config


@pytest.mark.parametrize("text", ["", "[]", '"x"', "3", '{"version": 7}', '{"version": 1, "streams": 4}', "{"])
def test_config_files_that_are_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ConfigError):
        MHCConfig.load(tmp_path / "x.json")
    with pytest.raises(ConfigError, match="nowhere"):
        MHCConfig.load(tmp_path / "nowhere.json")


# -- sites alone -------------------------------------------------------------------------------------------------------


class Own(nn.Module):
    """Loops over one layer, collects states, and returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 24, 0.0, batch_first=True, norm_first=True)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)) for _ in range(3))

    def forward(self, x: Tensor) -> dict[str, Any]:
        for _ in range(2):
            x = self.layer(x)
        for block in self.blocks:
            x = x + block(x)
        return {"last": x}


def vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=3, num_heads=2, num_classes=5)


def stack() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 24, 0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 3)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]]]] = {
    "gpt": (GPT, lambda: (ids(),)),
    "gpt2": (gpt2, lambda: (ids(),)),
    "timm": (vit, lambda: (torch.randn(2, 3, 32, 32),)),
    "torch": (stack, lambda: (torch.randn(2, 5, WIDTH),)),
    "own": (Own, lambda: (torch.randn(2, 5, WIDTH),)),
}


def result(model: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
    with seeded("run"):
        value = model(*inputs)
    return value["last"] if type(value) is dict else output(value)


@pytest.fixture(params=MODELS)
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module, tuple[Any, ...]]:
    """A conversion with perturbed sites, its original, and inputs."""
    build, inputs = MODELS[request.param]
    with seeded(request.param):
        base, x = build().eval(), inputs()
    return perturbed(mhcify(copy.deepcopy(base), x)), base, x


def perturbed(model: nn.Module) -> nn.Module:
    perturb(model)
    return model


def test_sites_alone(pair: tuple[nn.Module, nn.Module, tuple[Any, ...]], tmp_path: Path) -> None:
    """Into the original, without a run, equal to the last bit in both modes, gradients too."""
    model, base, x = pair
    before = result(base, x)
    save_sites(model, tmp_path / "sites")
    assert sorted(file.name for file in (tmp_path / "sites").iterdir()) == ["mhc_config.json", "mhc_model.safetensors"]
    handles = [module.register_forward_pre_hook(must_not_run) for module in base.modules()]
    assert load_sites(base, tmp_path / "sites") is base
    for handle in handles:
        handle.remove()
    assert torch.equal(result(base, x), result(model, x))
    assert (result(base, x) - before).abs().max() > 1e-3 * before.abs().max()
    for twin in (model, base):
        result(twin.train(), x).square().mean().backward()
    for (name, one), other in zip(model.named_parameters(), base.parameters()):
        assert (one.grad is None and other.grad is None) or torch.equal(one.grad, other.grad), name
    # The report is that of the conversion, and the original comes back.
    assert report(base).plan.streams == report(model).plan.streams
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(result(unmhcify(base).eval(), x), before)


def must_not_run(module: nn.Module, _: Any) -> None:
    raise AssertionError(f"{type(module).__name__} was run")


def test_what_is_in_the_file(tmp_path: Path) -> None:
    model = gpt(eps_norm=1e-5)
    save_sites(model, tmp_path)
    data = json.loads((tmp_path / "mhc_config.json").read_text())
    assert data["format"] == 1 and data["mhc_rewrite"] and data["kind"] == "GPT"
    assert MHCConfig.from_dict(data["plan"]["config"]) == MHCConfig(eps_norm=1e-5)
    site = data["sites"][3]
    assert (site["name"], site["holder"], site["width"], site["index"]) == ("blocks.1.mhc_1", "blocks.1", WIDTH, 3)
    assert site["line"].endswith("return x + self.mlp(self.norm2(x))") and site["line"].startswith("stays.py:")
    assert str(ROOT) not in (tmp_path / "mhc_config.json").read_text(), "no machine's folders in a file to share"
    tensors = safetensors.torch.load_file(tmp_path / "mhc_model.safetensors")
    assert set(tensors) == {key for key in model.state_dict() if ".mhc_" in key}


def test_into_a_conversion(tmp_path: Path) -> None:
    model, other = gpt(), mhcify(original(), example())
    save_sites(model, tmp_path)
    load_sites(other, tmp_path)
    assert torch.equal(other(**example()), model(**example()))


def test_with_an_example(tmp_path: Path) -> None:
    """Converted by it: the way for a model whose source is another."""
    model = gpt(exclude=("blocks.0.mhc_0",))
    save_sites(model, tmp_path)
    other = load_sites(original(), tmp_path, example())
    assert torch.equal(other(**example()), model(**example()))
    assert "compared" in str(report(other)) and "without an example" not in str(report(other))


def test_fewer_sites(tmp_path: Path) -> None:
    model = mhcify(original(), example(), exclude=("blocks.0.*",), filter_fn=lambda site: site.name != "blocks.1.mhc_1")
    perturb(model)
    save_sites(model, tmp_path)
    other = load_sites(original(), tmp_path)
    assert list(site_parameters(other)) == list(site_parameters(model)) and len(site_parameters(other)) == 9
    assert torch.equal(other(**example()), model(**example()))


def test_on_meta_then_weights(tmp_path: Path) -> None:
    """Sites onto a model without storage; its weights come later."""
    model = gpt()
    save_sites(model, tmp_path)
    with torch.device("meta"):
        other = GPT().eval()
    load_sites(other, tmp_path)
    assert not any(p.is_meta for p in site_parameters(other).values())
    other.load_state_dict(original().state_dict(), strict=False, assign=True)
    assert torch.equal(other(**example()), model(**example()))


def test_narrow_models_keep_wide_sites(tmp_path: Path) -> None:
    model = perturbed(mhcify(original().bfloat16(), example()))
    save_sites(model, tmp_path)
    other = load_sites(original().bfloat16(), tmp_path)
    assert {p.dtype for p in site_parameters(other).values()} == {torch.float32}
    assert torch.equal(other(**example()), model(**example()))


def test_in_a_fresh_process(tmp_path: Path) -> None:
    """And saved again from there: the same files."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    model = perturbed(mhcify(vit().eval(), (x,)))
    save_sites(model, tmp_path / "sites")
    base = {key: value for key, value in model.state_dict().items() if ".mhc_" not in key}
    torch.save((base, x, model(x)), tmp_path / "base.pt")
    script = """
        from mhc_rewrite import load_sites, save_sites
        import timm
        folder = sys.argv[1]
        base, x, want = torch.load(folder + "/base.pt")
        sizes = dict(img_size=32, embed_dim=24, depth=3, num_heads=2, num_classes=5)
        model = timm.create_model("vit_tiny_patch16_224", **sizes).eval()
        model.load_state_dict(base)
        load_sites(model, folder + "/sites")
        save_sites(model, folder + "/again")
        assert "transformers" not in sys.modules
        assert torch.equal(model(x), want)
        compiled = torch.compile(model, backend="eager")
        assert torch.allclose(compiled(x), want, atol=1e-6)
    """
    in_a_fresh_process(script, tmp_path)
    for name in ("mhc_config.json", "mhc_model.safetensors"):
        assert (tmp_path / "sites" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


# -- where the source is another ---------------------------------------------------------------------------------------

SOURCE = """
    import torch
    from torch import nn


    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x, cross=None):
            x = x + self.a(x)
            if cross is not None:
                x = x + self.a(cross * x)
            x = x + self.b(x)
            return x


    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Block() for _ in range(2))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x
"""
# What is replaced in the source by what, and what loading says then: by the saved plan, and by an example.
MOVED: dict[str, tuple[str, str, str, str]] = {
    "as it was": ("", "", "equal", "equal"),
    "lines before": ("class Block", "def f(x):\n    x = x + self.b(x)\n\n\nclass Block", "equal", "equal"),
    "lines inside": ("        x = x + self.b(x)", "        # now\n        x = x + self.b(x)", "equal", "equal"),
    "another add": ("x = x + self.b(x)", "x = self.b(x) + x", "`x = x + self.b(x)` in Block.forward", "equal"),
    "another class": ("Block", "Layer", "in Block.forward of net.py", "equal"),
    "an add more": ("    x = x + self.a(x)", "    x = x + self.b(x)\n        x = x + self.a(x)", "self.b(x)", "of 'b'"),
    "other layers": ("self.layers", "self.blocks", "no module 'layers.0'", "no module 'layers.0'"),
}  # fmt: skip


def built_from(folder: Path, source: str) -> nn.Module:
    """A model of a file as another folder, or another version of it, has it."""
    folder.mkdir()
    (folder / "net.py").write_text(source)
    spec = importlib.util.spec_from_file_location("net", folder / "net.py")
    sys.modules["net"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Net().eval()


@pytest.mark.parametrize("change", MOVED)
def test_another_source(change: str, tmp_path: Path) -> None:
    """Moved lines are found again; an add that is written otherwise is an error that says so, and leaves no trace."""
    source, (old, new, by_plan, by_example) = textwrap.dedent(SOURCE), MOVED[change]
    x = torch.randn(2, 3, 8)
    first = built_from(tmp_path / "first", source)
    base = first.state_dict()
    model = perturbed(mhcify(first, (x,)))
    save_sites(model, tmp_path / "sites")
    for number, (inputs, said) in enumerate(((None, by_plan), ((x,), by_example))):
        other = built_from(tmp_path / str(number), source.replace(old, new) if old else source)
        other.load_state_dict(dict(zip(other.state_dict(), base.values(), strict=True)))
        if said == "equal":
            assert torch.equal(load_sites(other, tmp_path / "sites", inputs)(x), model(x))
            continue
        with pytest.raises(SitesError, match=re.escape(said)):
            load_sites(other, tmp_path / "sites", inputs)
        assert not is_converted(other) and not site_parameters(other)


# -- what does not fit -------------------------------------------------------------------------------------------------


def changed(folder: Path, **fields: Any) -> None:
    data = json.loads((folder / "mhc_config.json").read_text())
    data.update(fields)
    (folder / "mhc_config.json").write_text(json.dumps(data))


def shallow() -> nn.Module:
    model = original()
    del model.blocks[2]
    return model


def wide() -> nn.Module:
    model = original()
    for block in model.blocks:
        block.norm1 = nn.LayerNorm(WIDTH + 4)
        block.attention.qkv = nn.Linear(WIDTH + 4, 3 * (WIDTH + 4))
    return model


REFUSED: dict[str, tuple[Callable[[Path], Any], Callable[[], nn.Module], str]] = {
    "nothing there": (lambda folder: (folder / "mhc_config.json").unlink(), original, "holds no saved sites"),
    "no JSON": (lambda folder: (folder / "mhc_config.json").write_text("{"), original, "holds no saved sites"),
    "no weights": (lambda folder: (folder / "mhc_model.safetensors").unlink(), original, "holds no saved sites"),
    "no safetensors": (
        lambda folder: (folder / "mhc_model.safetensors").write_text("x"), original, "holds no saved sites"),
    "another format": (lambda folder: changed(folder, format=9), original, "format 9.*format 1"),
    "no plan": (lambda folder: changed(folder, plan=3), original, "can't be read"),
    "fewer layers": (lambda folder: None, shallow, r"no module 'blocks\.2'"),
    "another width": (lambda folder: None, wide, "width of 16"),
    "other options": (lambda folder: None, lambda: gpt(eps_norm=1e-3), r"eps_norm=1e-06.*eps_norm=0\.001"),
    "other sites": (lambda folder: None, lambda: gpt(exclude="blocks.0.*"), r"lacks 2 of them \(blocks\.0\.mhc_0"),
    "other weights": (
        lambda folder: save_tensors(folder, lambda key, t: t[:1] if key.endswith("alpha") else t), original, "shape"),
    "weights of fewer": (
        lambda folder: save_tensors(folder, lambda key, t: None if "blocks.1" in key else t), original, "is missing"),
}  # fmt: skip


def save_tensors(folder: Path, change: Callable[[str, Tensor], Tensor | None]) -> None:
    tensors = safetensors.torch.load_file(folder / "mhc_model.safetensors")
    found = {key: value for key, t in tensors.items() if (value := change(key, t)) is not None}
    safetensors.torch.save_file({key: t.contiguous() for key, t in found.items()}, folder / "mhc_model.safetensors")


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused(what: str, tmp_path: Path) -> None:
    save_sites(gpt(), tmp_path)
    spoil, build, said = REFUSED[what]
    spoil(tmp_path)
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    converted = is_converted(model)
    with pytest.raises(SitesError, match=said):
        load_sites(model, tmp_path)
    assert is_converted(model) is converted
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


def test_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(MHCError, match="GPT is not converted"):
        save_sites(GPT(), tmp_path)
    model = gpt()
    model.get_submodule("blocks.0.mhc_1").to("meta")
    with pytest.raises(SitesError, match=r"'blocks\.0\.mhc_1\.phi' is on the meta device"):
        save_sites(model, tmp_path)
    two = nn.ModuleDict({"a": gpt(), "b": gpt()})
    with pytest.raises(MHCError, match="several converted models \\('a', 'b'\\)"):
        save_sites(two, tmp_path)


# -- the way back ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"connection": "hc"}, {"init": "paper"}], ids=str)
@pytest.mark.filterwarnings("ignore:init='paper'")
def test_what_was_learned_is_said(fields: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unmhcify(fresh(fields))
    model = fresh(fields)
    with torch.no_grad():
        model.get_submodule("blocks.1.mhc_0").bias[2] += 1e-4
    state = torch.get_rng_state()
    with pytest.warns(
        UserWarning, match=r"1 of 6 sites of GPT have learned: their [\d,]+ parameters are dropped.*save_sites"
    ):
        unmhcify(model)
    assert torch.equal(state, torch.get_rng_state())


def fresh(fields: dict[str, Any]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return mhcify(original(), example(), **fields)


def test_pickled_conversions_are_saved_too(tmp_path: Path) -> None:
    model = gpt()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        save_sites(twin, tmp_path)
        assert torch.equal(load_sites(original(), tmp_path)(**example()), model(**example()))
    buffer = io.BytesIO()
    torch.save(load_sites(original(), tmp_path), buffer)  # before its first call
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(**example()), model(**example()))
    assert site_names(model.state_dict())
