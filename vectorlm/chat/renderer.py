"""Rows become texts, with what of them is learned: all that is slow about conversations and needs
no tokenizer. Floor 1; called by `vectorlm.data.chat.encoder`, and by `worker` in processes of its
own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any, NamedTuple

from vectorlm.chat import formats
from vectorlm.chat.formats import Conversation, PromptCompletion
from vectorlm.chat.problem import RowProblem
from vectorlm.chat.shapes import Span
from vectorlm.chat.spans import TRIAL, Finder
from vectorlm.chat.template import ChatTemplate
from vectorlm.errors import DataError

NOT_UTF8 = "not UTF-8"
MARK = re.compile(r"<\|[^|<>\s]+\|>")  # as the families write their special tokens


class Recipe(NamedTuple):
    """How rows of one format are rendered, in values that can be sent to another process.

    `template` is its source, its name and the special tokens it may write; or why there is none,
    which matters only when a conversation comes. `bos_id`, `eos_id`: put around a prompt with its
    completion; `end_id`: put behind a last turn that the template leaves open.
    """

    row_format: str
    columns: dict[str, str]
    nulls: bool
    learn: str
    bos_id: int | None
    eos_id: int | None
    end_id: int | None
    template: tuple[str, str, dict[str, str]] | str
    specials: list[str]
    added: list[str]


class Piece(NamedTuple):
    """A text, what of it is learned, and single tokens before and behind it; the one behind it is
    learned."""

    text: str
    spans: list[Span]
    before: int | None = None
    after: int | None = None


class Refused(NamedTuple):
    """Why a row cannot be learned."""

    reason: str
    detail: str


class Renderer:
    """Rows of all formats but ready tokens."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    @cached_property
    def finder(self) -> Finder:
        template, recipe = self.recipe.template, self.recipe
        if isinstance(template, str):
            raise DataError(template)
        return Finder(ChatTemplate(*template), recipe.learn, recipe.specials, recipe.added)

    def render(self, values: Iterable[Any]) -> list[Piece | Refused]:
        return [self._rendered(value) for value in values]

    def parsed(self, value: Any) -> formats.Parsed:
        recipe = self.recipe
        return formats.parse(value, recipe.row_format, recipe.columns, recipe.nulls)

    def _rendered(self, value: Any) -> Piece | Refused:
        try:
            parsed = self.parsed(value)
            if isinstance(parsed, Conversation):
                piece = self._conversation(parsed)
            else:
                assert isinstance(parsed, PromptCompletion)
                piece = self._completion(parsed)
            return _encodable(piece)
        except RowProblem as problem:
            return Refused(problem.reason, problem.detail)

    def _conversation(self, conversation: Conversation) -> Piece:
        found = self.finder.find(conversation)
        # A model that never sees an end would never end.
        after = self.recipe.end_id if found.ends_open else None
        return Piece(found.text, found.spans, after=after)

    def _completion(self, row: PromptCompletion) -> Piece:
        text = row.prompt + row.completion
        start = 0 if self.recipe.learn == "all" else len(row.prompt)
        return Piece(text, [(start, len(text))], self.recipe.bos_id, self.recipe.eos_id)


def oddities(renderer: Renderer, values: Iterable[Any]) -> Iterator[str]:
    """What is lawful, and hardly what is wanted, of conversations and their template."""
    if _loses_thinking(renderer, values):
        yield (
            "rows have thinking (reasoning_content) that the chat template does not write: it is "
            "not learned"
        )
    unknown = _unknown_marks(renderer)
    if unknown:
        yield (
            f"the chat template writes {' and '.join(unknown)}, which this tokenizer does not know "
            "as one token: each is taken apart into several, here and where the model answers"
        )


def _loses_thinking(renderer: Renderer, values: Iterable[Any]) -> bool:
    """Some do, in all but the last answer; this is about those that never write it."""
    found = False
    for value in values:
        try:
            parsed = renderer.parsed(value)
            if not isinstance(parsed, Conversation):
                continue
            thoughts = [one.get("reasoning_content", "").strip() for one in parsed.messages]
            if not any(thoughts):
                continue
            text = renderer.finder.find(parsed).text
        except RowProblem:
            continue
        if any(thought and thought in text for thought in thoughts):
            return False
        found = True
    return found


def _unknown_marks(renderer: Renderer) -> list[str]:
    known = renderer.recipe.added
    if not known:
        return []
    try:
        text = renderer.finder.template.render(TRIAL)
    except RowProblem:
        return []
    return [mark for mark in dict.fromkeys(MARK.findall(text)) if mark not in known]


def _encodable(piece: Piece) -> Piece:
    try:
        piece.text.encode()
    except UnicodeEncodeError as error:
        raise RowProblem(NOT_UTF8, f"it is not valid UTF-8 ({error.reason})") from error
    return piece
