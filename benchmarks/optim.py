"""One optimizer step over SmolLM2-135M's matrices: ours against the implementations they are known by.

    python benchmarks/optim.py --soap soap.py --cosmos COSMOS_optim.py

The two files are the authors' (nikhilvyas/SOAP; lliu606/COSMOS, which has no licence and is no part of this tree). All
arms share weights and gradients, in one process with one thread, and take turns step by step; figures are medians of CPU
seconds. Newton-Schulz has five steps in float32 everywhere: that of torch.optim.Muon and of COSMOS, which cast to bfloat16,
are replaced by the same lines without the cast. What is no matrix of a layer is stepped by fused AdamW in every arm.
`batched` arms stack matrices of one shape, as on an accelerator.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import nn

AGAINST = {
    "torch_muon": "adamw",
    "muon": "torch_muon",
    "muon_batched": "torch_muon",
    "soap_reference": "adamw",
    "soap": "soap_reference",
    "soap_batched": "soap_reference",
    "cosmos_reference": "adamw",
    "cosmos_reference_compiled": "cosmos_reference",
    "cosmos": "cosmos_reference",
    "cosmos_batched": "cosmos_reference",
    "cosmos_compiled": "cosmos_reference",
    "cosmos_svd": "cosmos_reference",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of every arm, after its first")
    parser.add_argument("--turns", type=int, default=2, help="timed steps in which SOAP turns its bases")
    parser.add_argument("--soap", type=Path, help="the authors' soap.py")
    parser.add_argument("--cosmos", type=Path, help="the authors' COSMOS_optim.py")
    parser.add_argument("--arms", nargs="*", help="only these")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = smollm2(args.layers)
    wanted = ["adamw", *AGAINST] if args.arms is None else args.arms
    missing = {None if args.soap else "soap_reference", None if args.cosmos else "cosmos_reference"}
    if args.cosmos is None:
        missing.add("cosmos_reference_compiled")
    rest = torch.optim.AdamW([p for n, p in model.named_parameters() if not is_matrix(n, p)], fused=True)
    arms = {name: make(name, model, rest, args) for name in wanted if name not in missing}
    gradients = [torch.randn_like(p) * 1e-3 for p in model.parameters()]
    first = timed_round(arms, model, gradients)
    report("first step", {name: [seconds] for name, seconds in first.items()})
    rounds = {name: [] for name in arms}
    for _ in range(args.rounds):
        for name, seconds in timed_round(arms, model, gradients).items():
            rounds[name].append(seconds)
    report("later steps", rounds)
    turning = {name: step for name, step in arms.items() if name.startswith("soap")}
    turns = {name: [] for name in turning}
    for _ in range(args.turns if turning else 0):
        for name, seconds in timed_round(turning, model, gradients, turn=True).items():
            turns[name].append(seconds)
    if turning:
        report("SOAP, a step that turns the bases", turns)
        median = {name: statistics.median(rounds[name]) for name in arms}
        mixed = {name: [0.9 * median[name] + 0.1 * statistics.median(turns[name])] for name in turning}
        report("SOAP, mean of ten steps with one turn", mixed | {n: [v] for n, v in median.items() if n == "adamw"})


def smollm2(layers: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim == 2 and "embed" not in name


def timed_round(arms: dict, model: nn.Module, gradients: list, turn: bool = False) -> dict[str, float]:
    """A step of every arm, each on gradients nobody has touched."""
    seconds = {}
    for name, step in arms.items():
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient.clone()
        started = time.process_time()
        step(turn)
        seconds[name] = time.process_time() - started
        print(f"{name} {seconds[name]:.2f}", file=sys.stderr, flush=True)
    return seconds


def report(title: str, results: dict[str, list[float]]) -> None:
    median = {name: statistics.median(values) for name, values in results.items()}
    print(f"\n| {title} | CPU s, median (min-max) | x reference | x fused AdamW |\n|---|---|---|---|")
    for name, values in results.items():
        other = AGAINST.get(name)
        against = f"{median[name] / median[other]:.2f} {other}" if other in median and other != "adamw" else ""
        times = f"{median[name] / median['adamw']:.1f}" if "adamw" in median else ""
        print(f"| {name} | {median[name]:.2f} ({min(values):.2f}-{max(values):.2f}) | {against} | {times} |")
    sys.stdout.flush()


def make(name: str, model: nn.Module, rest: torch.optim.Optimizer, args: argparse.Namespace) -> Callable[[bool], None]:
    """`step(turn)`: `turn` says whether SOAP turns its bases in this one. `rest` steps what references leave out."""
    matrices = [p for n, p in model.named_parameters() if is_matrix(n, p)]
    if name == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        return lambda turn: optimizer.step()
    if name.partition("_")[0] in ("muon", "soap", "cosmos") and "reference" not in name:
        return ours(name, model)
    if name == "torch_muon":
        torch.optim._muon._zeropower_via_newtonschulz = float32_muon
        optimizer = torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw")
    elif name == "soap_reference":
        optimizer = loaded(args.soap).SOAP(matrices)
    else:
        module = loaded(args.cosmos)
        module.zeropower_via_newtonschulz5 = float32_cosmos
        if name.endswith("compiled"):
            module.zeropower_via_newtonschulz5 = torch.compile(float32_cosmos)
        optimizer = module.COSMOS(matrices, lr=2e-3, betas=(0.95, 0.95), lr_ratio=0.2, weight_decay=0.1)

    def step(turn: bool) -> None:
        if name == "soap_reference":
            for state in optimizer.state.values():
                state["precondition_frequency"] = 1 if turn else 10**9
        optimizer.step()
        rest.step()

    return step


def ours(name: str, model: nn.Module) -> Callable[[bool], None]:
    from adapt.components import optimizers
    from adapt.optim import newton_schulz

    algorithm, _, variant = name.partition("_")
    entry = optimizers[algorithm]
    fields = {"svd": {"init": "svd"}, "compiled": {"compile": True}}.get(variant, {})
    optimizer = entry.factory(entry.config_type(**fields), model)

    def step(turn: bool) -> None:
        newton_schulz.LOOPED = frozenset() if variant == "batched" else frozenset({"cpu"})
        for group in optimizer.param_groups:
            if "precondition_frequency" in group:
                group["precondition_frequency"] = 1 if turn else 10**9
        optimizer.step()

    return step


def loaded(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def float32_muon(grad, coefficients, steps, eps):
    """torch.optim.Muon's products in torch.optim.Muon's form, in float32."""
    a, b, c = coefficients
    tall = grad.size(0) > grad.size(1)
    x = grad.T if tall else grad
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def float32_cosmos(g, steps=5, eps=1e-7):
    """The products of the authors' COSMOS in their order, in float32."""
    x = g / (g.norm() + eps)
    x = x.T if g.size(0) > g.size(1) else x
    for _ in range(steps):
        gram = x @ x.T
        more = gram @ x
        x = 3.4445 * x - 4.7750 * more + 2.0315 * (gram @ more)
    return x.T if g.size(0) > g.size(1) else x


if __name__ == "__main__":
    main()
