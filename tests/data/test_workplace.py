"""The folder beside a prepared one: one run at a time, on one machine and between machines."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from vectorlm.data import workplace
from vectorlm.data.workplace import OWNER, Workplace
from vectorlm.errors import DataError

HOLD = """
import sys, time
from vectorlm.data.workplace import Workplace
place = Workplace(sys.argv[1])
place.enter()
print("in", flush=True)
time.sleep(60)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def entered(folder: Path) -> bool:
    place = Workplace(folder)
    place.enter()
    place.leave(keep=False)
    return True


def test_a_second_run_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path / "d")]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "in\n"
        with pytest.raises(DataError, match=rf"/d: a run on .* \(process {holder.pid}\) is prep"):
            entered(tmp_path / "d")
        assert names(tmp_path) == [".d.lock", ".d.tmp"]
        holder.kill()
        holder.wait(10)
        assert entered(tmp_path / "d")
        assert names(tmp_path) == []
    finally:
        holder.kill()
        holder.communicate(timeout=10)


def test_of_many_at_once_one_gets_in(tmp_path: Path) -> None:
    """The lock file is removed and made anew all the time; never are two inside."""
    inside: list[int] = []
    most: list[int] = []
    turns: list[int] = []
    end = time.monotonic() + 1

    def try_often() -> None:
        while time.monotonic() < end:
            place = Workplace(tmp_path / "d")
            try:
                place.enter()
            except DataError:
                continue
            inside.append(1)
            most.append(len(inside))
            inside.pop()
            turns.append(1)
            place.leave(keep=False)

    threads = [threading.Thread(target=try_often) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(turns) > 4
    assert max(most) == 1
    assert names(tmp_path) == []


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workplace, "BEAT_S", 0.05)
    monkeypatch.setattr(workplace, "SILENCE_S", 0.4)


def owned_elsewhere(folder: Path, host: str = "another-host") -> Path:
    temporary = folder.parent / f".{folder.name}.tmp"
    temporary.mkdir()
    (temporary / OWNER).write_text(json.dumps({"host": host, "pid": 17}))
    return temporary / OWNER


@pytest.mark.usefixtures("quick")
def test_a_silent_owner_on_another_machine_has_lost_its_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    owned_elsewhere(tmp_path / "d")
    assert entered(tmp_path / "d")
    assert "a run on another-host (process 17) has begun it; looking" in capsys.readouterr().out


@pytest.mark.usefixtures("quick")
def test_an_owner_on_another_machine_that_shows_life_keeps_its_place(tmp_path: Path) -> None:
    owner = owned_elsewhere(tmp_path / "d")
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.02):
            os.utime(owner)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(DataError, match=r"another-host \(process 17\) is preparing it"):
            entered(tmp_path / "d")
    finally:
        stop.set()
        thread.join(10)
    assert names(tmp_path) == [".d.tmp"]
    assert json.loads(owner.read_text())["pid"] == 17


@pytest.mark.usefixtures("quick")
def test_without_locks_the_sign_of_life_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    first = Workplace(tmp_path / "d")
    first.enter()
    with pytest.raises(DataError, match="is preparing it"):
        entered(tmp_path / "d")
    first.leave(keep=False)
    assert entered(tmp_path / "d")


@pytest.mark.usefixtures("quick")
def test_who_works_touches_its_name(tmp_path: Path) -> None:
    place = Workplace(tmp_path / "d")
    place.enter()
    before = workplace.touched(place.temporary)
    deadline = time.monotonic() + 10
    while workplace.touched(place.temporary) == before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert workplace.touched(place.temporary) != before
    place.leave(keep=False)
