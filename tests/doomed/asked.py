"""`check`, asked for its findings: in this process, or in one that stays on the pretended site.

As a program it answers on the site, a line of JSON for each: many cases, and one start of Python.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from vectorlm.check.everything import findings as check
from vectorlm.check.everything import findings_beside
from vectorlm.config.load import load_config
from vectorlm.errors import ConfigError


@dataclass(frozen=True)
class Found:
    severity: str
    where: str
    text: str
    cure: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.where}: {self.text}\n    -> {self.cure}"


def find(config: str, overrides: Sequence[str], environ: dict[str, str]) -> list[Found]:
    """All that is found for that file, as if this process had that environment."""
    with _environ(environ):
        try:
            loaded = load_config(config, overrides)
        except ConfigError as error:
            wrong = [Found("error", "", line, line) for line in str(error).splitlines()]
            found = findings_beside(config, environ, overrides)
        else:
            wrong, found = [], check(loaded, config, environ, overrides)
    return wrong + [Found(one.severity, one.where, one.text, one.cure) for one in found]


@contextmanager
def _environ(environ: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


class Site:
    """The other process; `command` starts it, and it ends with this one."""

    def __init__(self, command: Sequence[str], environ: dict[str, str]) -> None:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environ)

    def find(self, config: str, overrides: Sequence[str], environ: dict[str, str]) -> list[Found]:
        assert self._process.stdin
        assert self._process.stdout
        question = {"config": config, "overrides": list(overrides), "environ": environ}
        print(json.dumps(question), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, "the process on the site has ended; what it printed tells why"
        return [Found(**one) for one in json.loads(answer)]

    def close(self) -> None:
        self._process.communicate(timeout=30)


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps([asdict(one) for one in find(**json.loads(line))]), flush=True)
