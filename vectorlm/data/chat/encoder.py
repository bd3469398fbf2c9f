"""Conversations, prompts with completions, and ready tokens become documents with labels. Floor 2;
called by `vectorlm.preprocess`.

`data.chat.marking` says which tokens are learned; `vectorlm.chat` says it of characters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vectorlm.chat import formats
from vectorlm.chat.formats import TURNS, Conversation, PromptCompletion, Tokenized
from vectorlm.chat.problem import RowProblem
from vectorlm.chat.spans import NOTHING, Finder, Span
from vectorlm.chat.template import find_template
from vectorlm.config.schema import DatasetPreprocess
from vectorlm.data.chat.detection import COLUMNAR, RowsAre
from vectorlm.data.chat.marking import Learned, Marker, Spanned
from vectorlm.data.documents import BadRow, Documents, Position, RowBatch, offsets_of
from vectorlm.data.sources import Source
from vectorlm.data.tokenize import TextTokenizer
from vectorlm.errors import DataError
from vectorlm.hub_cache import find_model
from vectorlm.row import Tokens

NOT_UTF8 = "not UTF-8"


class Piece(NamedTuple):
    """A text, what of it is learned, and single tokens before and behind it; the one behind it is
    learned."""

    text: str
    spans: list[Span]
    before: int | None = None
    after: int | None = None


class Marked(NamedTuple):
    """One document."""

    ids: Tokens
    labels: Tokens


class ChatEncoder:
    """Rows of one format; `make_finder` is called when the first conversation comes."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        rows: RowsAre,
        columns: Mapping[str, str],
        make_finder: Callable[[], Finder],
        *,
        learn: str,
        add_bos_eos_tokens: bool,
        ignore_index: int,
        nulls: bool,
    ) -> None:
        self.tokenizer = tokenizer
        self.row_format = rows.row_format
        self.columns_read = rows.columns
        self.columns = columns
        self.make_finder = make_finder
        self.learn = learn
        self.add_bos_eos_tokens = add_bos_eos_tokens
        self.ignore_index = ignore_index
        self.nulls = nulls
        self.ids_end = vocabulary_end(tokenizer)
        self.marker = Marker(tokenizer)

    @cached_property
    def finder(self) -> Finder:
        return self.make_finder()

    def rows(self, source: Source, start: Position) -> Iterator[RowBatch]:
        return source.batches(self.columns_read, start)

    def encode(self, batch: RowBatch) -> tuple[Documents, list[BadRow]]:
        """One document a row, in order; rows with nothing to learn are bad."""
        found: list[Piece | Marked] = []
        good: list[int] = []
        bad: list[BadRow] = []
        for at, value in enumerate(batch.values):
            try:
                found.append(self.prepared(value))
                good.append(at)
            except RowProblem as problem:
                bad.append(BadRow(batch.where[at], problem.reason, problem.detail))
        pieces = [one for one in found if isinstance(one, Piece)]
        texts = [Spanned(piece.text, piece.spans) for piece in pieces]
        found_ids = self.marker.mark(texts)
        encoded = iter(map(self.joined, pieces, found_ids))
        marked = [next(encoded) if isinstance(one, Piece) else one for one in found]
        return Documents(
            np.concatenate([np.empty(0, np.int32), *(one.ids for one in marked)]),
            np.concatenate([np.empty(0, np.int32), *(one.labels for one in marked)]),
            offsets_of([len(one.ids) for one in marked]),
            batch.where.take(np.array(good, np.int64)),
        ), bad

    def content(self, value: Any) -> str | None:
        """What two rows have in common when they hold the same; None for a bad row."""
        try:
            return formats.canonical(self.parsed(value))
        except RowProblem:
            return None

    def parsed(self, value: Any) -> formats.Parsed:
        return formats.parse(value, self.row_format, self.columns, self.nulls)

    def prepared(self, value: Any) -> Piece | Marked:
        parsed = self.parsed(value)
        if isinstance(parsed, Tokenized):
            return self.ready(parsed)
        if isinstance(parsed, PromptCompletion):
            return encodable(self.completed(parsed))
        return encodable(self.rendered(parsed))

    def rendered(self, conversation: Conversation) -> Piece:
        found = self.finder.find(conversation)
        # A model that never sees an end would never end.
        after = self.tokenizer.eos_id if found.ends_open else None
        return Piece(found.text, found.spans, after=after)

    def completed(self, row: PromptCompletion) -> Piece:
        text = row.prompt + row.completion
        start = 0 if self.learn == "all" else len(row.prompt)
        ends = self.add_bos_eos_tokens
        return Piece(
            text,
            [(start, len(text))],
            self.tokenizer.bos_id if ends else None,
            self.tokenizer.eos_id if ends else None,
        )

    def ready(self, row: Tokenized) -> Marked:
        wrong = next((one for one in row.ids if not 0 <= one < self.ids_end), None)
        if wrong is not None:
            text = f"input_ids has {wrong}, and the tokenizer's ids end at {self.ids_end - 1}"
            raise RowProblem(formats.BAD_TOKENS, text)
        if all(label is None for label in row.labels):
            raise RowProblem(NOTHING, "no token of it is learned")
        ignored = self.ignore_index
        labels = [ignored if label is None else label for label in row.labels]
        return Marked(np.array(row.ids, np.int32), np.array(labels, np.int32))

    # --- tokens ---

    def joined(self, piece: Piece, marked: tuple[Tokens, Learned]) -> Marked:
        ids, learned = marked
        before, after = (
            np.array([] if token is None else [token], np.int32)
            for token in (piece.before, piece.after)
        )
        ids = np.concatenate([before, ids, after])
        labels = ids.copy()
        labels[: len(before)] = self.ignore_index
        labels[len(before) : len(before) + len(learned)][~learned] = self.ignore_index
        return Marked(ids, labels)


def encodable(piece: Piece) -> Piece:
    try:
        piece.text.encode()
    except UnicodeEncodeError as error:
        raise RowProblem(NOT_UTF8, f"it is not valid UTF-8 ({error.reason})") from error
    return piece


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
    encoder = ChatEncoder(
        tokenizer,
        rows,
        options.columns,
        lambda: make_finder(options, tokenizer, model),
        learn=options.learn,
        add_bos_eos_tokens=options.add_bos_eos_tokens,
        ignore_index=options.ignore_index,
        nulls=kind in COLUMNAR,
    )
    if rows.row_format in TURNS:
        encoder.finder.check_template()  # before hours are spent
    return encoder


def model_folder(model: str) -> Path | None:
    path = Path(model).expanduser()
    return path if path.is_dir() else find_model(model)


def make_finder(options: DatasetPreprocess, tokenizer: TextTokenizer, model: str) -> Finder:
    special = tokenizer.resolved.special
    template = find_template(options.chat_template, model_folder(model), special)
    tokens = added_tokens(tokenizer)
    specials = [text for text, is_special in tokens.items() if is_special]
    return Finder(template, options.learn, [*specials, *special.values()], list(tokens))


def added_tokens(tokenizer: TextTokenizer) -> dict[str, bool]:
    """What is never split, and whether it is special."""
    if tokenizer.resolved.serialized is None:
        return dict.fromkeys(tokenizer.resolved.special.values(), True)
    found = tokenizer.backend.get_added_tokens_decoder().values()
    return {token.content: token.special for token in found}
