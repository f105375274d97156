"""Where a run stands: plain numbers, the same on all ranks, saved with every checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from adapt.config.decode import decode
from adapt.errors import Problem, UserError

COUNTS = ("stage", "stage_step", "step", "tokens", "skipped", "non_finite", "seconds")


@dataclass
class State:
    stage: int = 0
    """Index of the stage being trained."""
    stage_step: int = 0
    """Optimizer steps done in it."""
    step: int = 0
    """Optimizer steps done in the run."""
    tokens: int = 0
    """Clean training tokens seen."""
    read: list[int] = field(default_factory=list)
    """Rows (of preference data, pairs) of each source that stages before this one have read; [] where none has."""
    skipped: int = 0
    """Steps of data left out after a rewind: step s of a stage reads the data of s + skipped."""
    non_finite: int = 0
    """Updates that were skipped or rewound, for a spike, too."""
    norms: list[float] = field(default_factory=list)
    """Gradient norms of the stage's last updates, where `trainer.spike` looks back on them."""
    seconds: float = 0.0
    """Time spent training, over all attempts."""
    best: float | None = None
    """Lowest value so far of the stage's `evaluation.best`."""
    best_step: int | None = None
    """Its step."""
    minima: dict[str, list[float]] = field(default_factory=dict)
    """Stop rules: metric -> [lowest value so far, evaluations since]."""
    results: dict[str, dict[str, float]] = field(default_factory=dict)
    """`before` and `after`: evaluation results."""
    measured: list[str] = field(default_factory=list)
    """What evaluations have measured of models that do not change (adapt.evaluate.others)."""
    objective: dict[str, float] = field(default_factory=dict)
    """What the objective learned from evaluations (`Objective.observe`)."""
    owes_evaluation: bool = False
    """Whether the evaluation of this step was begun and cut off: a resumed run makes it first."""
    decided: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What conversions found in the base's weights when the run began (which layers, which ranks), by their key."""
    start_values: str = ""
    """Fingerprint of the file with what the student made of the stage's data when it began; "" where nothing asks."""
    data: dict[str, str] = field(default_factory=dict)
    """Fingerprint of each data set of the stage, and of the plan in which they are read."""
    finished: Literal["", "steps", "data", "rule"] = ""
    """What ended the last stage. After its steps, a resumed run with more of them goes on; `data` is where its data
    ended before (`data.exhausted`)."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> State:
        """Raises UserError where another version of adapt wrote them, or somebody else."""
        known = {entry.name for entry in fields(State)}
        if unknown := sorted(values.keys() - known):
            raise UserError(
                f"state.json of the checkpoint holds {', '.join(unknown)}, which this version of adapt does not know; "
                "go on with the version that wrote it"
            )
        state = decode(values, State, "state.json")
        counts = {name: getattr(state, name) for name in COUNTS}
        if wrong := {name: n for name, n in counts.items() if not 0 <= n < 2**53}:  # NaN is neither
            raise UserError([Problem(f"state.json.{name}", f"{n} cannot be") for name, n in wrong.items()])
        return state
