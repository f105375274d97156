"""MEAP: the pretraining form, fine-tuning with masked copies (spec invariants 10 and 11), and what an export never emits.

Compared once with the authors' code (scitix/MEAP at 0f5e837), run as it is beside ours:
- pretraining (`meap_1b.py`, T = 4096, ratio 0.15): for steps 0 to 119 the masked positions are those of
  `upstream_cycle51`, all 614 of them, in both rows of a micro-batch and never the last one. Our own draw (`per_row`,
  `exclude: [last]`) has the same 614 = floor(0.15 x 4095) of the same eligible set in each row.
- fine-tuning (`preprocess_function`, ratio 0.1): 15 pairs with answers of 1 to 333 tokens give 15 clean samples and 9
  masked copies (the answers above 50 tokens). Ids, labels and the number of masks of every sample are those of
  `sft_layout: separate, exclude: [special]`; the EOS is in every copy, unmasked and unlearned. Which positions are
  masked differs, being drawn by other generators.
"""

from __future__ import annotations

import dataclasses
import json
from argparse import Namespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapt.components import SamplerChoice
from adapt.config import decode, resolve
from adapt.data.batch import Batch
from adapt.errors import UserError
from adapt.generation.verb import choose
from adapt.models import attention
from adapt.objectives.base import Facts, Models
from adapt.objectives.meap import Meap, MeapConfig, answers
from adapt.objectives.next_token import NextToken
from adapt.tokenization.vocabulary import Vocabulary
from adapt.train.fit import fit
from adapt.train.validate import check
from tests import tiny
from tests.batches import packed
from tests.recipes import WORDS, tiny_recipe

MASK = 3
FACTS = Facts(mask_token_id=MASK, vocabulary=Vocabulary(special=np.arange(4), ordinary=np.arange(10, 300)))
LAYOUTS = {
    "separate": {"sft_layout": "separate"},
    "isolated": {"sft_layout": "concat", "isolate_copies": True},
    "concat": {"sft_layout": "concat"},
}


def sft(**config) -> Meap:
    return Meap(MeapConfig(**{"ratio": 0.2, "sft_layout": "separate", "min_answer_tokens": 8} | config), FACTS)


def samples() -> Batch:
    """Two packed rows: answers of 21, 6 and 12 tokens behind a prompt of 4, and one of 30."""
    return packed([[25, 10, 16], [34]], prompt=4, pad=3)


def sums(model, goal, batch, seed=0):
    prepared = goal.prepare(batch, seed=seed, step=0)
    return goal(Models(model), prepared.inputs), prepared


def masked(prepared) -> dict[int, int]:
    """Flat index of a masked copy's output -> its target."""
    return dict(
        zip(prepared.inputs["masked_copy/source"].tolist(), prepared.inputs["masked_copy/target"].tolist(), strict=True)
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_clean_copys_loss_is_plain_fine_tunings(layout):
    """Invariant 11, first half; its gradients, too."""
    model = attention.use(tiny.tiny_model(dtype=torch.float64))
    found, prepared = sums(model, sft(**LAYOUTS[layout]), samples())
    plain, reference = sums(model, NextToken(Facts()), samples())
    torch.testing.assert_close(found["clean_copy"], plain["ar"], atol=1e-4, rtol=0)  # summed in fp32
    assert prepared.terms["clean_copy"].targets == reference.terms["ar"].count
    assert prepared.terms["masked_copy"].targets > 0
    a, b = (torch.autograd.grad(x, list(model.parameters())) for x in (found["clean_copy"], plain["ar"]))
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-6)


def test_isolated_copies_in_one_row_are_separate_samples():
    """Invariant 11, second half: the same total loss and gradients; copies that see the clean answer have others."""
    model = attention.use(tiny.tiny_model(dtype=torch.float64))
    losses = {}
    for name, config in LAYOUTS.items():
        found, prepared = sums(model, sft(**config), samples())
        losses[name] = sum(prepared.terms[n].weight * found[n] / prepared.terms[n].count for n in found)
    torch.testing.assert_close(losses["separate"], losses["isolated"], atol=1e-12, rtol=1e-12)
    assert abs(losses["concat"] - losses["separate"]) > 1e-3
    a, b = (torch.autograd.grad(losses[n], list(model.parameters())) for n in ("separate", "isolated"))
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, atol=1e-12, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_masked_copy_against_each_sample_alone(layout):
    """The loss of every masked token, from a forward of its document by itself: [clean | copy] where they share a row
    and are not isolated, the copy alone otherwise."""
    model = attention.use(tiny.tiny_model("mistral", dtype=torch.float64))
    batch, goal = samples(), sft(**LAYOUTS[layout])
    found, prepared = sums(model, goal, batch)
    twin = sft().prepare(batch, seed=0, step=0).inputs["input_ids"][2:]  # the masked copies of both rows
    model.set_attn_implementation("sdpa")
    total = count = 0.0
    for row in range(2):
        for doc in range(int(batch.doc_ids[row].max()) + 1):
            here = batch.doc_ids[row] == doc
            ids, copy = batch.input_ids[row, here], twin[row, here]
            behind = torch.cat([ids, copy]) if layout == "concat" else copy
            with torch.no_grad():
                logits = model(behind[None]).logits[0, len(behind) - len(copy) :]
            logits[:, MASK] = -torch.inf
            for m in (copy != ids).nonzero()[:, 0].tolist():
                total -= logits[m - 1].log_softmax(-1)[ids[m]]
                count += 1
    torch.testing.assert_close(found["masked_copy"].double(), total, atol=1e-4, rtol=0)
    assert prepared.terms["masked_copy"].targets == count
    assert {t.count for t in prepared.terms.values()} == {count + prepared.terms["clean_copy"].targets}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_short_answers_have_no_masked_copy(layout):
    """Invariant 10, second half: 50 answer tokens are too few, 51 get max(1, floor(ratio x 51)) masks; nothing of a
    prompt is ever masked. The EOS does not count where it may not be masked."""
    for learned, expected in ((50, 0), (51, 5)):
        batch = packed([[4 + learned + 1]], prompt=4)
        batch.input_ids[0, -1] = batch.labels[0, -1] = 0  # EOS
        prepared = sft(ratio=0.1, min_answer_tokens=51, **LAYOUTS[layout]).prepare(batch, seed=0, step=0)
        assert prepared.terms["masked_copy"].targets == expected
        assert prepared.terms["clean_copy"].targets == learned + 1
        shape = tuple(prepared.inputs["input_ids"].shape)
        one = (1, batch.input_ids.shape[1])
        assert shape == (one if not expected else (2, one[1]) if layout == "separate" else (1, 2 * one[1]))
        assert torch.equal(prepared.inputs["input_ids"][:1, : one[1]], batch.input_ids)


def test_each_answer_of_a_row_has_its_own_count():
    batch = samples()
    prepared = sft(exclude=("special",)).prepare(batch, seed=0, step=0)
    copies = prepared.inputs["input_ids"][2:]
    where = copies == MASK
    assert (batch.labels[where] != -100).all(), "answers only"
    run = answers(batch)
    for number in range(int(run.max()) + 1):
        here = run == number
        n = int((here & (batch.role == 2)).sum())
        assert int((where & here).sum()) == (max(1, int(0.2 * n)) if n >= 8 else 0)
    assert sorted(masked(prepared).values()) == sorted(batch.input_ids[where].tolist())


def test_turns_of_a_conversation_are_answers_of_their_own():
    batch = packed([[40]], prompt=5)
    batch.role[0, 25:30] = 1
    batch.labels[0, 25:30] = -100
    assert answers(batch)[0].tolist() == [0] * 5 + [1] * 20 + [2] * 5 + [3] * 10
    copies = sft(min_answer_tokens=15).prepare(batch, seed=0, step=0).inputs["input_ids"][1:]
    where = (copies == MASK)[0]
    assert where[5:25].sum() == 4
    assert where[25:].sum() == 0, "the second answer has 10 tokens"


def test_masks_are_drawn_anew_every_epoch_and_alike_on_any_split():
    """Invariants 6 and 7 for copies."""
    batch, goal = samples(), sft()
    later = Batch(**{**vars(batch), "epoch": batch.epoch + 1})
    first, second = (goal.prepare(b, seed=0, step=0).inputs["input_ids"][2:] for b in (batch, later))
    assert not torch.equal(first, second)
    alone = goal.prepare(batch.rows(1, 2), seed=0, step=99).inputs["input_ids"][1:]
    assert torch.equal(alone[0], first[1])


def test_rows_without_a_masked_token_are_not_repeated():
    batch = packed([[9], [40]], prompt=4)
    prepared = sft(min_answer_tokens=20).prepare(batch, seed=0, step=0)
    assert prepared.inputs["input_ids"].shape[0] == 3
    assert all(source >= 2 * 40 for source in masked(prepared))


def test_copies_longer_than_the_models_positions_are_refused():
    goal = Meap(sft(sft_layout="concat").config, dataclasses.replace(FACTS, positions=100))
    with pytest.raises(UserError, match=r"up to 60 tokens.*100 positions.*data\.seq_len=50"):
        goal.prepare(packed([[60]], prompt=4), seed=0, step=0)


@pytest.mark.parametrize(
    "change, where",
    [
        ({"ratio": 1.5}, "objective.ratio"),
        ({"ratio_schedule": {"warmup_frac": 0}}, "objective.ratio_schedule.warmup_frac"),
        ({"replace_rate": -1}, "objective.replace_rate"),
        ({"ratio": 0, "loss_on": "corrupted"}, "objective.loss_on"),
        ({"sft_layout": "separate", "loss_on": "corrupted"}, "objective.loss_on"),
        ({"sft_layout": "separate", "isolate_copies": True}, "objective.isolate_copies"),
        ({"min_answer_tokens": 0}, "objective.min_answer_tokens"),
        ({"rng": "upstream_cycle51"}, "objective.rng"),
        ({"rng": "upstream_cycle51", "exclude": [], "sft_layout": "concat"}, "objective.rng"),
        ({"conversions": []}, "model.conversions"),
    ],
)
def test_impossible_settings_are_named(change, where, tiny_base, tmp_path):
    change = dict(change)
    recipe = tiny_recipe(tiny_base, tmp_path)
    recipe["evaluation"], recipe["generation"] = {"suites": ["bpb"]}, {}
    recipe["model"]["conversions"] = change.pop("conversions", recipe["model"]["conversions"])
    recipe["objective"] = {"name": "meap", **change}
    found = [p.where for p in check(resolve(recipe), offline=True).problems]
    assert found == [where]


def chats(path) -> dict:
    turn = [{"role": "user", "content": " ".join(WORDS[:4])}, {"role": "assistant", "content": " ".join(WORDS[4:16])}]
    path.write_text("\n".join(json.dumps({"messages": [{**m, "content": f"{m['content']} {i}"} for m in turn]})
                              for i in range(40)))  # fmt: skip
    return {"train": [{"source": {"name": "jsonl", "path": str(path)}, "name": "chats"}]}


CASES = {
    "pretraining": {"objective": {"name": "meap", "exclude": ["special", "last"]}},
    "fine-tuning": {"objective": {"name": "meap", "ratio": 0.1, "sft_layout": "separate", "min_answer_tokens": 8}},
    "fine-tuning, one row": {"objective": {"name": "meap", "sft_layout": "concat", "min_answer_tokens": 8}},
    "lora, a new token": {
        "objective": {"name": "meap", "sft_layout": "concat", "isolate_copies": True, "min_answer_tokens": 8},
        "trainable": {"lora": {"rank": 4, "targets": ["q_proj", "down_proj"]}},
        "model": {"conversions": [{"name": "mask_token", "token": "<|new|>"}]},
    },
}


@pytest.mark.parametrize("case", CASES)
def test_runs_to_an_export_that_never_emits_the_mask(case, tmp_path):
    """Invariant 14, last part, and that the decoding contract says nothing of blocks. The mask's logit is made the
    highest by far: plain `generate` and our AR sampler still pass it over, greedy and sampled, with tied embeddings
    (llama) and with a head of its own (mistral)."""
    family = "llama" if "fine-tuning" in case else "mistral"
    base = tiny.save_tiny(tmp_path / "base", family)
    recipe = tiny_recipe(base, tmp_path, trainer={"steps": 3, "batch_tokens": 256, "microbatch": 2}, **CASES[case])
    recipe["evaluation"] = {"suites": ["bpb"], "limit": 2}
    recipe["generation"] = {"prompts": ["the model"], "max_new_tokens": 8, "samplers": ["ar"]}
    recipe["data"] |= {} if case == "pretraining" else chats(tmp_path / "chats.jsonl")
    assert fit(resolve(recipe)) == 0
    run = tmp_path / "runs" / "tiny"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "loss" in line]
    names = ("clean_prefix", "corrupted_input") if case == "pretraining" else ("clean_copy", "masked_copy")
    assert len(logged) == 3
    for line in logged:
        low, high = sorted(line[f"loss/{n}"] for n in names)
        assert low <= line["loss"] <= high, "the loss is a mean of the two"
        assert line["mask_ratio"] == CASES[case]["objective"].get("ratio", 0.15)
    folder = run / "export"
    assert not (folder / "custom_generate").exists()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    mask = tokenizer.mask_token_id
    assert model.config.mask_token_id == mask != tokenizer.eos_token_id
    assert getattr(model.config, "block_size", None) is None
    assert choose(Namespace(sampler=None), model, tokenizer).name == "ar", "what `adapt generate` takes by itself"
    never_emitted(model, mask)


def never_emitted(model, mask: int) -> None:
    prompt = torch.tensor([[9, 8, 7]])
    with torch.no_grad():
        state = model.get_decoder()(prompt).last_hidden_state[0, -1]
        head = model.get_output_embeddings().weight
        head[mask] = 50 * state / state.norm()
        assert int(model(prompt).logits[0, -1].argmax()) == mask, "or this test could not fail"
    for options in ({"do_sample": False}, {"do_sample": True, "temperature": 2.0}):
        out = model.generate(prompt, max_new_tokens=24, eos_token_id=None, pad_token_id=2, **options)
        assert out.shape == (1, 27)
        assert mask not in out
    for temperature in (0.0, 2.0):
        sampler = decode({"name": "ar", "temperature": temperature}, SamplerChoice).build()
        assert mask not in sampler.generate(model, [9, 8, 7], max_new_tokens=24).tokens
    model.generation_config.suppress_tokens = None
    assert mask in model.generate(prompt, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=2)
