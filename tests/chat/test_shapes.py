"""Turns that are found by a conversation's shape are those that are found by rendering it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from tests.data.chat.models import (
    NAMED,
    PLAIN,
    SOUND,
    SPECIAL,
    TOOL,
    calls,
    conversation,
    finder,
    result,
    said,
    system,
    template,
    user,
)
from vectorlm.chat.formats import Conversation
from vectorlm.chat.problem import RowProblem
from vectorlm.chat.shapes import Pattern, Span, cut, example_of, shape_of
from vectorlm.chat.spans import Finder
from vectorlm.chat.template import ChatTemplate

WORDS = ["the", "fox", "Grüße", "你好", "🙂", "a\nb", "x  y", "<b>", "'", '"', "\\", "user", "{{"]
MARKS = ["<think>", "</think>", "<|im_end|>", "<|eot_id|>", "</s>", "assistant", "[/INST]"]


class ByRendering(Finder):
    def turns(self, conversation: Conversation, text: str, numbers: Sequence[int]) -> list[Span]:
        return self.turns_by_rendering(conversation, text, numbers)


def words(rng: random.Random) -> str:
    known = WORDS + MARKS if rng.random() < 0.2 else WORDS
    before, after = rng.choices(["", " ", "\n", "\n\n"], weights=[9, 1, 1, 1], k=2)
    return before + " ".join(rng.choices(known, k=rng.randint(1, 6))) + after


def turn(rng: random.Random) -> list[dict[str, Any]]:
    kind = rng.random()
    if kind < 0.1:
        return [said(f"<think>\n{words(rng)}\n</think>\n\n{words(rng)}")]
    if kind < 0.2:
        return [calls("weather", city=words(rng)), result(words(rng)), said(words(rng))]
    if kind < 0.25:
        return [said("")]
    return [said(words(rng), words(rng) if kind < 0.5 else None)]


def any_conversation(rng: random.Random) -> Conversation:
    first = [system(words(rng))] if rng.random() < 0.2 else []
    turns = [[user(words(rng)), *turn(rng)] for _ in range(rng.randint(1, 3))]
    messages = first + [message for one in turns for message in one]
    flags = rng.choices([None, True, False], weights=[8, 1, 1], k=len(messages))
    return conversation(*messages, tools=rng.choice([None, None, [TOOL]]), flags=flags)


def outcome(one: Finder, given: Conversation) -> Any:
    try:
        return one.find(given)
    except RowProblem as problem:
        return problem.reason, problem.detail


@pytest.mark.parametrize("learn", ["assistant", "last_turn", "all"])
@pytest.mark.parametrize("name", SOUND)
def test_nothing_else_is_found_than_by_rendering(name: str, learn: str) -> None:
    rng = random.Random(11)
    ours = finder(name, learn)
    other = ByRendering(template(name), learn, SPECIAL, SPECIAL + PLAIN)
    for _ in range(100):
        given = any_conversation(rng)
        assert outcome(ours, given) == outcome(other, given)


class Counting(ChatTemplate):
    count = 0

    def render(self, *given: Any, **named: Any) -> str:
        self.count += 1
        return super().render(*given, **named)


@pytest.mark.parametrize("name", SOUND)
def test_one_rendering_for_a_conversation_of_a_known_shape(name: str) -> None:
    known = template(name)
    counting = Counting(known.source, name, NAMED)
    one = Finder(counting, "assistant", SPECIAL, SPECIAL + PLAIN)
    one.find(conversation(user("a"), said("b"), user("c"), said("d", "e")))
    counting.count = 0
    again = conversation(user("Hi!"), said("Grüße"), user("More"), said("Sure.", "hard"))
    found = one.find(again)
    assert counting.count == 1
    assert found.text == known.render(again.messages)


LOOKS = (
    "{% for m in messages %}{{ m.role }}:{% if '!' in m.content %}<loud>{% endif %}"
    "{{ m.content }}</s>{% endfor %}"
)


def test_a_template_that_looks_at_words_is_rendered_as_before() -> None:
    looks = ChatTemplate(LOOKS, "a.jinja", NAMED)
    ours, other = (kind(looks, "assistant", SPECIAL, SPECIAL) for kind in (Finder, ByRendering))
    for answer in ("b", "b!", "c"):
        given = conversation(user("a"), said(answer), user("!"), said(answer))
        assert ours.find(given) == other.find(given)
        assert ("<loud>b!</s>user:" in ours.find(given).text) == (answer == "b!")


def test_what_has_a_shape() -> None:
    given = conversation(user(" a b\n"), said("<think>\nc\n</think>\n\nd"))
    shape = shape_of(given)
    assert shape is not None
    assert shape.words == ["a b", "c", "d"]
    others = [
        conversation(user(" x\n"), said("<think>\ny\n</think>\n\nz")),
        example_of(given),
    ]
    for other in others:
        assert shape_of(other) == (shape.key, shape_of(other).words)  # type: ignore[union-attr]
    different = [
        conversation(user("a b"), said("<think>\nc\n</think>\n\nd")),
        conversation(user(" a b\n"), said("<think>\nc\n</think>\n\nd", "e")),
        conversation(system(" a b\n"), said("<think>\nc\n</think>\n\nd")),
        conversation(user(" a b\n"), said("<think>\n\n</think>\n\nd")),
    ]
    assert shape.key not in {shape_of(one).key for one in different}  # type: ignore[union-attr]
    assert shape_of(given._replace(tools=[TOOL])) is None
    assert shape_of(conversation(user("a"), calls("weather"))) is None


@pytest.mark.parametrize(
    "text", ["", " \n", "a", " a", "a\n", "a b", "<think>a</think>", "a<think>"]
)
def test_cut_texts_are_whole(text: str) -> None:
    parts = cut(text)
    assert "".join(parts) == text
    assert len(parts) % 2 == 1
    assert all(word and word == word.strip() for word in parts[1::2])


def test_a_turn_that_ends_within_a_word_makes_no_pattern() -> None:
    text = "u:\uf8e80\uf8e9;a:\uf8e81\uf8e9."
    pattern = Pattern(text, [(8, len(text))])
    assert pattern.fit("u:hello;a:you.", ["hello", "you"]) == [(10, 14)]
    assert pattern.fit("u:hello;a:you!", ["hello", "you"]) is None
    with pytest.raises(ValueError, match="within a word"):
        Pattern(text, [(4, len(text))])
