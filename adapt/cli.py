"""The command line. `--help` answers at once: a verb's arguments and imports come when that verb is chosen.

Exit codes: 0 done; 2 the user's input is wrong (all problems listed); 75 stopped on request, to be gone on with; 71 a
rank died or hangs; 1 anything else.
"""

from __future__ import annotations

import argparse
import atexit
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from adapt import __version__
from adapt.errors import RecipeError, RunLost, StopRequested, UserError, nearest

NOISY = ("torchao", "torch.utils._pytree")
"""Loggers that speak up whenever torchao is installed and transformers looks for it: of kernels for other machines."""


def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # checkpoints of a single process
    try:
        code = _dispatch(argv)
        sys.stdout.flush()
        return code
    except UserError as error:
        _end_display()
        _tell(error)
        return error.exit_code
    except StopRequested as stop:
        _end_display()
        if os.environ.get("RANK", "0") == "0":
            _tell_line(str(stop))
        return stop.exit_code
    except RunLost as lost:
        _end_display()
        _tell_line(f"rank {os.environ.get('RANK', '0')}: {lost}")
        return lost.exit_code
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        _end_display()
        _tell_line("interrupted")
        return 1
    except SystemExit as end:  # argparse after --help
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception:
        import traceback

        _end_display()
        traceback.print_exc()
        return 1


def entry() -> None:
    """The console script. After a run on several ranks the process ends without the interpreter's shutdown: native
    threads of the collectives may still abort it there ("terminate called without an active exception"), and a run
    that was saved and exported would exit with that."""
    code = main()
    if "WORLD_SIZE" in os.environ:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _dispatch(argv: list[str]) -> int:
    parser = _Parser(prog="adapt", formatter_class=argparse.RawDescriptionHelpFormatter, description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"adapt {__version__}")
    parser.add_argument("verb", metavar="VERB", nargs="?")
    if not argv or argv[0].startswith("-"):
        parser.parse_args(argv)
        parser.print_help()
        return 2
    name, *rest = argv
    if name not in VERBS:
        raise UserError(f"adapt has no verb {name!r}.{nearest(name, VERBS)} Verbs: {', '.join(VERBS)}")
    what, add_arguments, run = VERBS[name]
    parser = _Parser(prog=f"adapt {name}", description=what)
    add_arguments(parser)
    args = parser.parse(rest)
    code = run(args)
    return code if isinstance(code, int) else 0


class _Parser(argparse.ArgumentParser):
    def parse(self, argv: list[str]) -> argparse.Namespace:
        """Overrides may stand anywhere between the options."""
        argv = ["--resume=yes" if a == "--resume" else a for a in argv]
        known = [option for action in self._actions for option in action.option_strings]
        for item in argv:
            key = item.partition("=")[0]
            if "=" in item and key.startswith("--") and key not in known and "." in key:
                self.error(f"overrides are written without dashes: {item.lstrip('-')}")
        return self.parse_intermixed_args(argv)

    def error(self, message: str):
        usage = " ".join(self.format_usage().split())
        raise UserError(f"{message}\n{usage}")


def _recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-c", "--config", required=True, metavar="RECIPE", help="YAML file, or name of a shipped recipe"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY.SUBKEY=VALUE", help="dotted overrides of the recipe")


def _load(args: argparse.Namespace):
    from adapt.config import load

    return load(args.config, args.overrides)


def _read(args: argparse.Namespace, offline: bool = False):
    """The recipe, for verbs that check all of it: what can be read of a broken one is checked too."""
    try:
        return _load(args)
    except RecipeError as error:
        from adapt.train.validate import further

        raise UserError([*error.problems, *further(error, offline)]) from None


def _fit_arguments(parser: argparse.ArgumentParser) -> None:
    _recipe_arguments(parser)
    parser.add_argument(
        "--resume",
        default="no",
        metavar="auto",
        choices=["yes", "auto"],
        help="go on with the run in its folder; --resume=auto starts it or goes on",
    )


def _fit(args: argparse.Namespace) -> int:
    from adapt.train.signals import StopFlag

    with StopFlag() as flag:  # before anything that takes long is imported
        with flag.at_once("before anything was done"):
            resolved = _read(args)
            from adapt.train.fit import fit

        return fit(resolved, args.resume, flag)


def _validate_arguments(parser: argparse.ArgumentParser) -> None:
    _recipe_arguments(parser)
    parser.add_argument("--offline", action="store_true", help="reach for nothing; list what could not be checked")


def _validate(args: argparse.Namespace) -> int:
    from adapt.console import printable
    from adapt.train.validate import check

    resolved = _read(args, args.offline)
    print(resolved.to_yaml())
    report = check(resolved, args.offline)
    if not report.problems:  # as comments: what is printed is a recipe
        for line in report.checked:
            print(printable(f"# ✓ {line}"))
    for line in report.unchecked:
        print(printable(f"# ? not checked: {line}"))
    if report.problems:
        sys.stdout.flush()
        raise UserError(report.problems)
    return 0


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    from adapt.plan.verb import add_arguments

    _recipe_arguments(parser)
    add_arguments(parser)


def _plan(args: argparse.Namespace) -> int:
    from adapt.plan.verb import plan

    return plan(_load(args), args)


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    from adapt.generation.verb import add_arguments

    add_arguments(parser)


def _generate(args: argparse.Namespace) -> int:
    from adapt.generation.verb import generate

    return generate(args)


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    from adapt.evaluate.verb import add_arguments

    add_arguments(parser)


def _evaluate(args: argparse.Namespace) -> int:
    from adapt.evaluate.verb import evaluate

    return evaluate(args)


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument(
        "--compare", nargs="+", action="extend", default=[], type=Path, metavar="RUN", help="drawn over it"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="page to write (default: report.html in the run folder)"
    )


def _report(args: argparse.Namespace) -> int:
    from adapt.report import build

    print(build(args.run, args.compare, args.out))
    return 0


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder; its newest checkpoint is exported")
    parser.add_argument("--to", required=True, type=Path, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="default: the recipe's export.dtype"
    )
    parser.add_argument(
        "--reshard",
        type=int,
        metavar="RANKS",
        help="write the checkpoint itself, optimizer state and all, in files for this many ranks to go on from",
    )


def _export(args: argparse.Namespace) -> int:
    from adapt.train.deliver import export_run, reshard_run

    if args.reshard is not None:
        return reshard_run(args.run, args.to, args.reshard, args.dtype)
    return export_run(args.run, args.to, args.dtype)


def _push_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="exported model folder")
    parser.add_argument("--repo", required=True, metavar="ORG/NAME", help="model repository; made if it does not exist")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to push to (default: main)")
    parser.add_argument("--message", metavar="TEXT", help="commit message")
    parser.add_argument("--dry-run", action="store_true", help="list what would be uploaded, and send nothing")


def _push(args: argparse.Namespace) -> int:
    from adapt.export.push import push

    done = push(
        args.folder,
        args.repo,
        private=args.private,
        revision=args.revision,
        dry_run=args.dry_run,
        message=args.message,
    )
    for name, size in done.files:
        print(f"{size:>15,}  {name}")
    print(f"{done.total_bytes:>15,}  bytes in {len(done.files)} files", end="")
    print(f" would go to {args.repo}; nothing was sent" if args.dry_run else f": {done.url}")
    return 0


def _data_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        choices=["fetch", "prepare", "stats", "clean"],
        help="fetch: open every source and read its first document (no copy is made); prepare: read the texts and build "
        "the token shards; stats: print their manifest; clean: run the cleaning steps alone, on many machines if need be, "
        "and write the texts",
    )
    _recipe_arguments(parser)
    parser.add_argument("--json", action="store_true", help="stats as JSON")
    from adapt.data.clean_verb import add_arguments

    add_arguments(parser)


def _data(args: argparse.Namespace) -> int:
    from adapt.data import clean_verb, verbs

    if args.what != "clean":
        clean_verb.refuse_options(args)
    resolved = _load(args)
    verb = {"fetch": verbs.fetch, "prepare": verbs.prepare_verb, "stats": verbs.stats, "clean": clean_verb.clean}
    return verb[args.what](resolved, args)


def _tokenizer_arguments(parser: argparse.ArgumentParser) -> None:
    from adapt.tokenization.verb import add_arguments

    add_arguments(parser)


def _tokenizer(args: argparse.Namespace) -> int:
    from adapt.tokenization.verb import run

    return run(args)


def _health_arguments(parser: argparse.ArgumentParser) -> None:
    from adapt.distributed.health import add_arguments

    add_arguments(parser)


def _health(args: argparse.Namespace) -> int:
    from adapt.distributed.health import health

    return health(args)


def _recipes(args: argparse.Namespace) -> int:
    from adapt.config import shipped_recipes

    shipped = shipped_recipes()
    width = max(map(len, shipped), default=0)
    for name, path in shipped.items():
        comments = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
        print(f"{name:<{width}}  {comments[0].lstrip('# ') if comments else ''}".rstrip())
    return 0


Verb = tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]
VERBS: dict[str, Verb] = {
    "fit": ("train: convert, adapt, evaluate, export, report", _fit_arguments, _fit),
    "validate": (
        "print the resolved recipe and every problem at once; loads no weights",
        _validate_arguments,
        _validate,
    ),
    "plan": ("memory, communication and time of a recipe on a cluster", _plan_arguments, _plan),
    "generate": ("decode text with a model or a run", _generate_arguments, _generate),
    "evaluate": ("measure a model or a run on held-out data", _evaluate_arguments, _evaluate),
    "report": ("write one HTML page of a run, or of several", _report_arguments, _report),
    "export": ("write a run's newest checkpoint as a Hugging Face folder", _export_arguments, _export),
    "push": ("upload an exported folder to the Hub", _push_arguments, _push),
    "data": ("fetch, prepare or describe the data of a recipe", _data_arguments, _data),
    "tokenizer": ("extend a tokenizer by a language, or compare tokenizers", _tokenizer_arguments, _tokenizer),
    "health": ("try the machines of a run: do its ranks meet, memory, disk", _health_arguments, _health),
    "recipes": ("list the recipes that ship", lambda parser: None, _recipes),
}
DESCRIPTION = "\n".join(
    [
        "Turn a pretrained causal language model into the model you need, without pretraining again.",
        "",
        "verbs:",
        *(f"  {name:<10}{what}" for name, (what, _, _) in VERBS.items()),
        "",
        "`adapt VERB --help` explains each; `adapt recipes` lists where to start.",
    ]
)


def _end_display() -> None:
    """A live display gives the terminal back before anything else is said."""
    progress = sys.modules.get("adapt.train.progress")
    if progress is not None:
        progress.stop_all()


def _tell(error: UserError) -> None:
    from adapt.console import print_problems

    sys.stdout.flush()
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        _tell_line(f"rank {rank}:")
    print_problems(error.problems)


def _tell_line(text: str) -> None:
    from adapt.console import say

    say(text)
