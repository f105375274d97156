"""From a pretrained decoder to the student with other token mixers: the same tensors, in their places."""

from __future__ import annotations

from typing import Any

from adapt.conversion.base import fill_rows, filled_rows
from adapt.pretrained.families import dense_latent


def with_mixers(model: Any, config: Any, seed: int) -> Any:
    """The student of `config` (adapt.conversion.layer_map.planned) with the weights of `model`, which it shares: no
    number of the base changes. What the mixers add starts as they say, in float32, the same on every rank.

    A model on the meta device stays there. Raises RuntimeError where a weight of the base has no place.
    """
    import torch

    from adapt.models.modeling_adapted import AdaptedForCausalLM

    config.dtype = model.config.dtype
    config._attn_implementation = model.config._attn_implementation
    with torch.device("meta"):
        student = AdaptedForCausalLM(config)
    missing, unexpected = student.load_state_dict(model.state_dict(), strict=False, assign=True)
    student.tie_weights()
    created = created_parameters(student)
    lost = [name for name in missing if name not in created and not name.startswith("lm_head")]
    if unexpected or lost:
        raise RuntimeError(f"weights without a place: {', '.join([*unexpected, *lost][:5])}")
    if model.device.type != "meta":
        _start(student, model, seed)
    if model.generation_config is not None:
        student.generation_config = type(model.generation_config).from_dict(model.generation_config.to_dict())
    fill_rows(student, filled_rows(model))
    return student.train(model.training)


def _start(student: Any, model: Any, seed: int) -> None:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        read = model.state_dict().keys()  # what is on the meta device in an outline comes from its files
        for prefix, module in student.named_modules():
            new = [n for n, p in module.named_parameters(recurse=False) if p.is_meta and f"{prefix}.{n}" not in read]
            if new:
                module.to_empty(device=model.device, recurse=False)
                module.initialise()
    theirs = dict(model.named_buffers())
    for name, buffer in list(student.named_buffers()):
        if buffer.is_meta:  # rotary frequencies: not part of the state dict
            owner, _, leaf = name.rpartition(".")
            setattr(student.get_submodule(owner), leaf, theirs[name].detach().clone())


def learning_layers(model: Any) -> tuple[int, ...]:
    """Layers that can learn from the attention they replace (objective `attention_transfer`)."""
    layers = enumerate(model.get_decoder().layers)
    return tuple(i for i, layer in layers if getattr(type(layer.self_attn), "learns", False))


def converted_layers(model: Any) -> tuple[int, ...]:
    """Layers whose token mixer is not their family's attention (objective `layer_alignment`): as the config of a student
    says, or all of the stock class for latent attention."""
    if dense_latent(model.config):
        return tuple(range(model.config.num_hidden_layers))
    mixers = getattr(model.config, "token_mixers", None) or ()
    return tuple(i for i, mixer in enumerate(mixers) if mixer != "attention")


def created_parameters(model: Any) -> set[str]:
    """Names of the parameters that the base did not have: what a conversion created. Empty for other models."""
    found = set()
    for prefix, module in model.named_modules():
        if created := getattr(type(module), "created", None):
            found |= {f"{prefix}.{created}.{name}" for name, _ in module.get_submodule(created).named_parameters()}
    return found
