"""How far preprocessing is, told while it runs. Floor 2; called by `vectorlm.preprocess`."""

from __future__ import annotations

import sys
import time

PLAIN_EVERY_S = 5.0


class Progress:
    """Counts, and says every few seconds how far it is: one plain line, for logs."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.documents = self.tokens = 0
        self.start = self.said = time.monotonic()
        self.first: tuple[float, float] | None = None  # when, and how far: not always 0 %

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self, documents: int, tokens: int, fraction: float) -> None:
        self.documents += documents
        self.tokens += tokens
        self.first = self.first or (time.monotonic(), fraction)
        self.show(min(fraction, 1.0))

    def show(self, fraction: float) -> None:
        now = time.monotonic()
        if now - self.said >= PLAIN_EVERY_S:
            self.said = now
            left = self.left(now, fraction)
            print(f"{self.name}: {fraction:.0%}, {self.rates()}{left}", flush=True)

    def left(self, now: float, fraction: float) -> str:
        start, begun = self.first or (now, fraction)
        if fraction == begun < 1:
            return ""
        left = (now - start) * (1 - fraction) / max(fraction - begun, 1e-9)
        return f", about {duration(left)} left"

    def rates(self) -> str:
        seconds = max(time.monotonic() - self.start, 1e-9)
        return f"{self.documents / seconds:,.0f} documents/s, {self.tokens / seconds:,.0f} tokens/s"


class TerminalProgress(Progress):
    """The same as a bar."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        from rich import progress

        columns = (
            "{task.description}",
            progress.BarColumn(),
            progress.TaskProgressColumn(),
            "{task.fields[rates]}",
        )
        self.bar = progress.Progress(*columns, progress.TimeRemainingColumn(), transient=True)
        self.task = self.bar.add_task(name, total=1.0, rates="")

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.refresh()  # a quick run may end between two of its ticks
        self.bar.stop()

    def show(self, fraction: float) -> None:
        self.bar.update(self.task, completed=fraction, rates=self.rates())


def make_progress(name: str) -> Progress:
    return (TerminalProgress if sys.stdout.isatty() else Progress)(name)


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
