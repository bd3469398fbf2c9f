"""Conversations that cannot be prepared are told before the job, as preprocessing would tell."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.check.project import Project, says
from tests.data.chat.models import model_folder, said, source, user
from vectorlm.check.data_folder import look

CHAT = {"messages": [user("Hi"), said("Hello.")]}
Spoil = Callable[[Project], Any]


@pytest.fixture
def chats(project: Project, tmp_path: Path) -> Project:
    """A model with a template, and conversations for it that are not prepared yet."""
    project.config["model"] = str(model_folder(tmp_path / "chat-model", "qwen3"))
    del project.config["dataset"]
    write(project, CHAT, CHAT)
    project.config["dataset_preprocess"] = {
        "load_path": str(project.raw),
        "save_path": str(project.folder / "prepared"),
    }
    return project


def write(project: Project, *rows: Any) -> None:
    project.raw.write_text("".join(json.dumps(row) + "\n" for row in rows))


def set_keys(project: Project, **keys: Any) -> None:
    project.config["dataset_preprocess"] |= keys


def test_conversations_that_can_be_prepared(chats: Project) -> None:
    assert chats.find(look) == []


def in_datasets(project: Project) -> None:
    write(project, {"messages": []})
    del project.config["dataset_preprocess"]["load_path"]
    set_keys(project, datasets=[{"load_path": str(project.raw)}])


def template(project: Project, text: str) -> None:
    path = project.folder / "mine.jinja"
    path.write_text(text)
    set_keys(project, chat_template=str(path))


SPOILT: dict[str, tuple[Spoil, str, str]] = {
    "no template": (
        lambda p: (Path(p.config["model"]) / "chat_template.jinja").unlink(),
        "chat_template: model: the data holds conversations, but .* has no chat template",
        "chat_template, such as configs/chatml.jinja",
    ),
    "no such file": (
        lambda p: set_keys(p, chat_template="no.jinja"),
        "chat_template: no.jinja cannot be read",
        "a file that holds a chat template",
    ),
    "broken": (lambda p: template(p, "{% if %}"), "mine.jinja: line 1: .* is broken", "Mend it"),
    "hopeless": (
        lambda p: template(p, source("hopeless")),
        "mine.jinja: this chat template cannot be trained with",
        "such as configs/chatml.jinja",
    ),
    "a row": (
        lambda p: write(p, CHAT, {"messages": [user("a")]}, {"messages": 3}),
        "load_path: .*raw.jsonl:2: no message is an assistant's",
        "skip_bad_rows",
    ),
    "another format": (
        lambda p: set_keys(p, dataset_format="alpaca"),
        "dataset_format: .* has no field 'instruction', which alpaca needs; its fields: messages",
        "dataset_preprocess.columns",
    ),
    "one of several": (in_datasets, "datasets: .*raw.jsonl:1: .* has no messages", "mend it"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_conversations_that_cannot_be_prepared(name: str, chats: Project) -> None:
    spoil, text, cure = SPOILT[name]
    spoil(chats)
    assert says(chats.one(look), text, cure)


def test_bad_rows_that_are_skipped_are_a_warning(chats: Project) -> None:
    write(chats, {"messages": []})
    set_keys(chats, skip_bad_rows=True)
    assert says(chats.one(look, "warning"), "has no messages", "skip_bad_rows")


def test_texts_and_ready_tokens_need_no_template(chats: Project) -> None:
    (Path(chats.config["model"]) / "chat_template.jinja").unlink()
    for row in ({"text": "a"}, {"input_ids": [1]}, {"prompt": "a", "completion": "b"}):
        write(chats, row)
        assert chats.find(look) == []
