"""Deep merge of plain recipe data, guided by the schema: it knows which section is a component and which a list."""

from __future__ import annotations

import copy
import dataclasses
import types
import typing
from functools import cache
from typing import Any

from adapt.config.decode import Invalid, expand
from adapt.config.schema import Recipe
from adapt.errors import Problem, UserError
from adapt.registry import Selection, UnknownComponent


def merge(base: Any, over: Any, hint: Any = None, where: str = "") -> Any:
    """`over` on top of `base`. Sections merge key by key; a component whose name changes is replaced whole, and so is a
    list; `{0: ..., 2: ...}` on a list changes (or, one past the end, appends) the elements of these numbers."""
    hint = _concrete(hint, base, over)
    if is_component(hint):
        if isinstance(base, str) and isinstance(over, dict):
            base = _section(base, hint)
        both = isinstance(base, dict) and isinstance(over, dict)
        if both and "name" in base and over.get("name", base["name"]) != base["name"]:
            return copy.deepcopy(over)
    if isinstance(over, dict) and over and all(k.isdigit() for k in over) and _is_list(base, hint):
        return _elements(list(base or []), over, hint, where)
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return copy.deepcopy(over)
    if typing.get_origin(hint) is dict:
        hints = dict.fromkeys(over, typing.get_args(hint)[1])
    else:
        hints = _fields(hint, over.get("name", base.get("name")))
    merged = dict(base)
    for key, value in over.items():
        merged[key] = merge(base.get(key), value, hints.get(key), f"{where}.{key}" if where else key)
    return merged


def _elements(base: list[Any], over: dict[str, Any], hint: Any, where: str) -> list[Any]:
    for key, value in sorted(over.items(), key=lambda item: int(item[0])):
        index = int(key)
        if index > len(base):
            raise UserError(Problem(f"{where}.{key}", f"the list has {len(base)} entries; the next one is {len(base)}"))
        here = base[index] if index < len(base) else None
        base[index : index + 1] = [merge(here, value, _element(hint), f"{where}.{key}")]
    return base


def is_component(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Selection)


def _section(short: str, hint: Any) -> dict[str, Any]:
    try:
        return expand(short, hint)
    except Invalid:  # decoding will say it
        return {"name": short.partition(":")[0]}


def _concrete(hint: Any, base: Any, over: Any) -> Any:
    """`X | None` -> X; of other unions the section or list, as the data has it."""
    if not (isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union):
        return hint
    options = [o for o in typing.get_args(hint) if o is not type(None)]
    sections = [o for o in options if dataclasses.is_dataclass(o) or typing.get_origin(o) in (tuple, list)]
    return (sections or options)[0]


def _is_list(base: Any, hint: Any) -> bool:
    return isinstance(base, list) or (base is None and typing.get_origin(hint) in (tuple, list))


def _element(hint: Any) -> Any:
    return typing.get_args(hint)[0] if typing.get_args(hint) else None


def _fields(hint: Any, name: Any) -> dict[str, Any]:
    """The types of a section's keys, or nothing where they are not known."""
    if is_component(hint):
        try:
            return _hints(hint.registry[name].config_type) if isinstance(name, str) else {}
        except UnknownComponent:
            return {}
    if hint is Recipe:
        return {**_hints(hint), "stages": list[Recipe], "arms": dict[str, Recipe]}
    return _hints(hint) if dataclasses.is_dataclass(hint) else {}


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)
