from __future__ import annotations

import json
import os
import resource

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from adapt.config.schema import Lora
from adapt.conversion.base import apply_conversions
from adapt.errors import UserError
from adapt.export import export_folder
from adapt.export import weights as module
from adapt.export.weights import Whole
from adapt.pretrained import base_provenance, check_base, load_model
from adapt.pretrained.lora import add_lora, merge_lora
from tests import tiny
from tests.pretrained.recipes import recipe

IDS = torch.arange(4, 44)[None]
EXTRA = {"block_size": 8, "threshold": 0.9, "mask_token_id": 3, "shift": True, "context_mask": "causal"}
RESULTS = {
    "before": {"bpb/held-out": 1.25, "masked_ce/held-out/t=1.0": 11.5},
    "after": {"bpb/held-out": 1.2, "masked_ce/held-out/t=1.0": 5.5, "tokens_per_forward": 2.5},
}
PROVENANCE = {
    "base": {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "license": "apache-2.0",
        "note": "The starting weights came from a 4-bit (Q4_1) GGUF of the base model.",
    },
}
MANIFEST = {
    "fingerprint": "abc",
    "train": [
        {"label": "docs", "source": {"name": "text"}, "documents": 1200, "tokens": 3_400_000, "licence": "BSD-3-Clause"}
    ],
    "eval": {
        "held-out": {
            "label": "web",
            "source": {"name": "hub", "id": "org/web"},
            "documents": 5,
            "tokens": 10,
            "licence": None,
            "licences": {"mit": 3, "(others)": 2},
        }
    },
}


def export(out, model=None, *, dtype="float32", tokenizer=None, **kwargs):
    return export_folder(
        Whole(tiny.tiny_model() if model is None else model),
        tokenizer or tiny.tiny_tokenizer(),
        out,
        recipe=recipe("HuggingFaceTB/SmolLM2-135M-Instruct", dtype=dtype, **kwargs),
        resolved_yaml="run:\n  name: tiny\n",
        results=RESULTS,
        provenance=PROVENANCE,
        manifest=MANIFEST,
        extra_config=EXTRA,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_plain_transformers_loads_the_same_model(tmp_path, family, dtype):
    model = tiny.tiny_model(family)
    folder = export(tmp_path / "out", model, dtype=dtype)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert type(loaded) is type(model)
    assert str(loaded.dtype) == f"torch.{dtype}"
    expected = tiny.tiny_model(family)
    for parameter in expected.parameters():  # model.to(dtype) would round the RoPE frequencies, too
        parameter.data = parameter.data.to(loaded.dtype)
    assert torch.equal(loaded(IDS).logits, expected(IDS).logits)
    assert model.dtype == torch.float32  # the trained model stays as it was
    assert loaded.config.tie_word_embeddings == model.config.tie_word_embeddings
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.get_vocab() == tiny.tiny_tokenizer().get_vocab()
    assert tokenizer.chat_template == tiny.CHAT_TEMPLATE
    assert list(tmp_path.iterdir()) == [folder]


def test_generation_settings_are_in_both_configs_and_training_leaves_no_trace(tmp_path):
    model = tiny.tiny_model()
    model.config._attn_implementation = "sdpa"
    model.config._name_or_path = "/somewhere/private"
    folder = export(tmp_path / "out", model)
    config = json.loads((folder / "config.json").read_text())
    generation = GenerationConfig.from_pretrained(folder)
    for key, value in EXTRA.items():
        assert config[key] == value
        assert getattr(generation, key) == value
    assert not [k for k in config if "attn_impl" in k or "auto_map" in k]
    everything = "".join(p.read_text() for p in folder.iterdir() if p.suffix in (".json", ".md", ".yaml"))
    assert "/somewhere" not in everything
    assert str(tmp_path) not in everything
    out = AutoModelForCausalLM.from_pretrained(folder).generate(IDS, max_new_tokens=4, do_sample=False)
    assert out.shape == (1, 44)
    assert generation.suppress_tokens == [EXTRA["mask_token_id"]]


def test_an_export_can_be_the_next_base(tmp_path):
    made = recipe(export(tmp_path / "out"))
    assert check_base(made) == []
    assert torch.equal(load_model(made)(IDS).logits, tiny.tiny_model()(IDS).logits)
    assert base_provenance(made.model) == PROVENANCE["base"]


def test_a_new_mask_token_and_merged_adapters_travel(tmp_path):
    model, tokenizer = tiny.tiny_model("qwen3"), tiny.tiny_tokenizer.__wrapped__()
    apply_conversions(recipe("x", conversions=[{"name": "mask_token", "token": "<|mask|>"}]), model, tokenizer)
    add_lora(model, Lora(rank=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    with pytest.raises(RuntimeError, match="adapters that were not merged"):
        export(tmp_path / "out", model, tokenizer=tokenizer)
    assert not list(tmp_path.iterdir())
    merge_lora(model.eval())
    folder = export(tmp_path / "out", model, tokenizer=tokenizer)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert loaded.config.vocab_size == 321
    assert AutoTokenizer.from_pretrained(folder).mask_token_id == 320


def test_a_model_that_does_not_come_back_the_same_is_not_exported(tmp_path, monkeypatch):
    def broken(folder, dtype):
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            model.model.norm.weight[0] += 1
        return model

    monkeypatch.setattr(module, "reload", broken)
    with pytest.raises(RuntimeError, match=r"changed 1 weights, the first is model\.norm\.weight"):
        export(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_trained_model_that_is_not_stock_inside_is_noticed(tmp_path):
    model = tiny.tiny_model()
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: out * 3)
    with pytest.raises(RuntimeError, match="not the trained model"):
        export(tmp_path / "out", model)
    assert not list(tmp_path.iterdir())


def test_an_export_replaces_an_export_and_nothing_else(tmp_path):
    out = tmp_path / "out"
    export(out)
    export(out, tiny.tiny_model(seed=1))
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(loaded(IDS).logits, tiny.tiny_model(seed=1)(IDS).logits)
    assert list(tmp_path.iterdir()) == [out]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(UserError, match="not an export of adapt"):
        export(tmp_path / "thesis")
    (tmp_path / "empty").mkdir()
    export(tmp_path / "empty")


def test_a_full_disk_leaves_the_old_export_and_says_so(tmp_path, monkeypatch):
    out = export(tmp_path / "out")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("adapt.export.model_card.model_card", full)
    with pytest.raises(UserError, match="No space left on device"):
        export(out, tiny.tiny_model(seed=1))
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(loaded(IDS).logits, tiny.tiny_model()(IDS).logits)
    assert list(tmp_path.iterdir()) == [out]


def test_weights_that_do_not_fit_on_the_disk_leave_nothing(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    model, tokenizer = tiny.tiny_model(), tiny.tiny_tokenizer()
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot be written.*nothing was left behind"):
            export(tmp_path / "out", model, tokenizer=tokenizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_others_may_read_what_the_umask_lets_them(tmp_path):
    old = os.umask(0o027)
    try:
        folder = export(tmp_path / "out")
    finally:
        os.umask(old)
    assert {oct(p.stat().st_mode & 0o777) for p in folder.rglob("*") if p.is_file()} == {"0o640"}
    assert oct((folder / "custom_generate").stat().st_mode & 0o777) == "0o750"
    assert oct(folder.stat().st_mode & 0o777) == "0o750"


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="320 tokens, but the model has 300"):
        export(tmp_path / "out", tiny.tiny_model(vocab_size=300))


def test_the_card_says_what_was_done_with_what_and_what_came_out(tmp_path):
    folder = export(tmp_path / "out", dtype="bfloat16", conversions=["mask_token"], objective="block_diffusion")
    card = (folder / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert front["license"] == "apache-2.0"
    assert front["library_name"] == "transformers"
    assert "block-diffusion" in front["tags"]
    assert front["datasets"] == ["org/web"]
    assert "4-bit" in body
    assert "| `masked_ce/held-out/t=1.0` | 11.5 | 5.5 | -52.2% |" in body
    assert "| `tokens_per_forward` |  | 2.5 |  |" in body
    assert "| docs | train | 1,200 | 3,400,000 | BSD-3-Clause |" in body
    assert "| [held-out](https://huggingface.co/datasets/org/web) | eval | 5 | 10 | mit |" in body
    assert "adapt generate PATH_OR_REPO" in body
    assert "`mask_token`" in body
    assert "run:\n  name: tiny\n" in body
    record = json.loads((folder / "adapt.json").read_text())
    assert record["base"]["license"] == "apache-2.0"
    assert 0 < record["export"]["rounding_difference"] < 0.2


def test_a_run_decodes_in_plain_transformers_as_its_clean_stream_predicts(tiny_base, tmp_path):
    """Invariant 13: AR `generate` of the reloaded export follows the argmax of the clean stream of `[noisy | clean]`,
    and its config says how the model was trained."""
    from adapt.config import resolve
    from adapt.models import attention
    from adapt.models.layout import Layout
    from adapt.train.fit import fit
    from tests.recipes import tiny_recipe

    recipe = tiny_recipe(tiny_base, tmp_path, trainer={"steps": 3, "batch_tokens": 256})
    recipe["generation"]["samplers"] = ["ar", {"name": "block_diffusion", "threshold": 0.7}]
    fit(resolve(recipe))
    folder = tmp_path / "runs" / "tiny" / "export"
    model = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    config = model.config
    stated = (config.block_size, config.mask_token_id, config.prediction, config.context_mask, config.threshold)
    assert stated == (8, 3, "shifted", "causal", 0.7)
    prompt = IDS[:, :11]
    with torch.no_grad():
        text = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=13, do_sample=False)
        attention.use(model)
        pos = torch.arange(text.shape[1])[None]
        layout = Layout.noisy_then_clean(torch.zeros_like(pos), pos, pos // 8)
        both = torch.cat([torch.full_like(text, 3), text], 1)
        logits = model.lm_head(attention.hidden_states(model, both, pos.repeat(1, 2), layout))[:, text.shape[1] :]
    logits[..., 3] = float("-inf")  # generation_config suppresses the mask token
    assert torch.equal(logits[:, 10:-1].argmax(-1), text[:, 11:])
