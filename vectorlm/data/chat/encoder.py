"""Conversations, prompts with completions, and ready tokens become documents with labels. Floor 2;
called by `vectorlm.preprocess`.

`vectorlm.chat` says which characters of a row are learned, `data.chat.marking` which tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from vectorlm.chat import formats
from vectorlm.chat.formats import COLUMNAR, TURNS, Tokenized
from vectorlm.chat.problem import RowProblem
from vectorlm.chat.renderer import Piece, Recipe, Refused, Renderer, oddities
from vectorlm.chat.spans import NOTHING
from vectorlm.chat.template import template_or_why_not
from vectorlm.config.schema import DatasetPreprocess
from vectorlm.data.chat.detection import RowsAre
from vectorlm.data.chat.marking import Marker, Spanned
from vectorlm.data.chat.shares import rendered
from vectorlm.data.documents import Documents, Offsets, offsets_of
from vectorlm.data.sources import Source
from vectorlm.data.tokenize import TextTokenizer
from vectorlm.data.workers import Workers
from vectorlm.errors import DataError
from vectorlm.hub_cache import find_model_folder
from vectorlm.row import Tokens
from vectorlm.row_batch import BadRow, Position, RowBatch

LOOKED_AT = 100

Made = tuple[Tokens, Tokens, Offsets]  # ids, labels, and where each document begins


class Given(NamedTuple):
    """Ids and labels of one row, as they were."""

    ids: Tokens
    labels: Tokens


class ChatEncoder:
    """Rows of one format."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        renderer: Renderer,
        columns_read: tuple[str, ...] | None,
        ignore_index: int,
    ) -> None:
        self.tokenizer = tokenizer
        self.renderer = renderer
        self.columns_read = columns_read
        self.ignore_index = ignore_index
        self.ids_end = vocabulary_end(tokenizer)
        self.marker = Marker(tokenizer)

    def rows(self, source: Source, start: Position) -> Iterator[RowBatch]:
        return source.batches(self.columns_read, start)

    def content(self, value: Any) -> str | None:
        """What two rows have in common when they hold the same; None for a bad row."""
        try:
            return formats.canonical(self.renderer.parsed(value))
        except RowProblem:
            return None

    def ready(self, batches: Iterable[RowBatch], workers: Workers) -> Iterator[RowBatch]:
        """Each value is what becomes of the row: a Piece, Given, or Refused."""
        if self.renderer.recipe.row_format != "tokenized":
            return rendered(batches, self.renderer, workers)
        return (batch._replace(values=list(map(self.given, batch.values))) for batch in batches)

    def given(self, value: Any) -> Given | Refused:
        try:
            row = self.renderer.parsed(value)
            assert isinstance(row, Tokenized)
            return self.checked(row)
        except RowProblem as problem:
            return Refused(problem.reason, problem.detail)

    def checked(self, row: Tokenized) -> Given:
        wrong = next((one for one in row.ids if not 0 <= one < self.ids_end), None)
        if wrong is not None:
            text = f"input_ids has {wrong}, and the tokenizer's ids end at {self.ids_end - 1}"
            raise RowProblem(formats.BAD_TOKENS, text)
        if all(label is None for label in row.labels):
            raise RowProblem(NOTHING, "no token of it is learned")
        ignored = self.ignore_index
        labels = [ignored if label is None else label for label in row.labels]
        return Given(np.array(row.ids, np.int32), np.array(labels, np.int32))

    def encode(self, batch: RowBatch) -> tuple[Documents, list[BadRow]]:
        """One document a row, in order; rows with nothing to learn are bad."""
        good, bad = [], []
        for at, one in enumerate(batch.values):
            if isinstance(one, Refused):
                bad.append(BadRow(batch.where[at], *one))
            else:
                good.append(at)
        values = [batch.values[at] for at in good]
        is_given = self.renderer.recipe.row_format == "tokenized"
        made = as_given(values) if is_given else self.tokenized(values)
        return Documents(*made, batch.where.take(np.array(good, np.int64))), bad

    def tokenized(self, pieces: Sequence[Piece]) -> Made:
        ids, learned, offsets = self.marker.mark([Spanned(one.text, one.spans) for one in pieces])
        labels = np.where(learned, ids, np.int32(self.ignore_index))
        added = [
            (place, token, label)
            for (start, end), one in zip(pairwise(offsets.tolist()), pieces, strict=True)
            for place, token, label in (
                (start, one.before, self.ignore_index),
                (end, one.after, one.after),
            )
            if token is not None
        ]
        if not added:
            return ids, labels, offsets
        places, tokens, new_labels = (list(column) for column in zip(*added, strict=True))
        more = [(one.before is not None) + (one.after is not None) for one in pieces]
        return (
            np.insert(ids, places, tokens),
            np.insert(labels, places, new_labels),
            offsets_of(np.diff(offsets) + more),
        )


def as_given(rows: Sequence[Given]) -> Made:
    return (
        np.concatenate([np.empty(0, np.int32), *(one.ids for one in rows)]),
        np.concatenate([np.empty(0, np.int32), *(one.labels for one in rows)]),
        offsets_of([len(one.ids) for one in rows]),
    )


def vocabulary_end(tokenizer: TextTokenizer) -> int:
    """One more than the largest id; no limit where there is no backend to ask."""
    if tokenizer.resolved.serialized is None:
        return 2**31
    added = tokenizer.backend.get_added_tokens_decoder()
    return max([tokenizer.backend.get_vocab_size(with_added_tokens=True), *(n + 1 for n in added)])


# --- making ---------------------------------------------------------------------------------------


def make_encoder(
    options: DatasetPreprocess, rows: RowsAre, tokenizer: TextTokenizer, model: str, kind: str
) -> ChatEncoder:
    """For what these rows of files of this kind are."""
    for name in ("pre_pend", "separator"):
        if getattr(options, name) is not None:
            raise DataError(
                f"dataset_preprocess.{name} is only for texts, and the rows are "
                f"{rows.row_format}.\nRemove it, or set dataset_preprocess.dataset_format: text."
            )
    renderer = Renderer(recipe_of(options, rows.row_format, tokenizer, model, kind in COLUMNAR))
    if rows.row_format in TURNS:
        renderer.finder.check_template()  # before hours are spent
    return ChatEncoder(tokenizer, renderer, rows.columns, options.ignore_index)


def recipe_of(
    options: DatasetPreprocess, row_format: str, tokenizer: TextTokenizer, model: str, nulls: bool
) -> Recipe:
    special = tokenizer.resolved.special
    tokens = added_tokens(tokenizer)
    ends = options.add_bos_eos_tokens
    return Recipe(
        row_format,
        options.columns,
        nulls,
        options.learn,
        tokenizer.bos_id if ends else None,
        tokenizer.eos_id if ends else None,
        tokenizer.eos_id,
        template_or_why_not(options.chat_template, find_model_folder(model), special),
        [*(text for text, is_special in tokens.items() if is_special), *special.values()],
        list(tokens),
    )


def oddities_of(
    options: DatasetPreprocess,
    source: Source,
    row_format: str,
    tokenizer: TextTokenizer,
    model: str,
) -> list[str]:
    """By the first rows."""
    nulls = source.kind in COLUMNAR
    first: list[Any] = next((batch.values for batch in source.batches() if batch.values), [])
    renderer = Renderer(recipe_of(options, row_format, tokenizer, model, nulls))
    return list(oddities(renderer, first[:LOOKED_AT]))


def added_tokens(tokenizer: TextTokenizer) -> dict[str, bool]:
    """What is never split, and whether it is special."""
    if tokenizer.resolved.serialized is None:
        return dict.fromkeys(tokenizer.resolved.special.values(), True)
    found = tokenizer.backend.get_added_tokens_decoder().values()
    return {token.content: token.special for token in found}
