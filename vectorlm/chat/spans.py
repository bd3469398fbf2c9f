"""Which characters of a rendered conversation are learned. Floor 1; called by
`vectorlm.data.chat.encoder` and `vectorlm.check`.

The text is always the whole conversation as the template renders it. Where an assistant's turn
stands in it is found without marks in the template, by rendering:

- it begins where the messages before it end, followed by what makes the model answer
  (`add_generation_prompt`): just what the model is given when it has to say this turn;
- it ends where the messages up to it, rendered alone, end.

Both must be beginnings of the whole text. Templates that write earlier turns differently from the
last (thinking taken out, an end of text behind the last) break that; then a message's place is
found by rendering the conversation once more with other words in its place, and seeing what
changes. What cannot be told that way is refused, never guessed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from vectorlm.chat.formats import Conversation, Message
from vectorlm.chat.problem import UNCLEAR, UNWRITTEN, RowProblem
from vectorlm.chat.shapes import Pattern, Span, example_of, shape_of
from vectorlm.chat.template import KEY, ChatTemplate
from vectorlm.errors import DataError

NOTHING = "nothing to learn"
PROBE = "\uf8e5\uf8e6\uf8e7"  # private characters: in no text, and nothing a template looks for
MOST_PATTERNS = 500
SAMPLE: list[Message] = [{"role": "user", "content": "Hello"}]
TRIAL: list[Message] = [
    *SAMPLE,
    {"role": "assistant", "content": "Good morning."},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "Good night."},
]


class Words(NamedTuple):
    """Where a message's own words stand; `calls_only`: the template writes its calls instead."""

    start: int
    end: int
    calls_only: bool


class Rendered(NamedTuple):
    """`ends_open`: the last turn is learned, and the template has put no end token behind it."""

    text: str
    spans: list[Span]
    ends_open: bool


class Finder:
    """Renders conversations by one template and finds what is learned in them; `specials` are the
    tokenizer's special tokens, `added` all that it keeps whole."""

    def __init__(
        self, template: ChatTemplate, learn: str, specials: Sequence[str], added: Sequence[str]
    ) -> None:
        self.template = template
        self.learn = learn
        self.specials = tuple(sorted((text for text in specials if text), key=len, reverse=True))
        self.added = tuple(sorted((text for text in added if text), key=len, reverse=True))
        self.header = self._header()
        self.patterns: dict[str, Pattern | None] = {}

    def find(self, conversation: Conversation) -> Rendered:
        """RowProblem where the template refuses, turns cannot be told, or nothing is learned."""
        wanted = learned_messages(conversation, self.learn)
        conversation, text = self._whole(conversation)
        if self.learn == "all":
            holes = self.turns(conversation, text, [k for k, on in enumerate(wanted) if not on])
            spans = _all_but(_in_order(holes), len(text))
        else:
            turns = self.turns(conversation, text, [k for k, on in enumerate(wanted) if on])
            spans = _in_order([span for turn in turns for span in self.without_ends(text, turn)])
        if not any(text[start:end].strip() for start, end in spans):
            raise RowProblem(NOTHING, nothing_learned(conversation, self.learn))
        ends_open = wanted[-1] and not text.rstrip().endswith(self.specials)
        return Rendered(text, spans, ends_open)

    def _whole(self, conversation: Conversation) -> tuple[Conversation, str]:
        """With its text; some templates take the arguments of calls as texts alone."""
        try:
            return conversation, self.template.render(conversation.messages, conversation.tools)
        except RowProblem:
            messages = [_with_texts(message) for message in conversation.messages]
            if messages == conversation.messages:
                raise
            try:
                text = self.template.render(messages, conversation.tools)
            except RowProblem:
                pass  # the first problem is the one of the data as they are
            else:
                return conversation._replace(messages=messages), text
            raise

    def turns(self, conversation: Conversation, text: str, numbers: Sequence[int]) -> list[Span]:
        """Where these messages stand in the text."""
        shape = shape_of(conversation)
        pattern = self._pattern(shape.key, conversation, numbers) if shape else None
        found = pattern.fit(text, shape.words) if shape and pattern else None
        return self.turns_by_rendering(conversation, text, numbers) if found is None else found

    def turns_by_rendering(
        self, conversation: Conversation, text: str, numbers: Sequence[int]
    ) -> list[Span]:
        place = _Places(self, conversation, text)
        place.check_written()
        return [place.turn(k) for k in numbers]

    def _pattern(
        self, key: str, conversation: Conversation, numbers: Sequence[int]
    ) -> Pattern | None:
        key = f"{numbers} {key}"
        if key not in self.patterns:
            if len(self.patterns) >= MOST_PATTERNS:
                self.patterns.clear()
            self.patterns[key] = self._new_pattern(example_of(conversation), numbers)
        return self.patterns[key]

    def _new_pattern(self, example: Conversation, numbers: Sequence[int]) -> Pattern | None:
        """None where a template does not take words that are made up."""
        try:
            text = self.template.render(example.messages, example.tools)
            return Pattern(text, self.turns_by_rendering(example, text, numbers))
        except (RowProblem, ValueError):
            return None

    def check_template(self) -> None:
        """DataError where the turns of even a plain conversation cannot be told."""
        try:
            self.find(Conversation(TRIAL, [None] * len(TRIAL), None))
        except RowProblem as problem:
            if problem.reason not in (UNCLEAR, UNWRITTEN):
                return  # it may want more than a plain conversation has, such as a system message
            raise DataError(
                f"{self.template.name}: this chat template cannot be trained with: {problem}.\n"
                f"Name a file that holds another with {KEY}, such as configs/chatml.jinja."
            ) from problem

    def without_ends(self, text: str, turn: Span) -> Iterator[Span]:
        """The turn, and the end tokens behind it, but not the white space after the first."""
        start, end = turn
        tokens: list[Span] = []
        at = end
        while token := self._token_before(text, start, at):
            tokens.insert(0, token)
            at = token[0]
        if tokens:
            yield start, tokens[0][1]
            yield from tokens[1:]
            return
        stripped = start + len(text[start:end].rstrip())
        yield start, stripped if text[start:stripped].endswith(self.added) else end

    def _token_before(self, text: str, start: int, at: int) -> Span | None:
        end = start + len(text[start:at].rstrip())
        if not text.endswith(self.specials, start, end):
            return None
        found = next(one for one in self.specials if text.endswith(one, start, end))
        return end - len(found), end

    def _header(self) -> str | None:
        """What the template writes before an assistant's words although it was not asked to; None
        where it does as asked by `add_generation_prompt`, or cannot be tried."""
        answer: Message = {"role": "assistant", "content": PROBE}
        try:
            before = self.template.render(SAMPLE)
            if self.template.render(SAMPLE, prompt=True) != before:
                return None
            text = self.template.render([*SAMPLE, answer])
        except RowProblem:
            return None
        return text[len(before) : text.find(PROBE)] if text.startswith(before) else None


# --- which messages -------------------------------------------------------------------------------


def learned_messages(conversation: Conversation, learn: str) -> list[bool]:
    """For each message: what the row says, else what `learn` says."""
    messages = conversation.messages
    users = [k for k, message in enumerate(messages) if message["role"] == "user"]
    first = users[-1] if users and learn == "last_turn" else -1
    return [
        _learned(message, flag, learn == "all" or (message["role"] == "assistant" and k > first))
        for k, (message, flag) in enumerate(zip(messages, conversation.flags, strict=True))
    ]


def _learned(message: Message, flag: bool | None, usual: bool) -> bool:
    """A turn in which an assistant says nothing teaches nothing but to stop."""
    if message["role"] == "assistant" and not _says_something(message):
        return False
    return usual if flag is None else flag


def _says_something(message: Message) -> bool:
    return bool(
        message["content"].strip()
        or message.get("tool_calls")
        or message.get("reasoning_content", "").strip()
    )


def _with_texts(message: Message) -> Message:
    calls = [
        call | {"function": call["function"] | {"arguments": _as_text(call["function"])}}
        for call in message.get("tool_calls", ())
    ]
    return message | {"tool_calls": calls} if calls else message


def _as_text(function: dict[str, Any]) -> str:
    return json.dumps(function["arguments"], ensure_ascii=False, default=str)


def nothing_learned(conversation: Conversation, learn: str) -> str:
    said = [message for message in conversation.messages if message["role"] == "assistant"]
    if not said:
        return "no message is an assistant's, so there is nothing to learn"
    if not any(map(_says_something, said)):
        return "the assistant's messages are empty, so there is nothing to learn"
    return f"nothing in it is learned, by its own flags and learn: {learn}"


def _all_but(holes: list[Span], size: int) -> list[Span]:
    edges = [0, *(edge for hole in holes for edge in hole), size]
    pairs = zip(edges[::2], edges[1::2], strict=True)
    return [(start, end) for start, end in pairs if start < end]


def _in_order(spans: list[Span]) -> list[Span]:
    for (_, end), (start, _) in pairwise(spans):
        if start < end:
            raise unclear("two turns overlap")
    return spans


def unclear(why: str) -> RowProblem:
    return RowProblem(
        UNCLEAR, f"which part of the rendered text is an assistant's turn cannot be told ({why})"
    )


def unwritten(what: str) -> RowProblem:
    return RowProblem(UNWRITTEN, f"the chat template does not write {what}")


# --- where they are -------------------------------------------------------------------------------


class _Places:
    """One conversation's text, and where its messages stand in it."""

    def __init__(self, finder: Finder, conversation: Conversation, text: str) -> None:
        self.finder = finder
        self.messages = conversation.messages
        self.tools = conversation.tools
        self.text = text
        self.changed: dict[int, Words] = {}

    def _render(self, messages: Sequence[Message], prompt: bool = False) -> str:
        return self.finder.template.render(messages, self.tools, prompt)

    def _try(self, messages: Sequence[Message], prompt: bool = False) -> str | None:
        """Templates refuse parts of conversations that they take as a whole."""
        try:
            return self._render(messages, prompt)
        except RowProblem:
            return None

    def turn(self, k: int) -> Span:
        """From where the model would be asked for message k to the end of what it has to say."""
        mine = self.messages[k]["role"] == "assistant"
        start = self._start(k) if mine else self.words(k).start
        end = self._end(k)
        if start > end:
            raise unclear(f"message {k + 1} ends before it begins")
        if mine:
            self._check_turn(k, self.text[start:end])
        return start, end

    def _check_turn(self, k: int, said: str) -> None:
        message = self.messages[k]
        names = [call["function"]["name"] for call in message.get("tool_calls", ())]
        if not all(name in said for name in names):
            raise unwritten(f"the tool calls of message {k + 1}")
        # Thinking may be left out of earlier turns; what was answered may not.
        answer = message["content"].rpartition("</think>")[2].strip()
        if not names and answer not in said:
            raise unclear(f"message {k + 1} is not where it seems to be")

    def check_written(self) -> None:
        """Templates drop without a word what they have no place for."""
        for k, message in enumerate(self.messages):
            is_there = message["content"].strip() in self.text
            if message["role"] != "assistant" and not is_there and not self._has_place(k):
                raise unwritten(f"message {k + 1} ({message['role']})")
        names = [tool.get("function", tool).get("name", "") for tool in self.tools or ()]
        if not all(str(name) in self.text for name in names):
            raise unwritten("the tools")

    def _has_place(self, k: int) -> bool:
        """Are message k's words written in another way, such as JSON?"""
        try:
            self.words(k)
        except RowProblem:
            return False
        return True

    # --- the beginning ---

    def _start(self, k: int) -> int:
        asked = self._try(self.messages[:k], prompt=True) if k else None
        header = self.finder.header
        if asked is None or not self.text.startswith(asked):
            return self._start_by_change(k, asked)
        if header is None or not header.strip():
            return len(asked)
        if self.text.startswith(header, len(asked)):
            return len(asked) + len(header)
        return self.words(k).start

    def _start_by_change(self, k: int, asked: str | None) -> int:
        """Behind the message before and the header, if the template has one."""
        first = self.words(k).start
        header = self.finder.header
        if k and header is not None and not header.strip():
            return self._end(k - 1)
        plain = self._try(self.messages[:k]) if k else None
        if asked and plain and asked.startswith(plain):
            header = asked[len(plain) :]
        floor = self.words(k - 1).end if k else 0
        for candidate in self._beginnings(header or ""):
            at = self.text.rfind(candidate, floor, first)
            if at >= 0:
                return at + len(candidate)
        raise unclear(f"where message {k + 1} begins")

    def _beginnings(self, header: str) -> Iterator[str]:
        """The header, and it without what a template writes only when it asks."""
        if header.strip():
            yield header
        ends = [
            end
            for token in self.finder.added
            if (at := header.find(token)) >= 0 and (end := at + len(token)) < len(header)
        ]
        for end in sorted(ends, reverse=True):
            yield header[:end]

    # --- the end ---

    def _end(self, k: int) -> int:
        if k == len(self.messages) - 1:
            return len(self.text)
        alone = self._try(self.messages[: k + 1])
        if alone is not None and self.text.startswith(alone):
            return len(alone)
        return self._end_by_change(k)

    def _end_by_change(self, k: int) -> int:
        """Behind what follows the words both here and where the message is the last."""
        words = self.words(k)
        other = probed(self.messages[k], words.calls_only)
        alone = self._try([*self.messages[:k], other])
        if alone is None or PROBE not in alone:
            raise unclear(f"where message {k + 1} ends")
        closing = alone[alone.rfind(PROBE) + len(PROBE) :]
        if self.text.startswith(closing, words.end):
            return words.end + len(closing)
        after = self.text[words.end : self.words(k + 1).start]
        common = self._up_to_a_token(closing[: common_length(closing, after)])
        return words.end + len(common)

    def _up_to_a_token(self, common: str) -> str:
        for tokens in (self.finder.specials, self.finder.added):
            end = max((common.rfind(one) + len(one) for one in tokens if one in common), default=0)
            if end:
                return common[:end]
        raise unclear("no end token stands behind a turn that is not the last")

    # --- by change ---

    def words(self, k: int) -> Words:
        """Where message k's own words stand: what changes when they do."""
        if k not in self.changed:
            self.changed[k] = self._words(k)
        return self.changed[k]

    def _words(self, k: int) -> Words:
        # What stands before a call may depend on whether something is said.
        silent = (
            bool(self.messages[k].get("tool_calls")) and not self.messages[k]["content"].strip()
        )
        for calls_only in (silent, not silent):
            other = probed(self.messages[k], calls_only)
            text = self._try([*self.messages[:k], other, *self.messages[k + 1 :]])
            if text is not None and text.count(PROBE) == 1:
                start = common_length(self.text, text)
                same = common_length(self.text[start:][::-1], text[start:][::-1])
                return Words(start, len(self.text) - same, calls_only)
        raise unclear(f"the template does not write message {k + 1}, or writes it twice")


def probed(message: Message, calls_only: bool) -> Message:
    """The message with other words, or with another function called."""
    if not calls_only:
        return message | {"content": PROBE}
    first, *rest = message.get("tool_calls") or [{"function": {}}]
    called = first | {"function": first["function"] | {"name": PROBE}}
    return message | {"tool_calls": [called, *rest]}


def common_length(one: str, other: str) -> int:
    """How many characters both begin with."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
