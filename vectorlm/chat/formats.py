"""One record of a file becomes a conversation, a prompt with its completion, or ready tokens.
Floor 1; called by `vectorlm.data.chat.encoder` and `vectorlm.check`.

A format names its columns by their roles; `dataset_preprocess.columns` says which column of the
data plays which role. What comes out is the same whatever the format: messages as chat templates
know them, with what each says about being learned taken out of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from vectorlm.chat.problem import RowProblem

Record = Mapping[str, Any]
Message = dict[str, Any]

ABSENT = "field absent"
NOT_A_CONVERSATION = "no conversation"
UNKNOWN_ROLE = "unknown role"
NOT_TEXT = "not a string"
BROKEN_CALL = "broken tool call"
BAD_FLAG = "unclear what is learned"
BAD_TOKENS = "broken tokens"
EMPTY = "empty"

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "function_call",
}
FLAGS = ("train", "loss", "weight")
REASONING = ("reasoning_content", "thinking", "reasoning")
READ = frozenset({"role", "from", "content", "value", "tool_calls", *FLAGS, *REASONING})


class Conversation(NamedTuple):
    """`flags[i]` is whether message i is learned, None where the row does not say."""

    messages: list[Message]
    flags: list[bool | None]
    tools: list[dict[str, Any]] | None


class PromptCompletion(NamedTuple):
    """Two texts that no template is put around."""

    prompt: str
    completion: str


class Tokenized(NamedTuple):
    """Ids with a label each, None where nothing is learned."""

    ids: list[int]
    labels: list[int | None]


Parsed = Conversation | PromptCompletion | Tokenized


class RowFormat(NamedTuple):
    """A format: the roles of its columns, and how a record is read."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[dict[str, Any], bool], Parsed]


# --- values ---------------------------------------------------------------------------------------


def _structured(value: Any, role: str, reason: str) -> Any:
    """Lists and objects are often kept as JSON in one text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowProblem(reason, f"{role} is a text that is no JSON ({error})") from error


def _text(value: Any, what: str) -> str:
    """A text, or a list of text parts, which are put end to end."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "".join(_part(part, what) for part in value)
    raise RowProblem(NOT_TEXT, f"{what} is of type {type(value).__name__}, not a text")


def _part(part: Any, what: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise RowProblem(NOT_TEXT, f"{what} has a part of type {kind}; only texts can be learned here")


def _without_nulls(value: Any) -> Any:
    """Columnar files give every object the fields of all others, empty."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [_without_nulls(entry) for entry in value] if isinstance(value, list) else value


# --- messages -------------------------------------------------------------------------------------


def _role(given: Any, what: str) -> str:
    role = ROLES.get(given.strip().lower()) if isinstance(given, str) else None
    if role is None:
        known = ", ".join(ROLES)
        raise RowProblem(UNKNOWN_ROLE, f"{what} has the role {given!r}; known are {known}")
    return role


def _flag(message: Mapping[str, Any], what: str) -> bool | None:
    if message.keys().isdisjoint(FLAGS):
        return None
    found = {bool(message[name]) for name in FLAGS if _is_flag(message.get(name), name, what)}
    if len(found) > 1:
        raise RowProblem(BAD_FLAG, f"the flags of {what} contradict each other")
    return found.pop() if found else None


def _is_flag(value: Any, name: str, what: str) -> bool:
    if value is None:
        return False
    if isinstance(value, bool | int | float) and value in (0, 1):
        return True
    raise RowProblem(BAD_FLAG, f"{name} of {what} is {value!r}; must be true or false, or 1 or 0")


def _message(entry: Any, number: int, nulls: bool) -> tuple[Message, bool | None]:
    what = f"message {number}"
    if not isinstance(entry, Mapping):
        raise RowProblem(NOT_A_CONVERSATION, f"{what} is no object with a role and a content")
    role = _role(entry.get("role", entry.get("from")), what)
    content = entry["content"] if "content" in entry else entry.get("value")
    message = {key: entry[key] for key in entry if key not in READ and entry[key] is not None}
    if role == "function_call":
        call = _structured(content, what, BROKEN_CALL)
        calls, content, role = call if isinstance(call, list) else [call], "", "assistant"
    else:
        calls = _structured(entry.get("tool_calls"), f"tool_calls of {what}", BROKEN_CALL) or []
    message |= {"role": role, "content": _text(content, what)}
    message |= _reasoning(entry, what)
    if calls:
        message["tool_calls"] = [_call(call, what, nulls) for call in calls]
    return message, _flag(entry, what)


def _reasoning(entry: Mapping[str, Any], what: str) -> Message:
    """Under the names that templates read it by, as transformers does."""
    if entry.keys().isdisjoint(REASONING):
        return {}
    given = {name: entry[name] for name in REASONING if entry.get(name) is not None}
    texts = {name: _text(one, f"the reasoning of {what}") for name, one in given.items()}
    if not texts:
        return {}
    first = next(iter(texts.values()))
    return {"thinking": first, **texts, "reasoning_content": first}


def _call(call: Any, what: str, nulls: bool) -> dict[str, Any]:
    call = _structured(call, f"a tool call of {what}", BROKEN_CALL)
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise RowProblem(BROKEN_CALL, f"a tool call of {what} does not name its function")
    given = inner.get("arguments", inner.get("parameters"))
    arguments = _structured(given or {}, f"the arguments of {inner['name']}", BROKEN_CALL)
    outer = {key: call[key] for key in ("id", "type") if call.get(key) is not None}
    if nulls:
        arguments = _without_nulls(arguments)
    return {
        "type": "function",
        **outer,
        "function": {"name": inner["name"], "arguments": arguments},
    }


def _conversation(
    entries: Iterable[tuple[Message, bool | None]], tools: Any, nulls: bool
) -> Conversation:
    pairs = list(entries)
    if not pairs:
        raise RowProblem(EMPTY, "the conversation has no messages")
    return Conversation(
        [message for message, _ in pairs], [flag for _, flag in pairs], _tools(tools, nulls)
    )


def _tools(value: Any, nulls: bool) -> list[dict[str, Any]] | None:
    tools = _structured(value or None, "tools", BROKEN_CALL)
    if not tools:
        return None
    tools = [_structured(tool, "a tool", BROKEN_CALL) for tool in tools]
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RowProblem(BROKEN_CALL, "tools must be a list of objects, each describing a function")
    return [_without_nulls(tool) if nulls else dict(tool) for tool in tools]


def _list(value: Any, role: str) -> list[Any]:
    value = _structured(value, role, NOT_A_CONVERSATION)
    if not isinstance(value, list):
        kind = "null" if value is None else f"of type {type(value).__name__}"
        raise RowProblem(NOT_A_CONVERSATION, f"{role} is {kind}, not a list of messages")
    return value


# --- formats --------------------------------------------------------------------------------------


def _read_messages(record: dict[str, Any], nulls: bool) -> Conversation:
    return _dialog(record, "messages", nulls)


def _read_sharegpt(record: dict[str, Any], nulls: bool) -> Conversation:
    return _dialog(record, "conversations", nulls)


def _dialog(record: dict[str, Any], role: str, nulls: bool) -> Conversation:
    entries = [
        _message(entry, number, nulls)
        for number, entry in enumerate(_list(record[role], role), start=1)
    ]
    if entries and entries[0][0]["role"] != "system":
        entries = _system(record) + entries
    return _conversation(entries, record.get("tools"), nulls)


def _system(record: Record) -> list[tuple[Message, bool | None]]:
    text = _text(record.get("system"), "system")
    return [({"role": "system", "content": text}, None)] if text.strip() else []


def _read_alpaca(record: dict[str, Any], nulls: bool) -> Conversation:
    said: list[tuple[Message, bool | None]] = [
        ({"role": role, "content": _text(text, "history")}, None)
        for pair in _list(record.get("history") or [], "history")
        for role, text in zip(("user", "assistant"), _pair(pair), strict=True)
    ]
    parts = [_text(record["instruction"], "instruction"), _text(record.get("input"), "input")]
    question = "\n\n".join(part for part in parts if part.strip())
    if not question:
        raise RowProblem(EMPTY, "instruction and input are empty")
    answer = _text(record["output"], "output")
    said += [
        ({"role": "user", "content": question}, None),
        ({"role": "assistant", "content": answer}, None),
    ]
    return _conversation(_system(record) + said, None, nulls)


def _pair(value: Any) -> list[Any]:
    if isinstance(value, list) and len(value) == 2:
        return value
    raise RowProblem(NOT_A_CONVERSATION, "history must be a list of pairs: question, answer")


def _read_prompt_completion(record: dict[str, Any], nulls: bool) -> Parsed:
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion.strip():
            raise RowProblem(EMPTY, "completion is empty")
        return PromptCompletion(prompt, completion)
    asked = _side(prompt, "prompt", "user", nulls)
    given = _side(completion, "completion", "assistant", nulls)
    # What stands in the prompt is context, also where an assistant said it.
    context = [(message, bool(flag)) for message, flag in asked]
    return _conversation(context + given, record.get("tools"), nulls)


def _side(value: Any, role: str, speaker: str, nulls: bool) -> list[tuple[Message, bool | None]]:
    if isinstance(value, str):
        return [({"role": speaker, "content": value}, None)]
    return [_message(entry, n, nulls) for n, entry in enumerate(_list(value, role), start=1)]


def _read_tokenized(record: dict[str, Any], nulls: bool) -> Tokenized:
    ids = _integers(record["input_ids"], "input_ids")
    columns = {role: record.get(role) for role in ("labels", "loss_mask", "attention_mask")}
    given = {role: _integers(value, role) for role, value in columns.items() if value is not None}
    for role, values in given.items():
        if len(values) != len(ids):
            text = f"{role} has {len(values)} entries, input_ids has {len(ids)}"
            raise RowProblem(BAD_TOKENS, text)
    labels: list[int | None] = [*given.get("labels", ids)]
    if "loss_mask" in given:
        learned = given["loss_mask"]
        labels = [label if on else None for label, on in zip(labels, learned, strict=True)]
    seen = given.get("attention_mask", [1] * len(ids))  # where it is 0, there is padding
    kept = [at for at, on in enumerate(seen) if on]
    return Tokenized(
        [ids[at] for at in kept],
        [label if (label := labels[at]) is not None and label >= 0 else None for at in kept],
    )


def _integers(value: Any, role: str) -> list[int]:
    value = _structured(value, role, BAD_TOKENS)
    if not isinstance(value, list) or not all(isinstance(entry, int) for entry in value):
        raise RowProblem(BAD_TOKENS, f"{role} is no list of whole numbers")
    return value


FORMATS: dict[str, RowFormat] = {
    "tokenized": RowFormat(
        ("input_ids",), ("labels", "loss_mask", "attention_mask"), _read_tokenized
    ),
    "messages": RowFormat(("messages",), ("tools", "system"), _read_messages),
    "sharegpt": RowFormat(("conversations",), ("tools", "system"), _read_sharegpt),
    "prompt_completion": RowFormat(("prompt", "completion"), ("tools",), _read_prompt_completion),
    "alpaca": RowFormat(("instruction", "output"), ("input", "system", "history"), _read_alpaca),
}

COLUMNAR = ("hf", "parquet")  # kinds of files in which every object has the fields of all others
TURNS = ("messages", "sharegpt", "alpaca")  # without a template, none of their rows can be read


# --- columns --------------------------------------------------------------------------------------


def column_names(row_format: str, columns: Mapping[str, str]) -> dict[str, str]:
    """Which column of the data plays each role of the format."""
    shape = FORMATS[row_format]
    return {role: columns.get(role, role) for role in (*shape.required, *shape.optional)}


def detect(present: Iterable[str], columns: Mapping[str, str], data_field: str) -> str | None:
    """The format that these columns make up; None where they make up none."""
    there = set(present)
    asked = set(columns)
    for name, shape in FORMATS.items():
        # A role that `columns` names decides before a field of texts does.
        if asked & set(shape.required) and _fits(name, there, columns):
            return name
    if data_field in there:
        return "text"
    return next((name for name in FORMATS if _fits(name, there, columns)), None)


def _fits(row_format: str, there: set[str], columns: Mapping[str, str]) -> bool:
    names = column_names(row_format, columns)
    return all(names[role] in there for role in FORMATS[row_format].required)


def parse(record: Any, row_format: str, columns: Mapping[str, str], nulls: bool = False) -> Parsed:
    """One record read by its format; `nulls`: empty fields of objects say nothing."""
    if not isinstance(record, Mapping):
        raise RowProblem(ABSENT, f"an object is expected, not a {type(record).__name__}")
    shape = FORMATS[row_format]
    names = column_names(row_format, columns)
    for role in shape.required:
        if names[role] not in record:
            have = ", ".join(map(str, record)) or "none"
            raise RowProblem(
                ABSENT,
                f"there is no field '{names[role]}', which {row_format} needs (fields here: "
                f"{have}); dataset_preprocess.columns says which field is which",
            )
    return shape.read({role: record.get(name) for role, name in names.items()}, nulls)


def canonical(parsed: Parsed) -> str:
    """The contents alone, as a text that is equal for equal contents in whatever format."""
    if isinstance(parsed, Conversation):
        messages = [
            {key: value for key, value in message.items() if key not in REASONING[1:]}
            for message in parsed.messages
        ]
        return json.dumps([messages, parsed.tools], sort_keys=True, default=str)
    return json.dumps(parsed[:2] if isinstance(parsed, PromptCompletion) else parsed.ids)
