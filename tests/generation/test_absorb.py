"""A stock DeepseekV3 model, opened here, decodes without keys and values per head, and computes what it did."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from adapt.generation.absorb import absorb
from adapt.generation.load import open_model
from adapt.models.latent_attention import LatentAttention
from tests import tiny

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "mscale_all_dim": 1.0}
CASES = {
    "dense-queries": {},
    "query-rank": {"q_lora_rank": 24},
    "biases": {"q_lora_rank": 24, "attention_bias": True},
    "yarn": {"rope_parameters": {"rope_theta": 10000.0, **YARN}},
    "half-split": {"rope_interleave": False},
    "dynamic": {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 2.0}},
    "experts": {
        "first_k_dense_replace": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
    "eager": {"attn_implementation": "eager"},
}


def stock(attn_implementation: str = "sdpa", **over):
    fields = {
        "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "first_k_dense_replace": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 8, "qk_nope_head_dim": 4,
        "qk_rope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": 1, "n_group": 1, "topk_group": 1,
        "num_experts_per_tok": 1, "num_nextn_predict_layers": 0, "max_position_embeddings": 128,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    }  # fmt: skip
    config = AutoConfig.for_model("deepseek_v3", **fields | over)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3)
    return model


@pytest.fixture(params=CASES)
def theirs(request):
    return stock(**CASES[request.param])


def decoded(model, padding: int, steps: int = 4):
    """Logits of every step of two rows, the second `padding` tokens shorter, and the cache."""
    ids = torch.randint(4, 320, (2, 9 + steps), generator=torch.Generator().manual_seed(1))
    real = torch.ones_like(ids)
    real[1, :padding] = 0
    place = (real.cumsum(-1) - 1).clamp(min=0)
    mask = None if padding == 0 else real
    cache, found = None, []
    for first, last in [(0, 9), *((n, n + 1) for n in range(9, 9 + steps))]:
        out = model(
            ids[:, first:last],
            position_ids=place[:, first:last],
            attention_mask=None if mask is None else mask[:, :last],
            past_key_values=cache,
            use_cache=True,
        )
        cache = out.past_key_values
        found.append(out.logits[:, -1])
    return torch.stack(found), cache


@pytest.mark.parametrize("padding", [0, 3])
@torch.no_grad()
def test_absorbed_logits_are_the_stock_models(theirs, padding, monkeypatch):
    config = theirs.config
    narrow = config._attn_implementation == "eager" or config.first_k_dense_replace < config.num_hidden_layers
    theirs = theirs if narrow else theirs.double()  # the eager softmax is fp32, and grouped experts know no float64
    ours = absorb(copy.deepcopy(theirs))
    forms = []
    whole = LatentAttention.absorbed
    monkeypatch.setattr(LatentAttention, "absorbed", lambda *a: forms.append("absorbed") or whole(*a))
    (expected, held), (found, cache) = decoded(theirs, padding), decoded(ours, padding)
    assert forms == ["absorbed"] * 2 * 4  # every layer of every step after the prompt
    assert (found - expected).abs().max() < (1e-4 if narrow else 1e-10)
    for mine, other in zip(cache.layers, held.layers, strict=True):
        assert mine.keys.shape == other.keys.shape
        assert mine.values.shape == other.values.shape


@pytest.mark.parametrize("padding", [0, 3])
def test_greedy_ids_are_the_stock_models(theirs, padding):
    ids = torch.randint(4, 320, (2, 9), generator=torch.Generator().manual_seed(2))
    real = torch.ones_like(ids)
    real[1, :padding] = 0
    how = {"attention_mask": real, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 2, "eos_token_id": None}
    expected = theirs.generate(ids, **how)
    assert torch.equal(absorb(theirs).generate(ids, **how), expected)


def test_parameters_are_the_same_tensors_under_the_same_names(theirs):
    before = dict(theirs.named_parameters())
    after = dict(absorb(theirs).named_parameters())
    assert before.keys() == after.keys()
    assert all(after[name] is p for name, p in before.items())


def test_a_kernel_without_a_mask_stays_stock():
    """The absorbed form reads a mask of queries by keys; flex_attention, for one, gets another kind."""
    model = absorb(stock(attn_implementation="flex_attention"))
    assert not any(isinstance(layer.self_attn, LatentAttention) for layer in model.model.layers)


def test_other_classes_stay_as_they_are():
    model = tiny.tiny_model("llama")
    before = [layer.self_attn for layer in model.model.layers]
    assert [layer.self_attn for layer in absorb(model).model.layers] == before


def test_opened_stock_models_absorb(tmp_path):
    stock().save_pretrained(tmp_path)
    tiny.tiny_tokenizer().save_pretrained(tmp_path)
    model = open_model(str(tmp_path)).model
    assert all(isinstance(layer.self_attn, LatentAttention) for layer in model.model.layers)
