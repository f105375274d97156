"""README.md of an export: what it is, what was done to it with which data, what came out, how to use it."""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from importlib import resources
from typing import Any

from adapt.config.schema import Recipe
from adapt.export.code import carries_code

DTYPE_WORDS = {"float32": "32-bit floats", "bfloat16": "bfloat16", "float16": "float16"}


def model_card(
    *,
    recipe: Recipe,
    resolved_yaml: str,
    results: dict[str, Any],
    provenance: dict[str, Any],
    config,
    extra: dict[str, Any],
    check: dict[str, Any],
    chat: bool,
) -> str:
    import jinja2
    import yaml

    base = {"base_model": recipe.model.base, **provenance.get("base", {})}
    data = [_dataset(entry) for entry in provenance.get("data", [])]
    front = {
        "base_model": base["base_model"],
        "base_model_relation": "finetune",
        "license": base.get("license"),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["adapt", recipe.objective.name.rpartition(".")[2].replace("_", "-"), config.model_type],
        "datasets": sorted({d["hub"] for d in data if d["hub"]}),
    }
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True).from_string(
        (resources.files("adapt.export") / "card.md").read_text()
    )
    return template.render(
        front=yaml.safe_dump({k: v for k, v in front.items() if v}, sort_keys=False, allow_unicode=True).strip(),
        name=recipe.run.name,
        base=base,
        on_hub=_on_hub(base["base_model"]),
        method=_method(recipe.objective),
        sources=_sources(recipe.objective),
        recipe=recipe,
        data=data,
        rows=_rows(results),
        interpolation=results.get("interpolation"),
        yaml=resolved_yaml.strip(),
        config=config,
        extra=extra,
        check=check,
        dtype=DTYPE_WORDS[check["dtype"]],
        conversions=[c.name for c in recipe.model.conversions],
        chat=chat,
        code=carries_code(config),
        mixers=_mixers(config),
        block=extra.get("block_size"),
    )


def _method(choice) -> str:
    """The first paragraph of the objective's own description: of its factory, its config, or its module."""
    entry = choice.registry[choice.name]
    module = sys.modules.get(entry.factory.__module__)
    for thing in (entry.factory, entry.config_type, module):
        text = getattr(thing, "__doc__", None) or ""
        if text and not text.startswith(f"{entry.config_type.__name__}("):  # a dataclass's generated signature
            return " ".join(inspect.cleandoc(text).split("\n\n")[0].split())
    return choice.name


def _sources(choice) -> list[str]:
    """`SOURCES` of the objective's module: papers and code it follows, one line each."""
    module = sys.modules.get(choice.registry[choice.name].factory.__module__)
    return list(getattr(module, "SOURCES", ()))


def _mixers(config) -> str:
    """`22 x gated_linear, 8 x attention`; empty for stock models."""
    count = Counter(getattr(config, "token_mixers", None) or ())
    return ", ".join(f"{n} x `{name}`" for name, n in count.most_common())


def _dataset(entry: dict[str, Any]) -> dict[str, Any]:
    """A row of the data table, from the manifest of a dataset's shards."""
    source = entry.get("source")
    chosen = source if isinstance(source, dict) else {"name": source}
    hub = entry.get("hub") or (chosen.get("id") or entry.get("id") if chosen.get("name") == "hub" else None)
    licences = [name for name in entry.get("licences") or {} if name != "(others)"]
    return {
        "name": str(entry.get("name") or entry.get("label") or chosen.get("name") or "data"),
        "hub": hub,
        "use": entry.get("use", ""),
        "documents": _number(entry.get("documents")),
        "tokens": _number(entry.get("tokens")),
        "license": entry.get("license") or entry.get("licence") or ", ".join(licences[:5]) or "not stated",
    }


def _rows(results: dict[str, Any]) -> list[dict[str, str]]:
    before, after = results.get("before") or {}, results.get("after") or {}
    rows = []
    for metric in dict.fromkeys([*before, *after]):
        was, now = before.get(metric), after.get(metric)
        both = all(isinstance(v, int | float) for v in (was, now)) and was
        rows.append(
            {
                "metric": metric,
                "before": _number(was),
                "after": _number(now),
                "change": f"{(now - was) / abs(was):+.1%}" if both else "",
            }
        )
    return rows


def _number(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return "" if value is None else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _on_hub(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and ":" not in name
