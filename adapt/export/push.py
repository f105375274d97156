"""An export folder to the Hub: checked first, then one commit. Before it nothing of the folder is visible; a cut upload
leaves at most an empty repository, and the same command goes on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from adapt.errors import Problem, UserError

IGNORED = (".*", "__pycache__", "*.lock", "*.tmp")


@dataclass(frozen=True)
class Pushed:
    files: tuple[tuple[str, int], ...]
    """(path, bytes) of everything that is, or would be, uploaded."""
    url: str | None
    """Of the commit; null after a dry run."""

    @property
    def total_bytes(self) -> int:
        return sum(size for _, size in self.files)

    def __str__(self) -> str:
        """What the command line prints."""
        lines = [f"{size / 1e6:10.2f} MB  {name}" for name, size in self.files]
        lines.append(f"{self.total_bytes / 1e6:10.2f} MB  in {len(self.files)} files")
        return "\n".join([*lines, self.url or "dry run: nothing was sent"])


def push(
    folder: Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
    message: str | None = None,
) -> Pushed:
    """Upload `folder` to the model repository `repo` (ORGANISATION/NAME), made if need be."""
    folder = Path(folder)
    problems = [*folder_problems(folder), *_name_problems(repo)]
    if problems:
        raise UserError(problems)
    files = _files(folder)
    if dry_run:
        return Pushed(files, None)
    from huggingface_hub import HfApi, errors

    api = HfApi()
    done = "nothing was sent yet"
    try:
        api.create_repo(repo, repo_type="model", private=private, exist_ok=True)
        done = f"the repository {repo} exists, but none of these files is visible there"
        if revision:
            api.create_branch(repo, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=str(folder),
            revision=revision,
            commit_message=message or f"Upload {folder.name}",
            ignore_patterns=list(IGNORED),
        )
    except errors.HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        raise UserError(Problem("push", f"{_reason(status, repo)} ({_short(error)}); {done}")) from error
    except KeyboardInterrupt:
        raise UserError(Problem("push", f"interrupted; {done}. {AGAIN}")) from None
    except Exception as error:  # timeouts and resets come as the HTTP client's own exceptions
        raise UserError(Problem("push", f"the upload broke off ({_short(error)}); {done}. {AGAIN}")) from error
    return Pushed(files, str(getattr(commit, "commit_url", commit)))


AGAIN = "Run the same command again: what the Hub already holds is not sent twice"


def folder_problems(folder: Path) -> list[Problem]:
    """What keeps a folder from being a usable model on the Hub."""
    where = str(folder)
    if not folder.is_dir():
        return [Problem(where, "there is no such folder; `adapt export RUN --to DIR` makes one")]
    problems = []
    for name in ("config.json", "tokenizer_config.json"):
        try:
            json.loads((folder / name).read_text())
        except FileNotFoundError:
            problems.append(Problem(where, f"{name} is missing"))
        except (OSError, ValueError) as error:
            problems.append(Problem(where, f"{name} cannot be read: {error}"))
    if not (folder / "tokenizer.json").is_file() and not list(folder.glob("*.model")):
        problems.append(Problem(where, "tokenizer.json is missing"))
    return problems + _weight_problems(folder)


def _weight_problems(folder: Path) -> list[Problem]:
    from safetensors import SafetensorError, safe_open

    where, present = str(folder), sorted(folder.glob("*.safetensors"))
    problems, tensors = [], set()
    for file in present:
        try:
            with safe_open(file, framework="pt") as weights:  # checks header and length: a cut file fails here
                tensors |= set(weights.keys())
        except (SafetensorError, OSError) as error:
            problems.append(Problem(where, f"{file.name} is damaged: {error}"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        wanted = json.loads(index.read_text()).get("weight_map", {})
        missing = sorted(set(wanted.values()) - {f.name for f in present})
        problems += [Problem(where, f"{name} is missing, the index names it") for name in missing]
    elif not present:
        problems.append(Problem(where, "there are no .safetensors weights"))
    return problems


def _name_problems(repo: str) -> list[Problem]:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        return [Problem("--repo", f"{error}")]
    if "/" not in repo:
        return [Problem("--repo", f"{repo!r}: write ORGANISATION/NAME")]
    return []


def _files(folder: Path) -> tuple[tuple[str, int], ...]:
    from huggingface_hub.utils import filter_repo_objects

    names = (p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file())
    return tuple((n, (folder / n).stat().st_size) for n in filter_repo_objects(names, ignore_patterns=list(IGNORED)))


def _reason(status: int | None, repo: str) -> str:
    if status in (401, 403):
        return f"the Hub does not let you write to {repo}: `hf auth login` with a token that may write"
    if status == 404:
        return f"the Hub knows no owner for {repo}, or hides it from you"
    if status == 413:
        return "the Hub refused a file as too large"
    if status is not None and status >= 500:
        return f"the Hub had an error of its own. {AGAIN}"
    return f"the Hub refused the upload. {AGAIN}"


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
