"""Processes that render rows, as many as there are cores to use. Floor 2, standard library only;
made by `vectorlm.preprocess`, asked by `data.chat.shares`.

A process is started when there is work that no other is free for. It imports templates and nothing
heavier, and ends with this one, however that ends: it then reads the end of what it is sent.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as OutOfTime
from types import TracebackType

from vectorlm.chat.pipe import receive, send
from vectorlm.errors import DataError

LONGEST_S = 600.0  # for an answer
END_S = 10.0
# The paths of this process, so that it is this package that is imported, wherever it was found.
BEGIN = "import sys; sys.path[:] = sys.argv[1:]; from vectorlm.chat.worker import main; main()"


class Workers:
    """Leaving the block ends all of them, whatever they do."""

    def __init__(self, count: int | None, memory_mb: int) -> None:
        self.count = count or len(os.sched_getaffinity(0))
        self.memory_mb = memory_mb  # for what they are sent and answer
        self.threads = ThreadPoolExecutor(self.count, "renders")
        self.of_thread = threading.local()
        self.lock = threading.Lock()
        self.processes: list[subprocess.Popen[bytes]] = []
        self.left = False

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self.lock:
            self.left = True
            for process in self.processes:
                process.kill()
        self.threads.shutdown(cancel_futures=True)
        for process in self.processes:
            process.communicate(timeout=END_S)

    def ask(self, recipe: bytes, rows: bytes, where: str) -> Answer:
        """`where` the rows are, for errors."""
        return Answer(self.threads.submit(self._ask, recipe, rows, where), where)

    def _ask(self, recipe: bytes, rows: bytes, where: str) -> bytes:
        process = getattr(self.of_thread, "process", None) or self._start()
        assert process.stdin
        assert process.stdout
        try:
            send(process.stdin, recipe, rows)
            return receive(process.stdout)
        except (OSError, EOFError) as error:
            raise DataError(ended(process.wait(END_S), where)) from error

    def _start(self) -> subprocess.Popen[bytes]:
        paths = [path or os.getcwd() for path in sys.path]
        with self.lock:
            if self.left:
                raise CancelledError
            try:
                process = subprocess.Popen(
                    [sys.executable, "-c", BEGIN, *paths],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    start_new_session=True,  # Ctrl-C is for this process alone
                )
            except OSError as error:
                raise DataError(
                    f"a process to render conversations cannot be started ({error}).\n"
                    "Set dataset_preprocess.workers lower."
                ) from error
            self.processes.append(process)
        self.of_thread.process = process
        return process


class Answer:
    """What will come back."""

    def __init__(self, found: Future[bytes], where: str) -> None:
        self.found = found
        self.where = where

    def wait(self) -> bytes:
        """DataError where the process has ended, or does not come to an end."""
        try:
            return self.found.result(LONGEST_S)
        except OutOfTime as error:
            raise DataError(
                f"{self.where}: rendering these rows takes longer than {LONGEST_S:.0f} s.\n"
                "Does the chat template come to an end?"
            ) from error


def ended(code: int, where: str) -> str:
    if code < 0:
        return (
            f"{where}: a process that rendered these rows was ended by "
            f"{signal.Signals(-code).name}.\n"
            "Where it was for lack of memory, set dataset_preprocess.workers lower."
        )
    return (
        f"{where}: a process that rendered these rows ended by itself, with code {code}; why "
        "stands above.\nWith dataset_preprocess.workers: 1 there is no other process."
    )
