"""Block-diffusion decoding for this model, in plain transformers (written by adapt; it needs torch and transformers).

    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    model.generate(**inputs, custom_generate=FOLDER, trust_remote_code=True, max_new_tokens=128)

The model's config says how it was trained, and with that how it decodes: `block_size`, `mask_token_id`, `prediction`
(shifted | inplace), `context_mask` (causal | block | document), `noisy_attention`, `block_first`, `threshold`.

Rows of a batch are decoded one after the other; each has a cache (but for `document`, where any new token changes the
state of all others). Legend: W slots of a block, S tokens in the cache, V vocabulary.
"""

import torch
from transformers import DynamicCache


def generate(
    model,
    input_ids=None,
    inputs=None,
    attention_mask=None,
    generation_config=None,
    max_new_tokens=None,
    max_length=None,
    block_size=None,
    threshold=None,
    do_sample=None,
    temperature=None,
    eos_token_id=None,
    pad_token_id=None,
    streamer=None,
    **others,
):
    """[B, T] left-padded ids -> [B, T + new] ids, rows that end early filled up with the pad token.

    `block_size`: slots denoised together (default: the config's). `threshold`: reveal every slot whose token is more
    probable than this, and always the best one; lower is faster and less exact, 1 reveals one slot per forward.
    `do_sample`, `temperature`: draw tokens (with torch's global generator) instead of taking the most probable ones.
    Raises ValueError for arguments of `generate` that block diffusion does not have.
    """
    ignored = {"use_cache", "return_dict_in_generate", "logits_processor", "stopping_criteria", "synced_gpus", "prefix"}
    if unknown := sorted(k for k, v in others.items() if v is not None and v is not False and k not in ignored):
        raise ValueError(f"block-diffusion decoding has no argument {', '.join(unknown)}; leave it out")
    if others.get("logits_processor") or others.get("stopping_criteria"):
        raise ValueError("block-diffusion decoding takes no logits_processor and no stopping_criteria; leave them out")
    ids = input_ids if input_ids is not None else inputs
    if ids is None or ids.ndim != 2 or ids.shape[1] == 0:
        raise ValueError("give a prompt: input_ids of shape [batch, tokens], with at least one token")
    settings = generation_config or model.generation_config

    def setting(value, name, default=None):
        return next((v for v in (value, getattr(settings, name, None), default) if v is not None), None)

    new = max_new_tokens if max_new_tokens is not None else max_length and max_length - ids.shape[1]
    new = setting(new, "max_new_tokens", 128)
    eos = setting(eos_token_id, "eos_token_id", [])
    eos = set(eos if isinstance(eos, list | tuple) else [eos])
    pad = setting(pad_token_id, "pad_token_id", min(eos, default=0))
    heat = setting(temperature, "temperature", 1.0) if setting(do_sample, "do_sample", False) else 0.0
    if attention_mask is None:
        attention_mask = torch.ones_like(ids)
    rows = []
    for row, real in zip(ids, attention_mask.bool(), strict=True):
        prompt = row[real].tolist()
        room = min(new, getattr(model.config, "max_position_embeddings", len(prompt) + new) - len(prompt))
        if room < 1:
            raise ValueError(f"the prompt has {len(prompt)} tokens, all the model's context; shorten it")
        rows.append(Decoder(model, eos, heat, block_size, threshold).decode(prompt, room))
    longest = max(map(len, rows))
    answers = torch.tensor([r + [pad] * (longest - len(r)) for r in rows], device=ids.device)
    out = torch.cat([ids, answers], 1)
    if streamer is not None:
        streamer.put(out[0, ids.shape[1] :].cpu())
        streamer.end()
    return out


class Decoder:
    def __init__(self, model, eos, temperature, block_size, threshold):
        config = model.config
        self.model, self.eos, self.temperature = model, eos, temperature
        self.context = getattr(config, "context_mask", "causal")
        self.shift = int(getattr(config, "prediction", "shifted") == "shifted")
        self.from_head = self.shift or getattr(config, "block_first", "ar") == "ar"
        self.noisy_causal = getattr(config, "noisy_attention", "bidirectional") == "causal"
        self.mask_id = config.mask_token_id
        self.size = block_size or getattr(config, "block_size", None)
        if self.size is None and self.context != "document":
            raise ValueError("the model's config states no block_size; give block_size=8 (8 to 32 is usual)")
        self.threshold = getattr(config, "threshold", 0.9) if threshold is None else threshold
        if not 0 < self.threshold <= 1:
            raise ValueError(
                f"threshold={self.threshold} must lie in (0, 1]; 0.9 is usual, 1 reveals one slot per step"
            )
        if "flash" in config._attn_implementation or "flex" in config._attn_implementation:
            raise ValueError("flash and flex attention take no mask of ours: load with attn_implementation='sdpa'")

    @torch.no_grad()
    def decode(self, prompt, limit):
        """The new tokens, up to and including the first EOS."""
        decode = self.decode_document if self.context == "document" else self.decode_cached
        return decode(prompt, limit)

    def decode_cached(self, prompt, limit):
        cache, answer = DynamicCache(), []
        whole = len(prompt) if self.context == "causal" else len(prompt) // self.size * self.size
        given, head = prompt[whole:], None
        if whole:
            head = self.forward(cache, prompt[:whole], 0, self.clean_mask(whole, 0), keep=1)
        position = whole
        while True:
            width = min(self.size, len(given) + limit - len(answer))
            block = given + [self.mask_id] * (width - len(given))
            if not given and head is not None and self.from_head:
                block[0] = self.choose(head)[0][0]
            seen = torch.ones(width, position + width, dtype=torch.bool)
            if self.noisy_causal:
                seen = seen.tril(position)
            self.fill(block, len(given), lambda b, slots, at=position, m=seen: self.denoise(cache, b, slots, at, m))
            if (end := self.take(answer, block[len(given) :], limit)) is not None:
                return end
            head = self.forward(cache, block, position, self.clean_mask(width, position), keep=1)
            position, given = position + width, []

    def decode_document(self, prompt, limit):
        text, answer = prompt + [self.mask_id] * limit, []
        size = self.size or limit
        seen = torch.ones(len(text), len(text), dtype=torch.bool)
        if self.noisy_causal:
            seen = seen.tril()
        while True:
            start = len(prompt) + len(answer)
            block = text[start : start + size]

            def logits(block, slots, start=start):
                text[start : start + len(block)] = block
                keep = torch.tensor(slots) + start - self.shift
                return self.forward(None, text, 0, seen, keep)

            self.fill(block, 0, logits)
            text[start : start + len(block)] = block
            if (end := self.take(answer, block, limit)) is not None:
                return end

    def fill(self, block, given, logits):
        """Reveal the masked slots of `block`, in place."""
        open = [i for i, t in enumerate(block) if t == self.mask_id and i >= given]
        while open:
            settled = block[given : open[0]]
            if not self.eos.isdisjoint(settled):
                return  # nothing behind an EOS can matter
            tokens, confidence = self.choose(logits(block, open))
            best = max(confidence)
            first = confidence.index(best)
            for i in [i for i, c in enumerate(confidence) if c > self.threshold or i == first][::-1]:
                block[open.pop(i)] = tokens[i]

    def take(self, answer, tokens, limit):
        """Append a block's tokens; the answer once it is complete, else None."""
        for token in tokens:
            answer.append(token)
            if token in self.eos or len(answer) == limit:
                return answer
        return None

    def choose(self, logits):
        """[1, K, V] -> K tokens and how probable each is, as drawn."""
        logits = logits[0].float() if logits.dtype in (torch.float16, torch.bfloat16) else logits[0].clone()
        logits[:, self.mask_id] = float("-inf")
        probabilities = (logits / self.temperature if self.temperature else logits).softmax(-1)
        tokens = torch.multinomial(probabilities, 1)[:, 0] if self.temperature else logits.argmax(-1)
        return tokens.tolist(), probabilities.gather(-1, tokens[:, None])[:, 0].tolist()

    def denoise(self, cache, block, slots, position, seen):
        logits = self.forward(cache, block, position, seen, torch.tensor(slots) - self.shift)
        cache.crop(-len(block))
        return logits

    def clean_mask(self, width, position):
        """[W, S + W] what text sees: what stands before it, or its whole block and the blocks before."""
        i, j = torch.arange(position, position + width)[:, None], torch.arange(position + width)
        return j <= i if self.context == "causal" else j // self.size <= i // self.size

    def forward(self, cache, tokens, position, seen, keep):
        device = next(self.model.parameters()).device
        seen = seen[None, None].to(device)
        if self.model.config._attn_implementation == "eager":  # it adds its mask, and a bool would be taken as 0 and 1
            floor = torch.finfo(self.model.dtype).min
            seen = torch.zeros(seen.shape, dtype=self.model.dtype, device=device).masked_fill(~seen, floor)
        return self.model(
            input_ids=torch.tensor([tokens], device=device),
            position_ids=torch.arange(position, position + len(tokens), device=device)[None],
            attention_mask=seen,
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=keep if isinstance(keep, int) else keep.to(device),
        ).logits
