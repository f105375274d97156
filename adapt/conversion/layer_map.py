"""Which layers of a decoder a conversion takes: `layers` less `keep`, each a list of ids, `all` or `every_N`; or `auto`,
all but those that are hardest to imitate."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adapt.errors import Problem, UserError
from adapt.pretrained.families import family, unsupported

Layers = str | tuple[int, ...]

AUTO = "auto"


def chosen_layers(layers: Layers, keep: Layers, count: int) -> tuple[int, ...]:
    """Ids from 0. `every_4` in `layers` is 0, 4, 8, ...; in `keep` it is 3, 7, 11, ..., so that the first layer is
    converted either way. Raises UserError with the key."""
    problems: list[Problem] = []
    taken, kept = _ids("layers", layers, count, 0, problems), _ids("keep", keep, count, -1, problems)
    chosen = tuple(sorted(taken - kept))
    if not problems and not chosen:
        problems.append(
            Problem("layers", f"nothing is left to convert of {count} layers: layers={layers}, keep={keep}")
        )
    if problems:
        raise UserError(problems)
    return chosen


def _ids(key: str, wish: Layers, count: int, first: int, problems: list[Problem]) -> set[int]:
    if not isinstance(wish, str):
        if wrong := sorted({i for i in wish if not 0 <= i < count}):
            what = f"there is no layer {', '.join(map(str, wrong))}: the model has {count}, from 0 to {count - 1}"
            problems.append(Problem(key, what))
        if len(set(wish)) < len(wish):
            problems.append(Problem(key, f"{list(wish)} names a layer twice"))
        return set(wish)
    if wish == "all":
        return set(range(count))
    if wish == "none":
        return set()
    if (every := re.fullmatch(r"every_(\d+)", wish)) and 0 < (n := int(every[1])) <= count:
        return set(range(first % n, count, n))
    if wish == AUTO and key == "layers":
        what = "auto measures how well a recurrence imitates each layer, which is for lawcat and mamba2; give"
        problems.append(Problem(key, f"{what} all, every_N with N up to {count}, or a list of ids"))
        return set()
    problems.append(
        Problem(key, f"{wish!r} is no layer map: give all, none, every_N with N up to {count}, or a list of ids")
    )
    return set()


@dataclass(frozen=True)
class AutoMap:
    """Candidates of `layers: auto`, and how many of them keep their attention."""

    candidates: tuple[int, ...]
    """Attention layers that `keep` does not name, ascending."""
    stay: int

    def easiest(self, errors: Mapping[int, float]) -> tuple[int, ...]:
        """All candidates but the `stay` with the largest errors (of equal ones, the first)."""
        hardest = sorted(self.candidates, key=lambda i: (-errors[i], i))[: self.stay]
        return tuple(i for i in self.candidates if i not in hardest)

    def spread(self) -> tuple[int, ...]:
        """As many, with those that stay evenly spread: what is planned while nothing is measured."""
        count = len(self.candidates)
        stay = {self.candidates[(i + 1) * count // self.stay - 1] for i in range(self.stay)}
        return tuple(i for i in self.candidates if i not in stay)


def auto_map(config: Any, keep: Layers, share: float) -> AutoMap:
    """A `share` of all layers keeps its attention, those of `keep` among them, and at least one. Raises UserError."""
    count, problems = config.num_hidden_layers, []
    kept = _ids("keep", keep, count, -1, problems)
    attention = {i for i, mixer in enumerate(token_mixers(config)) if mixer == "attention"}
    wanted = max(1, int(share * count + 0.5))
    stay, candidates = wanted - len(kept & attention), tuple(sorted(attention - kept))
    if stay < 0:
        what = f"names {len(kept & attention)} layers, and of {count} only {wanted} keep their attention"
        problems.append(Problem("keep", f"{what} at attention_share={share:g}; raise it, or name fewer"))
    elif len(candidates) <= stay:
        what = (
            f"nothing is left to convert: {len(candidates)} of {count} layers are attention that `keep` does not name"
        )
        problems.append(Problem("attention_share", f"{what}, and {stay} of them should stay; lower {share:g}"))
    if problems:
        raise UserError(problems)
    return AutoMap(candidates, stay)


def token_mixers(config: Any) -> list[str]:
    return getattr(config, "token_mixers", None) or ["attention"] * config.num_hidden_layers


def planned(config: Any, mixer: str, chosen: tuple[int, ...], options: dict[str, Any]) -> Any:
    """The config of the student with `mixer` in the layers `chosen`: `config` stays as it is. Raises UserError for what
    cannot be converted."""
    from adapt.models.configuration_adapted import AdaptedConfig

    refuse_attention(config)
    before = token_mixers(config)
    if done := [i for i in chosen if before[i] != "attention"]:
        what = f"layer {done[0]} is {before[done[0]]} already; only attention layers can be converted"
        raise UserError(Problem("layers", what))
    stated = (getattr(config, "mixer_options", None) or {}).get(mixer)
    if mixer in before and stated is not None and stated != options:
        what = f"the model has {mixer} layers with other settings already ({stated}), and all of a kind share them"
        raise UserError(Problem("", what))
    register_student()
    return AdaptedConfig.of(config, dict.fromkeys(chosen, mixer), {mixer: options})


def refuse_attention(config: Any) -> None:
    """Attention that a converted layer could not learn from, or that would be lost without a word."""
    from adapt.models.blocks import NAMES

    if (kind := family(config)) not in NAMES:
        raise UserError(unsupported(kind))
    for key in ("attn_logit_softcapping", "attn_logit_soft_cap"):
        if getattr(config, key, None):
            what = f"{key}={getattr(config, key)}: the teacher's soft-capped scores are not supported"
            raise UserError(Problem("model.base", what))
    if getattr(config, "attention_sink", None) or getattr(config, "attn_sinks", None):
        raise UserError(Problem("model.base", "attention sinks are not supported: their mass has no counterpart here"))
    types = getattr(config, "layer_types", None)
    if getattr(config, "sliding_window", None) and (types is None or "sliding_attention" in types):
        what = (
            f"its attention has a sliding window of {config.sliding_window} tokens, and a converted layer has none; "
            "take a base with full attention (Mistral-7B-v0.3), or state it in the base's config.json: "
            '"sliding_window": null'
        )
        raise UserError(Problem("model.base", what))


def register_student() -> None:
    """transformers' Auto classes know the student from now on."""
    from adapt.models.modeling_adapted import register

    register()
