"""Conversations that differ in nothing but their words. Floor 1; called by `spans`.

To find turns by rendering beginnings of a conversation takes several renderings. Conversations of
one shape (the same roles, with words in the same places) mostly get the same text around their
words; so turns are found once for a shape, in an example whose words are made up and stand nowhere
else. Where the text of a real one is, to the character, that text with the real words in place of
those made up, its turns are in the same places.

Whether a conversation has a shape follows from itself alone, so its turns do not depend on what was
seen before it.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, chain
from typing import NamedTuple

from vectorlm.chat.formats import Conversation, Message

Span = tuple[int, int]
Edge = tuple[int, int]  # behind how many words, and how many characters behind the last of them

WORD = "\uf8e8"  # private characters: in no text, and nothing a template looks for
MADE_UP = re.compile("\uf8e8([0-9]+)\uf8e9")
THINKING = re.compile("(</?think>)")  # templates cut texts there


class Shape(NamedTuple):
    """`key`: a conversation without its words, of which only the white space around them is
    left."""

    key: str
    words: list[str]


def shape_of(conversation: Conversation) -> Shape | None:
    """None with tools or calls of them: hardly two such conversations are alike."""
    if conversation.tools:
        return None
    words: list[str] = []
    key: list[str] = []
    for message in conversation.messages:
        for name, text in message.items():
            if not isinstance(text, str):
                return None
            key.append(name)
            key.append(text if name == "role" else outline(text, words))
    return Shape(repr(key), words)


def outline(text: str, words: list[str]) -> str:
    if text and text.strip() == text and "think>" not in text:  # as most are
        words.append(text)
        return WORD
    parts = cut(text)
    words.extend(parts[1::2])
    return WORD.join(parts[::2])


def example_of(conversation: Conversation) -> Conversation:
    """One of the same shape, whose words are made up."""
    count = 0

    def made_up(message: Message) -> Message:
        nonlocal count
        made = {"role": message["role"]}
        for name, text in message.items():
            if name != "role":
                parts = cut(text)
                count, first = count + len(parts) // 2, count
                parts[1::2] = [f"\uf8e8{number}\uf8e9" for number in range(first, count)]
                made[name] = "".join(parts)
        return made

    return conversation._replace(messages=[made_up(message) for message in conversation.messages])


def cut(text: str) -> list[str]:
    """What is kept and words in turn, beginning and ending with what is kept."""
    found = [""]
    for at, piece in enumerate(THINKING.split(text) if "think>" in text else [text]):
        word = piece.strip()
        if at % 2 or not word:
            found[-1] += piece
            continue
        start = 0 if piece.startswith(word) else piece.index(word)
        found[-1] += piece[:start]
        found += [word, piece[start + len(word) :]]
    return found


class Pattern:
    """The text around the words of an example, and where its turns are."""

    def __init__(self, text: str, turns: Sequence[Span]) -> None:
        """ValueError where a turn begins or ends within a word."""
        found = list(MADE_UP.finditer(text))
        self.numbers = [int(one[1]) for one in found]
        starts = [0, *(one.end() for one in found)]
        ends = [*(one.start() for one in found), len(text)]
        self.around = [text[start:end] for start, end in zip(starts, ends, strict=True)]
        self.turns = [(edge(start, starts, ends), edge(end, starts, ends)) for start, end in turns]

    def fit(self, text: str, words: Sequence[str]) -> list[Span] | None:
        """Where the turns are in a text; None where it is not this one with other words."""
        pairs = zip((words[n] for n in self.numbers), self.around[1:], strict=True)
        parts = [self.around[0], *chain.from_iterable(pairs)]
        if "".join(parts) != text:
            return None
        starts = [0, *accumulate(map(len, parts))][::2]
        return [(starts[a] + at, starts[b] + to) for (a, at), (b, to) in self.turns]


def edge(place: int, starts: Sequence[int], ends: Sequence[int]) -> Edge:
    number = bisect_right(starts, place) - 1
    if place > ends[number]:
        raise ValueError("within a word")
    return number, place - starts[number]
