"""YAML -> stages. `extends` is the one inheritance; dotted overrides come last; interpolations follow them."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from adapt.config import arms
from adapt.config.decode import decode, encode
from adapt.config.merge import merge
from adapt.config.schema import STAGE_SECTIONS, Recipe
from adapt.config.text import read_yaml, write_yaml
from adapt.errors import Problem, RecipeError, UserError, nearest

SHIPPED = Path(str(resources.files("adapt"))) / "configs"


@dataclass(frozen=True)
class Resolved:
    """A recipe after inheritance, overrides and interpolation: one Recipe per stage, and the data they came from."""

    stages: tuple[Recipe, ...]
    names: tuple[str, ...]
    plain: dict[str, Any]
    arms: dict[str, Resolved] = field(default_factory=dict)
    """Of a recipe with arms: each by its name. `stages` are then the first one's, for what all of them share."""

    @property
    def recipe(self) -> Recipe:
        """The first stage: run, model, tokenizer, logging and export are the same in all."""
        return self.stages[0]

    def to_yaml(self) -> str:
        """The resolved recipe, defaults included; loading it again gives the same stages and arms."""
        return write_yaml(_literal(self._encoded()))

    def _encoded(self) -> dict[str, Any]:
        base = encode(self.stages[0])
        if self.arms:
            return arms.printed({name: arm._encoded() for name, arm in self.arms.items()}, base["run"])
        if self.plain.get("stages"):
            base["stages"] = [
                {"name": name} | {k: v for k in STAGE_SECTIONS if (v := encode(getattr(stage, k))) != base[k]}
                for name, stage in zip(self.names, self.stages, strict=True)
            ]
        return base


def _literal(value: Any) -> Any:
    """What is left of `${` after interpolation is text, and stays text when it is loaded again."""
    if isinstance(value, dict):
        return {k: _literal(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_literal(v) for v in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of the recipes in the package (`nbdiff`, `presets/...`, `paper/...`)."""
    return {str(p.relative_to(SHIPPED).with_suffix("")): p for p in sorted(SHIPPED.rglob("*.yaml"))}


def find(name: str, relative_to: Path | None = None) -> Path:
    """A recipe's file: a path as given, next to `relative_to`, or the name of a shipped recipe."""
    for candidate in (*([relative_to.parent / name] if relative_to else ()), Path(name)):
        if candidate.is_file():
            return candidate
    shipped = shipped_recipes()
    if name in shipped:
        return shipped[name]
    raise UserError(
        f"there is no recipe file {name!r}, and no shipped recipe of that name."
        f"{nearest(name, shipped)} Shipped: {', '.join(shipped)}"
    )


def load(name: str, overrides: list[str] | None = None) -> Resolved:
    """Read a recipe with dotted overrides (`optimizer.lr=2e-5`). Raises UserError with all problems in it."""
    data = _read(find(name), ())
    problems: list[Problem] = []
    changes = []
    for item in overrides or []:
        try:
            changes.append(override(item))
        except UserError as error:
            problems += error.problems
    paths = [".".join(keys) for keys, _ in changes]
    problems += _hidden_by_stages(data, paths)
    for name, arm in arms.stated(data).items():
        problems += [
            Problem(p.where, p.what.replace("stages", f"arms.{name}.stages")) for p in _hidden_by_stages(arm, paths)
        ]

    def place(change: tuple[list[str], Any]) -> tuple[bool, int, bool]:
        """Of all arms before of one; sections, names, then fields."""
        keys, _ = change
        return keys[0] in arms.KEYS, len(keys), keys[-1] != "name"

    for keys, value in sorted(changes, key=place):
        try:
            data = arms.override(data, keys, value)
        except UserError as error:
            problems += error.problems
    if not problems:
        return resolve(data)
    try:
        readable = resolve(data)
    except RecipeError as error:
        readable, problems = error.readable, [*problems, *error.problems]
    raise RecipeError(problems, readable)


def override(item: str) -> tuple[list[str], Any]:
    """`data.train[0].weight=3` -> [data, train, "0", weight], 3; the value is YAML, nothing is null."""
    dotted, equals, text = item.partition("=")
    keys = _keys(dotted)
    if not equals or not all(keys):
        raise UserError(f"override {item!r} is not of the form key.subkey=value")
    try:
        return keys, read_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"override {item!r} has a value YAML cannot read: {error}") from None


def _hidden_by_stages(data: dict[str, Any], paths: list[str]) -> list[Problem]:
    """A stage's own value wins over the recipe's: an override that no stage would see is a mistake worth a word."""
    stages = data.get("stages")
    return [
        Problem(path, f"stages[{index}] sets its own, which wins over this; override stages.{index}.{path} instead")
        for index, stage in enumerate(stages if isinstance(stages, list) else [])
        for path in paths
        if isinstance(stage, dict) and path != "name" and _has(stage, path)
    ]


def _has(data: Any, dotted: str) -> bool:
    """Whether `data` states a value at (or around) this key."""
    for key in _keys(dotted):
        if not isinstance(data, dict):
            return True
        if key not in data:
            return False
        data = data[key]
    return True


def _keys(dotted: str) -> list[str]:
    return re.sub(r"\[(\d+)\]", r".\1", dotted.strip()).split(".")


def _interpolated(data: dict[str, Any]) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_container(OmegaConf.create(data), resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(Problem(str(getattr(error, "full_key", "") or ""), str(error).splitlines()[0])) from None


def resolve(data: dict[str, Any]) -> Resolved:
    """Plain data -> validated stages (of each arm). Interpolations (`${data.seq_len}`) see each stage's own values."""
    if not arms.has_arms(data):
        return _resolve({k: v for k, v in data.items() if k not in arms.KEYS})
    each, problems = arms.arms_of(data)
    found: dict[str, list[Problem]] = {}
    readable: dict[str, Resolved] = {}
    for name, of_arm in each.items():
        try:
            readable[name], found[name] = _resolve(of_arm), []
        except UserError as error:
            found[name] = error.problems
            if (rest := getattr(error, "readable", None)) is not None:
                readable[name] = rest
    whole = None
    if readable:
        first = next(iter(readable.values()))
        whole = first if data.get("arm") is not None else Resolved(_together(first), first.names, data, readable)
    if problems or any(found.values()):
        raise RecipeError([*problems, *arms.gathered(found, data)], whole)
    if whole is None:
        raise UserError(Problem("arms", "every arm is left out; keep one, or train without arms: arms=null"))
    return whole


def _together(arm: Resolved) -> tuple[Recipe, ...]:
    """An arm's stages as parts of the recipe's folder, not of the arm's."""
    folder = Path(arm.recipe.run.dir)
    run = replace(arm.recipe.run, dir=str(folder.parent), name=folder.name)
    return tuple(replace(stage, run=run) for stage in arm.stages)


def _resolve(data: dict[str, Any]) -> Resolved:
    """One run: its stages."""
    stages = data.get("stages") or []
    base = {k: v for k, v in data.items() if k != "stages"}
    if not isinstance(stages, list) or not all(isinstance(s, dict) for s in stages):
        raise UserError(Problem("stages", "expected a list of sections, each with a name and what it overrides"))
    problems: list[Problem] = []
    recipes, names = [], []
    for index, stage in enumerate(stages or [{"name": "main"}]):
        name, where = stage.get("name", str(index)), f"stages[{index}]"
        if not isinstance(name, str) or name in names:
            problems.append(Problem(f"{where}.name", f"expected a name that no other stage has, got {name!r}"))
        names.append(name)
        for key in sorted(set(stage) - {"name", *STAGE_SECTIONS}):
            what = f"a stage may override only {', '.join(STAGE_SECTIONS)}.{nearest(key, STAGE_SECTIONS)}"
            problems.append(Problem(f"{where}.{key}", what))
        over = {k: v for k, v in stage.items() if k in STAGE_SECTIONS}
        recipe, found = _stage(base, over)
        recipes.append(recipe)
        problems += [Problem(f"{where}.{p.where}", p.what) if _has(over, p.where) else p for p in found]
    if problems:
        readable = None if None in recipes else Resolved(tuple(recipes), tuple(map(str, names)), data)
        raise RecipeError(dict.fromkeys(problems), readable)
    return Resolved(tuple(recipes), tuple(names), data)


def _stage(base: dict[str, Any], over: dict[str, Any]) -> tuple[Recipe | None, list[Problem]]:
    """The recipe of one stage, and what is wrong in it: then it is the recipe without the keys that are wrong."""
    problems: list[Problem] = []
    try:
        data = _interpolated(merge(base, over, Recipe))
        for _ in range(3):  # without a wrong key, another one may be missing; what is missing cannot be left out
            try:
                return decode(data, Recipe), problems
            except UserError as error:
                problems = problems or error.problems
                data = without(data, [p.where for p in error.problems])
    except UserError as error:
        problems = problems or error.problems
    return None, problems


def without(data: Any, paths: list[str]) -> Any:
    """A copy of `data` that lacks these keys; of a list, the element."""
    data = copy.deepcopy(data)
    for path in sorted(paths, reverse=True):  # the later elements of a list go first
        *way, last = _keys(path)
        here = data
        for key in way:
            here = here[int(key)] if isinstance(here, list) and key.isdigit() else here
            here = here.get(key) if isinstance(here, dict) else here
        if isinstance(here, list) and last.isdigit() and int(last) < len(here):
            del here[int(last)]
        elif isinstance(here, dict):
            here.pop(last, None)
    return data


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        circle = " -> ".join(map(str, (*seen, path)))
        raise UserError(f"{path}: `extends` goes in a circle: {circle}")
    try:
        data = read_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: a recipe is a mapping of sections (run, model, data, ...), not {type(data).__name__}")
    parents = data.pop("extends", None) or []
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(p, str) for p in parents):
        raise UserError(Problem("extends", f"expected the name or file of a recipe, got {parents!r}"))
    merged: dict[str, Any] = {}
    for parent in parents:
        try:
            file = find(parent, path)
        except UserError as error:
            raise UserError([Problem(f"{path}: extends", p.what) for p in error.problems]) from None
        merged = merge(merged, _read(file, (*seen, path.resolve())), Recipe)
    return merge(merged, data, Recipe)
