"""Every format becomes the same conversation; what is broken is told."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.data.chat.models import TOOL
from vectorlm.chat.formats import (
    FORMATS,
    Conversation,
    PromptCompletion,
    Tokenized,
    canonical,
    detect,
    parse,
)
from vectorlm.chat.problem import RowProblem

HI = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
BRIEF = [{"role": "system", "content": "Be brief."}, *HI]


def of(row_format: str, columns: dict[str, str] | None = None, **record: Any) -> Any:
    return parse(record, row_format, columns or {})


@pytest.mark.parametrize(
    "parsed",
    [
        of("messages", messages=BRIEF),
        of("messages", messages=json.dumps(BRIEF)),
        of("messages", messages=HI, system="Be brief."),
        of("messages", {"messages": "dialog"}, dialog=BRIEF),
        of("messages", messages=[{**one, "name": None, "tool_calls": None} for one in BRIEF]),
        of(
            "messages",
            messages=[
                {**one, "content": [{"type": "text", "text": one["content"]}]} for one in BRIEF
            ],
        ),
        of(
            "sharegpt",
            conversations=[
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Hello."},
            ],
        ),
        of("sharegpt", conversations=HI, system="Be brief."),
        of("alpaca", instruction="Hi", output="Hello.", input="", system="Be brief."),
        of("alpaca", {"instruction": "q"}, q="Hi", output="Hello.", system="Be brief."),
    ],
)
def test_formats_agree(parsed: Conversation) -> None:
    assert parsed.messages == BRIEF
    assert parsed.flags == [None] * 3
    assert parsed.tools is None
    assert canonical(parsed) == canonical(of("messages", messages=BRIEF))


def test_alpaca_joins_what_is_asked_and_remembers() -> None:
    found = of("alpaca", instruction="Add.", input="1 2", output="3", history=[["a", "b"]])
    assert [one["content"] for one in found.messages] == ["a", "b", "Add.\n\n1 2", "3"]
    assert [one["role"] for one in found.messages] == ["user", "assistant"] * 2


CALLS = {
    "object": {"function": {"name": "weather", "arguments": {"city": "Köln"}}},
    "text": {"id": "1", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}},
    "flat": {"name": "weather", "arguments": {"city": "Köln"}},
    "parameters": {"name": "weather", "parameters": {"city": "Köln"}},
}


@pytest.mark.parametrize("kind", CALLS)
def test_tool_calls(kind: str) -> None:
    rows = [HI[0], {"role": "assistant", "content": None, "tool_calls": [CALLS[kind]]}]
    rows += [{"role": "function", "content": "12", "tool_call_id": "1"}]
    found = of("messages", messages=rows, tools=json.dumps([TOOL]))
    said, answer = found.messages[1:]
    (call,) = said["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": {"city": "Köln"}}
    assert call["type"] == "function"
    assert said["content"] == ""
    assert answer == {"role": "tool", "content": "12", "tool_call_id": "1"}
    assert found.tools == [TOOL]


def test_a_call_of_sharegpt() -> None:
    rows = [{"from": "human", "value": "Rain?"}]
    rows += [{"from": "function_call", "value": json.dumps(CALLS["flat"])}]
    rows += [{"from": "observation", "value": "12"}]
    found = of("sharegpt", conversations=rows)
    assert [one["role"] for one in found.messages] == ["user", "assistant", "tool"]
    assert found.messages[1]["tool_calls"][0]["function"]["name"] == "weather"


def test_columnar_files_fill_objects_with_nothing() -> None:
    call = {"name": "weather", "arguments": {"city": "Köln", "day": None}}
    record = {"messages": [{"role": "assistant", "content": "", "tool_calls": [call]}]}
    for nulls, wanted in ((True, {"city": "Köln"}), (False, {"city": "Köln", "day": None})):
        found = parse(record, "messages", {}, nulls)
        assert isinstance(found, Conversation)
        assert found.messages[0]["tool_calls"][0]["function"]["arguments"] == wanted


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_thinking_under_any_name(name: str) -> None:
    found = of("messages", messages=[{"role": "assistant", "content": "a", name: "b"}])
    assert found.messages[0]["reasoning_content"] == found.messages[0]["thinking"] == "b"


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ({"train": False}, False),
        ({"loss": 1}, True),
        ({"weight": 0}, False),
        ({"weight": None}, None),
    ],
)
def test_flags(flags: dict[str, Any], wanted: bool | None) -> None:
    found = of("messages", messages=[HI[0], {**HI[1], **flags}])
    assert found.flags == [None, wanted]
    assert found.messages == HI


def test_prompt_and_completion() -> None:
    found = of("prompt_completion", prompt="1 + 1 =", completion=" 2")
    assert found == PromptCompletion("1 + 1 =", " 2")
    chat = of("prompt_completion", prompt=[*HI, HI[0]], completion=[HI[1]])
    assert chat.messages == HI + HI
    # What stands in the prompt is context.
    assert chat.flags == [False, False, False, None]
    assert of("prompt_completion", prompt="Hi", completion=[HI[1]]).messages == HI


@pytest.mark.parametrize(
    ("more", "labels"),
    [
        ({}, [5, 6, 7]),
        ({"labels": [-100, 6, 7]}, [None, 6, 7]),
        ({"loss_mask": [0, 1, 0]}, [None, 6, None]),
        ({"attention_mask": [1, 1, 0]}, [5, 6]),
        ({"labels": "[-100, -100, 7]", "attention_mask": [0, 1, 1]}, [None, 7]),
    ],
)
def test_tokenized(more: dict[str, Any], labels: list[int | None]) -> None:
    found = of("tokenized", input_ids=[5, 6, 7], **more)
    assert isinstance(found, Tokenized)
    assert found.labels == labels
    assert len(found.ids) == len(labels)


BROKEN: list[tuple[str, dict[str, Any], str]] = [
    ("messages", {"chat": []}, r"no field 'messages', which messages needs \(fields here: chat\)"),
    ("messages", {"messages": []}, "the conversation has no messages"),
    ("messages", {"messages": None}, "messages is null, not a list of messages"),
    ("messages", {"messages": "Hi"}, "messages is a text that is no JSON"),
    ("messages", {"messages": ["Hi"]}, "message 1 is no object"),
    ("messages", {"messages": [{"role": "narrator"}]}, "message 1 has the role 'narrator'; known"),
    ("messages", {"messages": [{"content": "a"}]}, "has the role None"),
    ("messages", {"messages": [{"role": "user", "content": 3}]}, "message 1 is of type int"),
    (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "a part of type image_url; only texts",
    ),
    ("messages", {"messages": [{**HI[1], "weight": 0.5}]}, "weight of message 1 is 0.5; must be"),
    ("messages", {"messages": [{**HI[1], "train": True, "loss": 0}]}, "contradict each other"),
    ("messages", {"messages": [{**HI[1], "tool_calls": [{}]}]}, "does not name its function"),
    (
        "messages",
        {"messages": [{**HI[1], "tool_calls": [{"name": "f", "arguments": "{"}]}]},
        "the arguments of f is a text that is no JSON",
    ),
    ("messages", {"messages": HI, "tools": "x"}, "tools is a text that is no JSON"),
    ("messages", {"messages": HI, "tools": [1]}, "tools must be a list of objects"),
    ("alpaca", {"instruction": " ", "output": "a"}, "instruction and input are empty"),
    ("alpaca", {"instruction": "a", "output": "b", "history": [["a"]]}, "a list of pairs"),
    ("prompt_completion", {"prompt": "a", "completion": " "}, "completion is empty"),
    ("tokenized", {"input_ids": ["a"]}, "input_ids is no list of whole numbers"),
    ("tokenized", {"input_ids": [1, 2], "labels": [1]}, "labels has 1 entries, input_ids has 2"),
]


@pytest.mark.parametrize(("row_format", "record", "told"), BROKEN)
def test_broken_rows_are_told(row_format: str, record: dict[str, Any], told: str) -> None:
    with pytest.raises(RowProblem, match=told):
        parse(record, row_format, {})


def test_a_row_that_is_no_object() -> None:
    with pytest.raises(RowProblem, match="an object is expected, not a list"):
        parse([1], "messages", {})


@pytest.mark.parametrize(
    ("present", "columns", "wanted"),
    [
        ("id messages", {}, "messages"),
        ("conversations tools", {}, "sharegpt"),
        ("instruction input output", {}, "alpaca"),
        ("prompt completion", {}, "prompt_completion"),
        ("prompt messages", {}, "messages"),
        ("input_ids attention_mask", {}, "tokenized"),
        ("text messages", {}, "text"),
        ("text dialog", {"messages": "dialog"}, "messages"),
        ("instruction", {}, None),
        ("", {}, None),
    ],
)
def test_detection(present: str, columns: dict[str, str], wanted: str | None) -> None:
    assert detect(present.split(), columns, "text") == wanted


def test_no_two_formats_need_the_same_columns() -> None:
    needed = [shape.required for shape in FORMATS.values()]
    assert len(set(needed)) == len(needed)
