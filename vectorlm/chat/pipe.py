"""Messages between a process and those it has started: a length and so many bytes. Floor 1,
standard library only; the two ends are `worker` and `vectorlm.data.workers`.
"""

from __future__ import annotations

import struct
from typing import IO

SIZE = struct.Struct("<Q")


def send(file: IO[bytes], *messages: bytes) -> None:
    for message in messages:
        file.write(SIZE.pack(len(message)))
        file.write(message)
    file.flush()


def receive(file: IO[bytes]) -> bytes:
    """EOFError where there is no whole message."""
    return _exactly(file, SIZE.unpack(_exactly(file, SIZE.size))[0])


def _exactly(file: IO[bytes], size: int) -> bytes:
    found = file.read(size)
    if len(found) < size:
        raise EOFError
    return found
