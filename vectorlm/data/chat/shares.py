"""Batches of rows rendered by several processes at once, in shares. Floor 2; called by
`data.chat.encoder`.

What comes of a row depends on the row alone, so neither its order nor its text does on how many
processes there are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain

from vectorlm.chat.renderer import Piece, Refused, Renderer
from vectorlm.chat.worker import pack, unpack_answer
from vectorlm.data.workers import Answer, Workers
from vectorlm.row_batch import RowBatch

SHARES = 8  # of a batch
BATCH_MB = 16  # of a batch that is being rendered, in all its forms
FEW_ROWS = 250  # rendered before a process has started

Rendered = list[Piece | Refused]


def rendered(
    batches: Iterable[RowBatch], renderer: Renderer, workers: Workers
) -> Iterator[RowBatch]:
    """The same batches in the same order; their values are pieces, or why there is none."""
    recipe = pack(tuple(renderer.recipe))
    waiting: deque[tuple[RowBatch, list[Answer | Rendered]]] = deque()
    for number, batch in enumerate(batches):
        if workers.count == 1 or (number == 0 and len(batch.values) < FEW_ROWS):
            yield batch._replace(values=renderer.render(batch.values))
            continue
        shares = list(begun(batch, recipe, renderer, workers))
        waiting.append((batch._replace(values=[]), shares))
        if len(waiting) > batches_ahead(workers):
            yield complete(*waiting.popleft())
    while waiting:
        yield complete(*waiting.popleft())


def batches_ahead(workers: Workers) -> int:
    """Twice what all processes are busy with, so that none waits for the next share."""
    return max(min(-(-2 * workers.count // SHARES), workers.memory_mb // BATCH_MB), 1)


def begun(
    batch: RowBatch, recipe: bytes, renderer: Renderer, workers: Workers
) -> Iterator[Answer | Rendered]:
    step = -(-len(batch.values) // SHARES) or 1
    for start in range(0, len(batch.values), step):
        values = batch.values[start : start + step]
        try:
            rows = pack(values)
        except ValueError:  # dates and the like, that only columnar files have
            yield renderer.render(values)
        else:
            last = batch.where.numbers[start + len(values) - 1]
            yield workers.ask(recipe, rows, f"{batch.where[start]}-{last}")


def complete(batch: RowBatch, shares: Iterable[Answer | Rendered]) -> RowBatch:
    found = (unpack_answer(one.wait()) if isinstance(one, Answer) else one for one in shares)
    return batch._replace(values=list(chain.from_iterable(found)))
