"""A process that renders rows for another: what it reads it answers, until there is no more. Floor
1, without what is slow to import; started by `vectorlm.data.workers`, asked by
`vectorlm.data.chat.shares`.

A request is a recipe and rows, as `marshal` writes plain values: both ends are the same Python.
"""

from __future__ import annotations

import marshal
import os
import select
import sys
import threading
from typing import Any

from vectorlm.chat.pipe import receive, send
from vectorlm.chat.renderer import Piece, Recipe, Refused, Renderer
from vectorlm.errors import DataError

RENDERED, ERROR = "rendered", "error"


def pack(value: Any) -> bytes:
    """ValueError where it is more than plain values."""
    return marshal.dumps(value)


def unpack_answer(message: bytes) -> list[Piece | Refused]:
    kind, found = marshal.loads(message)
    if kind == ERROR:
        raise DataError(found)
    return [Piece(*one) if len(one) == len(Piece._fields) else Refused(*one) for one in found]


def main() -> None:
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    threading.Thread(target=_end_with_the_other, daemon=True).start()
    known, renderer = b"", None
    while True:
        try:
            recipe, rows = receive(requests), receive(requests)
        except EOFError:
            return
        if renderer is None or recipe != known:
            known, renderer = recipe, Renderer(Recipe(*marshal.loads(recipe)))
        send(answers, pack(_answer(renderer, marshal.loads(rows))))


def _answer(renderer: Renderer, values: list[Any]) -> tuple[str, Any]:
    try:
        return RENDERED, [tuple(one) for one in renderer.render(values)]
    except DataError as error:
        return ERROR, str(error)


def _end_with_the_other() -> None:
    """At once, also from within a template that takes long: nobody waits for it any more."""
    hung_up = select.poll()
    hung_up.register(sys.stdin.fileno(), 0)
    hung_up.poll()
    os._exit(0)
