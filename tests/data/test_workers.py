"""Processes that render: what they answer, how they end, and that none is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.data.chat.models import NAMED, SPECIAL, said, source, user
from vectorlm.chat.renderer import Piece, Recipe, Refused, Renderer
from vectorlm.chat.worker import pack, unpack_answer
from vectorlm.data import workers as subject
from vectorlm.data.workers import Answer, Workers
from vectorlm.errors import DataError

ROOT = Path(__file__).parents[2]
# Comes to no end where a question says so.
ENDLESS = (
    "{% if messages[0].content == 'forever' %}{% for a in range(99999) %}"
    "{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
)
ROWS = [{"messages": [user("Hi"), said("Hello.")]}, {"messages": [user("Hi")]}]
FOREVER = [{"messages": [user("forever"), said("Hello.")]}]


def recipe(template: str | None = None) -> Recipe:
    given = (template or ENDLESS + source("chatml"), "a.jinja", NAMED)
    return Recipe("messages", {}, False, "assistant", None, None, 2, given, SPECIAL, SPECIAL)


def ask(workers: Workers, rows: Any, made: Recipe | None = None) -> Answer:
    return workers.ask(pack(tuple(made or recipe())), pack(rows), "c.jsonl:1-2")


@pytest.fixture
def workers() -> Iterator[Workers]:
    with Workers(2, 300) as made:
        yield made
    assert all(process.returncode is not None for process in made.processes)


def until(done: Callable[[], Any], seconds: float = 20) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := done()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def test_the_answer_is_what_is_rendered_here(workers: Workers) -> None:
    found = unpack_answer(ask(workers, ROWS).wait())
    assert found == Renderer(recipe()).render(ROWS)
    assert isinstance(found[0], Piece)
    assert isinstance(found[1], Refused)


def test_every_question_has_its_own_recipe(workers: Workers) -> None:
    names = ("chatml", "llama3", "chatml", "qwen3")
    asked = [ask(workers, ROWS, recipe(source(name))) for name in names]
    for name, answer in zip(names, asked, strict=True):
        wanted = Renderer(recipe(source(name))).render(ROWS)
        assert unpack_answer(answer.wait()) == wanted


def test_a_process_is_started_when_none_is_free(workers: Workers) -> None:
    assert not workers.processes
    ask(workers, ROWS).wait()
    assert len(workers.processes) == 1
    forever = ask(workers, FOREVER)
    ask(workers, ROWS).wait()
    until(lambda: len(workers.processes) == 2)
    assert not forever.found.done()


def test_by_itself_it_takes_all_cores() -> None:
    assert Workers(None, 300).count == len(os.sched_getaffinity(0))


def test_nothing_heavy_is_imported(workers: Workers) -> None:
    ask(workers, ROWS).wait()
    mapped = Path(f"/proc/{workers.processes[0].pid}/maps").read_text()
    assert "markupsafe" in mapped  # what is imported would be seen here
    heavy = ("torch", "numpy", "pyarrow", "tokenizers")
    assert not [name for name in heavy if f"/site-packages/{name}/" in mapped]


# --- what goes wrong ------------------------------------------------------------------------------


def test_a_mistake_of_the_user_is_told_as_it_is(workers: Workers) -> None:
    broken = ask(workers, ROWS, recipe("{% if %}"))
    with pytest.raises(DataError, match=r"a.jinja: line 1: the chat template is broken"):
        unpack_answer(broken.wait())
    without = recipe()._replace(template="there is none")
    with pytest.raises(DataError, match="there is none"):
        unpack_answer(ask(workers, ROWS, without).wait())
    unpack_answer(ask(workers, ROWS).wait())


def test_one_that_is_killed_ends_the_run(workers: Workers) -> None:
    answer = ask(workers, FOREVER)
    process = until(lambda: workers.processes)[0]
    process.send_signal(signal.SIGKILL)
    with pytest.raises(
        DataError, match=r"c.jsonl:1-2: a process .* was ended by SIGKILL.\n.*lower"
    ):
        answer.wait()


def test_one_that_fails_ends_the_run(workers: Workers, capfd: pytest.CaptureFixture[str]) -> None:
    answer = workers.ask(b"no recipe", pack(ROWS), "c.jsonl:1-2")
    with pytest.raises(DataError, match=r"c.jsonl:1-2: .* by itself, with code 1; why stands"):
        answer.wait()
    assert "ValueError: bad marshal data" in capfd.readouterr().err


def test_one_that_does_not_end_is_not_waited_for(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject, "LONGEST_S", 0.5)
    with pytest.raises(DataError, match=r"c.jsonl:1-2: .* longer than 0 s.\nDoes the chat"):
        ask(workers, FOREVER).wait()


def test_one_that_cannot_be_started_is_told(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(DataError, match=r"cannot be started \(.*nowhere.*\n.*workers lower"):
        ask(workers, ROWS).wait()


def test_leaving_ends_all_whatever_they_do() -> None:
    with Workers(2, 300) as made:
        asked = [ask(made, FOREVER) for _ in range(5)]
        until(lambda: len(made.processes) == 2)
        began = time.monotonic()
    assert time.monotonic() - began < 5
    assert [process.returncode for process in made.processes] == [-signal.SIGKILL] * 2
    assert all(answer.found.done() for answer in asked)


# --- when this process ends -----------------------------------------------------------------------

PARENT = """\
import sys, time
from tests.data.test_workers import FOREVER, ask, until
from vectorlm.data.workers import Workers
with Workers(2, 300) as made:
    for _ in range(3):
        ask(made, FOREVER)
    until(lambda: len(made.processes) == 2)
    print(*[process.pid for process in made.processes], flush=True)
    time.sleep(60)
"""


def is_gone(pid: int) -> bool:
    """Or waits for nothing but to be counted as ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_none_outlives_this_process(how: signal.Signals) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert parent.stdout
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    time.sleep(0.3)  # they are in the midst of it
    assert not any(map(is_gone, pids))
    parent.send_signal(how)
    parent.communicate(timeout=20)
    until(lambda: all(map(is_gone, pids)))
