"""Converted models of transformers, saved whole and loaded by transformers' own functions."""

from __future__ import annotations

import copy
import json
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import accelerate
import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor, nn

import families_text
import families_vision
from families_text import GROUPED, OPENAI, SIZE
from family import Family, output, seeded
from mhc_rewrite import is_converted, mhcify, report, save_sites, site_parameters, unmhcify
from mhc_rewrite.errors import MHCError, SitesError
from oracle import perturb
from test_saving import in_a_fresh_process

SMALL_VIT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8, "num_labels": 5,
}  # fmt: skip
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 99}
BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 2,
}  # fmt: skip
TOKENS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def quiet() -> None:
    hf.logging.set_verbosity_error()
    hf.logging.disable_progress_bar()


def llama() -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED, tie_word_embeddings=True))


BUILT: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**OPENAI)),
    "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**SIZE, id2label={0: "no", 1: "yes", 2: "both"})),
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5, decoder_start_token_id=0)),
    "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**SMALL_VIT)),  # its weights have other names in files
    "bart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**BART)),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**GROUPED, num_local_experts=2)),  # and other shapes
}


def original(name: str) -> Any:
    with seeded(name):
        return BUILT[name]().eval()


def converted(name: str, **fields: Any) -> Any:
    model = mhcify(original(name), **fields)
    perturb(model)
    return model


def inputs(name: str) -> dict[str, Tensor]:
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
    return {"input_ids": TOKENS, **({"decoder_input_ids": TOKENS[:, :4]} if name in ("t5", "bart") else {})}


def logits(model: Any, name: str = "llama") -> Tensor:
    return model(**inputs(name)).logits


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"<pad>": 0, **{f"w{i}": i for i in range(1, 99)}}, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return hf.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="w1")


# -- processes ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder a model, with what it gives in `want.pt`; an adapter with LoRA and sites of its own."""
    root = tmp_path_factory.mktemp("saved")
    for name in BUILT:
        model = converted(name)
        model.save_pretrained(root / name, max_shard_size="50KB" if name == "llama" else "1GB")
        want = {"inputs": inputs(name), "logits": logits(model, name)}
        if name == "llama":
            tokenizer().save_pretrained(root / name)
            want["generated"] = model.generate(TOKENS, max_new_tokens=5, do_sample=False, pad_token_id=0)
        torch.save(want, root / f"{name}.pt")
    assert len(list((root / "llama").glob("*.safetensors"))) > 2
    base = hf.AutoModelForCausalLM.from_pretrained(root / "llama")
    adapted = adapt(base)
    adapted.save_pretrained(root / "adapter")
    torch.save({"inputs": inputs("llama"), "logits": logits(adapted)}, root / "adapter.pt")
    return root


def adapt(base: Any) -> Any:
    """LoRA, and the sites trained with it."""
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["mhc_0", "mhc_1"])
    with torch.no_grad(), seeded("lora"):
        model = peft.get_peft_model(base, lora).eval()
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn_like(p))
    return model


LOADING = """
    import mhc_rewrite.hf
    import peft, warnings
    import transformers as hf
    from mhc_rewrite import is_converted, report
    hf.logging.set_verbosity_error()
    hf.logging.disable_progress_bar()
    warnings.simplefilter("error", UserWarning)
    root = sys.argv[1]

    def check(model, name):
        want = torch.load(f"{root}/{name}.pt")
        assert is_converted(model), name
        got = model(**want["inputs"])
        assert torch.equal(got.logits, want["logits"]), (name, type(model))
        assert not any(t.is_meta for t in model.state_dict().values())
        return want

    for name, auto, kind in (
        ("llama", hf.AutoModelForCausalLM, hf.LlamaForCausalLM),
        ("gpt2", hf.AutoModelForCausalLM, hf.GPT2LMHeadModel),
        ("bert", hf.AutoModelForSequenceClassification, hf.BertForSequenceClassification),
        ("t5", hf.AutoModelForSeq2SeqLM, hf.T5ForConditionalGeneration),
        ("vit", hf.AutoModelForImageClassification, hf.ViTForImageClassification),
        ("mixtral", hf.AutoModelForCausalLM, hf.MixtralForCausalLM),
    ):
        for loader in (auto, kind):
            model = loader.from_pretrained(f"{root}/{name}")
            assert type(model).__name__ == kind.__name__ and isinstance(model, kind)
            check(model, name)
        assert is_converted(hf.AutoModel.from_pretrained(f"{root}/{name}"))
    model = hf.AutoModelForCausalLM.from_pretrained(root + "/llama")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    want = torch.load(root + "/llama.pt")
    got = model.generate(want["inputs"]["input_ids"], max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(got, want["generated"])
    pipe = hf.pipeline("text-generation", model=root + "/llama", device="cpu")
    got = pipe("w5 w6 w7", max_new_tokens=4, do_sample=False, return_tensors=True)[0]["generated_token_ids"]
    ids = pipe.tokenizer("w5 w6 w7", return_tensors="pt").input_ids
    want = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)[0]
    assert is_converted(pipe.model) and list(got) == want.tolist()
    assert hf.AutoModelForSequenceClassification.from_pretrained(root + "/bert").config.id2label[2] == "both"
    for loader in (peft.AutoPeftModelForCausalLM, hf.AutoModelForCausalLM, hf.LlamaForCausalLM):
        check(loader.from_pretrained(root + "/adapter"), "adapter")
    print("done")
"""


@pytest.mark.slow
def test_loaded_in_a_fresh_process(saved: Path) -> None:
    """Auto classes, own classes, pipeline, PEFT: equal to the last bit, no example, no run before the first call."""
    assert in_a_fresh_process(LOADING, saved) == "done\n"


STOCK = """
    import json
    import transformers as hf
    hf.logging.set_verbosity_error()
    hf.logging.disable_progress_bar()
    root = sys.argv[1]
    loaders = {
        "llama": (hf.AutoModelForCausalLM, hf.LlamaForCausalLM, hf.AutoModel, hf.LlamaModel, hf.AutoConfig),
        "vit": (hf.AutoModelForImageClassification, hf.ViTForImageClassification, hf.ViTModel, hf.ViTConfig),
        "bert": (hf.AutoModelForSequenceClassification, hf.BertForSequenceClassification, hf.BertForMaskedLM),
        "t5": (hf.AutoModelForSeq2SeqLM, hf.T5ForConditionalGeneration, hf.T5EncoderModel),
        "adapter": (hf.AutoModelForCausalLM, hf.LlamaForCausalLM),
    }
    calls = [
        lambda loader=loader, name=name, more=more: loader.from_pretrained(f"{root}/{name}", **more)
        for name, kinds in loaders.items() for loader in kinds
        for more in ({}, {"dtype": torch.bfloat16}, {"num_labels": 7}, {"trust_remote_code": False})
    ]
    calls.append(lambda: hf.pipeline("text-generation", model=root + "/llama"))
    for call in calls:
        try:
            call()
        except Exception as error:
            assert "mhc_rewrite" in str(error) and "import mhc_rewrite.hf" in str(error), error
        else:
            raise AssertionError("loaded without a word")
    assert "mhc_rewrite" not in sys.modules
    model = hf.AutoModelForCausalLM.from_pretrained(root + "/llama", trust_remote_code=True)
    want = torch.load(root + "/llama.pt")
    assert torch.equal(model(**want["inputs"]).logits, want["logits"])
    print("done", len(calls))
"""


@pytest.mark.slow
def test_stock_transformers_stops(saved: Path) -> None:
    """It names this package, whoever loads and with whatever options; with `trust_remote_code=True` it loads."""
    assert in_a_fresh_process(STOCK, saved) == "done 69\n"


def test_what_is_in_the_folder(saved: Path) -> None:
    data = json.loads((saved / "bert" / "config.json").read_text())
    assert data["model_type"] == "bert" and data["architectures"] == ["BertForSequenceClassification"]
    assert data["mhc_config"]["plan"]["config"]["n_streams"] == 4
    first = data["mhc_config"]["sites"][0]
    assert (first["name"], first["width"]) == ("bert.encoder.layer.0.attention.output.mhc_0", 32)
    code = (saved / "bert" / f"{data['auto_map']['AutoConfig'].partition('.')[0]}.py").read_text()
    assert "from mhc_rewrite.hf import ConvertedConfig" in code and len(code.splitlines()) < 8
    # A file to share, and no word of the machine that it was written on.
    assert not any(part in json.dumps(data) for part in (os.getcwd(), "site-packages", str(saved)))
    weights = load_file(saved / "vit" / "model.safetensors")
    assert "vit.encoder.layer.0.mhc_1.phi" in weights, "under the names that the model's own weights have in files"


# -- ways to load ------------------------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "device_map": {"device_map": "cpu"},
    "device_map auto": {"device_map": "auto"},
    "low_cpu_mem_usage": {"low_cpu_mem_usage": True},
    "use_safetensors": {"use_safetensors": True},
    "eager attention": {"attn_implementation": "sdpa"},
    "config": {"config": "folder"},
    "fp32": {"dtype": torch.float32},
    "auto": {"dtype": "auto"},
}


@pytest.mark.parametrize("loader", [hf.AutoModelForCausalLM, hf.LlamaForCausalLM], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("options", OPTIONS)
def test_options_of_loading(options: str, loader: Any, saved: Path) -> None:
    more = dict(OPTIONS[options])
    if more.get("config") == "folder":
        more["config"] = hf.AutoConfig.from_pretrained(saved / "llama")
    model, info = loader.from_pretrained(saved / "llama", output_loading_info=True, **more)
    assert torch.equal(logits(model), torch.load(saved / "llama.pt")["logits"])
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert not hasattr(model.config, "mhc_config"), "what is converted knows it by itself"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_sites_stay_fp32(dtype: torch.dtype, saved: Path) -> None:
    model = hf.AutoModelForCausalLM.from_pretrained(saved / "llama", dtype=dtype)
    want = site_parameters(converted("llama"))
    assert model.dtype == dtype and model.lm_head.weight.dtype == dtype
    for name, p in site_parameters(model).items():
        assert p.dtype == torch.float32 and torch.equal(p, want[name])
    assert torch.allclose(logits(model).float(), torch.load(saved / "llama.pt")["logits"], atol=0.03)


def test_narrow_models(tmp_path: Path) -> None:
    """Saved in bf16 with sites in fp32, loaded as that."""
    original("llama").save_pretrained(tmp_path / "base")
    model = mhcify(hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16))
    perturb(model)
    model.save_pretrained(tmp_path / "converted")
    other = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "converted")
    assert other.dtype == torch.bfloat16 and {p.dtype for p in site_parameters(other).values()} == {torch.float32}
    assert torch.equal(logits(other), logits(model))


def test_saved_again_is_the_same(saved: Path, tmp_path: Path) -> None:
    for name in ("vit", "bert"):
        hf.AutoModel.from_pretrained(saved / name)
        model = BUILT[name]().__class__.from_pretrained(saved / name)
        model.save_pretrained(tmp_path / name)
        for file in ("config.json", "model.safetensors"):
            assert (tmp_path / name / file).read_bytes() == (saved / name / file).read_bytes(), (name, file)


def test_training_goes_on(saved: Path) -> None:
    """The same gradients: what is loaded trains as the one that was saved."""
    one, other = converted("llama"), hf.AutoModelForCausalLM.from_pretrained(saved / "llama")
    for model in (one, other):
        logits(model.train()).square().mean().backward()
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert a.requires_grad == b.requires_grad and torch.equal(a.grad, b.grad), name


def decoded(model: Any) -> Tensor:
    """Of embeddings: from such a folder transformers itself does not load the decoder's own."""
    return model.model.decoder(inputs_embeds=torch.linspace(-1, 1, 2 * 5 * 32).reshape(2, 5, 32).sin())[0]


HEADS: list[tuple[str, Any, Callable[[Any], Tensor], Callable[[Any], Tensor]]] = [
    ("llama", hf.LlamaModel, lambda m: m(TOKENS)[0], lambda m: m.model(TOKENS)[0]),
    ("llama", hf.LlamaForSequenceClassification, lambda m: m.model(TOKENS)[0], lambda m: m.model(TOKENS)[0]),
    ("gpt2", hf.GPT2Model, lambda m: m(TOKENS)[0], lambda m: m.transformer(TOKENS)[0]),
    ("bert", hf.BertModel, lambda m: m(TOKENS)[0], lambda m: m.bert(TOKENS)[0]),
    ("bert", hf.BertForMaskedLM, lambda m: m.bert(TOKENS)[0], lambda m: m.bert(TOKENS)[0]),
    ("t5", hf.T5EncoderModel, lambda m: m(TOKENS)[0], lambda m: m.encoder(TOKENS)[0]),
    ("bart", hf.BartForCausalLM, decoded, decoded),
    ("vit", hf.ViTModel, lambda m: m(**inputs("vit"))[0], lambda m: m.vit(**inputs("vit"))[0]),
]


@pytest.mark.parametrize(("name", "kind", "run", "want"), HEADS, ids=[kind.__name__ for _, kind, *_ in HEADS])
def test_other_heads(name: str, kind: Any, run: Any, want: Any, saved: Path) -> None:
    """The same trunk under another head, or none: its streams under their names there."""
    model, whole = kind.from_pretrained(saved / name), converted(name)
    share = {hf.T5EncoderModel: 0.4, hf.BartForCausalLM: 0.6}.get(kind, 1)
    assert len(site_parameters(model)) == share * len(site_parameters(whole))
    assert torch.equal(run(model), want(whole))
    assert report(model).plan.model == kind.__name__


def test_a_head_more(tmp_path: Path) -> None:
    """Saved without a head and loaded with one; collected states are n streams nowhere."""
    base = mhcify(hf.LlamaModel(hf.LlamaConfig(**GROUPED)).eval())
    perturb(base)
    base.save_pretrained(tmp_path)
    model = hf.LlamaForCausalLM.from_pretrained(tmp_path)
    states, want = (m(TOKENS, output_hidden_states=True).hidden_states for m in (model, base))
    assert all(torch.equal(a, b) for a, b in zip(states, want, strict=True)) and states[1].shape == (2, 9, 32)


def test_a_part_converted(tmp_path: Path) -> None:
    model = original("llama")
    mhcify(model.model)
    perturb(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(hf.AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_built_from_the_configuration(saved: Path) -> None:
    """`from_config`, on the meta device too; then weights by torch's own function, all keys matched."""
    config = hf.AutoConfig.from_pretrained(saved / "gpt2")
    weights = load_file(saved / "gpt2" / "model.safetensors")
    for context in (torch.device("cpu"), torch.device("meta"), accelerate.init_empty_weights()):
        with context:
            model = hf.AutoModelForCausalLM.from_config(config).eval()
        model.load_state_dict(weights, strict=False, assign=True)
        model.tie_weights()
        assert is_converted(model) and {p.device.type for p in site_parameters(model).values()} == {"cpu"}
    # Positions and masks of the last one are buffers that no file holds.
    assert torch.equal(logits(hf.AutoModelForCausalLM.from_pretrained(saved / "gpt2"), "gpt2"),
                       torch.load(saved / "gpt2.pt")["logits"])  # fmt: skip


def test_base_weights_into_a_conversion(saved: Path, tmp_path: Path) -> None:
    """The sites are as a conversion starts them, and no memory that nobody has written to."""
    base = original("llama")
    base.save_pretrained(tmp_path)
    config = hf.AutoConfig.from_pretrained(saved / "llama")
    model, info = hf.LlamaForCausalLM.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert is_converted(model) and all(".mhc_" in key for key in info["missing_keys"])
    start = site_parameters(mhcify(original("llama")))
    assert all(torch.equal(p, start[name]) for name, p in site_parameters(model).items())
    assert torch.allclose(logits(model), logits(base), atol=1e-5)
    assert set(model.state_dict()) == set(converted("llama").state_dict())
    model.load_state_dict(converted("llama").state_dict())
    assert torch.equal(logits(model), torch.load(saved / "llama.pt")["logits"])


def test_into_an_unconverted_model(saved: Path) -> None:
    """Someone's own configuration: the sites have no place, and a warning says which."""
    with pytest.warns(UserWarning, match=r"6 sites of mhc_rewrite .*model\.layers\.0\.mhc_0.* left out"):
        model = hf.AutoModelForCausalLM.from_pretrained(saved / "llama", config=original("llama").config)
    assert not is_converted(model)


def test_options_are_held_against_the_weights(saved: Path, tmp_path: Path) -> None:
    """A configuration whose options were changed by hand."""
    model = converted("gpt2")
    model.save_pretrained(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    data["mhc_config"]["plan"]["config"]["eps_norm"] = 0.5
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.raises(SitesError, match=r"eps_norm=1e-06.*eps_norm=0\.5"):
        hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(SitesError, match="eps_norm"):
        converted("gpt2", eps_norm=0.5).load_state_dict(load_file(saved / "gpt2" / "model.safetensors"), strict=False)


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "fewer layers": (lambda f: hf.AutoModelForCausalLM.from_pretrained(f, num_hidden_layers=2), r"'model\.layers\.2'"),
    "another model": (lambda f: hf.MistralForCausalLM.from_pretrained(f, num_hidden_layers=1), "none of its residual"),
    "another format": (lambda f: edited(f, format=3), "format 3"),
    "no plan": (lambda f: edited(f, carriers=None), "can't be read"),
}


def edited(folder: Path, **fields: Any) -> None:
    data = json.loads((folder / "config.json").read_text())
    data["mhc_config"].update(fields)
    (folder / "config.json").write_text(json.dumps(data))
    hf.AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused(what: str, tmp_path: Path) -> None:
    converted("llama").save_pretrained(tmp_path)
    load, said = REFUSED[what]
    with pytest.raises(MHCError, match=said):
        load(tmp_path)


# -- ways to save ------------------------------------------------------------------------------------------------------


def test_variants_and_given_states(tmp_path: Path) -> None:
    model = converted("llama")
    model.save_pretrained(tmp_path, state_dict=model.state_dict(), variant="v2")
    other = hf.AutoModelForCausalLM.from_pretrained(tmp_path, variant="v2")
    assert torch.equal(logits(other), logits(model))


def test_copies_and_pickles(tmp_path: Path) -> None:
    model = converted("llama")
    for number, twin in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        twin.save_pretrained(tmp_path / str(number))
        assert torch.equal(logits(hf.AutoModelForCausalLM.from_pretrained(tmp_path / str(number))), logits(model))


def test_uploaded_as_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is uploaded is there, and marked, before the upload."""
    uploaded: dict[str, Any] = {}

    def upload(self: Any, folder: Any, *args: Any, **kwargs: Any) -> None:
        uploaded.update({file.name: file.read_bytes() for file in Path(folder).iterdir()})

    api = SimpleNamespace(create_repo=lambda *args, **kwargs: SimpleNamespace(repo_id="a/b"))
    monkeypatch.setattr("transformers.modeling_utils.hf_api", lambda *args, **kwargs: api)
    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda *args, **kwargs: api, raising=False)
    for module in ("utils.hub", "modeling_utils"):
        monkeypatch.setattr(f"transformers.{module}.create_and_tag_model_card", lambda *args, **kwargs: mock.Mock())
    monkeypatch.setattr(hf.PreTrainedModel, "_upload_modified_files", upload)
    model = converted("llama")
    model.save_pretrained(tmp_path / "saved", push_to_hub=True)
    assert b"mhc_config" in uploaded["config.json"] and {"mhc_rewrite_config.py", "model.safetensors"} <= set(uploaded)
    uploaded.clear()
    model.push_to_hub("a/b")
    assert b"mhc_config" in uploaded["config.json"] and "mhc_rewrite_config.py" in uploaded


def test_the_original_again(saved: Path, tmp_path: Path) -> None:
    """Unconverted and saved: nothing of a conversion is left in the folder's configuration."""
    model = hf.AutoModelForCausalLM.from_pretrained(saved / "llama")
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="6 of 6 sites of LlamaForCausalLM have learned"):
        unmhcify(model)
    model.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert "mhc" not in text and "auto_map" not in text
    assert not is_converted(hf.AutoModelForCausalLM.from_pretrained(tmp_path))
    assert torch.equal(logits(hf.AutoModelForCausalLM.from_pretrained(tmp_path)), logits(original("llama")))


def test_failed_saving_leaves_the_configuration_alone(tmp_path: Path) -> None:
    model = converted("llama")
    with pytest.raises(AttributeError):
        model.save_pretrained(tmp_path, state_dict=3)
    assert "save_pretrained" not in vars(model.config) and "mhc" not in str(model.config)


def test_two_conversions_in_one_model(tmp_path: Path) -> None:
    model = original("t5")
    mhcify(model.encoder, {"input_ids": TOKENS})
    mhcify(model.decoder, {"input_ids": TOKENS, "encoder_hidden_states": torch.randn(2, 9, 32)})
    with pytest.raises(MHCError, match=r"several converted models \('encoder', 'decoder'\)"):
        model.save_pretrained(tmp_path)


# -- PEFT --------------------------------------------------------------------------------------------------------------


def test_through_peft(saved: Path, tmp_path: Path) -> None:
    """Wrapped, the sites in use are the adapter's; merged, they are the model's."""
    model = adapt(hf.AutoModelForCausalLM.from_pretrained(saved / "llama"))
    want = torch.load(saved / "adapter.pt")["logits"]
    assert torch.equal(logits(model), want)
    sites = site_parameters(model)
    assert is_converted(model) and len(sites) == 18 and all(".modules_to_save.default." in name for name in sites)
    assert sum(report(model).parameters_added) == sum(p.numel() for p in sites.values())
    save_sites(model, tmp_path / "sites")
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(loaded), logits(merged)) and torch.allclose(logits(merged), want, atol=1e-5)
    saved_sites = load_file(tmp_path / "sites" / "mhc_model.safetensors")
    assert all(torch.equal(p, saved_sites[name]) for name, p in site_parameters(loaded).items())


def test_unmhcify_through_peft(saved: Path) -> None:
    model = adapt(hf.AutoModelForCausalLM.from_pretrained(saved / "llama"))
    with pytest.warns(UserWarning, match="6 of 6 sites"):
        assert unmhcify(model) is model
    assert not is_converted(model) and not any("mhc_" in name for name, _ in model.named_modules())
    with model.disable_adapter():
        assert torch.allclose(logits(model), logits(original("llama")), atol=1e-6)


# -- other libraries ---------------------------------------------------------------------------------------------------


class Tokens(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": TOKENS[index % 2], "labels": TOKENS[index % 2]}


def training(folder: Path, steps: int, save_only_model: bool = False) -> hf.TrainingArguments:
    return hf.TrainingArguments(
        folder, max_steps=steps, save_steps=2, eval_steps=2, eval_strategy="steps", load_best_model_at_end=True,
        per_device_train_batch_size=4, learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True, seed=0,
        save_only_model=save_only_model, dataloader_pin_memory=False, logging_steps=1000,
    )  # fmt: skip


@pytest.mark.slow
def test_trainer(tmp_path: Path) -> None:
    """Its checkpoints are converted models; it resumes from them and loads the best; other options stop it."""
    model = converted("llama")
    hf.Trainer(model, training(tmp_path, 4), train_dataset=Tokens(), eval_dataset=Tokens()).train()
    other = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    assert is_converted(other) and torch.equal(logits(other), logits(model.eval()))
    assert not torch.equal(logits(other), logits(converted("llama")))
    again = converted("llama")
    trainer = hf.Trainer(again, training(tmp_path, 4), train_dataset=Tokens(), eval_dataset=Tokens())
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(logits(again.eval()), logits(model))
    wrong = converted("llama", eps_norm=0.5)
    trainer = hf.Trainer(wrong, training(tmp_path, 6), train_dataset=Tokens(), eval_dataset=Tokens())
    with pytest.raises(SitesError, match="eps_norm"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_trainer_that_saves_the_model_alone(tmp_path: Path) -> None:
    model = converted("llama")
    hf.Trainer(model, training(tmp_path, 2, True), train_dataset=Tokens(), eval_dataset=Tokens()).train()
    assert not (tmp_path / "checkpoint-2" / "optimizer.pt").exists()
    other = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert is_converted(other) and torch.equal(logits(other), logits(model.eval()))


def test_accelerate(saved: Path) -> None:
    config = hf.AutoConfig.from_pretrained(saved / "gpt2")
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    accelerate.load_checkpoint_and_dispatch(model, saved / "gpt2")
    assert torch.equal(logits(model, "gpt2"), torch.load(saved / "gpt2.pt")["logits"])
    with pytest.raises(ValueError, match="_extra_state"):
        accelerate.load_checkpoint_and_dispatch(model, saved / "gpt2", device_map={"": "cpu"})


def test_distributed_checkpoints(tmp_path: Path) -> None:
    """torch's own checkpoints of a state dict, and what they make of the options."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    model, other = converted("llama"), mhcify(original("llama"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint.save(get_model_state_dict(model), checkpoint_id=tmp_path)
        state = get_model_state_dict(other)
        checkpoint.load(state, checkpoint_id=tmp_path)
        set_model_state_dict(other, state)
        assert torch.equal(logits(other), logits(model))
        wrong = converted("llama", eps_norm=0.5)
        state = get_model_state_dict(wrong)
        checkpoint.load(state, checkpoint_id=tmp_path)
        with pytest.raises(SitesError, match="eps_norm"):
            set_model_state_dict(wrong, state)


# -- model families ----------------------------------------------------------------------------------------------------

# Marian computes its positions anew at each load, and Wav2Vec2 draws masks by numpy, converted or not.
FAMILIES = [
    family
    for family in (*families_text.LISTED, *families_text.OTHERS, *families_vision.TRANSFORMERS)
    if family.name not in ("Marian", "Wav2Vec2")
]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_family(family: Family, tmp_path: Path) -> None:
    """Every family of transformers, in shards, in both modes, equal to the last bit."""
    model: Any = family.model(torch.float32)
    example = family.example(torch.float32)
    mhcify(model, example)
    perturb(model)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    kinds = {"attn_implementation": model.config._attn_implementation}
    if getattr(model.config, "_experts_implementation", None) == "eager":
        kinds["experts_implementation"] = "eager"
    other, info = type(model).from_pretrained(tmp_path, output_loading_info=True, **kinds)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for p in other.parameters():
        p.data = p.data.clone()  # in a file's memory weights lie at any address, and sums by vectors round otherwise
    args, kwargs = family.arguments(torch.float32)
    for training in (False, True):
        found = []
        for twin in (model, other):
            with seeded("run"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found.append(output(twin.train(training)(*copy.deepcopy(args), **copy.deepcopy(kwargs))))
        assert torch.equal(*found), training
    assert isinstance(other, nn.Module) and len(site_parameters(other)) == 3 * family.sites
