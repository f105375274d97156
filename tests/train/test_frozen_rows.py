"""`trainable.rows: new`: old rows stay bit for bit, whatever the optimizer does, on one rank and two, in stages."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from adapt.components import optimizers
from adapt.config import resolve
from adapt.config.schema import Trainable
from adapt.conversion.base import apply_conversions, fill_rows
from adapt.distributed import checkpoint
from adapt.errors import StopRequested, UserError
from adapt.pretrained import load_model, load_tokenizer
from adapt.train.fit import fit
from adapt.train.frozen_rows import FrozenRows, row_parameters
from adapt.train.step import clip_gradients
from adapt.train.validate import check
from tests import tiny
from tests.train.test_fit import assert_same_run, launch, stop_after, weights
from tests.train.test_vocabulary_run import extending

EMBEDDING = "model.embed_tokens.weight"
ROWS = {True: ["*embed_tokens*"], False: ["*embed_tokens*", "lm_head*"]}
"""Tied or not -> patterns of what has rows."""


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def tied(request):
    return request.param


@pytest.fixture
def base(tied, tmp_path):
    return tiny.save_tiny(tmp_path / "base", tie_word_embeddings=tied)


def adamw(model):
    entry = optimizers["adamw"]
    return entry.factory(entry.config_type(lr=0.01, weight_decay=0.5, decay_embeddings=True), model)


def cosmos(model):
    entry = optimizers["cosmos"]
    return entry.factory(entry.config_type(lr=0.01, rank=8, weight_decay=0.5, decay_embeddings=True), model)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.5)


def step(model, optimizer, frozen: FrozenRows) -> torch.Tensor:
    """One step on old and new tokens; the gradient norm."""
    ids = torch.tensor([[5, 318, 7, 319, 9, 300, 5]])
    model(input_ids=ids, labels=ids).loss.backward()
    frozen.clear()
    norm = clip_gradients(model, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return norm


@pytest.mark.parametrize("make", [adamw, cosmos, sgd])
def test_invariant_13_old_rows_stay_and_new_rows_move(make, tied):
    """10 steps with weight decay on the very parameters, with moments from steps in which all rows trained."""
    model = tiny.tiny_model(tie_word_embeddings=tied).train()
    fill_rows(model, [318, 319])
    optimizer = make(model)
    for _ in range(3):
        step(model, optimizer, FrozenRows(model, Trainable()))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    frozen = FrozenRows(model, Trainable(rows="new"))
    frozen.guard(optimizer)
    for _ in range(10):
        step(model, optimizer, frozen)
    assert len(row_parameters(model)) == (1 if tied else 2)
    for name, parameter in model.named_parameters():
        if name in row_parameters(model):
            assert torch.equal(parameter[:318], before[name][:318])
            assert (parameter[318:] != before[name][318:]).any(1).all()
        else:
            assert not torch.equal(parameter, before[name])


def test_old_rows_have_no_part_in_the_gradient_norm_and_gather_no_moments(tied):
    model = tiny.tiny_model(tie_word_embeddings=tied).train()
    fill_rows(model, [318, 319])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in row_parameters(model))
    optimizer, frozen = adamw(model), FrozenRows(model, Trainable(rows="new"))
    frozen.guard(optimizer)
    alone = step(model, optimizer, frozen)
    for state in optimizer.state.values():
        assert not state["exp_avg"][:318].any()
        assert not state["exp_avg_sq"][:318].any()
        assert state["exp_avg"][318:].any(1).all()
    model.zero_grad()
    whole = step(model, adamw(model), FrozenRows(model, Trainable()))
    assert alone < whole


def test_all_rows_train_unless_asked(tied):
    model = tiny.tiny_model(tie_word_embeddings=tied).train()
    fill_rows(model, [318, 319])
    assert FrozenRows(model, Trainable()).frozen == []


def start_of(recipe) -> dict[str, torch.Tensor]:
    """The weights a run begins with."""
    made = resolve(recipe).stages[0]
    model = load_model(made)
    apply_conversions(made, model, load_tokenizer(made))
    return {name: p.detach() for name, p in model.named_parameters()}


def moved(before: torch.Tensor, after: torch.Tensor) -> list[int]:
    return (before != after).reshape(len(before), -1).any(1).nonzero().flatten().tolist()


def first_stage(base, folder, tied, **over):
    return extending(base, folder, trainable={"include": ROWS[tied], "rows": "new"}, **over)


def test_invariant_13_in_a_run_on_one_rank_and_two(base, tied, tmp_path):
    """6 steps of AdamW with decay: nothing moves but new rows; on two gloo ranks the same, within float32 noise. The
    table has 361 rows, so that the shards are unequal."""
    mask = {"name": "mask_token", "token": "<|mask|>"}
    over = {"model": {"conversions": ["vocabulary", mask]}}
    one = first_stage(base, tmp_path, tied, run={"name": "one"}, **over)
    before = start_of(one)
    assert fit(resolve(one)) == 0
    two = first_stage(base, tmp_path, tied, run={"name": "two"}, trainer={"devices": 2}, **over)
    done = launch(two, tmp_path)
    assert done.returncode == 0, done.stderr
    found = [weights(tmp_path / "runs" / name) for name in ("one", "two")]
    for after in found:
        assert len(after[EMBEDDING]) == 361
        for name in before:
            rows = moved(before[name], after[name])
            if "embed_tokens" in name or "lm_head" in name:
                assert rows
                assert min(rows) >= 320
                assert len(rows) >= 10
            else:
                assert not rows, name
    for name in before:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-3, atol=1e-4)


def staged(base, folder, tied, kept: str, **over):
    """New rows, then embedding and head, then everything."""
    stages = [
        {"name": "new", "trainable": {"include": ROWS[tied], "rows": "new"}, "trainer": {"steps": 2}},
        {"name": "rows", "trainable": {"include": ROWS[tied]}, "trainer": {"steps": 2}, "optimizer_state": kept},
        {"name": "all", "trainer": {"steps": 2}, "optimizer_state": kept},
    ]
    return extending(base, folder, checkpoint={"keep": 9}, **over) | {"stages": stages}


def saved(run, step: int, like) -> dict[str, torch.Tensor]:
    """Parameters of a checkpoint."""
    from adapt.train.root import Root

    made = resolve(like).stages[0]
    model = load_model(made)
    apply_conversions(made, model, load_tokenizer(made))
    checkpoint.load(run / "checkpoints" / f"step-{step}", Root(model), None)
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("kept", ["reset", "keep"])
def test_stages_thaw_new_rows_then_the_tables_then_everything(base, tied, tmp_path, kept):
    recipe = staged(base, tmp_path, tied, kept)
    assert fit(resolve(recipe)) == 0
    run = tmp_path / "runs" / "tiny"
    at = [start_of(recipe), *(saved(run, n, recipe) for n in (2, 4, 6))]
    by_row = {n for n in at[0] if "embed_tokens" in n or "lm_head" in n}
    for name in at[0]:
        rows = [moved(a[name], b[name]) for a, b in pairwise(at)]
        if name in by_row:
            assert min(rows[0]) >= 320
            assert min(rows[1]) < 320
            assert min(rows[2]) < 320
        else:
            assert rows[:2] == [[], []]
            assert rows[2] != []


@pytest.mark.parametrize("kept", ["reset", "keep"])
@pytest.mark.parametrize("after", [1, 3])
def test_stages_resume_exactly(base, tied, tmp_path, monkeypatch, kept, after):
    straight = staged(base, tmp_path, tied, kept, run={"name": "straight"})
    fit(resolve(straight))
    broken = staged(base, tmp_path, tied, kept, run={"name": "broken"})
    with monkeypatch.context() as patched, pytest.raises(StopRequested, match=f"after step {after}"):
        stop_after(patched, after)
        fit(resolve(broken))
    fit(resolve(broken), "yes")
    runs = tmp_path / "runs"
    assert_same_run(runs / "straight", runs / "broken")


@pytest.mark.parametrize("kept", ["reset", "keep"])
def test_a_run_killed_between_two_stages_resumes_exactly(tied, tmp_path, monkeypatch, kept):
    """The checkpoint between them has no moments of what the next stage thaws."""
    from adapt.train import fit as module

    base = tiny.save_tiny(tmp_path / "base", tie_word_embeddings=tied)
    straight = staged(base, tmp_path, tied, kept, run={"name": "straight"})
    fit(resolve(straight))
    broken = staged(base, tmp_path, tied, kept, run={"name": "broken"})
    original = module._Run._stage

    def stage(self, *args, **kwargs):
        if self.state.stage == 2:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(module._Run, "_stage", stage)
        fit(resolve(broken))
    fit(resolve(broken), "yes")
    runs = tmp_path / "runs"
    assert_same_run(runs / "straight", runs / "broken")


@pytest.mark.parametrize(
    ("over", "says"),
    [
        ({"model": {"conversions": []}, "tokenizer": {"path": None}}, "nothing adds rows here"),
        ({"trainable": {"rows": "new", "lora": {"rank": 2}}}, "with lora only the adapters train"),
        ({"trainable": {"rows": "new", "include": ["*.mlp.*"]}}, "leave nothing with rows to train; add model.embed"),
    ],
)
def test_rows_that_nothing_trains_are_refused(tiny_base, tmp_path, over, says):
    recipe = extending(tiny_base, tmp_path, **({"trainable": {"rows": "new"}} | over))
    found = check(resolve(recipe)).problems
    assert [p.where for p in found] == ["trainable.rows"]
    assert says in found[0].what


def test_a_conversion_that_filled_no_row_is_found_out(tmp_path):
    base = tiny.save_tiny(tmp_path / "base", mask_token_id=3)
    over = {"model": {"conversions": ["mask_token"]}, "tokenizer": {"path": None}}
    recipe = extending(base, tmp_path, trainable={"rows": "new"}, **over)
    with pytest.raises(UserError, match="the conversions filled no row here"):
        fit(resolve(recipe))
