from __future__ import annotations

import pytest

from tests.faults.warm import Warm


@pytest.fixture(scope="session")
def warm(tmp_path_factory):
    with Warm(tmp_path_factory.mktemp("warm")) as parent:
        yield parent
