from __future__ import annotations

import pytest
import torch

from adapt.conversion.base import apply_conversions, plan_conversions
from adapt.errors import UserError
from adapt.pretrained import check_base
from tests import tiny
from tests.pretrained.recipes import recipe

IDS = torch.arange(4, 44)[None]


def fresh_tokenizer(vocab=320, reserved=True):
    tokenizer = tiny.tiny_tokenizer.__wrapped__(vocab)
    if not reserved:
        raw = tokenizer.backend_tokenizer.to_str().replace("<reserved_0>", "<ordinary_0>")
        tokenizer._tokenizer = type(tokenizer._tokenizer).from_str(raw)
    return tokenizer


def convert(model, tokenizer, **config):
    """Plan and apply must agree; returns the mask token's id."""
    made = recipe("unused", conversions=[{"name": "mask_token", **config}])
    size, rows = len(tokenizer), model.config.vocab_size
    planned, planned_tokenizer = plan_conversions(made, model.config, tokenizer)
    assert (len(tokenizer), model.config.vocab_size) == (size, rows)  # planning changes nothing
    apply_conversions(made, model, tokenizer)
    assert model.config.mask_token_id == planned.mask_token_id == tokenizer.mask_token_id
    assert model.config.vocab_size == planned.vocab_size == model.get_input_embeddings().num_embeddings
    assert planned_tokenizer.get_vocab() == tokenizer.get_vocab()
    if model.config.tie_word_embeddings:
        assert model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    assert tokenizer(f"a{tokenizer.mask_token}b")["input_ids"].count(tokenizer.mask_token_id) == 1
    return tokenizer.mask_token_id


def test_a_reserved_token_is_reused():
    model, tokenizer = tiny.tiny_model(), fresh_tokenizer()
    before = model.get_input_embeddings().weight.detach().clone()
    assert convert(model, tokenizer) == 3
    assert tokenizer.mask_token == "<reserved_0>"
    after = model.get_input_embeddings().weight
    others = torch.arange(320) != 3
    assert torch.equal(after[others], before[others])
    torch.testing.assert_close(after[3], before[others].mean(0))


def test_the_tokenizers_own_mask_token_comes_first():
    tokenizer = fresh_tokenizer()
    tokenizer.mask_token = tokenizer.convert_ids_to_tokens(100)
    assert convert(tiny.tiny_model(), tokenizer) == 100


def test_a_model_trained_with_a_mask_token_keeps_it_and_its_row():
    model, tokenizer = tiny.tiny_model(mask_token_id=100), fresh_tokenizer()
    row = model.get_input_embeddings().weight[100].clone()
    assert convert(model, tokenizer) == 100
    assert torch.equal(model.get_input_embeddings().weight[100], row)


def test_a_model_and_a_tokenizer_with_different_mask_tokens_are_refused():
    tokenizer = fresh_tokenizer()
    tokenizer.mask_token = "<reserved_0>"
    with pytest.raises(UserError, match=r"mask_token_id=100, but .* '<reserved_0>' is 3; say which"):
        convert(tiny.tiny_model(mask_token_id=100), tokenizer)
    assert convert(tiny.tiny_model(mask_token_id=100), tokenizer, id=100) == 100


def test_a_spare_row_is_used_before_a_new_one():
    tokenizer = fresh_tokenizer(vocab=300, reserved=False)
    model = tiny.tiny_model()
    mean = model.get_input_embeddings().weight[:300].mean(0)
    assert convert(model, tokenizer) == 300
    assert model.config.vocab_size == 320
    assert tokenizer.mask_token == "<|mask|>"
    torch.testing.assert_close(model.get_input_embeddings().weight[300], mean)  # padding rows do not count


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_full_vocabulary_grows_by_one_row(family):
    model, tokenizer = tiny.tiny_model(family), fresh_tokenizer(reserved=False)
    embedding = model.get_input_embeddings().weight.detach().clone()
    head = model.get_output_embeddings().weight.detach().clone()
    logits = model(IDS).logits
    assert convert(model, tokenizer) == 320
    assert model.get_input_embeddings().weight.shape[0] == 321
    torch.testing.assert_close(model.get_input_embeddings().weight[320], embedding.mean(0))
    torch.testing.assert_close(model.get_output_embeddings().weight[320], head.mean(0))
    torch.testing.assert_close(model(IDS).logits[..., :320], logits)


@pytest.mark.parametrize("vocab, config", [(320, {}), (320, {"token": "<|blank|>"}), (300, {}), (300, {"id": 300})])
def test_a_converted_tokenizer_fits_a_fresh_model_the_same_way(vocab, config):
    tokenizer = fresh_tokenizer(vocab, reserved=False)
    first, second = tiny.tiny_model(), tiny.tiny_model()
    chosen = convert(first, tokenizer, **config)
    assert convert(second, tokenizer, **config) == chosen
    for name, weight in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], weight)


def test_an_explicit_choice_wins():
    assert convert(tiny.tiny_model(), fresh_tokenizer(), token="<|im_start|>") == 1
    assert convert(tiny.tiny_model(), fresh_tokenizer(), token="<|blank|>") == 320
    assert convert(tiny.tiny_model(), fresh_tokenizer(), id=3) == 3
    assert convert(tiny.tiny_model(), fresh_tokenizer(vocab=300), id=300, token="<|blank|>") == 300


def test_an_untied_head_keeps_an_existing_row_and_keep_keeps_the_embedding():
    model = tiny.tiny_model("mistral")
    head, row = model.lm_head.weight.detach().clone(), model.model.embed_tokens.weight[3].detach().clone()
    convert(model, fresh_tokenizer(), init="keep")
    assert torch.equal(model.lm_head.weight, head)
    assert torch.equal(model.model.embed_tokens.weight[3], row)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"id": 0}, "token 0 is the model's BOS token"),
        ({"token": "<|im_end|>"}, "token 2 is the model's PAD token"),
        ({"id": 320}, "320 is not one of the model's 320 embedding rows"),
        ({"id": -1}, "-1 is not one of"),
        ({"id": 5, "token": "<|im_start|>"}, "give one of the two"),
        ({"token": ""}, "is empty"),
        ({"token": "e"}, r"'e' \(id \d+\) is an ordinary piece of text"),
        ({"id": 70}, "id 70.*is an ordinary piece of text"),
    ],
)
def test_choices_that_cannot_work_are_refused(config, message):
    model, tokenizer = tiny.tiny_model(), fresh_tokenizer()
    made = recipe("unused", conversions=[{"name": "mask_token", **config}])
    for attempt in (
        lambda: plan_conversions(made, model.config, tokenizer),
        lambda: apply_conversions(made, model, tokenizer),
    ):
        with pytest.raises(UserError, match=message) as raised:
            attempt()
        assert str(raised.value).startswith("model.conversions[0].")


def test_a_gap_in_the_vocabulary_is_refused():
    made = recipe("unused", conversions=[{"name": "mask_token", "id": 310}])
    with pytest.raises(UserError, match="first row without a token is 300"):
        plan_conversions(made, tiny.tiny_config(), fresh_tokenizer(vocab=300))


def test_a_tokenizer_that_does_not_fit_is_not_papered_over():
    made = recipe("unused", conversions=["mask_token"])
    with pytest.raises(UserError, match="320 tokens, but the model only 300 embedding rows"):
        plan_conversions(made, tiny.tiny_config(vocab_size=300), fresh_tokenizer(reserved=False))


def test_check_base_reports_it_and_end_of_text_lists_count(tmp_path):
    folder = tiny.save_tiny(tmp_path / "m", eos_token_id=[0, 5])
    made = recipe(folder, conversions=[{"name": "mask_token", "id": 5}])
    assert "model.conversions[0].token: token 5 is the model's EOS token" in str(check_base(made)[0])


def test_without_a_tokenizer_the_id_is_still_checked():
    made = recipe("unused", conversions=[{"name": "mask_token", "id": 0}])
    with pytest.raises(UserError, match="BOS"):
        plan_conversions(made, tiny.tiny_config(), None)


@pytest.mark.parametrize("config", [{"token": "<|mask|>"}, {"token": "<reserved_0>"}, {"id": 3}, {}])
@pytest.mark.parametrize("reserved", [True, False])
def test_a_converted_tokenizer_converts_another_copy_of_the_model_the_same_way(config, reserved):
    """Export builds the model anew beside the run's tokenizer, which has the mask token already."""
    tokenizer, first, second = fresh_tokenizer(reserved=reserved), tiny.tiny_model("qwen2"), tiny.tiny_model("qwen2")
    made = recipe("unused", conversions=[{"name": "mask_token", **config}])
    for model in (first, second):
        apply_conversions(made, model, tokenizer)
    assert first.config.mask_token_id == second.config.mask_token_id
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name]), name


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize(
    "vocab, reserved", [(320, False), (300, False), (320, True)]
)  # a new row, a spare one, reserved
def test_adding_a_mask_token_leaves_the_logits_of_all_other_ids_unchanged(family, vocab, reserved):
    model = tiny.tiny_model(family)
    logits = model(IDS).logits.detach()
    mask = convert(model, fresh_tokenizer(vocab, reserved))
    others = torch.arange(320) != mask
    torch.testing.assert_close(model(IDS).logits[..., :320][..., others], logits[..., others], atol=1e-6, rtol=0)
