"""One idiom for everything a recipe selects by name.

    @objectives.register("meap")
    def meap(config: MeapConfig) -> Objective: ...

The annotation of the factory's first parameter is the component's config: a frozen keyword-only dataclass, whose
fields are exactly the keys the recipe may give. A name that is not registered is tried as an entry point of the group
`adapt.<kind>` and as a dotted path (`my_package.objectives.mine`), so nobody has to fork to extend.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import pkgutil
import typing
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from typing import Any

from adapt.errors import nearest


class UnknownComponent(LookupError):
    pass


@dataclass(frozen=True)
class Entry:
    name: str
    factory: Callable[..., Any]
    config_type: type
    builds: Any = None
    """What the factory is annotated to return: its class attributes are facts known before anything is built."""


class Registry:
    def __init__(self, kind: str, package: str, what: str):
        """`kind` names the registry in errors, `package` holds the built-in entries (imported on first look-up),
        `what` says what may be registered and who calls it."""
        self.kind, self.package, self.what = kind, package, what
        self._entries: dict[str, Entry] = {}
        self._loaded = False

    def register(self, name: str):
        def decorate(factory):
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._entries[name] = _entry(name, factory)
            return factory

        return decorate

    def names(self) -> list[str]:
        """Built-in and registered ones, and those that installed packages offer as entry points."""
        self._load()
        return sorted({*self._entries, *(p.name for p in importlib.metadata.entry_points(group=f"adapt.{self.kind}"))})

    def __getitem__(self, name: str) -> Entry:
        if name not in self._entries and name.isidentifier():
            module = f"{self.package}.{name}"  # most components live in a file of their own name: the others wait
            if importlib.util.find_spec(module):
                importlib.import_module(module)
        if name not in self._entries:
            self._load()
        if name in self._entries:
            return self._entries[name]
        try:
            for point in importlib.metadata.entry_points(group=f"adapt.{self.kind}", name=name):
                return _entry(name, point.load())
            module, _, attribute = name.rpartition(".")
            if module:
                return _entry(name, getattr(importlib.import_module(module), attribute))
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            raise UnknownComponent(f"cannot import {self.kind} {name!r}: {error}") from None
        known = self.names()
        raise UnknownComponent(
            f"no {self.kind} is called {name!r}.{nearest(name, known)} "
            f"Known: {', '.join(known)}; or give a dotted import path."
        )

    def _load(self) -> None:
        if self._loaded:
            return
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")
        self._loaded = True


def _entry(name: str, factory: Callable[..., Any]) -> Entry:
    hints = typing.get_type_hints(factory)
    builds = hints.pop("return", None)
    config_type = next(iter(hints.values()), None)
    if not is_dataclass(config_type):
        raise TypeError(f"{name!r}: the first parameter must be annotated with a config dataclass, got {config_type}")
    return Entry(name, factory, config_type, builds)


@dataclass(frozen=True)
class Selection:
    """A component chosen by a recipe: its registered name and its own, already validated config.

    Subclasses bind a registry; a recipe field of that type accepts `{name: ..., **fields}` or a bare name.
    """

    name: str
    config: Any
    registry: typing.ClassVar[Registry]

    def declares(self, fact: str) -> bool:
        """`needs_teacher` and the like: a property of the config, where that decides it, or a class attribute of what
        will be built, by the factory's return annotation."""
        if hasattr(self.config, fact):
            return bool(getattr(self.config, fact))
        return bool(getattr(self.registry[self.name].builds, fact, False))

    def build(self, *args: Any, **kwargs: Any) -> Any:
        return self.registry[self.name].factory(self.config, *args, **kwargs)
