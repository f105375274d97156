"""The conversion `vocabulary`: a model takes an extended tokenizer, and reads old text as before."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from adapt.conversion.base import apply_conversions, filled_rows, plan_conversions
from adapt.conversion.new_tokens import new_tokens
from adapt.errors import UserError
from adapt.pretrained import load_model, load_tokenizer
from tests import tiny
from tests.conversion.extended import extended_tokenizer, save_extended
from tests.pretrained.recipes import recipe

BASES = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "qwen2, untied": {"family": "qwen2"},
    "qwen3, tied": {"family": "qwen3"},
    "mistral, untied": {"family": "mistral"},
}
OLD = torch.arange(4, 44).reshape(2, 20)


@pytest.fixture(params=BASES)
def base(request, tmp_path):
    return tiny.save_tiny(tmp_path / "base", **BASES[request.param])


def converted(base, folder, *, before=(), after=(), count=40, special=None, **config):
    """(model before, model after, its tokenizer); plan and apply agree."""
    if not folder.exists():
        save_extended(folder, count, special=special)
    made = recipe(
        base, tokenizer=folder, conversions=[*before, {"name": "vocabulary", **config}, *after], dtype="float32"
    )
    old, model, tokenizer = load_model(made), load_model(made), load_tokenizer(made)
    planned, planned_tokenizer = plan_conversions(made, model.config, tokenizer)
    assert model.config.vocab_size == old.config.vocab_size  # planning changes nothing
    apply_conversions(made, model, tokenizer)
    assert model.config.vocab_size == planned.vocab_size == model.get_input_embeddings().num_embeddings
    assert model.vocab_size == planned.vocab_size
    assert planned_tokenizer.get_vocab() == tokenizer.get_vocab()
    return old, model, tokenizer


def tables(model) -> list[torch.Tensor]:
    found = [model.get_input_embeddings().weight]
    if not model.config.tie_word_embeddings:
        found.append(model.get_output_embeddings().weight)
    return found


@torch.no_grad()
def test_invariant_10_old_rows_and_old_logits_stay(base, tmp_path):
    old, model, _ = converted(base, tmp_path / "t")
    for before, after in zip(tables(old), tables(model), strict=True):
        assert torch.equal(after[:320], before)
    torch.testing.assert_close(model(OLD).logits[..., :320], old(OLD).logits, rtol=0, atol=1e-5)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet="the quick brown fox jumps 0123\n", min_size=1, max_size=60))
@torch.no_grad()
def test_invariant_10_on_any_text_that_uses_no_new_token(text, two_models):
    old, model, tokenizer = two_models
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    assume(int(ids.max()) < 320)
    torch.testing.assert_close(model(ids).logits[..., :320], old(ids).logits, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def two_models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return converted(tiny.save_tiny(folder / "base"), folder / "t")


def test_invariant_10_tied_stays_tied_and_untied_untied(base, tmp_path):
    from transformers import AutoModelForCausalLM

    old, model, _ = converted(base, tmp_path / "t", pad_to_multiple=64)
    model.save_pretrained(tmp_path / "saved")
    for made in (model, AutoModelForCausalLM.from_pretrained(tmp_path / "saved")):
        shared = made.get_input_embeddings().weight.data_ptr() == made.get_output_embeddings().weight.data_ptr()
        assert shared == old.config.tie_word_embeddings
        assert made.get_output_embeddings().out_features == made.config.vocab_size == 384
        assert all(torch.equal(x, y) for x, y in zip(tables(model), tables(made), strict=True))


def test_invariant_10_rows_are_a_multiple_and_the_tail_is_neutral(base, tmp_path):
    old, model, _ = converted(base, tmp_path / "t", pad_to_multiple=64)
    assert model.config.vocab_size == 384
    ordinary = torch.arange(320) >= 4
    for before, after in zip(tables(old), tables(model), strict=True):
        torch.testing.assert_close(after[360:], before[ordinary].mean(0).expand(24, -1))


@torch.no_grad()
@pytest.mark.parametrize("multiple", [1, 64])
def test_invariant_11_mean_costs_old_text_at_most_log_of_the_growth(base, tmp_path, multiple):
    old, model, _ = converted(base, tmp_path / "t", init="mean", pad_to_multiple=multiple)
    new, trained = model.config.vocab_size - 320, 316
    rise = old(OLD).logits.log_softmax(-1) - model(OLD).logits.log_softmax(-1)[..., :320]
    assert rise.min() >= -1e-5
    assert rise.max() <= math.log(1 + new / trained) + 1e-5


def test_invariant_11_subword_rows_are_means_of_what_the_old_tokenizer_made_of_the_text(base, tmp_path):
    old, model, tokenizer = converted(base, tmp_path / "t", init="subword_mean")
    theirs, word = tiny.tiny_tokenizer(), tokenizer.convert_ids_to_tokens(359)
    text = tokenizer.decode([359])
    ids = theirs(text)["input_ids"]
    assert len(ids) > 1
    assert "".join(theirs.convert_ids_to_tokens(ids)) == word
    for before, after in zip(tables(old), tables(model), strict=True):
        torch.testing.assert_close(after[359], before[ids].mean(0), rtol=0, atol=1e-6)


def test_invariant_11_no_new_token_is_a_single_old_one():
    found = new_tokens(tiny.tiny_tokenizer(), extended_tokenizer(44), 320)
    assert all(len(pieces) > 1 for pieces in found.pieces)


def test_invariant_12_rows_are_filled_by_id_in_a_matrix_taller_than_its_tokenizer(tmp_path):
    """350 rows, 320 tokens: new tokens take the padding first, and more rows are added than were needed for none."""
    base = tiny.save_tiny(tmp_path / "base", vocab_size=350)
    for count, rows in ((10, 350), (40, 360)):
        old, model, _ = converted(base, tmp_path / f"t{count}", count=count, init="subword_mean")
        before, after = tables(old)[0], tables(model)[0]
        assert len(after) == rows
        assert torch.equal(after[:320], before[:320])
        found = new_tokens(tiny.tiny_tokenizer(), extended_tokenizer(count), 350)
        for i, pieces in zip(found.ids, found.pieces, strict=True):
            torch.testing.assert_close(after[i], before[list(pieces)].mean(0), rtol=0, atol=1e-6)
        assert torch.equal(after[320 + count : 350], before[320 + count : 350])  # never shrunk, never touched


def test_the_defaults_are_the_pieces_and_for_a_head_of_its_own_the_mean(base, tmp_path):
    _, model, _ = converted(base, tmp_path / "t")
    ways = [{"init": "subword_mean"}]
    if not model.config.tie_word_embeddings:
        ways = [{"init": "subword_mean", "output": "mean"}, {"init": "subword_mean"}]
    others = [tables(converted(base, tmp_path / "t", **way)[1]) for way in ways]
    assert all(torch.equal(x, y) for x, y in zip(tables(model), others[0], strict=True))
    assert not torch.equal(tables(model)[-1], others[-1][-1]) or len(ways) == 1


def test_a_new_special_token_starts_at_the_mean(base, tmp_path):
    old, model, tokenizer = converted(base, tmp_path / "t", special="<|corpus|>", init="subword_mean")
    assert tokenizer.convert_tokens_to_ids("<|corpus|>") == 360
    for before, after in zip(tables(old), tables(model), strict=True):
        torch.testing.assert_close(after[360], before[4:].mean(0))


def test_rescaled_rows(base, tmp_path):
    old, model, _ = converted(base, tmp_path / "t", init="subword_mean", rescale=True)
    for before, after in zip(tables(old), tables(model), strict=True):
        mean = before[4:].mean(0)
        usual = (before[4:] - mean).norm(dim=1).median()
        torch.testing.assert_close((after[320:] - mean).norm(dim=1), usual.expand(40))


def test_bfloat16_weights_stay_so(tmp_path):
    base = tiny.save_tiny(tmp_path / "base", dtype=torch.bfloat16)
    made = recipe(base, tokenizer=save_extended(tmp_path / "t"), conversions=["vocabulary"])
    model = load_model(made).to(torch.bfloat16)
    before = tables(model)[0].clone()
    apply_conversions(made, model, load_tokenizer(made))
    assert tables(model)[0].dtype == torch.bfloat16
    assert torch.equal(tables(model)[0][:320], before)


@pytest.mark.parametrize("first", [True, False])
def test_it_works_before_and_after_a_mask_token_that_is_reused(base, tmp_path, first):
    mask = [{"name": "mask_token", "token": "<reserved_0>"}]
    around = {"before": mask} if first else {"after": mask}
    old, model, tokenizer = converted(base, tmp_path / "t", **around)
    assert (model.config.vocab_size, model.config.mask_token_id, tokenizer.mask_token_id) == (360, 3, 3)
    assert filled_rows(model) == (3, *range(320, 360))
    kept = [i for i in range(320) if i != 3]
    assert torch.equal(tables(model)[0][kept], tables(old)[0][kept])


def test_a_new_mask_token_comes_after_the_new_words(base, tmp_path):
    mask = {"name": "mask_token", "token": "<|mask|>"}
    _, model, tokenizer = converted(base, tmp_path / "t", after=[mask])
    assert (model.config.vocab_size, tokenizer.mask_token_id) == (361, 360)
    assert filled_rows(model) == tuple(range(320, 361))
    with pytest.raises(UserError, match=r"conversions\[0\]: the tokenizer has 360 .* comes before this one"):
        converted(base, tmp_path / "t", before=[mask])


def test_the_same_tokenizer_is_converted_alike_twice(tmp_path):
    """A run plans first, and converts with the tokenizer that planning made."""
    mask = {"name": "mask_token", "token": "<|mask|>"}
    made = recipe(
        tiny.save_tiny(tmp_path / "base"),
        tokenizer=save_extended(tmp_path / "t"),
        conversions=[{"name": "vocabulary", "pad_to_multiple": 64, "init": "normal_cov"}, mask],
        dtype="float32",
    )
    models, tokenizer = [load_model(made), load_model(made)], load_tokenizer(made)
    for model in models:
        apply_conversions(made, model, tokenizer)
    assert torch.equal(tables(models[0])[0], tables(models[1])[0])
    assert models[0].config.mask_token_id == models[1].config.mask_token_id == 360
    assert filled_rows(models[0]) == filled_rows(models[1])


def changed(folder, change):
    """A tokenizer folder after `change` of its tokenizer.json."""
    save_extended(folder)
    path = folder / "tokenizer.json"
    stored = json.loads(path.read_text())
    change(stored)
    path.write_text(json.dumps(stored))
    return folder


def _swap(stored):
    vocab = stored["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


def _drop(stored):
    vocab = stored["model"]["vocab"]
    vocab.pop("~")
    last = max(vocab, key=vocab.get)  # no hole
    vocab[last] = 94


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_swap, r"gives 2 of the base's tokens other ids: 'a' is \d+ in the base and \d+ here"),
        (_drop, r"lacks 1 of the base's 320 tokens, '~' \(id \d+\) first"),
    ],
)
def test_a_tokenizer_that_is_no_extension_is_refused(tmp_path, tiny_base, change, says):
    made = recipe(tiny_base, tokenizer=changed(tmp_path / "t", change), conversions=["vocabulary"])
    config = load_model(made).config
    with pytest.raises(UserError, match=says):
        plan_conversions(made, config, load_tokenizer(made))
    with pytest.raises(UserError, match="tokenizer.path"):
        apply_conversions(made, load_model(made), load_tokenizer(made))


def above_the_vocabulary(folder):
    """A base as Llama 3 is laid out: special tokens (320, 321) behind the model's vocabulary."""
    tiny.save_tiny(folder, vocab_size=322)
    tokenizer = tiny.tiny_tokenizer.__wrapped__()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|a|>", "<|b|>"]})
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_special_tokens_behind_the_vocabulary_keep_their_ids_and_rows(tmp_path):
    tokenizer = above_the_vocabulary(tmp_path / "base")
    extended_tokenizer(base=tokenizer, special="<|a|>").save_pretrained(tmp_path / "t")
    old, model, made = converted(tmp_path / "base", tmp_path / "t")
    assert made.convert_tokens_to_ids(["<|a|>", "<|b|>"]) == [320, 321]
    assert model.config.vocab_size == 362
    assert torch.equal(tables(model)[0][:322], tables(old)[0])
    assert filled_rows(model) == tuple(range(322, 362))


def test_special_tokens_that_new_words_drove_away_are_refused(tmp_path):
    """Without them in the vocabulary, loading renumbers them silently: `tokenizers` puts them behind it."""
    tokenizer = above_the_vocabulary(tmp_path / "base")
    extended_tokenizer(base=tokenizer, special="<|a|>").save_pretrained(tmp_path / "t")
    path = tmp_path / "t" / "tokenizer.json"
    stored = json.loads(path.read_text())
    for token in ("<|a|>", "<|b|>"):
        del stored["model"]["vocab"][token]
    path.write_text(json.dumps(stored))
    made = recipe(tmp_path / "base", tokenizer=tmp_path / "t", conversions=["vocabulary"])
    with pytest.raises(
        UserError, match=r"'<\|a\|>' is 320 in the base and 360 here(.|\n)*360 is '<\|a\|>', 'Ġ"
    ) as error:
        plan_conversions(made, load_model(made).config, load_tokenizer(made))
    assert "under their old ids" in str(error.value)


def test_nothing_to_extend_is_refused(tiny_base):
    made = recipe(tiny_base, tokenizer=tiny_base, conversions=["vocabulary"])
    with pytest.raises(UserError, match="the base's 320 tokens and no other, so there is nothing to extend"):
        plan_conversions(made, load_model(made).config, load_tokenizer(made))


def test_an_output_start_of_a_tied_head_is_refused(tiny_base, tmp_path):
    conversion = {"name": "vocabulary", "output": "mean"}
    made = recipe(tiny_base, tokenizer=save_extended(tmp_path / "t"), conversions=[conversion])
    with pytest.raises(UserError, match=r"conversions\[0\]\.output: this model's head is its embedding"):
        plan_conversions(made, load_model(made).config, load_tokenizer(made))
