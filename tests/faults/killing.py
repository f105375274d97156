"""Runs that are killed at random moments until they are done, and what that did to them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from adapt.errors import RankLost
from tests.faults.warm import NAMES, Warm
from tests.recipes import corpus, tiny_recipe
from tests.train.test_fit import losses, weights

ANY = "any moment"
AIMS = (ANY, ANY, *NAMES, "save")
"""What a kill is aimed at, drawn evenly: so that the short phases are hit as well, a few aims are taken at each."""
LATE = ("export", "samples", "report")


@dataclass
class Tally:
    kills: Counter[str] = field(default_factory=Counter)
    """Phase in which the worker was -> kills."""
    runs: int = 0
    lost: list[str] = field(default_factory=list)
    """Runs that could not be gone on with, and what they ended with."""
    different: list[str] = field(default_factory=list)
    """Losses and weights that are not the straight run's, bit for bit."""
    left: list[str] = field(default_factory=list)
    """Files and processes that a killed attempt left for good."""
    unnoticed: list[str] = field(default_factory=list)
    """Ranks that did not end with exit code 71 and the name of the killed one."""
    seconds: list[float] = field(default_factory=list)
    """From the kill of a rank to the end of the others."""

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def num_kills(self) -> int:
        return sum(self.kills.values())


def diffusion(folder: Path) -> dict[str, Any]:
    """Growing blocks, noise and dropout that depend on the step; checkpoints are written while it trains on."""
    return {}


def mixed(folder: Path) -> dict[str, Any]:
    """Two sources whose weights change, prepared by two workers, packed by best fit, inputs masked at a rising ratio;
    training waits for its checkpoints."""
    old, new = (
        {
            "source": {"name": "jsonl", "path": str(corpus(folder, 60, seed=i))},
            "name": name,
            "clean": ["unicode", "lines"],
        }
        for i, name in enumerate(("old", "new"), 2)
    )
    train = [old | {"weight": [{"until": 0.5, "weight": 1}, {"weight": 0.3}]}, new | {"weight": 2}]
    return {
        "data": {"train": train, "packing": "best_fit", "workers": 2},
        "objective": {"name": "meap", "ratio": 0.3, "ratio_schedule": {"start": 0.0, "warmup_frac": 0.5}},
        "generation": {"samplers": ["ar"]},
        "checkpoint": {"asynchronous": False},
        "evaluation": {"suites": ["bpb"]},
    }


def ranks(folder: Path) -> dict[str, Any]:
    """Two ranks, one of which is killed: both hold half of everything, and write half of each checkpoint."""
    return {"trainer": {"start_timeout": 5}}


KINDS = {"diffusion": diffusion, "mixed": mixed, "ranks": ranks}
RANKS = {"ranks": 2}
"""Of a kind; others are single processes."""


def recipe_of(kind: str, base: Path, folder: Path, name: str) -> dict[str, Any]:
    over: dict[str, Any] = {
        "trainer": {"steps": 20, "batch_tokens": 256, "microbatch": 2},
        "checkpoint": {"every": 2, "keep": 2},
        "evaluation": {"every": 6, "limit": 1, "suites": ["bpb", "masked_ce"], "best": "bpb/held-out"},
        "generation": {"max_new_tokens": 4},
    }
    for section, keys in KINDS[kind](folder).items():
        over[section] = {**over.get(section, {}), **keys}
    return tiny_recipe(base, folder, run={"name": name}, **over)


def kill(
    warm: Warm,
    kind: str,
    base: Path,
    folder: Path,
    rng: random.Random,
    *,
    runs: int,
    kills: int,
    hasty: bool = False,
) -> Iterator[Tally]:
    """`runs` runs of a kind, each killed at `kills` random moments and compared with a straight one."""
    recipe, again = (recipe_of(kind, base, folder, f"{kind}-{name}") for name in ("straight", "again"))
    many = {"ranks": RANKS[kind], "hasty": hasty} if kind in RANKS else {}
    straight = warm.attempt(recipe, folder / "cache-straight", **many)
    assert straight["code"] == 0, straight["said"]
    spent = warm.attempt(again, folder / "cache-again", **many)["spent"]  # the parent is warm now
    assert not (found := differences(folder / "runs" / f"{kind}-again", folder / "runs" / f"{kind}-straight")), found
    for number in range(runs):
        yield _kill_one(warm, kind, recipe_of(kind, base, folder, f"{kind}-{number}"), folder, spent, rng, kills, many)


def _kill_one(
    warm: Warm,
    kind: str,
    recipe: dict[str, Any],
    folder: Path,
    spent: dict,
    rng: random.Random,
    kills: int,
    many: dict[str, int],
) -> Tally:
    name = recipe["run"]["name"]
    tally, run, over = Tally(runs=1), folder / "runs" / name, False
    # data is prepared once, and a run that is done can be killed in its last phases only
    aims = sorted(rng.choices(AIMS, k=kills), key=lambda aim: (aim in LATE) - (aim == "data"))
    while tally.num_kills < kills:
        wanted = rng.choice(LATE) if over else aims[tally.num_kills]
        aim = moment(wanted, spent, rng) | {"rank": rng.randrange(many.get("ranks", 1))}
        done = warm.attempt(recipe, folder / f"cache-{name}", aim, **many)
        if done["left"]:
            tally.left.append(f"{name}: {done['left']} process(es)")
        if done["killed"]:
            tally.kills[done["phase"]] += 1
            if many:
                tally.seconds.append(done["noticed"])
                tally.unnoticed += unnoticed(name, done, aim["rank"])
                over = over or done["code"] == 0
        elif done["code"] == 0:
            over = True
        else:
            break
    end = warm.attempt(recipe, folder / f"cache-{name}", **many)
    if end["code"] != 0:
        tally.lost.append(f"{name} ended with {end['code']}:\n{end['said']}")
        return tally
    if different := differences(run, folder / "runs" / f"{kind}-straight"):
        tally.different.append(f"{name}: {different}")
    for path in run.rglob("*"):
        unfinished = ".partial" in path.name or ".replaced" in path.name or path.name.endswith(".new")
        if unfinished and path.parent.name != "attempts":  # an attempt's sign of life is its own, and stays
            tally.left.append(f"{name}: {path.relative_to(run)}")
    return tally


def unnoticed(name: str, done: dict[str, Any], victim: int) -> Iterator[str]:
    """Ranks that did not end as they should when another one was killed. After the last thing they did together there is
    nothing to notice."""
    for rank, code in enumerate(done["codes"]):
        if rank == victim or (code == 0 and done["phase"] in (*LATE, "start-up")):
            continue
        if code != RankLost.exit_code or f"rank {rank}: " not in done["said"] or f"rank {victim}" not in done["said"]:
            yield f"{name}: rank {victim} was killed in {done['phase']}; rank {rank} ended with {code}:\n{done['said']}"
        elif "Traceback" in done["said"]:
            yield f"{name}: killed in {done['phase']}: a traceback:\n{done['said']}"


def moment(wanted: str, spent: dict[str, tuple[int, float]], rng: random.Random) -> dict[str, Any]:
    """A random time in the first half of the first or second entry of the phase."""
    phase = "start-up" if wanted == ANY else wanted
    times, seconds = spent[phase]
    once = seconds / times
    if wanted == "start-up":
        once -= sum(spent[other][1] for other in NAMES if other != phase)
    # half of it: this time it may be faster, and what is done in one attempt is not there to be killed in the next
    return {"phase": phase, "nth": rng.randint(1, min(times, 2)), "after": rng.uniform(0, once / 2)}


def differences(run: Path, straight: Path) -> str:
    """What of a run is not as in the straight one: losses by step, tensors of the export, bit for bit."""
    a, b = losses(run), losses(straight)
    wrong = [f"loss of step {s}" for s in sorted(a.keys() | b.keys()) if a.get(s) != b.get(s)]
    x, y = weights(run), weights(straight)
    wrong += [n for n in sorted(x.keys() | y.keys()) if n not in x or n not in y or not torch.equal(x[n], y[n])]
    return ", ".join(wrong)
