from __future__ import annotations

import pytest

from tests.slurm.cluster import MISSING, Cluster


@pytest.fixture(scope="session")
def _running(tmp_path_factory):
    if MISSING:
        pytest.skip(f"SLURM is not installed ({', '.join(MISSING)} missing): apt-get install slurm-wlm")
    cluster = Cluster(tmp_path_factory.mktemp("slurm") / "cluster")
    yield cluster
    cluster.stop()


@pytest.fixture
def cluster(_running):
    """Two nodes, nobody on them."""
    yield _running
    _running.clear()
