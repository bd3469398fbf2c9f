"""Conversations that cannot be rendered, or of which nothing can be learned."""

from __future__ import annotations

import json
import shutil
from typing import Any

from tests.doomed.case import Case
from tests.doomed.entry import doomed, sound

HELLO = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]


def conversations(case: Case, *rows: Any) -> None:
    """Instead of the texts, not prepared yet."""
    shutil.rmtree(case.data)
    lines = [json.dumps(row) for row in (*rows, {"messages": HELLO})]
    case.put(case.raw / "train.jsonl", "\n".join(lines) + "\n")
    case.put(case.raw / "test.jsonl", lines[-1] + "\n")


@doomed(
    r"chat_template.*no chat template",
    r"chat_template.*jinja",
    "has no chat template",
    verb="preprocess",
)
def conversations_for_a_base_model(case: Case) -> None:
    conversations(case)
    (case.model / "chat_template.jinja").unlink()


@doomed(
    r"chat_template.*mine.jinja cannot be read",
    r"chat template",
    "mine.jinja cannot be read",
    verb="preprocess",
)
def a_chat_template_that_is_not_there(case: Case) -> None:
    conversations(case)
    case.prepare["chat_template"] = str(case.folder / "mine.jinja")


@doomed(
    r"chat_template.*line 1.*broken",
    r"[Mm]end",
    "the chat template is broken",
    verb="preprocess",
)
def a_chat_template_with_a_loop_that_never_ends(case: Case) -> None:
    conversations(case)
    text = "{% for message in messages %}{{ message.content }}"
    case.put(case.folder / "mine.jinja", text)
    case.prepare["chat_template"] = str(case.folder / "mine.jinja")


@doomed(
    r"chat_template.*cannot be trained with",
    r"chat_template.*jinja",
    "this chat template cannot be trained with",
    verb="preprocess",
)
def a_chat_template_that_writes_in_capitals(case: Case) -> None:
    conversations(case)
    line = "{{ message.role }}: {{ message.content | upper }}{{ eos_token }}"
    case.put(case.folder / "mine.jinja", "{% for message in messages %}" + line + "{% endfor %}")
    case.prepare["chat_template"] = str(case.folder / "mine.jinja")


@doomed(
    r"load_path.*train.jsonl:1.*assistant",
    r"skip_bad_rows|[Mm]end",
    "no message is an assistant's",
    verb="preprocess",
)
def a_conversation_without_an_answer(case: Case) -> None:
    conversations(case, {"messages": HELLO[:1]})


@doomed(
    r"(dataset_format|columns).*conversations",
    r"dataset_format|columns",
    "there is no field 'conversations'",
    verb="preprocess",
)
def conversations_of_another_format(case: Case) -> None:
    conversations(case)
    case.prepare["dataset_format"] = "sharegpt"


@sound()
def conversations_by_the_models_own_template(case: Case) -> None:
    conversations(case, *[{"messages": HELLO}] * 11)
    case.prepare_again()
