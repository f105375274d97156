"""Plain containers -> typed dataclasses, through cattrs; every problem is reported, with its dotted key."""

from __future__ import annotations

import dataclasses
import types
import typing
from functools import cache
from typing import Any

import cattrs
from cattrs.errors import BaseValidationError, ForbiddenExtraKeysError

from adapt.errors import Problem, UserError, nearest
from adapt.registry import Selection, UnknownComponent

JSON_TYPES = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}


class Invalid(ValueError):
    """A value that does not fit; the message is the letter to the user."""


def decode(data: Any, cls: type, where: str = "") -> Any:
    """`data` as an instance of the dataclass `cls`. Raises UserError with all problems."""
    try:
        return _converter().structure(data, cls)
    except (BaseValidationError, Invalid, ForbiddenExtraKeysError) as error:
        raise UserError(list(_problems(error, where))) from None


def encode(value: Any) -> Any:
    """Dataclasses -> plain containers, the way the recipe writes them (`{name: ..., **fields}` for components)."""
    if isinstance(value, Selection):
        return {"name": value.name, **encode(value.config)}
    if dataclasses.is_dataclass(value):
        return {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [encode(v) for v in value]
    if isinstance(value, dict):
        return {k: encode(v) for k, v in value.items()}
    return value


@cache
def _converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True, detailed_validation=True)
    for scalar in (str, int, float, bool):
        converter.register_structure_hook(scalar, _scalar)
    converter.register_structure_hook_func(_is_union, lambda value, hint: _union(converter, value, hint))
    converter.register_structure_hook_func(_is_selection, lambda value, t: _selection(converter, value, t))
    converter.register_structure_hook_func(
        lambda t: typing.get_origin(t) is typing.Literal, lambda value, t: _literal(value, t)
    )
    converter.register_structure_hook_factory(
        lambda t: dataclasses.is_dataclass(t) and not _is_selection(t), lambda cls: _dataclass_hook(converter, cls)
    )
    converter.register_structure_hook_func(
        lambda t: typing.get_origin(t) is tuple, lambda value, t: _tuple(converter, value, t)
    )
    return converter


def _is_selection(hint) -> bool:
    return isinstance(hint, type) and issubclass(hint, Selection)


def _dataclass_hook(converter, cls):
    structure = cattrs.gen.make_dict_structure_fn(
        cls, converter, _cattrs_forbid_extra_keys=True, _cattrs_detailed_validation=True
    )

    def hook(value, _):
        if not isinstance(value, dict):
            raise Invalid(f"expected a section with keys ({', '.join(_keys(cls))}), got {value!r}")
        return structure(value, cls)

    return hook


def _scalar(value, hint):
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise Invalid(f"expected {JSON_TYPES[hint]}, got {value!r}")
    return value


def _literal(value, hint):
    choices = typing.get_args(hint)
    if value not in choices or type(value) not in {type(c) for c in choices}:
        raise Invalid(
            f"expected one of {', '.join(map(str, choices))}; got {value!r}.{nearest(str(value), map(str, choices))}"
        )
    return value


def _tuple(converter, value, hint):
    if not isinstance(value, list | tuple):
        raise Invalid(f"expected a list, got {value!r}")
    return tuple(converter.structure(list(value), list[typing.get_args(hint)[0]]))


def _is_union(hint) -> bool:
    return isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union


def _union(converter, value, hint):
    options = typing.get_args(hint)
    if value is None:
        if type(None) in options:
            return None
        raise Invalid(f"expected {_spell(hint)}, got null")
    options = [o for o in options if o is not type(None)]
    lists = [o for o in options if typing.get_origin(o) is tuple]
    if isinstance(value, list) and len(lists) == 1:  # then a problem inside of it is named by its own key
        options = lists
    if len(options) == 1:
        return converter.structure(value, options[0])
    for option in options:
        try:
            return converter.structure(value, option)
        except (Invalid, BaseValidationError):
            continue
    raise Invalid(f"expected {_spell(hint)}, got {value!r}")


def _spell(hint) -> str:
    if _is_union(hint):
        return " or ".join(_spell(o) for o in typing.get_args(hint))
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return "a list"
    return JSON_TYPES.get(hint, getattr(hint, "__name__", str(hint)))


def _selection(converter, value, cls):
    value = expand(value, cls)
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise Invalid(f"expected a {cls.registry.kind} name or {{name: ..., ...}}, got {value!r}")
    try:
        entry = cls.registry[value["name"]]
    except UnknownComponent as error:
        raise Invalid(str(error)) from None
    fields = {k: v for k, v in value.items() if k != "name"}
    return cls(entry.name, converter.structure(fields, entry.config_type))


def expand(value: Any, cls: type) -> Any:
    """The short forms of a component: `adamw`, and `hub:org/name` for its first key."""
    if not isinstance(value, str):
        return value
    name, colon, argument = value.partition(":")
    return {"name": name, **({_first_key(cls, name): argument} if colon else {})}


def _first_key(cls, name) -> str:
    try:
        keys = _keys(cls.registry[name].config_type)
    except UnknownComponent as error:
        raise Invalid(str(error)) from None
    if not keys:
        raise Invalid(f"{cls.registry.kind} {name!r} takes no argument after ':'")
    return keys[0]


def _keys(cls) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def _problems(error: BaseException, where: str):
    """Flatten a cattrs exception tree into Problems with dotted keys."""
    if isinstance(error, ForbiddenExtraKeysError):
        known = [*_keys(error.cl), *getattr(error.cl, "OTHER_KEYS", ())]
        for key in sorted(error.extra_fields):
            yield Problem(
                _join(where, key), f"there is no such key.{nearest(key, known)} Known here: {', '.join(known)}"
            )
        return
    if not isinstance(error, BaseExceptionGroup):
        if isinstance(error, KeyError):
            yield Problem(_join(where, str(error.args[0])), "is required and missing")
        else:
            yield Problem(where, str(error))
        return
    for inner in error.exceptions:
        step = ""
        for note in getattr(inner, "__notes__", ()):
            name, index = getattr(note, "name", None), getattr(note, "index", None)
            name = index if isinstance(index, str) else name  # the key of a free section
            step = name if name is not None else f"[{index}]" if index is not None else step
        if isinstance(inner, KeyError):  # its own note repeats the missing key
            step = ""
        yield from _problems(inner, _join(where, step))


def _join(where: str, step: str) -> str:
    if not step:
        return where
    return f"{where}{step}" if step.startswith("[") or not where else f"{where}.{step}"
