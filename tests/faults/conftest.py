from __future__ import annotations

import pytest

from adapt.config import resolve
from adapt.errors import StopRequested
from adapt.train.fit import fit
from tests.faults.warm import Warm
from tests.recipes import tiny_recipe
from tests.train.test_fit import stop_after


@pytest.fixture(scope="session")
def warm(tmp_path_factory):
    with Warm(tmp_path_factory.mktemp("warm")) as parent:
        yield parent


@pytest.fixture
def stopped(tiny_base, tmp_path, monkeypatch):
    """A run that has a checkpoint and is to be gone on with."""
    recipe = tiny_recipe(tiny_base, tmp_path)
    with monkeypatch.context() as patched, pytest.raises(StopRequested):
        stop_after(patched, 2)
        fit(resolve(recipe))
    return recipe
