"""One optimizer whose groups name their algorithm: matrices by COSMOS or Muon, say, and everything else by AdamW.

A trainer steps, schedules and saves a single torch.optim.Optimizer. Every number an algorithm reads is in `param_groups`,
so a scheduler's new rate acts at the next step and a state dict says how it was made. All state is there from the start:
a checkpoint of any step has the same keys on every rank, and torch's checkpointing has no reason to step for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from adapt.errors import Problem, UserError
from adapt.optim.algorithms import local, named
from adapt.optim.routing import table


class Suite(torch.optim.Optimizer):
    """`groups`: as routing.param_groups makes them, each with `algorithm` and that algorithm's hyperparameters."""

    def __init__(self, groups: list[dict[str, Any]]):
        super().__init__(groups, {})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Takes over the group and makes the state of its parameters."""
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            self.restart(parameter)

    def restart(self, parameter: Tensor | None = None) -> None:
        """The state of `parameter` (of all of them, for None) as it was before the first step."""
        for group in self.param_groups:
            for one in group["params"]:
                if parameter is None or one is parameter:
                    self.state[one] = named(group["algorithm"]).state(one, group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every group. Gradients are read and left as they are; whoever calls has made sure that they are
        finite on all ranks."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = group["params"]
            states = [self.state[p] for p in parameters]
            named(group["algorithm"]).step(parameters, [p.grad for p in parameters], states, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but no state changes its precision to that of a bfloat16 parameter, and another algorithm's
        state is refused with UserError."""
        saved, ours = state_dict["param_groups"], self.param_groups
        pairs = [
            (group, of, index, parameter)
            for of, group in zip(saved, ours, strict=False)
            for index, parameter in zip(of["params"], group["params"], strict=False)
        ]
        for group, of, index, parameter in pairs:
            found, expected = state_dict["state"].get(index, {}), self.state[parameter]
            said, algorithm = of.get("algorithm", group["algorithm"]), group["algorithm"]
            if said != algorithm or (found and found.keys() != expected.keys()):
                have = f"was made by {said}" if said != algorithm else f"has {', '.join(sorted(found))}"
                raise UserError(
                    f"the optimizer state of a {group['role']} parameter {have}; {algorithm} cannot go on from it "
                    f"(it needs {', '.join(sorted(expected))}). Start with fresh state, or select the old optimizer."
                )
        kinds = {p: {key: (v.dtype, v.device) for key, v in self.state[p].items()} for *_, p in pairs}
        super().load_state_dict(state_dict)
        for *_, index, parameter in pairs:
            for key, value in state_dict["state"].get(index, {}).items():
                dtype, device = kinds[parameter][key]
                self.state[parameter][key] = value.to(dtype=dtype, device=device)

    def table(self) -> str:
        """What is trained by what."""
        return table(self.param_groups)

    def state_bytes(self) -> int:
        """Of this rank."""
        return sum(local(v).untyped_storage().nbytes() for s in self.state.values() for v in s.values())


def restart(optimizer: torch.optim.Optimizer, parameter: Tensor | None = None) -> None:
    """Forget what steps left behind, of one parameter or all: torch's optimizers make state anew when they step, ours
    has it always."""
    if isinstance(optimizer, Suite):
        optimizer.restart(parameter)
    elif parameter is None:
        optimizer.state.clear()
    else:
        optimizer.state.pop(parameter, None)


def algorithms(root: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, str]:
    """Name -> algorithm of the parameters that a Suite trains."""
    if not isinstance(optimizer, Suite):
        return {}
    of = {p: group["algorithm"] for group in optimizer.param_groups for p in group["params"]}
    return {name: of[p] for name, p in root.named_parameters() if p in of}


def adopt(optimizer: torch.optim.Optimizer, before: torch.optim.Optimizer) -> None:
    """Take over the state of the parameters that the stage before trained too. Raises UserError where it was made by
    another algorithm or with another rank."""
    wrong = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            theirs, ours = before.state.get(parameter), optimizer.state.get(parameter)
            if not theirs:
                continue
            if ours and {k: v.shape for k, v in theirs.items()} != {k: v.shape for k, v in ours.items()}:
                wrong.append(group["algorithm"])
            optimizer.state[parameter] = theirs
    of = [{p: g.get("algorithm") for g in o.param_groups for p in g["params"]} for o in (before, optimizer)]
    wrong += [algorithm for p, algorithm in of[1].items() if of[0].get(p, algorithm) != algorithm]
    if wrong:
        what = (
            f"keep: {wrong[0]} cannot go on from the state of the stage before, which another optimizer made; use reset"
        )
        raise UserError(Problem("optimizer_state", what))
