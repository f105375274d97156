"""Plan, tracker and the resident memory of real ranks, side by side."""

from __future__ import annotations

import pytest

from tests.plan.reality import CASES, foretold, measured


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_planned_and_tracked_memory_are_what_real_ranks_take(case, checkpointing, tmp_path):
    real = measured(case, checkpointing, tmp_path)
    formula, tracked = foretold(case, checkpointing)
    print(f"planned {formula:,.0f}, tracked {tracked}, measured {real:,}")
    assert tracked is None or tracked == pytest.approx(real, rel=0.1)
    assert formula == pytest.approx(real, rel=0.1)
