"""The dispatch point: what it chooses, that it says so once, and that packages get tensors in their own layouts.

The packages need CUDA. Here stand-ins with their documented interfaces run instead: what is proven is the translation.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from adapt.models import kernels
from adapt.models.layout import Layout
from adapt.models.tokens import Tokens, _starts
from tests.models.linear import ids, student

LENGTHS = [[20, 4, 16], [1, 39]]


def chunk_gla(q, k, v, g, scale, initial_state, output_final_state, cu_seqlens):
    """flash-linear-attention: q, k, g [B, T, H, K], v [B, T, H, V], states [documents, H, K, V]."""
    spans = [(b, 0, q.shape[1]) for b in range(len(q))]
    if cu_seqlens is not None:
        assert len(q) == 1
        spans = [(0, int(i), int(j)) for i, j in zip(cu_seqlens, cu_seqlens[1:], strict=False)]
    out, states = torch.zeros(*q.shape[:3], v.shape[3], dtype=v.dtype), []
    for n, (b, start, stop) in enumerate(spans):
        state = q.new_zeros(q.shape[2], q.shape[3], v.shape[3]) if initial_state is None else initial_state[n]
        for t in range(start, stop):
            state = g[b, t].exp()[..., None] * state + k[b, t][..., None] * v[b, t][:, None]
            out[b, t] = scale * torch.einsum("hk,hkv->hv", q[b, t], state)
        states.append(state)
    return out, torch.stack(states)


def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, seq_idx, initial_states, return_final_states):
    """mamba-ssm: x [B, T, H, P], dt [B, T, H], B and C [B, T, G, N], states [B, H, P, N]."""
    assert chunk_size > 0
    assert return_final_states
    state = x.new_zeros(len(x), x.shape[2], x.shape[3], B.shape[3]) if initial_states is None else initial_states
    out = []
    for t in range(x.shape[1]):
        if seq_idx is not None and t:
            assert seq_idx.dtype == torch.int32
            state = state * (seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None, None]
        state = (A * dt[:, t]).exp()[..., None, None] * state
        state = state + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        out.append(torch.einsum("bhpn,bhn->bhp", state, C[:, t]))
    return torch.stack(out, 1), state


def causal_conv1d_fn(x, weight, bias, seq_idx, activation):
    """causal-conv1d: x [B, C, T], weight [C, W]; taps of another document count as zeros."""
    width, out = weight.shape[1], torch.zeros_like(x)
    for t in range(x.shape[2]):
        for j in range(min(width, t + 1)):
            same = 1.0 if seq_idx is None else (seq_idx[:, t - j] == seq_idx[:, t])[:, None].to(x.dtype)
            out[:, :, t] += weight[:, width - 1 - j] * x[:, :, t - j] * same
    out = out if bias is None else out + bias[:, None]
    return F.silu(out) if activation == "silu" else out


PACKAGES = {
    "fla.ops.gla": SimpleNamespace(chunk_gla=chunk_gla),
    "mamba_ssm.ops.triton.ssd_combined": SimpleNamespace(mamba_chunk_scan_combined=mamba_chunk_scan_combined),
    "causal_conv1d": SimpleNamespace(causal_conv1d_fn=causal_conv1d_fn),
}


@pytest.fixture
def used(monkeypatch):
    """Stand-ins as on a GPU with all packages; which were asked for."""
    found = set()

    def fit(x, name):
        found.add(name)
        return PACKAGES[name]

    def of(layout, original=Tokens.of):
        tokens = original(layout)
        return Tokens(tokens.segments, _starts(tokens.segments.diff() != 0))  # what a GPU's have

    monkeypatch.setattr(kernels, "_fit", fit)
    monkeypatch.setattr(Tokens, "of", staticmethod(of))
    return found


def states(model, packed):
    from adapt.models import attention

    if not packed:
        return model(ids(2, 40), use_cache=True)
    doc = torch.stack([torch.repeat_interleave(torch.arange(len(n)), torch.tensor(n)) for n in LENGTHS])
    pos = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])
    return attention.decode(attention.use(model), ids(2, 40), pos, Layout.causal(doc, pos))


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("case", [("gated_linear", {}), ("gated_linear", {"gate": "head"}), ("mamba2", {"conv_silu": True})])
@torch.no_grad()
def test_packages_get_what_they_expect(case, packed, request):
    mixer, options = case
    model = student(mixer, options)
    expected = states(model, packed)
    used = request.getfixturevalue("used")
    found = states(model, packed)
    for a, b in zip(list(found.values())[:1], list(expected.values())[:1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)
    if not packed:  # states a kernel left behind are ours to go on from
        more = ids(2, 20, seed=3)
        a = model(more, past_key_values=found.past_key_values).logits
        b = model(more, past_key_values=expected.past_key_values).logits
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)
    scan = "fla.ops.gla" if mixer == "gated_linear" else "mamba_ssm.ops.triton.ssd_combined"
    assert used == {scan, "causal_conv1d"}


def test_the_last_state_of_packed_rows_is_their_last_documents(used):
    q, k = torch.rand(2, 2, 40, 3).double(), torch.rand(2, 2, 40, 3).double()
    v, g = torch.randn(2, 2, 40, 5).double(), -torch.rand(2, 2, 40, 3).double()
    segments = torch.stack([torch.repeat_interleave(torch.arange(len(n)), torch.tensor(n)) for n in LENGTHS])
    tokens = Tokens(segments, _starts(segments.diff() != 0))
    assert tokens.starts.tolist() == [0, 20, 24, 40, 41, 80]
    _, found = kernels.gated_linear_attention(q, k, v, g, tokens=tokens)
    _, expected = kernels._torch(q, k, v, g, segments, None, 16, exact=True)
    torch.testing.assert_close(found, expected)


def test_without_cuda_torch_runs_and_says_so_once(caplog):
    kernels._say.cache_clear()
    with caplog.at_level(logging.INFO, logger="adapt.kernels"):
        model = student(dtype=torch.float32)
        for _ in range(3):
            model(ids(1, 20))
    assert caplog.messages == ["short convolution: torch on cpu", "gated linear attention: torch on cpu"]
    assert kernels._fit(torch.zeros(1), "json") is None


def test_a_package_that_does_not_import_is_as_good_as_missing(tmp_path, monkeypatch, caplog):
    (tmp_path / "broken_kernels.py").write_text("raise OSError('no CUDA extension')")
    monkeypatch.syspath_prepend(tmp_path)
    kernels.package.cache_clear()
    assert kernels.package("broken_kernels") is None
    assert kernels.package("no_such_kernels.ops") is None
    assert caplog.messages == ["broken_kernels is installed and does not import: no CUDA extension"]
