"""Recurrent layers against softmax attention on a CPU: prefill, forward and backward, decoding, memory.

    python benchmarks/linear_attention.py prefill                 # one layer of SmolLM2-135M's shape, 1K to 32K tokens
    python benchmarks/linear_attention.py decode                  # one token after 1K, 4K and 16K
    python benchmarks/linear_attention.py train --fla FOLDER      # forward and backward against flash-linear-attention

One thread, float32, one row. Times are process CPU seconds: variants take turns, medians count. A layer here is what
stands between the projections: rotary embedding and SDPA for attention; convolutions, feature maps, decays and the
recurrence for the others. Whole models are in linear_model.py.

FOLDER is where a wheel of `fla-core` lies unpacked (its `fla/ops/gla/naive.py` is what runs: plain torch, the package's
reference on devices without Triton); left out, an installed one is looked for.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F

from adapt.models.blocks import blocks
from adapt.models.configuration_adapted import AdaptedConfig
from adapt.models.linear_attention import chunked, floor, quadratic
from adapt.models.linear_mixer import in_pieces
from adapt.models.modeling_adapted import MIXERS
from adapt.models.tokens import Tokens

HEADS, GROUPS, HEAD_DIM, HIDDEN = 9, 3, 64, 576
LAYERS = {
    "lawcat": ("gated_linear", {}),
    "lawcat, exact": ("gated_linear", {"exact": True}),
    "lawcat, one decay a head": ("gated_linear", {"gate": "head"}),
    "mamba2": ("mamba2", {}),
}


def recurrence(name: str):
    """The module of a layer that was trained a little."""
    mixer, options = LAYERS[name]
    config = AdaptedConfig(
        num_hidden_layers=1, hidden_size=HIDDEN, num_attention_heads=HEADS, num_key_value_heads=GROUPS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        token_mixers=[mixer], mixer_options={mixer: options},
    )  # fmt: skip
    module = MIXERS[mixer](config, 0).recurrence
    for part in module.modules():
        if hasattr(part, "initialise"):
            part.initialise()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return module


def inputs(length: int):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, length, n, HEAD_DIM) for n in (HEADS, GROUPS, GROUPS))
    return torch.randn(1, length, HIDDEN), q, k, v


def softmax(length: int):
    _, q, k, v = inputs(length)
    angle = torch.arange(length)[:, None] / 10000 ** (torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    cos, sin = (torch.cat([f(angle)] * 2, -1)[None] for f in (torch.cos, torch.sin))

    def run():
        a, b = blocks("llama").apply_rotary(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        return F.scaled_dot_product_attention(a, b, v.transpose(1, 2), is_causal=True, enable_gqa=True)

    return run


def linear(name: str, length: int):
    module, (x, q, k, v) = recurrence(name), inputs(length)
    return lambda: in_pieces(module, x, q, k, v, ((), None), Tokens(), None)[0]


def medians(variants: dict[str, Callable], repeat: int, times: int = 1) -> dict[str, float]:
    """CPU seconds of a call; the variants take turns, `times` calls a turn, after a round that does not count."""
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeat + 1):
        for name, run in variants.items():
            started = time.process_time()
            for _ in range(times):
                run()
            if turn:
                taken[name].append((time.process_time() - started) / times)
    return {name: statistics.median(of) for name, of in taken.items()}


@torch.no_grad()
def prefill(lengths: list[int], repeat: int) -> None:
    print("\nPrefill of one layer, CPU seconds (times SDPA's speed)\n")
    print(f"| tokens | SDPA | {' | '.join(LAYERS)} |")
    print(f"|---|---|{'---|' * len(LAYERS)}")
    for length in lengths:
        found = medians({"SDPA": softmax(length), **{name: linear(name, length) for name in LAYERS}}, repeat)
        base = found.pop("SDPA")
        cells = " | ".join(f"{t:.3f} ({base / t:.2f}x)" for t in found.values())
        print(f"| {length:,} | {base:.3f} | {cells} |", flush=True)


def naive_gla(folder: Path | None) -> Callable:
    """flash-linear-attention's recurrence in torch. The package itself needs Triton to import; this file does not."""
    if folder is None:
        spec = importlib.util.find_spec("fla")
        if spec is None:
            sys.exit("flash-linear-attention is not installed: unpack a wheel of fla-core and give its folder as --fla")
        folder = Path(next(iter(spec.submodule_search_locations))).parent
    file = folder / "fla" / "ops" / "gla" / "naive.py"
    if not file.is_file():
        sys.exit(f"{file} is not there: --fla is the folder that holds the package `fla`")
    spec = importlib.util.spec_from_file_location("fla_naive_gla", file)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module.naive_recurrent_gla


def train(lengths: list[int], repeat: int, fla: Path | None) -> None:
    """The recurrence itself, forward and backward, on the same inputs; then how far each is from float64."""
    naive = naive_gla(fla)

    def theirs(q, k, v, g):  # [B, T, H, *], and it multiplies q by K^-1/2
        q, k, v, g = (t.transpose(1, 2) for t in (q * q.shape[-1] ** 0.5, k, v, g))
        return naive(q, k, v, g)[0].transpose(1, 2)

    forms = {
        "flash-linear-attention, naive_recurrent_gla": theirs,
        "ours, exact chunks": lambda *t: chunked(*t, chunk=64, exact=True)[0],
        "ours, fast chunks": lambda *t: chunked(*t, chunk=64)[0],
    }
    print("\nForward and backward of the recurrence, CPU seconds\n")
    print("| tokens | form | CPU s | | furthest from float64: output | gradients |\n|---|---|---|---|---|---|")
    for length in lengths:
        leaves, weight = tensors(length)

        def of(form, leaves=leaves, weight=weight):
            def run():
                out = form(*leaves)
                return out.detach(), torch.autograd.grad((out * weight).sum(), leaves)

            return run

        took = medians({name: of(form) for name, form in forms.items()}, repeat)
        exact = [t.detach().double().requires_grad_() for t in leaves]
        right, slopes = of(lambda *t: chunked(*t, chunk=64, exact=True)[0], exact, weight.double())()
        slow = next(iter(took.values()))
        for name, form in forms.items():
            out, grads = of(form)()
            far = [relative(a, b) for a, b in zip(grads, slopes, strict=True)]
            cells = f"{took[name]:.3f} | {slow / took[name]:.1f}x | {relative(out, right):.1e} | {max(far):.1e}"
            print(f"| {length:,} | {name} | {cells} |", flush=True)
    leaves = [t.detach() for t in tensors(256)[0]]
    right = quadratic(*(t.double() for t in leaves))[0]
    far = {name: relative(form(*leaves), right) for name, form in forms.items()}
    print(f"\nFrom the definition in float64, 256 tokens: {', '.join(f'{n} {x:.1e}' for n, x in far.items())}")


def tensors(length: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """q, k, v with a column of ones, log decays down to the fast form's limit; a weight of the outputs."""
    torch.manual_seed(0)
    q, k = (torch.randn(1, HEADS, length, HEAD_DIM).softmax(-1) for _ in range(2))
    v = F.pad(torch.randn(1, HEADS, length, HEAD_DIM), (0, 1), value=1.0)
    g = floor(64) * torch.rand(1, HEADS, length, HEAD_DIM) ** 4
    return [t.requires_grad_() for t in (q, k, v, g)], torch.randn(1, HEADS, length, HEAD_DIM + 1)


def relative(found: torch.Tensor, right: torch.Tensor) -> float:
    return ((found - right).abs().max() / right.abs().max()).item()


@torch.no_grad()
def decode(lengths: list[int], repeat: int, tokens: int = 32) -> None:
    """After a prompt; attention reads keys and values of drawn numbers, in place (a cache that grows copies them)."""
    print("\nOne token in one layer, CPU ms, and bytes it keeps, after so many tokens\n")
    print(f"| layer | {' | '.join(f'{n:,}' for n in lengths)} |\n|---|{'---|' * len(lengths)}")
    variants, sizes = {}, {}
    _, q, *_ = inputs(1)
    for length in lengths:
        keys, values = (torch.randn(1, GROUPS, length, HEAD_DIM) for _ in range(2))
        variants["SDPA", length] = lambda k=keys, v=values: F.scaled_dot_product_attention(
            q.transpose(1, 2), k, v, enable_gqa=True
        )
        sizes["SDPA", length] = 2 * keys.numel() * keys.element_size()
    for name in LAYERS:
        module = recurrence(name)
        for length in lengths:
            _, states = in_pieces(module, *inputs(length), ((), None), Tokens(), None)
            held = {"states": states}

            def run(held=held, module=module, step=inputs(1)):
                _, held["states"] = module(*step, None, Tokens(), held["states"])

            variants[name, length] = run
            sizes[name, length] = sum(s.numel() * s.element_size() for s in states.values())
    found = medians(variants, repeat, tokens)
    for name in ("SDPA", *LAYERS):
        cells = [f"{1000 * found[name, n]:.2f} ms, {sizes[name, n]:,} B" for n in lengths]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["prefill", "decode", "train"])
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--fla", type=Path, help="folder of an unpacked wheel of fla-core")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.what == "prefill":
        prefill(args.lengths or [1024, 2048, 4096, 8192, 16384, 32768], args.repeat)
    elif args.what == "decode":
        decode(args.lengths or [1024, 4096, 16384], args.repeat)
    else:
        train(args.lengths or [512, 2048], args.repeat, args.fla)


if __name__ == "__main__":
    main()
