"""COSMOS in one process: the invariants of its arithmetic."""

from __future__ import annotations

import copy

import pytest
import torch

from adapt.components import optimizers
from adapt.errors import UserError
from adapt.optim.cosmos import CosmosConfig
from adapt.optim.newton_schulz import orthogonalise
from adapt.optim.suite import Suite
from tests.optim.reference import Reference

SHAPES = [(48, 24), (24, 48), (32, 32)]


def made(shapes, *, lr=0.1, decay=0.0, dtype=torch.float32, split=(), transposed=False, **fields) -> Suite:
    """A Suite of one group of random matrices; `lr` is the group's own, eta."""
    maker = torch.Generator().manual_seed(5)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=maker).to(dtype)) for shape in shapes]
    return over(parameters, lr=lr, decay=decay, split=split, transposed=transposed, **fields)


def over(parameters, *, lr=0.1, decay=0.0, split=(), transposed=False, **fields) -> Suite:
    config = CosmosConfig(**{"rank": 8, **fields})
    rates = {"lr": lr, "base_lr_ratio": 1 / config.lr_ratio, "weight_decay": decay, "role": "matrix"}
    names = [f"w{i}" for i in range(len(parameters))]
    layout = {"split": split, "transposed": transposed, "names": names}
    return Suite([{"params": parameters} | config.group() | rates | layout])


def gradients(shape, steps, seed=0, scale=1.0):
    """Correlated in time and along few directions, as real ones are, and full of noise."""
    maker = torch.Generator().manual_seed(seed)
    left, right = torch.randn(shape[0], 4, generator=maker), torch.randn(4, shape[1], generator=maker)
    for t in range(steps):
        g = left @ (right * torch.tensor([4.0, 2.0, 1.0, 0.5])[:, None]) + 0.5 * torch.randn(shape, generator=maker)
        left = left + 0.1 * torch.randn(left.shape, generator=maker)
        yield scale * g / (1 + t) ** 0.5


def run(optimizer, streams) -> list[torch.Tensor]:
    """Steps through all streams; the weights after each step of the first one."""
    parameters = optimizer.param_groups[0]["params"]
    path = []
    for step in zip(*streams, strict=True):
        for parameter, g in zip(parameters, step, strict=True):
            parameter.grad = g.clone() if g is not None else None
        optimizer.step()
        path.append(parameters[0].detach().clone())
    return path


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"nesterov": False},
        {"nesterov": False, "eps_inside": True, "beta2": 0.98, "beta3": 0.9, "gamma": 0.5},
        {"rank": 1},
        {"gamma": 0.0},
    ],
)
def test_invariant_1_parity_with_float64(shape, fields):
    """30 steps against loops in float64 that share the first basis: far less than one step apart."""
    grads = list(gradients(shape, 30))
    optimizer = made([shape], decay=0.01, init="svd", **fields)
    names = {
        "nesterov": "nesterov",
        "eps_inside": "inside",
        "beta2": "b2",
        "beta3": "b3",
        "gamma": "gamma",
        "rank": "rank",
    }
    reference = Reference(
        optimizer.param_groups[0]["params"][0].detach(), eta=0.1, wd=0.01, **{names[k]: v for k, v in fields.items()}
    )
    path = run(optimizer, [grads])
    one = 0.1 * (shape[0] * shape[1]) ** 0.5
    for g, w in zip(grads, path, strict=True):
        reference.step(g)
        assert (w - reference.w).norm() < 1e-3 * one


@pytest.mark.parametrize("shape", [*SHAPES, (1, 20), (20, 1), (5, 40)])
@pytest.mark.parametrize("rank", [0, 8, 1000])
def test_invariant_2_and_10_every_update_has_the_size_eta(shape, rank):
    """Also for more columns than the matrix has, a single row and a single column."""
    optimizer = made([shape], rank=rank)
    before = optimizer.param_groups[0]["params"][0].detach().double()
    for w in run(optimizer, [gradients(shape, 4)]):
        after = w.double()
        assert (after - before).square().mean().sqrt() == pytest.approx(0.1, rel=2e-5)
        before = after


@pytest.mark.parametrize("gamma", [0.2, 5.0])
def test_invariant_3_rank_0_is_normalised_nesterov_muon(gamma):
    shape, beta = (32, 32), 0.95
    grads = list(gradients(shape, 8))
    optimizer = made([shape], rank=0, gamma=gamma)
    w = optimizer.param_groups[0]["params"][0].detach().clone()
    momentum = torch.zeros(shape)
    for g, found in zip(grads, run(optimizer, [grads]), strict=True):
        momentum = beta * momentum + g
        update = orthogonalise(g + beta * momentum)
        w = w - 0.1 * (shape[0] * shape[1]) ** 0.5 * update / update.norm()
        torch.testing.assert_close(found, w, rtol=0, atol=1e-4)  # a thousandth of a step of 0.1


def test_invariant_4_full_rank_is_one_sided_soap():
    """The gate: nothing but rounding is left for the orthogonalised part, and gamma makes no difference."""
    shape = (48, 24)
    grads = list(gradients(shape, 8))
    paths = [run(made([shape], rank=24, gamma=gamma, init="svd"), [grads]) for gamma in (0.0, 0.2)]
    assert all(torch.equal(a, b) for a, b in zip(*paths, strict=True))
    optimizer = made([shape], rank=24)
    reference = Reference(optimizer.param_groups[0]["params"][0].detach(), eta=0.1, rank=24, gamma=0.0)
    for g, w in zip(grads, paths[0], strict=True):
        reference.step(g)
        torch.testing.assert_close(w.double(), reference.w, rtol=0, atol=1e-4)


def test_invariant_5_without_gamma_updates_have_the_rank():
    optimizer = made([(48, 40)], gamma=0.0)
    before = optimizer.param_groups[0]["params"][0].detach().clone()
    for after in run(optimizer, [gradients((48, 40), 4)]):
        values = torch.linalg.svdvals((after - before).double())
        assert values[8] < 1e-4 * values[0]
        before = after


@pytest.mark.parametrize("orth", ["qr", "cholesky"])
@pytest.mark.parametrize("init", ["svd", "range"])
def test_invariant_6_the_state_is_what_it_says(orth, init):
    optimizer = made(SHAPES, orth=orth, init=init)
    for count in range(1, 6):
        run(optimizer, [gradients(shape, 1, seed=count) for shape in SHAPES])
        for parameter in optimizer.param_groups[0]["params"]:
            state = optimizer.state[parameter]
            u, s = state["basis"], state["cov"]
            assert (u.mT @ u - torch.eye(8)).abs().max() < 1e-5
            assert torch.equal(s, s.mT)
            assert torch.linalg.eigvalsh(s.double()).min() > -1e-5 * s.abs().max()
            assert (state["proj_sq"] >= 0).all()


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_invariant_7_the_gradients_scale_cancels(scale):
    shape = (32, 40)
    start, other = made([shape]), made([shape])
    first = other.param_groups[0]["params"][0].detach().clone()
    a, b = run(start, [gradients(shape, 10)]), run(other, [gradients(shape, 10, scale=scale)])
    assert (a[-1] - b[-1]).norm() < 1e-3 * (a[-1] - first).norm()


def test_invariant_8_signs_of_the_basis_make_no_difference():
    shape = (32, 40)
    one = made([shape])
    run(one, [gradients(shape, 3)])
    two = over([torch.nn.Parameter(one.param_groups[0]["params"][0].detach().clone())])
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    (state,) = two.state.values()
    signs = torch.tensor([1.0, -1, -1, 1, 1, -1, 1, -1])
    state["basis"] *= signs
    state["cov"] *= signs[:, None] * signs
    a, b = (run(o, [gradients(shape, 3, seed=1)]) for o in (one, two))
    torch.testing.assert_close(a[-1], b[-1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("init", ["svd", "range"])
@pytest.mark.parametrize("orth", ["qr", "cholesky"])
@pytest.mark.parametrize("missing", [True, False])
def test_invariant_9_steps_without_gradients_first(init, orth, missing):
    """No update, no NaN, and a basis that finds the first real gradients as if they were the first."""
    shape = (32, 40)
    optimizer = made([shape], init=init, orth=orth)
    before = optimizer.param_groups[0]["params"][0].detach().clone()
    path = run(optimizer, [[None if missing else torch.zeros(shape)] * 3])
    assert torch.equal(path[-1], before)
    path = run(optimizer, [gradients(shape, 3)])
    assert all(torch.isfinite(w).all() for w in path)
    assert not torch.equal(path[-1], before)
    (state,) = optimizer.state.values()
    assert (state["basis"].mT @ state["basis"] - torch.eye(8)).abs().max() < 1e-5


@pytest.mark.parametrize("rank_of_g", [0, 1, 5, 31, 40])
@pytest.mark.parametrize("how", ["qr", "cholesky"])
def test_bases_of_rank_deficient_products_are_orthonormal(rank_of_g, how):
    from adapt.optim.basis import orth

    maker = torch.Generator().manual_seed(rank_of_g)
    old = torch.linalg.qr(torch.randn(64, 32, generator=maker))[0]
    g = torch.randn(48, rank_of_g, generator=maker) @ torch.randn(rank_of_g, 64, generator=maker)
    new = orth((g.mT @ (g @ old)).unsqueeze(0), old.unsqueeze(0), how)[0]
    assert (new.mT @ new - torch.eye(32)).abs().max() < 3e-6
    if rank_of_g == 0:
        assert (new - old).abs().max() < 1e-5


def test_cholesky_and_householder_take_the_same_steps():
    shape = (48, 40)
    a, b = (run(made([shape], orth=how, init="svd"), [gradients(shape, 5)]) for how in ("qr", "cholesky"))
    assert (a[0] - b[0]).norm() < 1e-4 * 0.1 * 1920**0.5
    assert (a[-1] - b[-1]).norm() < 3e-3 * 0.1 * 1920**0.5  # a thousandth of the old basis is mixed in each time


def test_the_range_finder_finds_what_the_decomposition_finds():
    from adapt.optim.basis import from_range, from_svd

    g = next(gradients((60, 80), 1))[None]
    found, exact = from_range(g, 4, lambda x: x, "qr")[0], from_svd(g, 4)[0]
    assert torch.linalg.svdvals(found.mT @ exact).min() > 0.9999


def test_invariant_14_and_22_numbers_of_the_group_act_at_the_next_step():
    optimizer = made([(32, 40)])
    (parameter,) = optimizer.param_groups[0]["params"]
    before = parameter.detach().clone()
    for lr in (0.1, 0.01, torch.tensor(0.5)):
        optimizer.param_groups[0]["lr"] = lr
        (after,) = run(optimizer, [gradients((32, 40), 1)])
        assert (after - before).double().square().mean().sqrt() == pytest.approx(float(lr), rel=1e-3)
        before = after
    optimizer.param_groups[0] |= {"lr": 0.1, "weight_decay": 0.5, "wd_lr": "base", "base_lr_ratio": 5.0}
    two = over([torch.nn.Parameter(before.clone())])
    two.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    two.param_groups[0]["weight_decay"] = 0.0
    (decayed,), (plain,) = (run(o, [gradients((32, 40), 1)]) for o in (optimizer, two))
    torch.testing.assert_close(plain - decayed, 0.1 * 5 * 0.5 * before)


def test_invariant_15_gradients_are_left_as_they_are():
    optimizer = made(SHAPES)
    grads = [next(gradients(shape, 1)) for shape in SHAPES]
    run(optimizer, [[g] for g in grads])
    for parameter, g in zip(optimizer.param_groups[0]["params"], grads, strict=True):
        assert torch.equal(parameter.grad, g)


@pytest.mark.parametrize("init", ["svd", "range"])
def test_invariant_16_memory_is_mn_and_m_plus_n_times_r_and_r_squared(init):
    """Before the first step and after it, and storages hold nothing else."""
    optimizer = made(SHAPES, init=init)
    expected = sum(m * n + (m + n) * 8 + 64 + 1 for m, n in SHAPES) * 4
    assert optimizer.state_bytes() == expected
    run(optimizer, [gradients(shape, 2) for shape in SHAPES])
    assert optimizer.state_bytes() == expected
    assert sum(v.nbytes for s in optimizer.state.values() for v in s.values()) == expected


def test_invariant_19_fused_weights_are_their_parts():
    """Two blocks of different heights in one weight, and the same two apart; stored transposed, too."""
    heights, n = (24, 40), 20
    whole = made([(64, n)], split=heights)
    parts = over([torch.nn.Parameter(p.clone()) for p in whole.param_groups[0]["params"][0].detach().split(heights)])
    grads = list(gradients((64, n), 5))
    run(whole, [grads])
    run(parts, [[g[:24] for g in grads], [g[24:] for g in grads]])
    found = torch.cat([p.detach() for p in parts.param_groups[0]["params"]])
    assert torch.equal(whole.param_groups[0]["params"][0], found)
    flipped = over([torch.nn.Parameter(made([(64, n)]).param_groups[0]["params"][0].detach().T.contiguous())],
                   split=heights, transposed=True)  # fmt: skip
    run(flipped, [[g.T.contiguous() for g in grads]])
    torch.testing.assert_close(flipped.param_groups[0]["params"][0].T, found, rtol=0, atol=1e-6)


def test_invariant_19_experts_are_separate_matrices():
    experts = made([(3, 24, 20)])
    apart = over([torch.nn.Parameter(w.clone()) for w in experts.param_groups[0]["params"][0].detach()])
    grads = [torch.stack(step) for step in zip(*(gradients((24, 20), 5, seed=e) for e in range(3)), strict=True)]
    run(experts, [grads])
    run(apart, [[g[e] for g in grads] for e in range(3)])
    found = torch.stack([p.detach() for p in apart.param_groups[0]["params"]])
    assert torch.equal(experts.param_groups[0]["params"][0], found)


def test_the_output_side_is_the_mirror_image():
    shape = (32, 40)
    plain = made([shape])
    mirror = over([torch.nn.Parameter(plain.param_groups[0]["params"][0].detach().T.contiguous())], basis_side="output")
    grads = list(gradients(shape, 5))
    a, b = run(plain, [grads]), run(mirror, [[g.T for g in grads]])
    torch.testing.assert_close(a[-1], b[-1].T, rtol=0, atol=1e-6)


def test_invariant_20_a_clipped_spike_does_not_turn_the_basis():
    """One gradient of a thousand times the size, other directions, clipped to the usual norm: the leading direction
    stays where it would have been."""
    shape, angles = (32, 40), []
    for spike in (False, True):
        optimizer = made([shape])
        grads = list(gradients(shape, 20))
        if spike:
            wild = 1000 * torch.randn(shape, generator=torch.Generator().manual_seed(9))
            grads[10] = wild * grads[10].norm() / wild.norm()
        run(optimizer, [grads])
        angles.append(next(iter(optimizer.state.values()))["basis"][:, :2])
    assert torch.linalg.svdvals(angles[0].mT @ angles[1]).min() > 0.9


def test_invariant_21_without_nesterov_the_momentum_is_read():
    optimizer = made([(32, 40)], nesterov=False)
    (parameter,) = optimizer.param_groups[0]["params"]
    run(optimizer, [gradients((32, 40), 2)])
    optimizer.state[parameter]["exp_avg"].fill_(float("nan"))
    run(optimizer, [gradients((32, 40), 1)])
    assert torch.isnan(parameter).all()


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_bfloat16_weights_step_in_float32(kind):
    """The step of the same weights in float32, rounded; state keeps its own precision through a state dict."""
    shape = (32, 40)
    low = made([shape], dtype=torch.bfloat16, momentum_dtype=kind)
    high = over([torch.nn.Parameter(low.param_groups[0]["params"][0].detach().float())])
    grads = [g.bfloat16() for g in gradients(shape, 1)]
    (a,), (b,) = run(low, [grads]), run(high, [[g.float() for g in grads]])
    torch.testing.assert_close(a.float(), b, rtol=2**-7, atol=2**-7)
    saved = copy.deepcopy(low.state_dict())
    low.load_state_dict(state_dict=saved)
    (state,) = low.state.values()
    assert {k: v.dtype for k, v in state.items()} == {
        "step": torch.float32, "exp_avg": getattr(torch, kind), "proj_sq": torch.float32, "basis": torch.float32,
        "cov": torch.float32,
    }  # fmt: skip
    assert all(torch.equal(v, saved["state"][0][k]) for k, v in state.items())


def test_invariant_13_a_state_dict_goes_on_bit_for_bit():
    straight = made(SHAPES)
    run(straight, [gradients(shape, 3) for shape in SHAPES])
    resumed = over([torch.nn.Parameter(p.detach().clone()) for p in straight.param_groups[0]["params"]])
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    for optimizer in (straight, resumed):
        run(optimizer, [gradients(shape, 3, seed=4) for shape in SHAPES])
    for a, b in zip(straight.param_groups[0]["params"], resumed.param_groups[0]["params"], strict=True):
        assert torch.equal(a, b)


def test_the_state_dict_of_another_algorithm_is_refused_by_name():
    model = torch.nn.Sequential(torch.nn.Linear(32, 32, bias=False))
    adamw, cosmos = (optimizers[n].factory(optimizers[n].config_type(), model) for n in ("adamw", "cosmos"))
    with pytest.raises(UserError, match="made by adamw; cosmos cannot go on"):
        cosmos.load_state_dict(adamw.state_dict())


def test_many_matrices_at_once_step_as_each_alone(monkeypatch):
    """What an accelerator does: stacks of the same shape, no more than fit."""
    from adapt.optim.algorithms import cosmos as module

    shapes = [(24, 20)] * 5 + [(20, 24)] * 2

    def three(bucket):
        return (bucket[i : i + 3] for i in range(0, len(bucket), 3))

    alone = made(shapes)
    run(alone, [gradients(shape, 3, seed=i) for i, shape in enumerate(shapes)])
    monkeypatch.setattr(module, "_chunks", three)
    together = made(shapes)
    run(together, [gradients(shape, 3, seed=i) for i, shape in enumerate(shapes)])
    for a, b in zip(alone.param_groups[0]["params"], together.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_invariant_22_a_new_rate_compiles_nothing_anew(monkeypatch):
    """Compiled functions take rates and bias corrections as tensors; and they step as the others do."""
    from torch._dynamo.utils import counters

    from adapt.optim.algorithms import cosmos as module

    whole = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kwargs: whole(f, backend="eager", **kwargs))
    module._compiled.cache_clear()
    shape = (32, 40)
    plain, optimizer = made([shape], init="svd"), made([shape], init="svd", compile=True)
    frames = []
    for step, g in enumerate(gradients(shape, 5)):
        for one in (plain, optimizer):
            one.param_groups[0]["lr"] = 0.1 / (1 + step)
            run(one, [[g]])
        frames.append(counters["stats"]["unique_graphs"])
    module._compiled.cache_clear()
    assert frames[0] > 0
    assert frames[1:] == [frames[1]] * 4
    a, b = (o.param_groups[0]["params"][0] for o in (plain, optimizer))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
