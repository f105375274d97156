"""One token after the other, from a cache. The yardstick of every faster sampler."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from adapt.components import samplers
from adapt.generation.base import BatchSampler, Sampler
from adapt.generation.rows import Padded, Row, device_of
from adapt.generation.sampling import Sampling, propose


@dataclass(frozen=True, kw_only=True)
class ArConfig(Sampling):
    pass


class ArSampler(BatchSampler):
    def __init__(self, config: ArConfig):
        self.config = config

    def decode(self, model, rows: list[Row], plan) -> None:
        device, forbidden = device_of(model), getattr(model.config, "mask_token_id", None)
        padded = Padded.of(rows, device)
        ids, positions, real = padded.ids, padded.positions, padded.real
        cache = None  # the model makes one of its own kind: sliding windows, running states
        while True:
            out = model(
                input_ids=ids,
                position_ids=positions,
                attention_mask=None if bool(real.all()) else real.long(),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache, uniform = out.past_key_values, None
            if self.config.temperature > 0:
                uniform = torch.stack([r.uniform(1) for r in rows]).to(device)
            tokens = propose(out.logits, self.config, uniform, forbidden).tokens  # [R, 1]
            for row, token in zip(rows, tokens[:, 0].tolist(), strict=True):
                row.forwards += 1
                row.reveal([len(row.tokens)], [token], 0)
                row.commit([token])
            going = [i for i, r in enumerate(rows) if r.result is None]
            if not going:
                return
            if len(going) < len(rows):
                keep = torch.tensor(going, device=device)
                cache.batch_select_indices(keep)
                rows = [rows[i] for i in going]
                tokens, positions, real = tokens[keep], positions[keep], real[keep]
            ids, positions = tokens, positions[:, -1:] + 1
            real = torch.cat([real, real.new_ones(len(rows), 1)], 1)


@samplers.register("ar")
def ar(config: ArConfig) -> Sampler:
    return ArSampler(config)
