"""LoRA through PEFT's injection: the model stays the causal LM it was, with adapters inside its linears."""

from __future__ import annotations

from adapt.config.schema import Lora
from adapt.errors import Problem, UserError, nearest

ADAPTER = "default"


def lora_problems(model, lora: Lora) -> list[Problem]:
    """What keeps these adapters from this model; it may be on the meta device."""
    linear = _linear(model)
    ends = {name.rpartition(".")[2] for name in linear}
    problems = [
        Problem(
            "trainable.lora.targets",
            f"{t!r} matches no linear module.{nearest(t, ends)} There are: {', '.join(sorted(ends))}",
        )
        for t in lora.targets
        if not any(_is(name, t) for name in linear)
    ]
    if lora.rank < 1:
        problems.append(Problem("trainable.lora.rank", f"must be at least 1; got {lora.rank}"))
    if model.config.tie_word_embeddings and "lm_head" in lora.targets:
        problems.append(
            Problem("trainable.lora.targets", "lm_head is tied to the embedding here and cannot be merged back")
        )
    if not lora.targets:
        problems.append(Problem("trainable.lora.targets", "is empty: nothing would train"))
    return problems


def adapted_names(model, lora: Lora) -> list[str]:
    """The parameters' names as they will be with adapters, without putting any in."""
    adapted = {name for name in _linear(model) if any(_is(name, t) for t in lora.targets)}
    names = []
    for name, _ in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        names.append(f"{module}.base_layer.{leaf}" if module in adapted else name)
    return names + [f"{name}.lora_{x}.{ADAPTER}.weight" for name in sorted(adapted) for x in "AB"]


def _linear(model) -> list[str]:
    from torch import nn

    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def _is(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def add_lora(model, lora: Lora, seed: int = 0):
    """Put adapters into every linear module whose name ends in one of `lora.targets`, and freeze everything else. They
    start as `start_of` says; on the meta device they stay empty."""
    from peft import LoraConfig, inject_adapter_in_model
    from torch import nn

    if problems := lora_problems(model, lora):
        raise UserError(problems)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
        bias="none",
        task_type="CAUSAL_LM",
    )
    # Inside another module: where PEFT sees a DeepseekV3 it takes `down_proj` for an expert's, and leaves it out.
    inject_adapter_in_model(config, nn.ModuleDict({"model": model}), ADAPTER)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name and not parameter.is_meta:
            parameter.data.copy_(start_of(name, parameter.shape, seed))
    return model


def start_of(name: str, shape, seed: int):
    """float32: PEFT's own start (uniform within sqrt(1 / inputs), and zero), drawn for each adapter by its name, so that
    a rank that holds some of its rows needs no other adapter."""
    import torch

    from adapt.data.noise import generator

    if ".lora_B." in name:
        return torch.zeros(shape)
    bound = shape[-1] ** -0.5
    drawn = generator(seed, *name.encode()).uniform(-bound, bound, tuple(shape))
    return torch.from_numpy(drawn.astype("float32"))


def merge_lora(model):
    """Fold the adapters into the weights and take them out again, in place: for export. What is on the meta device just
    gets the shape."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            if not module.get_base_layer().weight.is_meta:
                module.merge(safe_merge=True)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
    model._hf_peft_config_loaded = False
    return model
