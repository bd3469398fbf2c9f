"""Conversations that cannot be prepared are told before the job, as preprocessing would tell."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.check.project import Project, says
from tests.data.chat.models import calls, model_folder, result, said, source, user
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


def save(path: Path, rows: list[Any]) -> None:
    """In the kind of file that the ending says."""
    lines = [json.dumps(row) for row in rows]
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.suffix == ".json":
        path.write_text(f"[{','.join(lines)}]")
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress("".join(f"{line}\n" for line in lines).encode()))
    elif path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            written = csv.writer(file)
            written.writerows([["messages"], *([json.dumps(row["messages"])] for row in rows)])
    else:
        datasets.Dataset(table).save_to_disk(path)


THOUGHTFUL = {"messages": [user("Hi"), said("Hello.", "think about it")]}


def test_thinking_that_is_not_written(chats: Project) -> None:
    write(chats, CHAT, THOUGHTFUL)
    template(chats, source("chatml"))
    assert says(chats.one(look, "warning"), "chat_template: rows have thinking", "docs/chat.md")
    for name in ("configs/chatml", "qwen3"):
        template(chats, source(name))
        assert chats.find(look) == []


def test_marks_that_the_tokenizer_does_not_know(chats: Project) -> None:
    template(chats, source("chatml").replace("<|im_end|>", "<|stop|>"))
    assert says(chats.one(look, "warning"), r"writes <\|stop\|>, which this tokenizer does not", "")
    template(chats, source("configs/plain_chat"))
    assert chats.find(look) == []


def test_a_template_is_to_blame(chats: Project) -> None:
    tools = [{"type": "function", "function": {"name": "weather"}}]
    write(chats, {**CHAT, "tools": tools})
    assert says(chats.one(look), "does not write the tools", "name another template")


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("c.parquet", "c.parquet: row 41"),
        ("c.json", "c.json: row 41"),
        ("c.jsonl.gz", "c.jsonl.gz:41"),
        ("c.csv", "c.csv:42"),
        ("saved", "saved/data-00000-of-00001.arrow: row 41"),
    ],
)
def test_the_first_rows_of_every_kind_of_file(chats: Project, name: str, place: str) -> None:
    path = chats.folder / name
    set_keys(chats, load_path=str(path))
    # In columnar files, what one message has is empty in all others.
    called = {"messages": [user("a"), calls("weather", city="x"), result("12"), said("b")]}
    save(path, [CHAT, called] * 20)
    assert chats.find(look) == []
    if path.is_dir():
        shutil.rmtree(path)
    save(path, [CHAT, called] * 20 + [{"messages": [user("a")]}])
    assert says(chats.one(look), f"{place}: no message is an assistant's", "skip_bad_rows")


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"input_ids": [1, "a"]}, "input_ids is no list of whole numbers"),
        ({"prompt": "a", "completion": " "}, "completion is empty"),
        ({"prompt": [user("a")], "completion": [user("b")]}, "no message is an assistant's"),
        ({"instruction": "a", "output": 3}, "output is of type int"),
        ({"conversations": [{"from": "ape", "value": "a"}]}, "has the role 'ape'"),
        ({"messages": [user("a"), said("\ud800")]}, "it is not valid UTF-8"),
    ],
)
def test_rows_of_every_format(chats: Project, row: Any, text: str) -> None:
    write(chats, row)
    assert says(chats.one(look), f"raw.jsonl:1: .*{text}", "skip_bad_rows")


def test_many_rows_take_no_time(chats: Project) -> None:
    """Only the first are looked at."""
    turns = [user("Hi " * 50), said("Hello. " * 100, "because")] * 10
    save(chats.folder / "c.parquet", [{"messages": turns}] * 2000)
    set_keys(chats, load_path=str(chats.folder / "c.parquet"))
    began = time.process_time()
    assert chats.find(look) == []
    assert time.process_time() - began < 1


def test_bad_rows_that_are_skipped_are_a_warning(chats: Project) -> None:
    write(chats, {"messages": []})
    set_keys(chats, skip_bad_rows=True)
    assert says(chats.one(look, "warning"), "has no messages", "skip_bad_rows")


def test_texts_and_ready_tokens_need_no_template(chats: Project) -> None:
    (Path(chats.config["model"]) / "chat_template.jinja").unlink()
    for row in ({"text": "a"}, {"input_ids": [1]}, {"prompt": "a", "completion": "b"}):
        write(chats, row)
        assert chats.find(look) == []
