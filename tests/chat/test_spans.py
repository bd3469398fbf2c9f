"""What is learned, written out for every template; what cannot be told is refused."""

from __future__ import annotations

import random

import pytest

from tests.data.chat.models import (
    NAMED,
    SOUND,
    SPECIAL,
    TOOL,
    calls,
    conversation,
    finder,
    result,
    said,
    source,
    system,
    template,
    user,
)
from vectorlm.chat.formats import Conversation, Message
from vectorlm.chat.problem import RowProblem
from vectorlm.chat.spans import Finder, learned_messages
from vectorlm.chat.template import ChatTemplate
from vectorlm.errors import DataError

OPEN, CLOSE = "⟦", "⟧"

TWO = conversation(user("Hi"), said("Hello."), user("More"), said("Sure."))
BRIEF = conversation(system("Be brief."), user("Hi"), said("Hello."))
THOUGHT = conversation(user("Hi"), said("Hello.", "easy"), user("More"), said("Sure.", "hard"))
INSIDE = conversation(
    user("Hi"),
    said("<think>\neasy\n</think>\n\nHello."),
    user("More"),
    said("<think>\nhard\n</think>\n\nSure."),
)
TOOLS = conversation(
    user("Rain?"),
    calls("weather", city="Köln"),
    result("12"),
    said("No."),
    user("Thanks"),
    said("Bye."),
    tools=[TOOL],
)
TOOL_JSON = (
    '{"type": "function", "function": {"name": "weather", "description": "<Tells> it.", '
    '"parameters": {"type": "object"}}}'
)
CHATML_TWO = (
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n"
    "<|im_start|>user\nMore<|im_end|>\n<|im_start|>assistant\n⟦Sure.<|im_end|>⟧\n"
)
GEMMA_TWO = (
    "<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n⟦Hello.<end_of_turn>⟧\n"
    "<start_of_turn>user\nMore<end_of_turn>\n<start_of_turn>model\n⟦Sure.<end_of_turn>⟧\n"
)
LLAMA3_TWO = (
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Hello.<|eot_id|>⟧"
    "<|start_header_id|>user<|end_header_id|>\n\nMore<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Sure.<|eot_id|>⟧"
)
WRITTEN_OUT: list[tuple[str, Conversation, str]] = [
    ("chatml", TWO, CHATML_TWO),
    ("marked", TWO, CHATML_TWO),
    (
        "chatml",
        INSIDE,
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        "⟦<think>\neasy\n</think>\n\nHello.<|im_end|>⟧\n<|im_start|>user\nMore<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\nhard\n</think>\n\nSure.<|im_end|>⟧\n",
    ),
    (
        "llama2",
        TWO,
        "<s>[INST] Hi [/INST]⟦ Hello. </s>⟧<s>[INST] More [/INST]⟦ Sure. </s>⟧",
    ),
    (
        "llama2",
        BRIEF,
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]⟦ Hello. </s>⟧",
    ),
    ("llama3", TWO, "<s>" + LLAMA3_TWO),
    (
        "llama31",
        TWO,
        "<s><|start_header_id|>system<|end_header_id|>\n\nToday: 26 Jul 2024\n\n<|eot_id|>"
        + LLAMA3_TWO,
    ),
    ("gemma", TWO, GEMMA_TWO),
    ("gemma3", TWO, GEMMA_TWO),
    (
        "gemma3",
        BRIEF,
        "<s><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n"
        "<start_of_turn>model\n⟦Hello.<end_of_turn>⟧\n",
    ),
    (
        # The end of the text is learned, too; the white space before it is not.
        "phi3",
        TWO,
        "<|user|>\nHi<|end|>\n<|assistant|>\n⟦Hello.<|end|>⟧\n"
        "<|user|>\nMore<|end|>\n<|assistant|>\n⟦Sure.<|end|>⟧\n⟦</s>⟧",
    ),
    ("mistral", TWO, "<s>[INST] Hi[/INST]⟦ Hello.</s>⟧[INST] More[/INST]⟦ Sure.</s>⟧"),
    (
        # Tools stand before the last question only, so no prefix is one of the whole.
        "mistral",
        TOOLS,
        '<s>[INST] Rain?[/INST]⟦[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Köln"}}]'
        '</s>⟧[TOOL_RESULTS] {"content": 12}[/TOOL_RESULTS]⟦ No.</s>⟧'
        f"[AVAILABLE_TOOLS] [{TOOL_JSON}][/AVAILABLE_TOOLS][INST] Thanks[/INST]⟦ Bye.</s>⟧",
    ),
    (
        "qwen25",
        TWO,
        "<|im_start|>system\nYou help.<|im_end|>\n" + CHATML_TWO,
    ),
    (
        "qwen25",
        TOOLS,
        f"<|im_start|>system\nYou help.\n\n# Tools\n\n<tools>\n{TOOL_JSON}\n</tools><|im_end|>\n"
        "<|im_start|>user\nRain?<|im_end|>\n<|im_start|>assistant\n"
        '⟦<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
        "<|im_end|>⟧\n<|im_start|>user\n<tool_response>\n12\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n⟦No.<|im_end|>⟧\n<|im_start|>user\nThanks<|im_end|>\n"
        "<|im_start|>assistant\n⟦Bye.<|im_end|>⟧\n",
    ),
    (
        # An earlier turn is written without thinking, the last one with.
        "qwen3",
        THOUGHT,
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n"
        "<|im_start|>user\nMore<|im_end|>\n<|im_start|>assistant\n"
        "⟦<think>\nhard\n</think>\n\nSure.<|im_end|>⟧\n",
    ),
    (
        "qwen3",
        INSIDE,
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n"
        "<|im_start|>user\nMore<|im_end|>\n<|im_start|>assistant\n"
        "⟦<think>\nhard\n</think>\n\nSure.<|im_end|>⟧\n",
    ),
    (
        "qwen3",
        TWO,
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n"
        "<|im_start|>user\nMore<|im_end|>\n<|im_start|>assistant\n"
        "⟦<think>\n\n</think>\n\nSure.<|im_end|>⟧\n",
    ),
    (
        "qwen3",
        conversation(
            user("Rain?"),
            calls("weather", "Let me see.", city="Köln") | {"reasoning_content": "look"},
            result("12"),
            said("No.", "seen"),
        ),
        "<|im_start|>user\nRain?<|im_end|>\n<|im_start|>assistant\n"
        '⟦<think>\nlook\n</think>\n\nLet me see.\n<tool_call>\n{"name": "weather", "arguments": '
        '{"city": "Köln"}}\n</tool_call><|im_end|>⟧\n<|im_start|>user\n<tool_response>\n12\n'
        "</tool_response><|im_end|>\n<|im_start|>assistant\n"
        "⟦<think>\nseen\n</think>\n\nNo.<|im_end|>⟧\n",
    ),
    (
        # What it is asked with is more than what stands before an answer.
        "thinker",
        TWO,
        "<s><|user|>Hi<|assistant|>⟦Hello.</s>⟧<|user|>More<|assistant|>⟦Sure.</s>⟧",
    ),
    ("configs/chatml", TWO, CHATML_TWO),
    (
        "configs/chatml",
        TOOLS,
        f"<|im_start|>system\nYou may call these functions:\n<tools>\n{TOOL_JSON}\n</tools>\n"
        "To call one, answer with its name and its arguments as JSON between <tool_call> and "
        "</tool_call>.<|im_end|>\n<|im_start|>user\nRain?<|im_end|>\n<|im_start|>assistant\n"
        '⟦<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
        "<|im_end|>⟧\n<|im_start|>user\n<tool_response>\n12\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n⟦No.<|im_end|>⟧\n<|im_start|>user\nThanks<|im_end|>\n"
        "<|im_start|>assistant\n⟦Bye.<|im_end|>⟧\n",
    ),
    (
        # Thinking is written in every turn.
        "configs/chatml",
        THOUGHT,
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        "⟦<think>\neasy\n</think>\n\nHello.<|im_end|>⟧\n<|im_start|>user\nMore<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\nhard\n</think>\n\nSure.<|im_end|>⟧\n",
    ),
    (
        "configs/plain_chat",
        TWO,
        "<s>User: Hi\n\nAssistant:⟦ Hello.</s>⟧\n\nUser: More\n\nAssistant:⟦ Sure.</s>⟧\n\n",
    ),
    (
        "plain",
        TWO,
        "### Question:\nHi\n\n### Answer:\n⟦Hello.\n\n⟧### Question:\nMore\n\n"
        "### Answer:\n⟦Sure.\n\n⟧",
    ),
]


def shown(finder: Finder, given: Conversation) -> str:
    """The text with marks around what is learned."""
    found = finder.find(given)
    text = found.text
    for start, end in reversed(found.spans):
        text = text[:start] + OPEN + text[start:end] + CLOSE + text[end:]
    return text


@pytest.mark.parametrize(("name", "given", "wanted"), WRITTEN_OUT)
def test_written_out(name: str, given: Conversation, wanted: str) -> None:
    assert shown(finder(name), given) == wanted


def test_every_template_is_written_out() -> None:
    assert {name for name, _, _ in WRITTEN_OUT} == set(SOUND)


def test_last_turn_is_all_that_follows_the_last_question() -> None:
    given = conversation(
        user("a"), said("b"), user("Rain?"), calls("weather", city="x"), result("12"), said("No.")
    )
    wanted = (
        '⟦<tool_call>\n{"name": "weather", "arguments": {"city": "x"}}\n</tool_call><|im_end|>⟧\n'
        "<|im_start|>user\n<tool_response>\n12\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n⟦No.<|im_end|>⟧\n"
    )
    text = shown(finder("qwen25", "last_turn"), given)
    assert text.endswith(wanted)
    assert text.count(OPEN) == 2


def test_all_is_all_but_what_a_flag_takes_out() -> None:
    assert (
        shown(finder("chatml", "all"), TWO)
        == OPEN + CHATML_TWO.replace(OPEN, "").replace(CLOSE, "") + CLOSE
    )
    given = TWO._replace(flags=[None, False, None, None])
    assert shown(finder("chatml", "all"), given) == (
        "⟦<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟧Hello.<|im_end|>\n"
        "⟦<|im_start|>user\nMore<|im_end|>\n<|im_start|>assistant\nSure.<|im_end|>\n⟧"
    )


def test_flags_of_messages_count_before_the_setting() -> None:
    given = TWO._replace(flags=[None, False, True, None])
    assert shown(finder("llama3"), given) == (
        "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n⟦More<|eot_id|>⟧"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Sure.<|eot_id|>⟧"
    )
    earlier = TWO._replace(flags=[None, True, None, None])
    assert learned_messages(earlier, "last_turn") == [False, True, False, True]


def test_a_turn_that_says_nothing_is_not_learned() -> None:
    given = conversation(user("a"), said(" "), user("b"), said("c"))
    assert shown(finder("chatml"), given).count(OPEN) == 1
    with pytest.raises(RowProblem, match="the assistant's messages are empty"):
        finder("chatml").find(conversation(user("a"), said("")))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (conversation(user("a")), "no message is an assistant's"),
        (TWO._replace(flags=[None, False, None, False]), "by its own flags and learn: assistant"),
    ],
)
def test_nothing_to_learn(given: Conversation, reason: str) -> None:
    with pytest.raises(RowProblem, match=reason) as caught:
        finder("chatml").find(given)
    assert caught.value.reason == "nothing to learn"


@pytest.mark.parametrize(
    ("name", "ends_open"), [(name, name == "plain") for name in SOUND], ids=SOUND
)
def test_a_template_without_an_end_is_known(name: str, ends_open: bool) -> None:
    assert finder(name).find(TWO).ends_open == ends_open
    unlearned = TWO._replace(flags=[None, None, None, False])
    assert not finder(name).find(unlearned).ends_open


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "given", "reason"),
    [
        ("gemma", BRIEF, "refuses it: a system role is not supported"),
        ("mistral", BRIEF, r"does not write message 1 \(system\)"),
        ("chatml", TOOLS, "does not write the tools"),
        ("chatml", TOOLS._replace(tools=None), "does not write the tool calls of message 2"),
        (
            "phi3",
            conversation(user("a"), said("b"), result("12"), said("c")),
            r"does not write message 3 \(tool\)",
        ),
    ],
)
def test_what_a_template_has_no_place_for_is_not_lost_silently(
    name: str, given: Conversation, reason: str
) -> None:
    with pytest.raises(RowProblem, match=reason):
        finder(name).find(given)


HOPELESS = {
    "twice and backwards": source("hopeless"),
    "in capitals": "{% for m in messages %}<s>{{ m.content | upper }}</s>{% endfor %}",
    "no ends": "{% for m in messages %}{{ m.content }}{% if loop.last %}.{% endif %}{% endfor %}",
}


@pytest.mark.parametrize("how", HOPELESS)
def test_a_template_whose_turns_cannot_be_told_is_refused(how: str) -> None:
    hopeless = Finder(ChatTemplate(HOPELESS[how], "a.jinja", {}), "assistant", SPECIAL, SPECIAL)
    with pytest.raises(RowProblem):
        hopeless.find(TWO)
    with pytest.raises(DataError, match=r"a.jinja: this chat template cannot be trained with: "):
        hopeless.check_template()


@pytest.mark.parametrize("name", SOUND)
def test_sound_templates_are_not_refused(name: str) -> None:
    finder(name).check_template()


def test_a_template_that_wants_more_is_not_refused_before_the_rows() -> None:
    wants = "{% if messages[0].role != 'system' %}{{ raise_exception('system') }}{% endif %}"
    one = ChatTemplate(wants + source("chatml"), "a.jinja", {})
    Finder(one, "assistant", SPECIAL, SPECIAL).check_template()


# --- any conversation -----------------------------------------------------------------------------

WORDS = [
    "the",
    "fox",
    "Grüße",
    "你好",
    "🙂",
    "12",
    "a\nb",
    "x  y",
    "<b>",
    "'",
    "</i>",
    "user",
    "{{",
]
ENDS = {
    "configs/plain_chat": " {}</s>",
    "llama2": " {} </s>",
    "mistral": " {}</s>",
    "gemma": "{}<end_of_turn>",
    "gemma3": "{}<end_of_turn>",
    "llama3": "{}<|eot_id|>",
    "llama31": "{}<|eot_id|>",
    "phi3": "{}<|end|>",
    "thinker": "{}</s>",
    "plain": "{}\n\n",
}


def words(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, 8))).strip()


@pytest.mark.parametrize("name", SOUND)
def test_any_conversation(name: str) -> None:
    """The learned parts are the assistant's words, each with its end, and nothing else."""
    rng = random.Random(5)
    one = finder(name)
    for _ in range(150):
        turns = rng.randint(1, 4)
        messages: list[Message] = [make(words(rng)) for _ in range(turns) for make in (user, said)]
        flags = [rng.choice([None, True, False]) if k % 2 else None for k in range(2 * turns)]
        flags[-1] = True
        found = one.find(Conversation(messages, flags, None))
        parts = [found.text[start:end] for start, end in found.spans]
        ending = ENDS.get(name, "{}<|im_end|>")
        answers = [
            ending.format(message["content"])
            for message, flag in zip(messages, flags, strict=True)
            if message["role"] == "assistant" and flag is not False
        ]
        if name == "qwen3":
            answers[-1] = "<think>\n\n</think>\n\n" + answers[-1]
        assert parts == answers + (["</s>"] if name == "phi3" else [])
        assert found.text == template(name).render(messages)


TAKES_TEXTS = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}{% for call in m.tool_calls or [] %}"
    "{{ call.function.name + '(' + call.function.arguments + ')' }}{% endfor %}</s>{% endfor %}"
)


def test_a_template_that_takes_arguments_as_texts() -> None:
    one = Finder(ChatTemplate(TAKES_TEXTS, "a.jinja", NAMED), "assistant", SPECIAL, SPECIAL)
    given = conversation(user("a"), calls("weather", city="Köln", days=2), result("12"), said("b"))
    wanted = 'user:a</s>assistant:⟦weather({"city": "Köln", "days": 2})</s>⟧tool:12</s>assistant:⟦b'
    assert shown(one, given).startswith(wanted)
    refusing = "{{ raise_exception('never ' ~ messages[1].tool_calls[0].function.arguments) }}"
    never = Finder(ChatTemplate(refusing, "a.jinja", NAMED), "assistant", SPECIAL, SPECIAL)
    with pytest.raises(RowProblem, match=r"never .'city': 'Köln', 'days': 2"):
        never.find(given)


def test_results_written_as_json_are_written() -> None:
    text = "{% for m in messages %}{{ m.role }}:{{ m.content | tojson }}</s>{% endfor %}"
    one = Finder(ChatTemplate(text, "a.jinja", NAMED), "assistant", SPECIAL, SPECIAL)
    given = conversation(user("a"), result('{"b": "c"}'), said("d"))
    assert shown(one, given).endswith('tool:"{\\"b\\": \\"c\\"}"</s>assistant:"⟦d"</s>⟧')
