"""Several sources as one, and rows that are chosen by a hash: for weights, and to hold some out.
Floor 2; called by `vectorlm.preprocess`.

Whether a row is chosen follows from the seed and from the row alone, never from what was read
before it, so it is the same after an interruption and for any number of workers.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, groupby
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vectorlm.config.schema import DatasetPreprocess
from vectorlm.data.chat.detection import RowsAre, look_at_rows
from vectorlm.data.documents import Documents, Encoder, RowEncoder
from vectorlm.data.sources import START, Source, find_source
from vectorlm.row_batch import BadRow, Position, RowBatch
from vectorlm.source_files import joined_sha256

if TYPE_CHECKING:
    from vectorlm.data.workers import Workers


class Part(NamedTuple):
    """One source of a prepared folder: how it is read, what its rows are, how often each is
    taken."""

    source: Source
    options: DatasetPreprocess
    split: str | None
    rows: RowsAre
    weight: float


def find_part(
    options: DatasetPreprocess, load_path: str, split: str | None, weight: float = 1.0
) -> Part:
    source = find_source(options, load_path, split)
    return Part(source, options, split, look_at_rows(source, options), weight)


def joined_source(parts: Sequence[Part]) -> Source:
    if len(parts) == 1 and parts[0].weight == 1:
        return parts[0].source
    return Mixture(parts)


class Pass(NamedTuple):
    """One reading of a part; `share` of its rows are taken."""

    part: int
    share: float
    first: bool


class Mixture(Source):
    """Sources one after the other; a weight of 2.5 is two whole passes and half of a third."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)
        self.name = ", ".join(part.source.name for part in parts)
        self.kind = "several"
        self.root = Path()
        self.files = tuple(file for part in parts for file in part.source.files)
        self.passes = [one for number, part in enumerate(parts) for one in passes(number, part)]
        sizes = [parts[one.part].source.total_bytes for one in self.passes]
        self.before = [0, *accumulate(sizes)]
        self.total_bytes = sum(part.source.total_bytes for part in parts)
        # Files are counted through over all passes, so that a position is one of a pass, too.
        counts = [max(len(parts[one.part].source.files), 1) for one in self.passes]
        self.starts = [0, *accumulate(counts)]
        self.reading = 0

    def pass_of(self, position: Position) -> int:
        return bisect_right(self.starts, position.file, hi=len(self.passes)) - 1

    def fraction(self) -> float:
        if not self.passes:
            return 1.0
        one = self.parts[self.passes[self.reading].part].source
        done = self.before[self.reading] + one.fraction() * one.total_bytes
        return done / max(self.before[-1], 1)

    def sha256(self) -> str:
        hashes = [part.source.sha256() for part in self.parts]
        return joined_sha256(hashes, [part.weight for part in self.parts])

    def check_unchanged(self) -> None:
        for part in self.parts:
            part.source.check_unchanged()


def passes(number: int, part: Part) -> Iterator[Pass]:
    whole = int(part.weight)
    for again in range(whole):
        yield Pass(number, 1.0, again == 0)
    if part.weight > whole:
        yield Pass(number, part.weight - whole, whole == 0)


class MixedEncoder:
    """Each part of a mixture by its own encoder."""

    def __init__(self, mixture: Mixture, encoders: Sequence[Encoder], seed: int) -> None:
        self.mixture = mixture
        self.encoders = tuple(encoders)
        self.tokenizer = encoders[0].tokenizer
        self.seed = seed

    def rows(self, source: Source, start: Position) -> Iterator[RowBatch]:
        mixture = self.mixture
        first = mixture.pass_of(start)
        for number in range(first, len(mixture.passes)):
            mixture.reading, one = number, mixture.passes[number]
            offset = mixture.starts[number]
            here = start._replace(file=start.file - offset) if number == first else START
            for batch in self.encoders[one.part].rows(mixture.parts[one.part].source, here):
                file = batch.after.file
                taken = self.thinned(batch, one, file) if one.share < 1 else batch
                yield taken._replace(
                    bad=taken.bad if one.first else [],  # else they have been counted
                    after=batch.after._replace(file=offset + file),
                    source=one.part,
                    again=not one.first,
                    passed_over=len(batch.values) - len(taken.values),
                )

    def thinned(self, batch: RowBatch, one: Pass, file: int) -> RowBatch:
        start = f"{one.part}:{file}:"
        numbers = batch.where.numbers
        return chosen(
            batch, [at for at, n in enumerate(numbers) if lot(self.seed, f"{start}{n}") < one.share]
        )

    def ready(self, batches: Iterable[RowBatch], workers: Workers) -> Iterator[RowBatch]:
        for part, group in groupby(batches, key=lambda batch: batch.source):
            yield from self.encoders[part].ready(group, workers)

    def encode(self, batch: RowBatch) -> tuple[Documents, list[BadRow]]:
        documents, bad = self.encoders[batch.source].encode(batch)
        return documents, [] if batch.again else bad


class HeldOut:
    """One side of a source's rows: those held out, or the others. Equal rows are on one side."""

    def __init__(self, encoder: RowEncoder, share: float, seed: int, held: bool) -> None:
        self.encoder = encoder
        self.tokenizer = encoder.tokenizer
        self.share = share
        self.seed = seed
        self.held = held

    def rows(self, source: Source, start: Position) -> Iterator[RowBatch]:
        for batch in self.encoder.rows(source, start):
            contents = map(self.encoder.content, batch.values)
            taken = chosen(batch, [at for at, one in enumerate(contents) if self.is_mine(one)])
            if self.held:
                yield taken._replace(bad=[])
            else:
                yield taken._replace(held_out=len(batch.values) - len(taken.values))

    def is_mine(self, content: str | None) -> bool:
        """Bad rows are told of with the training data."""
        held = content is not None and lot(self.seed, content) < self.share
        return held == self.held

    def ready(self, batches: Iterable[RowBatch], workers: Workers) -> Iterator[RowBatch]:
        return self.encoder.ready(batches, workers)

    def encode(self, batch: RowBatch) -> tuple[Documents, list[BadRow]]:
        return self.encoder.encode(batch)


def chosen(batch: RowBatch, places: list[int]) -> RowBatch:
    return batch._replace(
        values=[batch.values[at] for at in places], where=batch.where.take(places)
    )


def lot(seed: int, text: str) -> float:
    """A number from 0 up to 1 that is this text's for this seed."""
    key = seed.to_bytes(8, "little")
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8, key=key).digest()
    return int.from_bytes(digest, "little") / 2**64
