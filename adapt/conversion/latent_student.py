"""The pretrained model -> the same model with latent attention: all else is taken over as it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adapt.config.schema import Recipe
from adapt.conversion.base import fill_rows, filled_rows
from adapt.conversion.calibration import Inputs, attention_inputs, latent_rms, norm_gains, training_rows
from adapt.conversion.latent_config import Layout, student_config
from adapt.conversion.latent_ranks import allocated, latent_room
from adapt.conversion.latent_shape import MULTIPLE, TeacherShape, most_kv_rank, round_up
from adapt.conversion.latent_start import Attention, LayerStart, rope_dims, start_layer
from adapt.errors import Problem, UserError

if TYPE_CHECKING:
    from adapt.conversion.xecomla import XEcomlaConfig


@torch.no_grad()
def build(
    model: nn.Module, layout: Layout, wish: XEcomlaConfig, recipe: Recipe, starts: Starts | None = None
) -> nn.Module:
    """The student with the ranks of `layout`, in the teacher's dtype and on its device; the two share what is not
    converted. On the meta device there is only the shape of it. `starts`: what `starts_of` says, where it is known."""
    if next(model.parameters()).is_meta:
        return _empty(model, student_config(model.config, layout)).eval()
    found: dict[int, dict[str, Tensor]] = {}
    starts = starts_of(model, layout, wish, recipe) if starts is None else starts
    for (index, start), rank in zip(starts, layout.kv_ranks, strict=True):
        found[index] = start if isinstance(start, dict) else _cut(start, rank, layout, wish)
        if layout.kv_norm and "kv_a_layernorm.weight" not in found[index]:
            found[index]["kv_a_layernorm.weight"] = torch.ones(rank, device=model.device)
        found[index] = {name: weight.to(model.dtype) for name, weight in found[index].items()}
    student = _empty(model, student_config(model.config, layout))
    converted = tuple(f"model.layers.{i}.self_attn." for i in found)
    weights = {k: v.detach() for k, v in model.state_dict().items() if not k.startswith(converted)}
    for index, layer in found.items():
        weights |= {f"model.layers.{index}.self_attn.{name}": weight for name, weight in layer.items()}
    student.load_state_dict(weights, assign=True)
    student.tie_weights()
    with torch.device(model.device):  # frequencies are in no state dict
        student.model.rotary_emb = type(student.model.rotary_emb)(config=student.config)
    fill_rows(student, filled_rows(model))
    if model.generation_config is not None:
        student.generation_config = type(model.generation_config).from_dict(model.generation_config.to_dict())
    return student.eval()


def _empty(model: nn.Module, config: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, dtype=model.dtype, attn_implementation=model.config._attn_implementation
        )


@dataclasses.dataclass(frozen=True)
class Start:
    layer: LayerStart
    inputs: Inputs | None


Starts = Iterable[tuple[int, Start | dict[str, Tensor]]]
"""Of each converted layer, with its number; parameters where they are drawn."""


@torch.no_grad()
def starts_of(model: nn.Module, layout: Layout, wish: XEcomlaConfig, recipe: Recipe) -> Starts:
    """One by one; no rank of `layout` is read but that of drawn parameters."""
    decoder, teacher = model.get_decoder().layers, TeacherShape.of(model.config)
    if wish.start == "random":
        generator = torch.Generator().manual_seed(recipe.run.seed)
        for index in layout.layers:
            std = model.config.initializer_range
            yield index, _random(decoder[index].self_attn, teacher, layout, std, generator)
        return
    inputs: dict[int, Inputs] = {}
    qk_norm = any(hasattr(decoder[i].self_attn, "q_norm") for i in layout.layers)
    if wish.svd == "covariance" or wish.latent_norm in ("ballast", "calibrated") or qk_norm:
        tokens = wish.calibration_tokens
        inputs = attention_inputs(model, training_rows(recipe, tokens), layout.layers, tokens)
    dims = rope_dims(wish.rope, teacher.head_dim, layout.nope_dim, layout.rope_dim)
    for index in layout.layers:
        seen = inputs.get(index)
        weights = weights_of(decoder[index].self_attn, teacher, seen, keep_biases=layout.biases)
        covariance = seen.covariance if seen is not None and wish.svd == "covariance" else None
        yield index, Start(start_layer(weights, teacher, dims, wish.shared_key, covariance), seen)


def free_ranks(starts: list[LayerStart], layout: Layout, wish: XEcomlaConfig, config: Any) -> list[int]:
    """The rank of each layer, of `kv_energy` (of each for itself) or `kv_budget` (of all together); `config`: the base's."""
    teacher = TeacherShape.of(config)
    full = most_kv_rank(teacher, len(starts[0].dims.joint), ballast=layout.ballast)
    if wish.kv_energy is not None:
        return [round_up(start.kv.rank_of_energy(wish.kv_energy) + layout.ballast, full) for start in starts]
    room = latent_room(wish.kv_budget, teacher, config.num_hidden_layers, len(layout.layers), layout.rope_dim)
    energies = [start.kv.values.square().tolist() for start in starts]
    return allocated(energies, room, full // MULTIPLE * MULTIPLE, layout.ballast)


def _cut(start: Start, rank: int, layout: Layout, wish: XEcomlaConfig) -> dict[str, Tensor]:
    """Parameters of a layer."""
    rms = latent_rms(start.inputs.sample) if wish.latent_norm in ("ballast", "calibrated") else None
    found = start.layer.weights(rank, layout.q_rank, wish.sigma, rms, layout.ballast)
    if bad := [name for name, weight in found.items() if not bool(weight.isfinite().all())]:
        raise UserError(
            Problem("model.base", f"a layer's {bad[0]} comes out non-finite: are the base's weights finite?")
        )
    return _empty_biases(layout, start.layer.shape, rank, start.layer.rope_key.device) | found


def weights_of(layer: nn.Module, shape: TeacherShape, seen: Inputs | None, *, keep_biases: bool) -> Attention:
    """A layer's projections, norms of queries and keys folded into them by their mean effect on `seen`."""
    q, k = layer.q_proj.weight, layer.k_proj.weight
    if hasattr(layer, "q_norm"):
        q = norm_gains(q, shape.heads, layer.q_norm.weight, seen.sample)
        k = norm_gains(k, shape.kv_heads, layer.k_norm.weight, seen.sample)
    projections = (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj)
    biases = [p.bias if keep_biases else None for p in projections]
    return Attention(q, k, layer.v_proj.weight, layer.o_proj.weight, *biases)


def _random(
    layer: nn.Module, teacher: TeacherShape, layout: Layout, std: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """The control of the paper's tables: drawn as transformers draws a new model's; the output projection is kept."""
    rank, queries = layout.kv_ranks[0], teacher.heads * (layout.nope_dim + layout.rope_dim)
    sizes = {
        "kv_a_proj_with_mqa": (rank + layout.rope_dim, teacher.hidden),
        "kv_b_proj": (teacher.heads * (layout.nope_dim + teacher.head_dim), rank),
    }
    if layout.q_rank is None:
        sizes["q_proj"] = (queries, teacher.hidden)
    else:
        sizes |= {"q_a_proj": (layout.q_rank, teacher.hidden), "q_b_proj": (queries, layout.q_rank)}
    drawn = {f"{n}.weight": torch.randn(size, generator=generator) * std for n, size in sizes.items()}
    device = layer.o_proj.weight.device
    found = {n: w.to(device) for n, w in drawn.items()} | {"o_proj.weight": layer.o_proj.weight}
    return _empty_biases(layout, teacher, rank, device) | found


def _empty_biases(layout: Layout, shape: TeacherShape, rank: int, device: torch.device) -> dict[str, Tensor]:
    """Zeros in all places that the student has for them."""
    sizes = {}
    if layout.biases:
        query = "q_proj" if layout.q_rank is None else "q_b_proj"
        sizes[query] = shape.heads * (layout.nope_dim + layout.rope_dim)
    if layout.biases or layout.ballast:
        sizes |= {"kv_a_proj_with_mqa": rank + layout.rope_dim, "o_proj": shape.hidden}
    return {f"{name}.bias": torch.zeros(size, device=device) for name, size in sizes.items()}
