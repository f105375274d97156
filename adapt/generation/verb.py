"""`adapt generate MODEL_OR_RUN --prompt ...`: text to stdout as it is committed, figures to stderr."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields as dataclass_fields
from functools import partial
from typing import Any

from adapt.errors import UserError
from adapt.generation.contract import Contract

SETTINGS = ("block_size", "rule", "threshold", "steps", "sub_block", "temperature", "top_k", "top_p")
"""Arguments that are the sampler's own fields; the sampler's config judges them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL_OR_RUN", help="run folder, model folder, Hub id, .gguf or pypi:<package>"
    )
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="text to continue; - reads it from stdin")
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's turn: apply the chat template")
    parser.add_argument(
        "--sampler",
        metavar="NAME",
        help="ar, block_diffusion, self_speculation, ... (default: what the model was made for)",
    )
    parser.add_argument("--block-size", type=int, metavar="B", help="slots denoised together (default: the model's)")
    parser.add_argument(
        "--rule",
        metavar="NAME",
        help="which slots a step reveals: confidence, topk, entropy, margin, sequential, random",
    )
    parser.add_argument(
        "--threshold", type=float, metavar="P", help="reveal what is surer than this (default: the model's, or 0.9)"
    )
    parser.add_argument(
        "--steps",
        type=int,
        metavar="T",
        help="denoising steps of a block at most (--rule topk, --sampler self_speculation)",
    )
    parser.add_argument(
        "--sub-block", type=int, metavar="G", help="reveal a block in groups of G slots from left to right"
    )
    parser.add_argument("--temperature", type=float, metavar="T", help="0 is greedy, the default")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw among the K most probable tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw among the tokens that make up this probability")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: 128")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times"
    )
    parser.add_argument("--seed", type=int, default=0, help="decides what is drawn at temperatures above 0")
    parser.add_argument(
        "--show-order", action="store_true", help="show in which denoising step each token was revealed"
    )


def generate(args: argparse.Namespace) -> int:
    prompt = sys.stdin.read().removesuffix("\n") if args.prompt == "-" else args.prompt
    from rich.console import Console

    from adapt.generation.load import eos_ids, open_model
    from adapt.generation.terminal import Stream, order_view, summary, text_of

    opened = open_model(args.model)
    choice = choose(args, opened.model, opened.tokenizer)
    ids = encode(opened.tokenizer, prompt, chat=args.chat)
    stream = Stream(opened.tokenizer, _write)
    result = choice.build().generate(
        opened.model,
        ids,
        max_new_tokens=args.max_new_tokens,
        eos_ids=eos_ids(opened.model, opened.tokenizer),
        stop=args.stop,
        decode=partial(text_of, opened.tokenizer),
        seed=args.seed,
        on_event=stream,
    )
    stream.finish(result.text)
    _write("\n")
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if args.show_order:
        console.print()
        console.print(order_view(opened.tokenizer, result, colour=console.color_system is not None))
    console.print(f"{choice.name}: {summary(result)}", style="dim", markup=False)
    return 0


def choose(args: argparse.Namespace, model: Any, tokenizer: Any):
    """The sampler asked for, or block diffusion where the model's config has what it takes."""
    from adapt.components import SamplerChoice, samplers
    from adapt.config import decode
    from adapt.registry import UnknownComponent

    contract = Contract.of(model.config)
    mask = contract.mask_token_id
    # a context seen in whole blocks was never trained for AR: without a block size, better ask for one
    block = contract.block_size is not None or contract.context_mask == "block"
    name = args.sampler or ("block_diffusion" if block and mask is not None else "ar")
    wanted = {key: value for key in SETTINGS if (value := getattr(args, key, None)) is not None}
    try:
        known = {f.name for f in dataclass_fields(samplers[name].config_type)}
    except UnknownComponent as error:
        raise UserError(str(error)) from None
    if "mask_token_id" in known and tokenizer.mask_token_id is not None:
        wanted["mask_token_id"] = tokenizer.mask_token_id
    exported = getattr(model.generation_config, "threshold", None)
    if "threshold" in known and exported is not None:
        wanted.setdefault("threshold", float(exported))
    return decode({"name": name, **wanted}, SamplerChoice, f"sampler {name}")


def encode(tokenizer: Any, prompt: str, *, chat: bool) -> list[int]:
    if chat:
        if not tokenizer.chat_template:
            raise UserError("--chat needs a chat template, and this model's tokenizer has none; leave --chat away")
        turns = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = tokenizer(prompt)["input_ids"]
    if not ids and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id]
    if not ids:
        raise UserError("the prompt is empty, and the tokenizer has no BOS token to start from; give some text")
    return ids


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
