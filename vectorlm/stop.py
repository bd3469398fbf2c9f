"""A request to stop, on floor 0 so that it can be armed before anything slow is imported.
Used by `train`.

Handlers only set a flag: the trainer asks for it at step boundaries, where all ranks agree, and
saves there.
"""

from __future__ import annotations

import signal
from types import FrameType

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
