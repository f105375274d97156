"""`adapt fit` of a recipe with arms: one run after another, each in a process of its own, then one page of all.

An arm is the same recipe with `arm=<name>`: its own process has its own memory (so that its peak is its own), its own
process group, and whatever ends it ends no other arm. Arms that are done are not made again; a failed one is named, and
the others still run, except under torchrun and srun, which must end all ranks together.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

from adapt.config import Resolved
from adapt.console import say
from adapt.distributed import checkpoint
from adapt.distributed.world import place_of_its_own
from adapt.errors import Problem, StopRequested, UserError
from adapt.runfolder import ARMS, RunFolder
from adapt.train.mixing import total_steps
from adapt.train.signals import SIGNALS
from adapt.train.state import State

BEGAN = "ADAPT_BEGAN"
"""Environment variable: when the command began, on the monotonic clock; `trainer.max_time` is for all arms together."""
STOPPED, LEFT = StopRequested.exit_code, 130
"""Exit codes of a run that was asked to stop: saved, and by a second Ctrl-C."""

Start = Callable[[Path, str, bool, int], int]
"""(recipe file, arm, whether it may go on, its number) -> exit code."""


def fit_arms(resolved: Resolved, resume: str = "no", start: Start | None = None) -> int:
    """Train every arm that is not done and write `comparison.html` beside their folders. Returns 0, or the exit code of
    the first arm that failed; raises UserError (nothing was started) and StopRequested."""
    from adapt.train.validate import check_or_raise

    began = time.monotonic()
    check_or_raise(resolved)
    folder = Path(resolved.recipe.run.dir) / resolved.recipe.run.name
    go_on = _may_start(resolved, folder, resume)
    failed: dict[str, int] = {}
    alone = "WORLD_SIZE" not in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) == 1
    main = alone or int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0
    with ExitStack() as stack:
        file = _recipe_file(resolved, folder) if main else _copy(resolved, stack)
        run = start or stack.enter_context(_Processes(began))
        for index, (name, arm) in enumerate(resolved.arms.items()):
            if is_done(arm):
                _tell(main, f"arm {name}: it is done; nothing is trained again")
                continue
            _tell(main, f"arm {name} ({index + 1} of {len(resolved.arms)})")
            code = run(file, name, go_on, index)
            if code == STOPPED:
                _compare(resolved, folder, main)
                raise StopRequested(
                    f"stopped in arm {name}; go on with --resume: the arms that are done stay as they are"
                )
            if code == LEFT:
                return code
            if code:
                failed[name] = code
                _tell(main, f"arm {name} ended with exit code {code}; its message stands above")
                if not alone:
                    return code
    page = _compare(resolved, folder, main)
    if page and main:
        print(f"comparison:     {page}")
    if failed:
        many = f"{len(failed)} of {len(resolved.arms)} arms failed: {', '.join(failed)}"
        _tell(main, f"{many}. Once that is mended, --resume trains them and no other.")
    return next(iter(failed.values()), 0)


def is_done(arm: Resolved) -> bool:
    """Whether the arm's run has made all its steps, and its export and its page after them."""
    path = _folder(arm)
    saved = checkpoint.checkpoints(path / "checkpoints")
    if not saved or not (path / "report.html").is_file() or not (path / "export" / "config.json").is_file():
        return False
    state = State.from_dict(checkpoint.read_state(saved[-1]))
    return bool(state.finished) and not (state.finished == "steps" and total_steps(arm.stages[-1]) > state.stage_step)


def _folder(arm: Resolved) -> Path:
    return Path(arm.recipe.run.dir) / arm.recipe.run.name


def _may_start(resolved: Resolved, folder: Path, resume: str) -> bool:
    """Whether arms may go on where they are. Refuses before the first one what any of them would."""
    problems: list[Problem] = []
    exists = False
    for name, arm in resolved.arms.items():
        try:
            exists |= RunFolder.create(arm, "no" if resume == "no" else "auto").resumed
        except UserError as error:
            problems += [
                Problem(f"arms.{name}.{p.where}" if p.where else f"arms.{name}", p.what) for p in error.problems
            ]
    if (folder / "config.yaml").is_file():
        what = f"{folder} holds a run without arms; choose another name for the arms' folder, or delete it"
        problems.append(Problem("run.name", what))
    if resume == "yes" and not exists and not problems:
        what = f"there is no arm in {folder} to go on with; start without --resume, or use --resume=auto to do either"
        problems.append(Problem("--resume", what))
    if problems:
        raise UserError(problems)
    return resume != "no"


def _recipe_file(resolved: Resolved, folder: Path) -> Path:
    """The recipe as it is now, for the arms to be made from: the user's file may change while they run."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{ARMS}.partial"
        partial.write_text(resolved.to_yaml(), encoding="utf-8")
        os.replace(partial, folder / ARMS)
    except OSError as error:
        raise UserError(Problem("run.dir", f"{folder} cannot be written: {error.strerror}")) from None
    return folder / ARMS


def _copy(resolved: Resolved, stack: ExitStack) -> Path:
    """The same for a rank that writes nothing into the run folder and cannot know when rank 0 has."""
    file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / ARMS
    file.write_text(resolved.to_yaml(), encoding="utf-8")
    return file


def _compare(resolved: Resolved, folder: Path, main: bool) -> Path | None:
    from adapt.report import build

    begun = any((_folder(arm) / "metrics.jsonl").is_file() for arm in resolved.arms.values())
    return build(folder, [], None) if begun and main else None


def _tell(main: bool, text: str) -> None:
    if main:
        say(text)


class _Processes:
    """Starts an arm and waits for it. Signals go on to it: it saves and ends with exit code 75."""

    def __init__(self, began: float) -> None:
        self.began = began
        self.child: subprocess.Popen | None = None
        self.asked = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> _Processes:
        self._before = {number: signal.signal(number, self._pass_on) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __call__(self, file: Path, name: str, go_on: bool, index: int) -> int:
        if self.asked:  # between two arms
            return STOPPED
        command = [sys.executable, "-m", "adapt", "fit", "-c", str(file), f"arm={name}"]
        command += ["--resume=auto"] if go_on else []
        environment = os.environ | place_of_its_own(index) | {BEGAN: str(self.began)}
        # A session of its own: a terminal's Ctrl-C would reach it besides being passed on, and two end it at once.
        self.child = subprocess.Popen(
            command, env=environment, start_new_session=True, preexec_fn=_die_with(os.getpid())
        )
        if self.asked:
            self.child.send_signal(signal.SIGTERM)
        code = self.child.wait()
        self.child = None
        return code if code >= 0 else 1

    def _pass_on(self, number: int, _frame: FrameType | None) -> None:
        self.asked = True
        if self.child is not None and self.child.poll() is None:
            self.child.send_signal(number)


def _die_with(parent: int) -> Callable[[], None] | None:
    """Linux: the process is asked to save and stop when this one is killed, or two would soon train in one folder."""
    if sys.platform != "linux":
        return None
    import ctypes

    library, request = ctypes.CDLL(None), 1  # PR_SET_PDEATHSIG

    def ask() -> None:
        library.prctl(request, signal.SIGTERM)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)

    return ask
