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


def read_yaml(text: str) -> Any:
    return yaml.load(text, Loader)


def write_yaml(data: Any) -> str:
    return yaml.dump(data, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=110)
