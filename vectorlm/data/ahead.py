"""Work that runs ahead of what needs it, in a thread. Floor 2, standard library only; called by
`vectorlm.preprocess`.

It pays where the work leaves Python: reading, hashing, and encoding in Rust.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")

LOOK_S = 0.1  # how often a full queue is asked whether it is still wanted


class Ahead(Generic[T]):
    """The items of an iterable, at most `depth` of them made before they are asked for. An error
    comes where its item would; leaving the block ends the thread."""

    def __init__(self, items: Iterable[T], depth: int) -> None:
        self.items = items
        self.queue: queue.Queue[tuple[bool, Any]] = queue.Queue(depth)
        self.left = threading.Event()
        self.thread = threading.Thread(target=self.work, daemon=True, name="ahead")

    def __enter__(self) -> Iterator[T]:
        self.thread.start()
        return self.results()

    def __exit__(self, *_: object) -> None:
        self.left.set()
        self.thread.join()

    def work(self) -> None:
        try:
            for item in self.items:
                if not self.put((True, item)):
                    return
            self.put((False, None))
        except BaseException as error:  # raised again where the item is missing
            self.put((False, error))

    def put(self, found: tuple[bool, Any]) -> bool:
        """Whether it is still wanted."""
        while not self.left.is_set():
            try:
                self.queue.put(found, timeout=LOOK_S)
            except queue.Full:
                continue
            return True
        return False

    def results(self) -> Iterator[T]:
        while True:
            there, found = self.queue.get()
            if there:
                yield found
            elif found is None:
                return
            else:
                raise found


class Later(Generic[T]):
    """What a function returns, worked out in a thread."""

    def __init__(self, function: Callable[[], T]) -> None:
        self.function = function
        self.found: T | None = None
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self.work, daemon=True, name="later")
        self.thread.start()

    def work(self) -> None:
        try:
            self.found = self.function()
        except BaseException as error:  # raised again where the value is asked for
            self.error = error

    @property
    def done(self) -> bool:
        return not self.thread.is_alive() and self.error is None

    def value(self) -> T:
        self.thread.join()
        if self.error is not None:
            raise self.error
        return self.found  # type: ignore[return-value]
