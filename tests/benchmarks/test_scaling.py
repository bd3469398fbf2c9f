"""The arithmetic of the scaling benchmark, on steps whose parts are known."""

from __future__ import annotations

import pytest

from benchmarks.scaling import (
    ACCUMULATIONS,
    LENGTH,
    Setting,
    Turn,
    accumulated,
    parts,
    settings,
    weak,
)

MICRO_S, BESIDE_S = 0.050, 0.020


def turn(setting: Setting) -> Turn:
    step_s = setting.accumulation * MICRO_S + BESIDE_S
    return Turn(setting.ranks * setting.accumulation * LENGTH / step_s, step_s)


@pytest.mark.parametrize(
    ("counts", "strategies"), [([1, 2], {"NO_SHARD"}), ([1, 2, 4], {"NO_SHARD", "HYBRID_SHARD"})]
)
def test_the_largest_number_of_ranks_is_swept(counts: list[int], strategies: set[str]) -> None:
    found = settings(counts)
    assert len(set(found)) == len(found)
    assert {s.strategy for s in found} == {"FULL_SHARD"} | strategies
    for strategy in {s.strategy for s in found if s.ranks == max(counts)}:
        swept = [s.accumulation for s in found if (s.ranks, s.strategy) == (max(counts), strategy)]
        assert tuple(swept) == ACCUMULATIONS


def test_the_parts_of_a_step_are_found() -> None:
    turns = {setting: [turn(setting)] * 3 for setting in settings([1, 2])}
    micro, beside = parts(turns, 2, "FULL_SHARD")
    assert micro == pytest.approx([50] * 3)
    assert beside == pytest.approx([20] * 3)


def test_ranks_that_do_as_much_as_one_have_its_share() -> None:
    turns = {setting: [turn(setting)] for setting in settings([1, 2])}
    slow = Setting(2, "NO_SHARD", 16)
    turns[slow] = [Turn(turn(slow).tokens_s / 2, turn(slow).step_s * 2)]

    lines = {
        line.split("|")[2:4][0].strip() + line.split("|")[3]: line
        for line in weak(turns).splitlines()
    }

    assert "100% (100%-100%)" in lines["`FULL_SHARD` 16 "]
    assert "50% (50%-50%)" in lines["`NO_SHARD` 16 "]
    assert "20 (20-20) ms beside them" in accumulated(turns, 2)
