"""Threads beside the loop: items that are made ahead, and a piece of work that is waited for later.
Floor 2, standard library only; used by `trainer`, `checkpoint` and `benchmarks`.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")
LEAVING_S = 5.0  # for a thread that is not needed any more


@dataclass(frozen=True)
class _End:
    """What comes after the last item."""

    error: BaseException | None


class Ahead(Generic[T]):
    """The items of an iterator in their order, made by a thread, at most `depth` before they are
    asked for. What goes wrong there is raised here, when its turn has come.
    """

    def __init__(
        self, items: Iterator[T], depth: int, limit_s: float, late: Callable[[], Exception]
    ) -> None:
        """`late` makes the error for an item that does not come within `limit_s`."""
        self.waited_s = 0.0  # by whom asked; may be set back to 0
        self._items, self._limit_s, self._late = items, limit_s, late
        self._made: queue.SimpleQueue[T | _End] = queue.SimpleQueue()
        self._room = threading.Semaphore(depth)
        self._closed = False
        self._thread = threading.Thread(target=self._make, daemon=True, name="ahead")
        self._thread.start()

    def _make(self) -> None:
        error = None
        try:
            while self._wanted():
                self._made.put(next(self._items))
        except StopIteration:
            pass
        except BaseException as raised:  # whatever it is belongs to whom the items are for
            error = raised
        self._made.put(_End(error))

    def _wanted(self) -> bool:
        self._room.acquire()
        return not self._closed

    def __iter__(self) -> Iterator[T]:
        while True:
            item = self._next()
            if isinstance(item, _End):
                self._made.put(item)  # for whom asks again
                if item.error is not None:
                    raise item.error
                return
            yield item

    def _next(self) -> T | _End:
        began = time.perf_counter()
        try:
            return self._made.get(timeout=self._limit_s)
        except queue.Empty:
            raise self._late() from None
        finally:
            self._room.release()
            self.waited_s += time.perf_counter() - began

    def __enter__(self) -> Ahead[T]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closed = True
        self._room.release()
        self._thread.join(LEAVING_S)


class Underway(Generic[T]):
    """A piece of work that a thread does."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._outcome: T | BaseException | None = None
        self._work = work
        self._thread = threading.Thread(target=self._do, daemon=True, name="underway")
        self._thread.start()

    def _do(self) -> None:
        try:
            self._outcome = self._work()
        except BaseException as error:  # told by `result`
            self._outcome = error

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    @property
    def failed(self) -> bool:
        return self.done and isinstance(self._outcome, BaseException)

    def result(self, limit_s: float, late: Callable[[], Exception]) -> T:
        """Its result, or what it raised; `late` makes the error if it is not done by then."""
        self._thread.join(limit_s)
        if not self.done:
            raise late()
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        return self._outcome  # type: ignore[return-value]
