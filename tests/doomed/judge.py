"""What `check` finds in a case, and whether that is what its user must read."""

from __future__ import annotations

import json
import re
import subprocess

from tests.doomed.asked import Found, Site, find
from tests.doomed.case import ROOT, SCRATCH, Case
from tests.doomed.entry import Doomed

LIMIT_S = 30


def findings(case: Case) -> list[Found]:
    """All that `check` finds, where the case is."""
    config = str(case.write())
    try:
        if case.scratch:
            return _site(case).find(config, case.overrides, case.environ)
        if case.apart:
            return _in_another_process(case)
        return find(config, case.overrides, case.environ)
    finally:
        for leave in case.on_leave:
            leave()


def _site(case: Case) -> Site:
    there = case.surroundings
    if there.site is None:
        command = in_namespace(case, [case.python, "-m", "tests.doomed.asked"])
        there.site = Site(command, case.environ)
    return there.site


def _in_another_process(case: Case) -> list[Found]:
    command = [case.python, "-m", "vectorlm.cli", "check", "--json"]
    command += ["--config", str(case.config_path), *(f"--set={text}" for text in case.overrides)]
    done = subprocess.run(
        in_namespace(case, command),
        cwd=ROOT,
        env=case.environ,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode in (0, 2), done.stdout + done.stderr
    told = json.loads(done.stdout)
    return [Found(**{key: one[key] for key in Found.__annotations__}) for one in told["findings"]]


# $1 and $2: where the shared file system is to be, and where its contents are; $3 and $4: options
# and place of a small one. Those that are empty are not mounted.
MOUNT = """
set -e
if [ -n "$1" ]; then
  mkdir -p "$2" && mount -t tmpfs -o size=4t none "$2" && mkdir "$2/low" "$2/up" "$2/work"
  mount -t overlay -o "lowerdir=$2/low,upperdir=$2/up,workdir=$2/work" none "$1"
fi
if [ -n "$3" ]; then mkdir -p "$4" && mount -t tmpfs -o "$3" none "$4"; fi
shift 4
exec "$@"
"""


def in_namespace(case: Case, command: list[str]) -> list[str]:
    """The command where the case's file systems are mounted, which nobody else sees."""
    if not case.mount and not case.scratch:
        return command
    shared = [str(SCRATCH), str(case.surroundings.root / "store")] if case.scratch else ["", ""]
    small = [case.mount[0], str(case.mount[1])] if case.mount else ["", ""]
    return ["unshare", "--mount", "sh", "-c", MOUNT, "sh", *shared, *small, *command]


def catches(entry: Doomed, found: list[Found]) -> bool:
    return any(
        one.severity in entry.severities
        and re.search(entry.finds, f"{one.where}: {one.text}", re.S)
        and re.search(entry.cure, one.cure, re.S)
        for one in found
    )
