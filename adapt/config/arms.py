"""Arms of one recipe: `arms: {muon: {optimizer: {name: muon}}, ...}`. Each is the recipe with its own sections over it,
and a run of its own, `<dir>/<name>/<arm>`; `arm=muon` on the command line picks one, `arms=null` does without them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from adapt.config.merge import merge
from adapt.config.schema import ARM_SECTIONS, Recipe
from adapt.errors import Problem, nearest

KEYS = ("arms", "arm")


def has_arms(data: dict[str, Any]) -> bool:
    return bool(data.get("arms")) or data.get("arm") is not None


def stated(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the arms say, as far as it is a recipe's."""
    arms = data.get("arms")
    return {name: arm for name, arm in arms.items() if isinstance(arm, dict)} if isinstance(arms, dict) else {}


def override(data: dict[str, Any], keys: list[str], value: Any) -> dict[str, Any]:
    """`data` with a dotted override in it. One that is not an arm's own holds for all arms: it goes over what they say
    of the section, too."""
    for key in reversed(keys):
        value = {key: value}
    merged = merge(data, value, Recipe)
    over = {name: merge(arm, value, Recipe) for name, arm in stated(data).items() if keys[0] in arm}
    if keys[0] in KEYS or not over:
        return merged
    return {**merged, "arms": {**merged["arms"], **over}}


def arms_of(data: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], list[Problem]]:
    """The whole recipe of each arm that is to be trained, by its name, and what is wrong with how they are stated."""
    base = {key: value for key, value in data.items() if key not in KEYS}
    every, chosen = data.get("arms") or {}, data.get("arm")
    if not isinstance(every, dict):
        what = f"expected a section of named arms, each with what it overrides, got {every!r}"
        return {}, [Problem("arms", what)]
    every = {name: arm for name, arm in every.items() if arm is not None}
    if chosen is not None and chosen not in every:
        known = f"{nearest(str(chosen), every)} There are {', '.join(every)}" if every else " It has none"
        return {}, [Problem("arm", f"the recipe has no arm {chosen!r}.{known}")]
    found, problems = {}, []
    for name, arm in every.items():
        if chosen is not None and name != chosen:
            continue
        problems += _problems(name, arm)
        if isinstance(arm, dict):
            own = {key: value for key, value in arm.items() if key in ARM_SECTIONS}
            found[name] = _in_its_folder(merge(base, own, Recipe), name)
    return found, problems


def _problems(name: str, arm: Any):
    if not re.fullmatch(r"[^\W_][\w+=@-]*", name):
        yield Problem(
            f"arms.{name}", f"{name!r} is no name of an arm (and its folder); use letters, digits and _ - + = @"
        )
    if not isinstance(arm, dict):
        yield Problem(f"arms.{name}", f"expected the sections it overrides, or null to leave it out, got {arm!r}")
        return
    for key in sorted(set(arm) - set(ARM_SECTIONS)):
        what = f"an arm may override only {', '.join(ARM_SECTIONS)}: the rest is what makes arms comparable."
        yield Problem(f"arms.{name}.{key}", f"{what}{nearest(key, ARM_SECTIONS)}")


def _in_its_folder(data: dict[str, Any], name: str) -> dict[str, Any]:
    """The run of an arm lies in the folder that the recipe names."""
    run = data.get("run")
    whole = run.get("name") if isinstance(run, dict) else None
    if not isinstance(whole, str) or not whole:  # decoding will say it
        return data
    return {**data, "run": {**run, "dir": f"{run.get('dir', 'runs')}/{whole}", "name": name}}


def gathered(found: Mapping[str, list[Problem]], data: dict[str, Any]) -> list[Problem]:
    """The problems of all arms, each once: what an arm states, and what is wrong in some arms only, is named by the
    arm. `found` has every arm that is trained, `data` is the recipe they are stated in."""
    problems = []
    for name, of_arm in found.items():
        for p in of_arm:
            own = re.split(r"[.\[ ]", p.where)[0] in stated(data).get(name, {})
            if not own and all(p in others for others in found.values()):
                problems.append(p)
            else:
                problems.append(Problem(f"arms.{name}.{p.where}" if p.where else f"arms.{name}", p.what))
    return list(dict.fromkeys(problems))


def printed(arms: Mapping[str, dict[str, Any]], run: dict[str, Any]) -> dict[str, Any]:
    """One recipe of the arms' own: sections that are alike in all of them stand outside."""
    first = next(iter(arms.values()))
    common = {key: value for key, value in first.items() if all(key in a and a[key] == value for a in arms.values())}
    own = {name: {k: v for k, v in arm.items() if k not in common and k != "run"} for name, arm in arms.items()}
    return {**common, "run": run, "arms": own}
