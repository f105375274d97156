"""YAML as people mean it: `2e-5` is a number, `10:00:00` and `2026-01-01` are text, a key given twice is an error."""

from __future__ import annotations

import re
from typing import Any

import yaml

# YAML 1.1 would also read 10:00:00 (in base sixty), 010 (in base eight) and 2026-01-01 as something else than text.
INTEGER = re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$")
NUMBER = re.compile(
    r"""^(?:[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9_]*)\.[0-9_]*)(?:[eE][-+]?[0-9]+)?
         |[-+]?(?:0|[1-9][0-9_]*)[eE][-+]?[0-9]+
         |[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)
OURS = ("int", "float", "timestamp", "value")


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the rules above."""


class Dumper(yaml.SafeDumper):
    """Quotes whatever `Loader` would not read back as text."""


for _class in (Loader, Dumper):
    _class.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in rules if tag.rpartition(":")[2] not in OURS]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _class.add_implicit_resolver("tag:yaml.org,2002:int", INTEGER, list("-+0123456789"))
    _class.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+0123456789."))


def _mapping(loader: Loader, node: yaml.MappingNode) -> dict[str, Any]:
    loader.flatten_mapping(node)
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        problem = "a key must be text" if not isinstance(key, str | int | float) else ""
        problem = f"the key {key!r} is given twice" if not problem and str(key) in result else problem
        if problem:
            raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
        result[str(key)] = loader.construct_object(value_node, deep=True)
    return result


Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value.replace("_", "")))
Dumper.ignore_aliases = lambda *_: True


DEPTH, VALUES = 64, 200_000
"""At most so deep, and so many, aliases written out: one that holds itself, or doubles the one before, is no recipe."""


def read_yaml(text: str) -> Any:
    """Raises yaml.YAMLError."""
    try:
        data = yaml.load(text, Loader)
    except RecursionError:
        raise yaml.YAMLError(f"it is nested more than {DEPTH} levels deep") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # PyYAML's, for `!!int x`, `!!bool x`
        raise yaml.YAMLError(f"a value is not what its tag says: {error}") from None
    todo, seen = [(data, 0)], 0
    while todo:
        value, depth = todo.pop()
        seen += 1
        if depth > DEPTH:
            raise yaml.YAMLError(f"it is nested more than {DEPTH} levels deep")
        if seen > VALUES:
            raise yaml.YAMLError(f"it has more than {VALUES:,} values, with its aliases written out")
        held = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple | set) else ()
        todo += [(inner, depth + 1) for inner in held]
    return data


def write_yaml(data: Any) -> str:
    return yaml.dump(data, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=110)
