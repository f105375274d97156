"""Owner exchange: whole matrices arrive, rows come back, and what is sent is what the formula says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from adapt.optim.exchange import Exchange, Grid, assign, traffic
from tests.ranks import on_ranks

SHAPES = [(8, 4), (12, 5), (7, 3), (3, 6), (1, 4)]
"""Rows divisible by four ranks or not; the last two leave ranks empty."""


@given(st.lists(st.integers(1, 100), max_size=40), st.integers(1, 9))
def test_owners_differ_by_one_matrix_at_most(costs, ranks):
    owners = assign(costs, ranks)
    assert all(0 <= owner < ranks for owner in owners)
    loads = [sum(c for c, o in zip(costs, owners, strict=True) if o == rank) for rank in range(ranks)]
    assert max(loads) <= min(loads) + max(costs, default=0)
    assert owners == assign(list(costs), ranks)


def test_rows_are_the_chunks_of_dtensor():
    for m in range(20):
        for shards in range(1, 6):
            expected = [len(c) for c in torch.arange(m).chunk(shards)]
            assert Grid(shards=shards).rows(m) == (expected + [0] * shards)[:shards] if m else [0] * shards


def test_one_process_exchanges_nothing():
    whole = [torch.randn(6, 4) for _ in range(3)]
    traffic.clear()
    exchange = Exchange(Grid.of(whole[0]), (0, 0, 0), (6,), 4)
    gathered = exchange.to_owners(whole, torch.float32)()
    assert torch.equal(gathered, torch.stack(whole))
    assert all(map(torch.equal, exchange.to_rows(gathered), whole))
    assert not traffic


def round_trip(shard: int, replicate: int) -> None:
    """Every k around the number of ranks, every shape; the results of the owners reach every rank's rows."""
    ranks = shard * replicate
    if replicate == 1:
        mesh, placements = init_device_mesh("cpu", (shard,)), [Shard(0)]
    else:
        mesh = init_device_mesh("cpu", (replicate, shard), mesh_dim_names=("replicate", "shard"))
        placements = [Replicate(), Shard(0)]
    for m, n in SHAPES:
        for k in (1, ranks, ranks + 1, 2 * ranks + 1):
            for dtype in (torch.float32, torch.bfloat16):
                torch.manual_seed(k)
                whole = [torch.randn(m, n).to(dtype) for _ in range(k)]
                spread = [distribute_tensor(w, mesh, placements) for w in whole]
                grid = Grid.of(spread[0])
                assert (grid.shards, grid.replicas, grid.ranks) == (shard, replicate, ranks)
                exchange = Exchange(grid, tuple(assign([1.0] * k, ranks)), tuple(grid.rows(m)), n)
                gathered = exchange.to_owners([s.to_local() for s in spread], dtype)()
                assert gathered.shape == (len(exchange.mine), m, n)
                for one, i in zip(gathered, exchange.mine, strict=True):
                    assert torch.equal(one, whole[i])
                back = exchange.to_rows(2 * gathered + torch.arange(n).to(dtype))
                for one, w in zip(back, whole, strict=True):
                    expected = distribute_tensor(2 * w + torch.arange(n).to(dtype), mesh, placements).to_local()
                    assert torch.equal(one, expected)


def bytes_sent(shard: int) -> None:
    """Section 7: 4mn(W-1)/W² per rank and matrix with bfloat16 there and back, where W divides m and k."""
    mesh = init_device_mesh("cpu", (shard,))
    m, n, k = 4 * shard, 6, 3 * shard
    rows = [distribute_tensor(torch.randn(m, n), mesh, [Shard(0)]).to_local() for _ in range(k)]
    grid = Grid(shard, mesh.get_local_rank(), across_shards=mesh.get_group())
    exchange = Exchange(grid, tuple(assign([1.0] * k, shard)), tuple(grid.rows(m)), n)
    traffic.clear()
    exchange.to_rows(exchange.to_owners(rows, torch.bfloat16)())
    assert traffic == {"all_to_all": k * 4 * m * n * (shard - 1) / shard**2}
    grid.all_reduce(torch.zeros(10))
    assert traffic["all_reduce"] == 2 * (shard - 1) / shard * 40


def on_two() -> None:
    round_trip(2, 1)
    round_trip(1, 2)
    bytes_sent(2)


def on_four() -> None:
    round_trip(4, 1)
    round_trip(2, 2)
    bytes_sent(4)
    unknown = distribute_tensor(torch.randn(8, 8), init_device_mesh("cpu", (4,)), [Shard(1)])
    with pytest.raises(NotImplementedError, match="sharded by rows"):
        Grid.of(unknown)


@pytest.mark.parametrize(("ranks", "function"), [(2, on_two), (4, on_four)])
def test_matrices_go_to_their_owners_and_rows_come_back(ranks, function, tmp_path):
    on_ranks(ranks, tmp_path, function)
