"""A request to stop, on floor 0 so that it can be armed before anything slow is imported.
Used by `train`.

Handlers only set a flag: the trainer asks for it at step boundaries, where all ranks agree, and
saves there.

    python -m vectorlm.stop ARGUMENTS      as `python ARGUMENTS`, with these signals held back until
                                           it arms a StopFlag
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


class StopFlag:
    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def arm(self) -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # the launcher holds them back

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    def __bool__(self) -> bool:
        return self.received is not None


def run_with_signals_held(arguments: Sequence[str]) -> NoReturn:
    """For a program that loads for seconds before it can arm anything: none ends it meanwhile."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    os.execv(sys.executable, [sys.executable, *arguments])


if __name__ == "__main__":
    run_with_signals_held(sys.argv[1:])
