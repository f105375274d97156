"""Export: stock architecture, the dtype asked for, proven by loading it back with plain transformers.

Order: cast a copy -> write it into a hidden folder beside the target -> load that folder as any user would -> compare
weights (bit for bit) and logits -> model card -> rename. Whatever fails before the rename leaves no folder.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adapt.config.schema import Recipe
from adapt.console import printable
from adapt.errors import Problem, UserError
from adapt.export.code import write_code
from adapt.export.pieces import copy_model
from adapt.export.weights import Weights
from adapt.pretrained.provenance import EXPORT_FILE

CUSTOM_GENERATE = Path(__file__).with_name("custom_generate") / "generate.py"
MARKER = EXPORT_FILE
"""Says that a folder is our export (so that a new one may replace it), and how it was made."""


def export_folder(
    weights: Weights,
    tokenizer,
    out: Path,
    *,
    recipe: Recipe,
    resolved_yaml: str,
    results: dict[str, Any],
    provenance: dict[str, Any],
    manifest: dict[str, Any] | None = None,
    extra_config: dict[str, Any] | None = None,
    check: Callable[[], None] = lambda: None,
) -> Path:
    """Write the model of `weights` as the folder `out`. Collective where the weights are on several ranks.

    results: `{"before": {metric: value}, "after": {metric: value}}`, either may be missing.
    manifest: the data's: `{"train": [...], "eval": {label: ...}}`, one entry per dataset (adapt.data.prepare).
    provenance: `base` (adapt.pretrained.base_provenance), `data` (where there is no manifest: datasets like its own,
        each with its `use`), and anything else worth keeping (`run`, `environment`); all of it goes into `adapt.json`,
        and what the card knows into the card.
    extra_config: what generation needs (`block_size`, `threshold`, `mask_token_id`, `shift`, `context_mask`), for both
        config.json and generation_config.json.
    check: called before the folder is begun and before it takes its place; raises where it may not.
    """
    out = Path(out)
    new = out.with_name(f"{out.name}.new")
    if manifest is not None:
        provenance = {**provenance, "data": _datasets(manifest)}
    extra_config = dict(extra_config or {})

    def begin() -> None:
        _refuse_foreign(out)
        check()
        shutil.rmtree(new, ignore_errors=True)  # of an export that was killed

    def fits() -> None:
        if len(tokenizer) > stock.config.vocab_size:
            what = f"{len(tokenizer)} tokens, but the model has {stock.config.vocab_size} embedding rows"
            raise UserError(Problem("tokenizer.path", what))

    def around() -> None:
        with letter(out):
            tokenizer.save_pretrained(folder)
            copy_model(tokenizer, folder)
            _tidy(folder, extra_config, getattr(stock.config, "mask_token_id", None))
            write_code(folder, stock)
            if "mask_token_id" in extra_config:  # it decodes by block diffusion where adapt is not installed, too
                (folder / "custom_generate").mkdir()
                shutil.copyfile(CUSTOM_GENERATE, folder / "custom_generate" / CUSTOM_GENERATE.name)

    def describe() -> None:
        from adapt.export.model_card import model_card

        record = {
            "export": {"target": recipe.export.target, **compared},
            "results": results,
            **provenance,
            "generation": extra_config,
        }
        card = model_card(
            recipe=recipe,
            resolved_yaml=resolved_yaml,
            results=results,
            provenance=provenance,
            config=stock.config,
            extra=extra_config,
            check=compared,
            chat=tokenizer.chat_template is not None,
        )
        with letter(out):
            (folder / MARKER).write_text(json.dumps(record, indent=2, ensure_ascii=False, default=str) + "\n")
            (folder / "recipe.yaml").write_text(resolved_yaml)
            (folder / "README.md").write_text(printable(card))
            _forget_place(folder)

    weights.alone(begin)
    stock = weights.stock(recipe.export, extra_config)
    weights.alone(fits)
    with letter(out), weights.folder(new) as folder:
        weights.write(folder, stock)
        weights.alone(around)
        compared = weights.compare(folder, stock, tokenizer)
        weights.alone(describe)
    weights.alone(lambda: (check(), _swap(new, out)))
    return out


@contextmanager
def letter(out: Path) -> Iterator[None]:
    """What the disk says, as a letter to the user."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors has its own exception for a full disk
        reason = getattr(error, "strerror", None) or error
        raise UserError(Problem("export", f"{out} cannot be written: {reason}; nothing was left behind")) from error


def _datasets(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    held_out = [{"name": label, **entry} for label, entry in manifest.get("eval", {}).items()]
    return [{**e, "use": "train"} for e in manifest.get("train", [])] + [{**e, "use": "eval"} for e in held_out]


def _tidy(folder: Path, extra_config: dict[str, Any], mask: int | None) -> None:
    """Generation fields into generation_config.json, and no leftovers of training in config.json. Plain `generate` must
    never emit a mask token: text has none, and with tied embeddings no output row of its own could say so."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key in (
        "_name_or_path",
        "_attn_implementation",
        "attn_implementation",
        "_attn_implementation_autoset",
    ):
        config.pop(key, None)
    path.write_text(json.dumps(config, indent=2) + "\n")
    path = folder / "generation_config.json"
    generation = json.loads(path.read_text()) if path.is_file() else {}
    generation = {k: v for k, v in generation.items() if k != "_from_model_config"} | extra_config
    if mask is not None:
        generation["suppress_tokens"] = sorted({*(generation.get("suppress_tokens") or []), mask})
    path.write_text(json.dumps(generation, indent=2) + "\n")


def _forget_place(folder: Path) -> None:
    """tokenizer_config.json remembers where it was loaded from; nobody else has that folder."""
    path = folder / "tokenizer_config.json"
    if path.is_file():
        fields = json.loads(path.read_text())
        for key in ("name_or_path", "is_local", "local_files_only", "tokenizer_file"):
            fields.pop(key, None)
        path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n")


def _refuse_foreign(out: Path) -> None:
    if out.exists() and not (out / MARKER).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(Problem("export", f"{out} exists and is not an export of adapt; give another folder"))


def _swap(new: Path, out: Path) -> None:
    """`new` takes the place of `out`: two renames, so that a complete export is there at any time but between them."""
    if not out.exists():
        os.replace(new, out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent))
    os.replace(out, old)
    os.replace(new, out)
    for old in out.parent.glob(f".{out.name}.old.*"):  # and what killed exports left
        shutil.rmtree(old, ignore_errors=True)
