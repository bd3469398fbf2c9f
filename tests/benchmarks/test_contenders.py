"""Contenders have their turns: real processes, whose child in a session of its own logs."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.contenders import Run, begin, begin_stopped, is_running

# Starts itself once more in another session, as launchers start ranks; the child logs a step every
# 20 ms, 7 tokens each.
PROGRAM = """
import json, subprocess, sys, time
if len(sys.argv) == 1:
    sys.exit(subprocess.call([sys.executable, __file__, "child"], start_new_session=True))
for step in range(1, 10_000):
    time.sleep(0.02)
    with open("out/metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": step, "tokens": 7 * step}) + "\\n")
"""


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    (tmp_path / "out").mkdir()
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    run = begin_stopped("steady", [sys.executable, str(program)], tmp_path, threads=1)
    yield run
    run.end()


def test_steps_are_made_only_in_a_turn(run: Run) -> None:
    time.sleep(0.1)
    before = len(run.steps())
    time.sleep(0.3)
    assert len(run.steps()) == before >= 2

    began = time.monotonic()
    lines = run.take_turn(5)
    took_s = time.monotonic() - began

    first = lines[0]["step"]
    assert first >= before + 2  # the one under way is not measured
    assert [line["step"] for line in lines] == list(range(first, first + 5))
    assert run.rates[0] > 5 * 7 / took_s
    assert run.memory_gib > 0
    after = len(run.steps())
    time.sleep(0.3)
    assert len(run.steps()) <= after + 1  # logged before it was stopped, seen after


def test_a_turn_can_be_so_long_at_least(run: Run) -> None:
    began = time.monotonic()
    lines = run.take_turn(1, seconds=0.5)
    assert time.monotonic() - began >= 0.5
    assert len(lines) > 1


def test_a_line_that_is_half_written_is_read_when_it_is_whole(run: Run) -> None:
    run.log = run.log.with_name("other.jsonl")
    run._steps, run._read_bytes = [], 0
    run.log.write_text('{"step": 1}\n{"st')
    assert run.steps() == [{"step": 1}]
    with open(run.log, "a") as file:
        file.write('ep": 2}\n')
    assert run.steps() == [{"step": 1}, {"step": 2}]


def test_nothing_is_left_of_one_that_is_ended(run: Run) -> None:
    members = run.members()
    assert len(members) == 2
    run.end()
    assert not any(map(is_running, members))


def test_one_that_fails_is_told_with_its_output(tmp_path: Path) -> None:
    run = begin("broken", [sys.executable, "-c", "print('no such thing')"], tmp_path)
    with pytest.raises(RuntimeError, match="broken: no step 1:\nno such thing"):
        run.after(1, limit_s=60)
    run.end()
