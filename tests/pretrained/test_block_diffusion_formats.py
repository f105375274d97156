"""SDAR, Fast-dLLM v2 and dLLM A2D checkpoints, written here as small random models with the files their releases have.

Compared once with the releases' own modelling code (outside this repository, on a CPU, in float64): a 2-layer random
model, 2 rows of 22 tokens of which 3 are masks, block-causal attention over blocks of 4 (SDAR) and 8, strict loading of
our state dict into their class, largest difference of all logits (themselves up to 7.5 in size) from the stock class:

    SDAR              SDARForCausalLM             transformers 4.53.1    2e-15
    Fast-dLLM v2 7B   Fast_dLLM_QwenForCausalLM   transformers 4.53.1    0
    dLLM A2D          A2DQwen3LMHeadModel         transformers 4.57.1    0

SDAR's norm is a flash-attn kernel, replaced there by the float32 formula beneath it. Commits: JetAstra/SDAR c2041a8,
ZHZisZZ/dllm ca17675, and for Fast-dLLM v2 the copy of the release in Satgoy152/DualDiffusion 9587d1e.
"""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapt.conversion.base import apply_conversions, plan_conversions
from adapt.errors import UserError
from adapt.generation.contract import Contract
from adapt.generation.load import open_model
from adapt.generation.verb import choose
from adapt.pretrained import check_base, inspect_base, load_config, load_model, load_tokenizer
from tests import tiny
from tests.pretrained.recipes import recipe

IDS = torch.arange(3, 43)[None]

MASKS = {"sdar": "<|MASK|>", "Fast_dLLM_Qwen": "|<MASK>|", "a2d-llama": "<|mask|>"}
STOCK = {"sdar": "qwen3", "Fast_dLLM_Qwen": "qwen2", "a2d-llama": "llama", "a2d-qwen2": "qwen2", "a2d-qwen3": "qwen3"}
SIZES = {"Fast_dLLM_Qwen": {"bd_size": 8}}
MASK = 320
"""Id of the mask token in these files: the first row behind the tokenizer's own tokens."""


def save(folder, kind, *, state_mask=False, tokenizer_file=True, **over):
    """A model folder as the release of `kind` looks: its config.json, the weights, the tokenizer's files."""
    tiny.tiny_model(STOCK[kind], vocab_size=324).save_pretrained(folder)
    stock = json.loads((folder / "config.json").read_text())
    rope = stock.pop("rope_parameters")
    fields = {
        **stock,
        "model_type": kind,
        "architectures": [f"{kind}ForCausalLM"],
        "auto_map": {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"},
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None,
        "attn_implementation": "flex_attention",
        "fuse_cross_entropy": True,
        "use_cache": False,
        **SIZES.get(kind, {"block_size": 4}),
        **({"mask_token_id": MASK} if state_mask else {}),
        **over,
    }
    (folder / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if v is not ...}))
    (folder / "theirs.py").write_text("raise SystemExit('their code ran')\n")
    name = MASKS.get(kind, "<|mask|>")
    tokenizer = tiny.tiny_tokenizer.__wrapped__()
    if kind == "Fast_dLLM_Qwen":
        tokenizer.add_special_tokens({"additional_special_tokens": [name]})
    else:
        tokenizer.add_special_tokens({"mask_token": name})
    tokenizer.save_pretrained(folder)
    if not tokenizer_file:
        _as_vocabulary_and_merges(folder, name)
    return folder


def _as_vocabulary_and_merges(folder, name):
    """Without tokenizer.json, as Fast-dLLM v2 is released."""
    bpe = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(bpe["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in bpe["merges"]) + "\n")
    (folder / "added_tokens.json").write_text(json.dumps({name: MASK}))
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "additional_special_tokens": [name],
        "added_tokens_decoder": {str(MASK): {"content": name, "special": True}},
        "eos_token": "<|endoftext|>",
        "pad_token": "<|im_end|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def edit(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def said(made):
    return "\n".join(map(str, check_base(made)))


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize("kind", STOCK)
def test_the_same_weights_in_the_stock_class_and_no_code_of_theirs(tmp_path, kind, trusted):
    made = recipe(save(tmp_path / "m", kind), dtype="float32", trust_remote_code=trusted)
    assert said(made) == ""
    model = load_model(made)
    stock = tiny.tiny_model(STOCK[kind], vocab_size=324)
    assert type(model) is type(stock)
    assert torch.equal(model(IDS).logits, stock(IDS).logits)
    assert load_model(made, device="meta").config.model_type == STOCK[kind]
    assert model.config.use_cache
    assert not {"auto_map", "fuse_cross_entropy", "bd_size", "attn_implementation"} & set(model.config.to_dict())


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("sdar", {"block_size": 4, "prediction": "inplace", "block_first": "noisy"}),
        ("Fast_dLLM_Qwen", {"block_size": 8, "prediction": "shifted", "block_first": "ar"}),
        ("a2d-llama", {"block_size": 4, "prediction": "inplace", "block_first": "noisy"}),
        ("a2d-qwen2", {"block_size": 4, "prediction": "inplace", "block_first": "noisy"}),
        ("a2d-qwen3", {"block_size": 4, "prediction": "inplace", "block_first": "noisy"}),
    ],
)
@pytest.mark.parametrize("state_mask", [True, False])
def test_the_contract_is_read_from_the_files(tmp_path, kind, expected, state_mask):
    config = load_config(recipe(save(tmp_path / "m", kind, state_mask=state_mask)).model)
    same = {"mask_token_id": MASK, "context_mask": "block", "noisy_attention": "bidirectional", "threshold": 0.9}
    assert asdict(Contract.of(config)) == same | expected
    assert config.rope_parameters["rope_theta"] == 10000.0


@pytest.mark.parametrize(
    "name, kind, size",
    [
        ("SDAR-4B-Chat", "sdar", 4),
        ("SDAR-1.7B-Chat-b16", "sdar", 16),
        ("my-sdar", "sdar", None),
        ("Qwen3-0.6B-diffusion-bd3lm-v0.1", "a2d-qwen3", 32),
        ("a2d", "a2d-qwen3", None),
    ],
)
def test_releases_that_state_no_block_size_have_it_in_their_name(tmp_path, name, kind, size):
    config = load_config(recipe(save(tmp_path / name, kind, block_size=...)).model)
    assert Contract.of(config).block_size == size


def test_decoding_asks_for_a_block_size_nobody_states(tmp_path):
    opened = open_model(str(save(tmp_path / "mine", "sdar", block_size=...)))
    choice = choose(Namespace(sampler=None), opened.model, opened.tokenizer)
    assert choice.name == "block_diffusion"
    with pytest.raises(UserError, match="block_size: the model's config does not state one; give it"):
        choice.build().generate(opened.model, [5, 6], max_new_tokens=4)


def test_whole_sequence_checkpoints_of_the_same_format_are_refused(tmp_path):
    text = said(recipe(save(tmp_path / "Qwen3-0.6B-diffusion-mdlm-v0.1", "a2d-qwen3", block_size=...)))
    assert "masked over whole sequences (MDLM)" in text
    assert "-diffusion-bd3lm-" in text


def test_a_tokenizer_without_tokenizer_json_asks_no_questions(tmp_path, capfd):
    made = recipe(save(tmp_path / "m", "Fast_dLLM_Qwen", tokenizer_file=False))
    assert load_tokenizer(made).convert_tokens_to_ids("|<MASK>|") == MASK == load_config(made.model).mask_token_id
    assert "run the custom code" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    "kind, reason",
    [
        ("llada", "llada family is not supported: it is masked over whole sequences"),
        ("Dream", "Dream family is not supported: it is masked over whole sequences"),
        ("sdar_moe", "sdar_moe family is not supported: a mixture of experts"),
        ("Fast_dLLM_Qwen3", "model_type 'Fast_dLLM_Qwen3' is not a layout known here"),
    ],
)
def test_other_diffusion_layouts_are_refused_by_name(tmp_path, kind, reason):
    text = said(recipe(save(tmp_path / "m", "sdar"), dtype="float32"))
    assert text == ""
    edit(tmp_path / "m", model_type=kind)
    text = said(recipe(tmp_path / "m"))
    assert reason in text
    assert "sdar (SDAR), Fast_dLLM_Qwen (Fast-dLLM v2)" in text


def test_weights_without_a_place_are_refused(tmp_path):
    folder = save(tmp_path / "m", "Fast_dLLM_Qwen")
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "model.relay_layer_norm.weight": torch.ones(32)}, folder / "model.safetensors")
    with pytest.raises(
        UserError, match=r"1 of its weights have no place in Qwen2ForCausalLM \(model\.relay_layer_norm"
    ):
        load_model(recipe(folder))
    save_file({k.replace("model.", "transformer."): v for k, v in weights.items()}, folder / "model.safetensors")
    with pytest.raises(UserError, match="lacks .* of the model's weights: model.embed_tokens.weight"):
        load_model(recipe(folder))


def test_a_head_that_is_tied_and_is_not_is_refused(tmp_path):
    folder = save(tmp_path / "m", "a2d-qwen3")
    weights = load_file(folder / "model.safetensors")
    table = weights["model.embed_tokens.weight"]
    save_file({**weights, "lm_head.weight": table.clone()}, folder / "model.safetensors", {"format": "pt"})
    load_model(recipe(folder))  # twice the same is no contradiction
    save_file({**weights, "lm_head.weight": table + 1}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"tie_word_embeddings=true, but .* lm_head\.weight"):
        load_model(recipe(folder))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"block_size": 0}, "block_size=0; a block has at least 1 token"),
        ({"block_size": "4"}, "block_size='4'"),
        ({"mask_token_id": 7}, r"mask_token_id=7, but its tokenizer declares '<|MASK|>' as 320"),
    ],
)
def test_contradictions_are_refused_naming_both(tmp_path, change, message):
    folder = save(tmp_path / "m", "sdar")
    edit(folder, **change)
    assert message in said(recipe(folder))
    with pytest.raises(UserError):
        load_model(recipe(folder))


def test_an_incomplete_config_is_not_filled_with_defaults(tmp_path):
    folder = save(tmp_path / "m", "sdar", num_attention_heads=...)
    assert "lacks num_attention_heads" in said(recipe(folder))


def test_the_mask_tokens_name_in_tokenizer_json_may_differ_and_is_then_refused(tmp_path):
    """SDAR's added_tokens.json says <MASK> and its tokenizer_config.json <|MASK|> for one id: where tokenizer.json has
    the former, the latter becomes a new token, one id further."""
    folder = save(tmp_path / "m", "sdar", state_mask=True)
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("<|MASK|>", "<MASK>"))
    text = said(recipe(folder))
    assert "mask_token_id=320 ('<MASK>' to its tokenizer)" in text
    assert "'<|MASK|>' is 321" in text
    with pytest.raises(UserError, match="mask_token_id=320"):
        open_model(str(folder))
    with pytest.raises(UserError, match=r"model\.conversions\[0\].*mask_token_id=320.*321"):
        raise UserError(check_base(recipe(folder, conversions=["mask_token"])))
    found = inspect_base(recipe(folder, conversions=[{"name": "mask_token", "id": 320}]))
    assert (found.problems, found.tokenizer.mask_token, found.config.mask_token_id) == ([], "<MASK>", 320)


@pytest.mark.parametrize("kind", STOCK)
def test_the_mask_token_conversion_takes_the_models_own_and_keeps_its_row(tmp_path, kind):
    made = recipe(save(tmp_path / "m", kind), conversions=["mask_token"])
    model, tokenizer = load_model(made), load_tokenizer(made)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    planned, _ = plan_conversions(made, model.config, tokenizer)
    apply_conversions(made, model, tokenizer)
    assert planned.mask_token_id == model.config.mask_token_id == tokenizer.mask_token_id == MASK
    assert model.config.vocab_size == 324
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]), name


def test_a_stated_mask_token_the_tokenizer_has_no_name_for(tmp_path):
    """A row behind the vocabulary, in a checkpoint whose tokenizer is the base's."""
    folder = save(tmp_path / "m", "Fast_dLLM_Qwen", state_mask=True)
    tiny.tiny_tokenizer.__wrapped__().save_pretrained(folder)
    made = recipe(folder, conversions=["mask_token"])
    model, tokenizer = load_model(made), load_tokenizer(made)
    row = model.get_input_embeddings().weight[MASK].clone()
    apply_conversions(made, model, tokenizer)
    assert tokenizer.mask_token_id == MASK
    assert torch.equal(model.get_input_embeddings().weight[MASK], row)
