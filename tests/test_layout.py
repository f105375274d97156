"""The tree keeps its promises: what is where, what may import what, and that every key and name is used once."""

from __future__ import annotations

import ast
import dataclasses
import os
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path

import pytest

from adapt import __version__, components
from adapt.config import decode, load, shipped_recipes
from adapt.config.schema import Recipe, Teacher
from adapt.registry import Registry
from adapt.tokenization.recipe import PruneRecipe, TokenizerRecipe, shipped_tokenizers
from adapt.train.rules import core_problems

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "adapt"
REGISTRIES = [value for value in vars(components).values() if isinstance(value, Registry)]


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def python(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_nothing_shadows_hugging_face_tokenizers():
    """A top-level package of that name would break transformers for everyone who starts Python in the root."""
    assert not (ROOT / "tokenizers.py").exists()
    assert not list((ROOT / "tokenizers").rglob("*.py"))
    shown = python("-c", "import tokenizers; print(tokenizers.__file__); from tokenizers import Tokenizer")
    assert shown.returncode == 0, shown.stderr
    assert not Path(shown.stdout.strip()).is_relative_to(ROOT / "tokenizers")


@pytest.mark.parametrize("name", ["models", "configs", "tokenizers", "slurm"])
def test_one_step_from_the_top(name):
    assert (ROOT / name).is_symlink()
    assert (ROOT / name).resolve() == PACKAGE / name


def test_python_dash_m_in_the_root():
    assert python("-m", "adapt", "--version").stdout == f"adapt {__version__}\n"


def test_the_wheel_has_the_recipes_and_only_adapt(tmp_path):
    command = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", str(tmp_path)]
    tree = tmp_path / "tree"  # a build leaves its marks in the tree it builds
    tree.mkdir()
    for name in ("adapt", "pyproject.toml", "README.md", "LICENSE"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(tree / name)], check=True)
    done = python(*command, str(tree))
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"adapt", f"adapt_lm-{__version__}.dist-info"}
    for recipe in shipped_recipes():
        assert f"adapt/configs/{recipe}.yaml" in names
    for path in (*shipped_tokenizers().values(), *shipped_tokenizers(PruneRecipe).values()):
        assert str(path.relative_to(ROOT)) in names
    for path in PACKAGE.rglob("*"):
        if path.suffix in (".py", ".html", ".md", ".yaml", ".sbatch"):
            assert str(path.relative_to(ROOT)) in names
    target = tmp_path / "installed"
    install = python("-m", "pip", "install", "--no-deps", "--no-index", "-q", "--target", str(target), str(wheel))
    assert install.returncode == 0, install.stderr
    code = "import adapt, sys; from adapt.cli import main; print(adapt.__file__, file=sys.stderr); main(['recipes'])"
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(target)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert shown.stderr.strip() == str(target / "adapt" / "__init__.py")
    assert [line.split()[0] for line in shown.stdout.splitlines()] == list(shipped_recipes())


def test_models_import_nothing_of_the_rest():
    """They travel inside exported checkpoints: same-folder relative imports, and packages a user has."""
    for path in (PACKAGE / "models").rglob("*.py"):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ImportFrom):
                assert node.level <= 1, f"{path.name}:{node.lineno} leaves the folder"
                assert node.level == 1 or not (node.module or "").startswith("adapt"), f"{path.name}:{node.lineno}"
            if isinstance(node, ast.Import):
                assert not any(alias.name.split(".")[0] == "adapt" for alias in node.names), f"{path}:{node.lineno}"


def test_no_lightning_outside_training():
    """Formulas, data and decoding are to be had without the trainer."""
    for path in sources():
        if path.is_relative_to(PACKAGE / "train"):
            continue
        for node in ast.walk(tree(path)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(n.split(".")[0] in ("lightning", "pytorch_lightning") for n in names), path


def component_files() -> set[Path]:
    """Files that register something, and their helpers of the same folder, know names; the core does not."""
    return {path for path in sources() if "register(" in path.read_text() and path.parent != PACKAGE}


def test_the_core_never_compares_a_name():
    """`if objective == ...` belongs into the objective."""
    names = {name for registry in REGISTRIES for name in registry.names()}
    owners = component_files()
    for path in sources():
        if path in owners:
            continue
        for node in ast.walk(tree(path)):
            if not isinstance(node, ast.Compare):
                continue
            sides = [node.left, *node.comparators]
            about_a_name = any(isinstance(s, ast.Attribute) and s.attr == "name" for s in sides)
            literals = {c.value for s in sides for c in ast.walk(s) if isinstance(c, ast.Constant)}
            assert not (about_a_name and literals & names), f"{path}:{node.lineno} compares a component's name"


def config_classes() -> dict[type, Path]:
    """Every dataclass a recipe can reach: the schema's, each registered component's, and those inside them."""
    found: dict[type, Path] = {}

    def add(hint):
        import typing

        for argument in typing.get_args(hint):
            add(argument)
        if isinstance(hint, type) and dataclasses.is_dataclass(hint) and hint not in found:
            module = sys.modules[hint.__module__]
            if hasattr(hint, "registry"):
                return
            found[hint] = Path(module.__file__)
            for value in typing.get_type_hints(hint).values():
                add(value)

    add(Recipe)
    add(TokenizerRecipe)
    add(PruneRecipe)
    for registry in REGISTRIES:
        for name in registry.names():
            add(registry[name].config_type)
    return found


CHECKS = {PACKAGE / "train" / "rules.py", PACKAGE / "train" / "validate.py"}
"""Looking whether a value is allowed is not yet reading it."""
ELEMENTS = {"Dataset": {"dataset", "d"}, "WeightPhase": {"phase"}, "Stop": {"rule"}}
ELEMENTS |= {"Bound": {"bound", "b"}, "Interpolation": {"wanted"}, "HyperSchedule": {"wanted"}}
"""Names that the code gives to the entries of lists."""


def sections_of(cls: type, found: dict[type, set[str]]) -> dict[type, set[str]]:
    """The schema's own section classes, each with the names it goes by: `trainer`, `mesh`."""
    import typing

    for name, hint in typing.get_type_hints(cls).items():
        for inner in (hint, *typing.get_args(hint), *(a for h in typing.get_args(hint) for a in typing.get_args(h))):
            if isinstance(inner, type) and dataclasses.is_dataclass(inner) and inner.__module__ == Recipe.__module__:
                found.setdefault(inner, ELEMENTS.get(inner.__name__, set()) | {name})
                sections_of(inner, found)
    return found


def reads(path: Path) -> set[tuple[str, str]]:
    """(owner, attribute) of everything read in a file, by the last name before the attribute: `recipe.data.seq_len`
    is (data, seq_len), and so is `getattr(recipe.data, "seq_len")`."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            found.add((last_name(node.value), node.attr))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr":
            owner, *names = node.args
            found |= {(last_name(owner), n.value) for n in names if isinstance(n, ast.Constant)}
    return found


def last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def test_every_key_is_read():
    """A key that nothing reads is a promise nobody keeps. A section's key is read through the section's name
    (`trainer.clip`), a component's in the package of the component."""
    everywhere = {path: reads(path) for path in sources() if path not in CHECKS}
    sections = sections_of(Recipe, {Recipe: {"recipe", "stage", "stages[0]", "over"}})
    unread = []
    for cls, file in config_classes().items():
        for field in dataclasses.fields(cls):
            if cls in sections:
                read = any((name, field.name) in found for found in everywhere.values() for name in sections[cls])
            else:
                package = PACKAGE / file.relative_to(PACKAGE).parts[0]
                near = [found for path, found in everywhere.items() if path.is_relative_to(package)]
                read = any(field.name in {attribute for _, attribute in found} for found in near)
            if not read:
                unread.append(f"{cls.__name__}.{field.name}")
    assert unread == [], "\n".join(unread)


def test_a_teacher_that_nothing_reads_is_refused():
    """And one that something reads must be there. An objective says which by its class or its config."""
    for name in components.objectives.names():
        choice = decode(name, components.ObjectiveChoice)
        for teacher in (None, Teacher()):
            recipe = dataclasses.replace(load("nbdiff").recipe, objective=choice, teacher=teacher)
            refused = "teacher" in {p.where for p in core_problems(recipe, 0)}
            assert refused == (choice.declares("needs_teacher") != (teacher is not None)), name
    choice = decode({"name": "next_token", "kl_to_base": 0.5}, components.ObjectiveChoice)
    assert choice.declares("needs_teacher")


def test_every_key_says_what_it_is():
    """A docstring under every field: it is the key's help."""
    for cls, path in config_classes().items():
        (body,) = [n.body for n in ast.walk(tree(path)) if isinstance(n, ast.ClassDef) and n.name == cls.__name__]
        for node, after in zip(body, [*body[1:], None], strict=True):
            if isinstance(node, ast.AnnAssign) and "ClassVar" not in ast.unparse(node.annotation):
                told = isinstance(after, ast.Expr) and isinstance(getattr(after.value, "value", None), str)
                assert told or cls is Recipe, f"{cls.__name__}.{ast.unparse(node.target)} has no docstring"


def test_configs_are_frozen_and_keyword_only():
    for cls in config_classes():
        assert cls.__dataclass_params__.frozen, cls
        assert all(field.kw_only for field in dataclasses.fields(cls)), cls


def test_registries_say_what_they_hold():
    for registry in REGISTRIES:
        assert registry.what
        assert registry.names(), registry.kind


def test_files_stay_readable():
    """Around 400 lines, look for the second idea in the file."""
    long = {str(p.relative_to(ROOT)): n for p in sources() if (n := len(p.read_text().splitlines())) > 450}
    assert not long


def test_pins_are_plain_versions():
    """Exact, without build labels, addresses or paths: they must mean the same everywhere."""
    lines = [x for x in (ROOT / "requirements.lock").read_text().splitlines() if x and not x.startswith("#")]
    for line in lines:
        _, equals, version = line.partition("==")
        assert equals, line
        assert version, line
        assert not set("+/:@ ") & set(line), line
    assert "torch==2.13.0" in lines
