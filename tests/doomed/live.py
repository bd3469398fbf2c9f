"""What really happens to an entry without `check`: its verb, run in a process of its own.

`python -m tests.doomed --live [WORDS]` runs all entries that this machine can show, and tells those
that end otherwise than the catalogue says. It takes minutes.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from tests.doomed.case import ROOT, Case
from tests.doomed.judge import in_namespace

LIMIT_S = 120  # for a command
WAITING_S = 5  # for Slurm to say why a job waits
JOB_S = 300


def happens(case: Case, verb: str) -> str:
    """The exit code and all that is printed, with "..." for the case's folder."""
    case.write()
    start = _as_command if case.apart or case.hub else _forked
    try:
        code, text = start(case, verb)
    finally:
        for leave in case.on_leave:
            leave()
    if not code and verb == "submit":
        text += _why_it_waits(case)
    if not code and verb == "job":
        text += _log_of_job(case)
    text = text.replace(str(case.folder), "...")
    return f"exit {code}\n" + re.sub(r"\x1b\[[0-9;]*m", "", text)


def _why_it_waits(case: Case) -> str:
    """What Slurm says of the job that was submitted, which is cancelled then."""
    lab = case.surroundings.lab
    assert lab is not None
    end = time.monotonic() + WAITING_S
    while (said := lab.run("squeue", "-h", "-o", "%T %r").stdout.strip()).endswith(" None"):
        if time.monotonic() > end:
            break
        time.sleep(0.2)
    for job in lab.queue():
        lab.cancel(job)
    return f"\n{said.replace('PENDING ', 'pending: ')}"


def _log_of_job(case: Case) -> str:
    lab = case.surroundings.lab
    assert lab is not None
    lab.until(lambda: not lab.queue(), "end of the job", JOB_S)
    return "\n".join(path.read_text() for path in sorted(case.output.glob("logs/*")))


def _words(case: Case, verb: str) -> list[str]:
    """Of the command; a job is submitted whatever `check` says of it."""
    words = verb.replace("job", "submit").split()
    forced = ["--force"] if words[0] == "submit" else []
    return [*words, *forced, "--config", str(case.config_path)]


def _as_command(case: Case, verb: str) -> tuple[int, str]:
    command = [case.python, "-m", "vectorlm.cli", *_words(case, verb)]
    done = subprocess.run(
        in_namespace(case, command),
        cwd=ROOT,
        env=case.environ,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    return done.returncode, done.stderr + done.stdout


def _forked(case: Case, verb: str) -> tuple[int, str]:
    """A fork of this process, which has imported what takes seconds."""
    import torch  # noqa: F401

    import vectorlm.assemble  # noqa: F401

    said = case.folder / "said"
    child = os.fork()
    if not child:
        _be(case, verb, said)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), said.read_text(errors="replace")


def _be(case: Case, verb: str, said: Path) -> None:
    code = 70
    try:
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 1)
        os.dup2(1, 2)
        os.environ.clear()
        os.environ.update(case.environ)
        if verb == "train":
            from vectorlm.train import main

            code = main(["--config", str(case.config_path)])
        else:
            from vectorlm.cli import main as cli

            code = cli(_words(case, verb))
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
