"""The conversion `pruned_vocabulary`: rows follow their tokens, and text of kept tokens is read as before."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from adapt.conversion.base import apply_conversions, filled_rows, plan_conversions
from adapt.errors import NotReachable, UserError
from adapt.pretrained import load_config, load_model, load_tokenizer
from tests.conversion.extended import extended_tokenizer
from tests.conversion.pruned import BOS, EOS, PAD, ROWS, TEXT, WHOLE, save_base, save_pruned, save_tokenizer, small
from tests.conversion.test_vocabulary import BASES, tables
from tests.pretrained.recipes import recipe
from tests.tokenization.byte_level import SPECIALS

SIZE = len(small().ids)


@pytest.fixture(params=BASES)
def folder(request, tmp_path):
    return save_base(tmp_path / "base", **BASES[request.param])


def made_of(folder, tokenizer, *after, **config):
    conversions = [{"name": "pruned_vocabulary", **config}, *after]
    return recipe(folder, tokenizer=tokenizer, conversions=conversions, dtype="float32")


def converted(folder, tmp_path, *after, text=TEXT, **config):
    """(model before, model after, its tokenizer); plan and apply agree."""
    made = made_of(folder, save_pruned(tmp_path / "pruned", text), *after, **config)
    old, model, tokenizer = load_model(made), load_model(made), load_tokenizer(made)
    planned, _ = plan_conversions(made, model.config, tokenizer)
    assert model.config.vocab_size == old.config.vocab_size  # planning changes nothing
    apply_conversions(made, model, tokenizer)
    assert model.config.vocab_size == planned.vocab_size == model.get_input_embeddings().num_embeddings
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(planned, key) == getattr(model.config, key)
    return old, model, tokenizer


def old_ids() -> list[int]:
    """Of each new id, the old one: by token."""
    names = {i: token for token, i in small().ids.items()}
    return [WHOLE.ids[names[i]] for i in range(SIZE)]


def test_every_row_is_that_of_its_token_bit_for_bit(folder, tmp_path):
    old, model, _ = converted(folder, tmp_path)
    assert model.config.vocab_size == SIZE < ROWS - 30
    for before, after in zip(tables(old), tables(model), strict=True):
        assert torch.equal(after, before[old_ids()])
    body = {k: v for k, v in old.state_dict().items() if "embed" not in k and "lm_head" not in k}
    assert all(torch.equal(model.state_dict()[k], v) for k, v in body.items())
    assert filled_rows(model) == ()


@torch.no_grad()
def test_logits_of_kept_tokens_on_text_of_kept_tokens_stay(folder, tmp_path):
    old, model, tokenizer = converted(folder, tmp_path)
    theirs = WHOLE.tokenizer().encode(TEXT)
    ours = tokenizer(TEXT)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ours) == theirs.tokens
    before = old(torch.tensor([theirs.ids])).logits[..., old_ids()]
    torch.testing.assert_close(model(torch.tensor([ours])).logits, before, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def two_models(tmp_path_factory):
    path = tmp_path_factory.mktemp("two")
    return converted(save_base(path / "base"), path)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=20) | st.lists(st.sampled_from(TEXT.split()), min_size=1).map(" ".join))
@torch.no_grad()
def test_logits_stay_on_any_text_that_used_no_other_token(text, two_models):
    old, model, tokenizer = two_models
    theirs = WHOLE.tokenizer().encode(text)
    assume(theirs.tokens and set(theirs.tokens) <= small().ids.keys())
    logits = model(torch.tensor([tokenizer(text)["input_ids"]])).logits
    torch.testing.assert_close(logits, old(torch.tensor([theirs.ids])).logits[..., old_ids()], rtol=0, atol=1e-6)


def test_special_ids_follow_their_tokens(folder, tmp_path):
    file = folder / "generation_config.json"
    fields = json.loads(file.read_text()) | {
        "eos_token_id": [EOS, PAD],
        "pad_token_id": PAD,
        "suppress_tokens": [5, BOS],
    }
    fields["suppress_tokens"].append(next(i for i in range(ROWS) if i not in old_ids()))
    file.write_text(json.dumps(fields))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": [EOS, PAD], "sep_token_id": -1}))
    _, model, tokenizer = converted(folder, tmp_path)
    end, start, pad = (small().ids[s] for s in SPECIALS)
    assert {end, start, pad} == {SIZE - 1, SIZE - 2, SIZE - 3} != {EOS, BOS, PAD}
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id) == (end, start, pad)
    assert (model.config.eos_token_id, model.config.bos_token_id, model.config.pad_token_id) == ([end, pad], start, pad)
    assert model.config.sep_token_id == -1
    generation = model.generation_config
    assert (generation.eos_token_id, generation.bos_token_id, generation.pad_token_id) == ([end, pad], start, pad)
    assert generation.suppress_tokens == [old_ids().index(5), start]


def test_tied_stays_tied_and_untied_untied_after_saving(folder, tmp_path):
    from transformers import AutoModelForCausalLM

    old, model, _ = converted(folder, tmp_path)
    model.save_pretrained(tmp_path / "saved")
    for made in (model, AutoModelForCausalLM.from_pretrained(tmp_path / "saved")):
        shared = made.get_input_embeddings().weight.data_ptr() == made.get_output_embeddings().weight.data_ptr()
        assert shared == old.config.tie_word_embeddings
        assert made.get_output_embeddings().out_features == made.config.vocab_size == made.vocab_size == SIZE
        assert all(torch.equal(x, y) for x, y in zip(tables(model), tables(made), strict=True))


def test_rows_are_a_multiple_and_the_tail_is_neutral(folder, tmp_path):
    old, model, _ = converted(folder, tmp_path, pad_to_multiple=64)
    rows = model.config.vocab_size
    assert rows % 64 == 0
    assert 0 < rows - SIZE < 64
    for before, after in zip(tables(old), tables(model), strict=True):
        assert torch.equal(after[:SIZE], before[old_ids()])
        ordinary = torch.tensor([i for i in range(ROWS) if i not in (EOS, BOS, PAD)])
        torch.testing.assert_close(after[SIZE:], before[ordinary].mean(0).expand(rows - SIZE, -1))


def test_the_row_that_gets_no_gradient_is_still_the_padding_tokens(folder, tmp_path):
    old, model, tokenizer = converted(folder, tmp_path)
    assert old.get_input_embeddings().padding_idx == PAD
    padding = tokenizer.pad_token_id
    model.get_input_embeddings()(torch.tensor([[5, padding]])).sum().backward()
    gradient = model.get_input_embeddings().weight.grad.abs().sum(1)
    assert gradient[padding] == 0 < gradient[5]
    assert model.get_decoder().padding_idx == padding


def test_the_padding_of_a_matrix_taller_than_its_tokenizer_goes(tmp_path):
    _, model, _ = converted(save_base(tmp_path / "base", vocab_size=384), tmp_path)
    assert model.config.vocab_size == SIZE


def test_a_mask_token_comes_after_it(folder, tmp_path):
    mask = {"name": "mask_token", "token": "<|mask|>"}
    old, model, tokenizer = converted(folder, tmp_path, mask)
    assert (model.config.vocab_size, model.config.mask_token_id, tokenizer.mask_token_id) == (SIZE + 1, SIZE, SIZE)
    assert torch.equal(tables(model)[0][:SIZE], tables(old)[0][old_ids()])
    made = recipe(folder, tokenizer=tmp_path / "pruned", conversions=[mask, "pruned_vocabulary"])
    (problem,) = made.model.conversions[1].config.problems(made)
    assert "comes first" in problem.what


def problems_of(made) -> str:
    with pytest.raises(UserError) as planned:
        plan_conversions(made, load_config(made.model), load_tokenizer(made))
    with pytest.raises(UserError) as applied:
        apply_conversions(made, load_model(made), load_tokenizer(made))
    assert str(planned.value) == str(applied.value)
    return str(planned.value)


def test_a_special_token_that_was_pruned_is_named_with_what_to_do(tmp_path):
    """A model may use an ordinary token as its padding; only the model knows."""
    lost = next(i for i in range(256, ROWS) if i not in old_ids())
    folder = save_base(tmp_path / "base", pad_token_id=lost)
    token = next(t for t, i in WHOLE.ids.items() if i == lost)
    told = problems_of(made_of(folder, save_pruned(tmp_path / "t")))
    assert f"tokenizer.path: the model's pad_token_id {lost} is {token!r}, which it lacks" in told
    assert f"keep: [{token!r}]" in told
    made = made_of(folder, save_pruned(tmp_path / "kept", keep=[token]))
    model, tokenizer = load_model(made), load_tokenizer(made)
    apply_conversions(made, model, tokenizer)
    assert model.config.pad_token_id == model.generation_config.pad_token_id == tokenizer.convert_tokens_to_ids(token)


def test_an_id_without_a_token_is_refused(tmp_path):
    folder = save_base(tmp_path / "base", vocab_size=384, pad_token_id=380)
    assert "pad_token_id 380 is no token of the base's" in problems_of(made_of(folder, save_pruned(tmp_path / "t")))


def test_what_is_no_pruned_tokenizer_is_refused(tmp_path):
    folder = save_base(tmp_path / "base")
    assert "all of the base's 343 tokens, so there is nothing to drop" in problems_of(made_of(folder, folder))
    extended_tokenizer(40).save_pretrained(tmp_path / "other")
    assert "tokens that the base lacks" in problems_of(made_of(folder, tmp_path / "other"))
    low = save_base(tmp_path / "low", vocab_size=330, eos_token_id=1, bos_token_id=1, pad_token_id=1)
    told = problems_of(made_of(low, save_pruned(tmp_path / "t")))
    assert "tokens that never had an embedding row: id 33" in told
    assert "beyond its 330. Extend the base's vocabulary first" in told


def test_the_conversion_for_extended_vocabularies_points_to_this_one(tmp_path):
    folder = save_base(tmp_path / "base")
    made = recipe(folder, tokenizer=save_pruned(tmp_path / "t"), conversions=["vocabulary"])
    with pytest.raises(
        UserError, match=r"lacks \d+ of the base's 343 tokens.*pruned, the conversion is `pruned_vocabulary`"
    ):
        plan_conversions(made, load_config(made.model), load_tokenizer(made))


def test_a_base_that_is_out_of_reach_is_planned_by_the_tokenizer_alone(tmp_path, monkeypatch):
    made = made_of(save_base(tmp_path / "base"), save_pruned(tmp_path / "t"))

    def unreachable(recipe, *, offline):
        raise NotReachable("no connection")

    monkeypatch.setattr("adapt.conversion.pruned_vocabulary.base_tokenizer", unreachable)
    config, _ = plan_conversions(made, load_config(made.model), load_tokenizer(made))
    end, start, pad = (small().ids[s] for s in SPECIALS)
    assert (config.vocab_size, config.eos_token_id, config.bos_token_id, config.pad_token_id) == (SIZE, end, start, pad)


def test_pruned_and_extended_in_two_steps(tmp_path):
    """The export of the pruned model is the base of the extended one."""
    from tests.tokenization.byte_level import learned

    _, model, _ = converted(save_base(tmp_path / "base"), tmp_path)
    model.save_pretrained(tmp_path / "exported")
    save_tokenizer(small(), tmp_path / "exported")
    found = learned(small(), 10)
    both = save_tokenizer(small().extended(found.merges, found.tokens), tmp_path / "both")
    made = recipe(tmp_path / "exported", tokenizer=both, conversions=["vocabulary"], dtype="float32")
    grown, tokenizer = load_model(made), load_tokenizer(made)
    apply_conversions(made, grown, tokenizer)
    assert grown.config.vocab_size == len(tokenizer) == SIZE + 10
    assert torch.equal(tables(grown)[0][:SIZE], tables(model)[0])
