"""Data that the file, as it is now, would not make: preprocessing, `check` and training see it
alike."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.check.project import write_model
from vectorlm.check.data_folder import look
from vectorlm.check.finding import Finding, Surroundings
from vectorlm.config.load import load_config
from vectorlm.config.schema import Config
from vectorlm.manifest import read_manifest
from vectorlm.prepared import why_not
from vectorlm.preprocess import prepare_config
from vectorlm.recipe import changed_since

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
Content = dict[str, Any]
Edit = Callable[[Content], object]


def chats(name: str, rows: int = 40) -> list[Content]:
    roles = ("user", "assistant")
    return [
        {"messages": [{"role": role, "content": f"{name} {n} {role}"} for role in roles]}
        for n in range(rows)
    ]


def jsonl(path: Path, rows: list[Content]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Files:
    """A folder with a model, sources and a file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_model(folder / "model")
        for name in ("a", "b", "other"):
            jsonl(folder / f"{name}.jsonl", chats(name))
        jsonl(folder / "text.jsonl", [{"text": "a text"}] * 40)
        (folder / "t.jinja").write_text(TEMPLATE)
        (folder / "u.jinja").write_text(TEMPLATE.replace(": ", "> "))
        self.content: Content = {
            "model": "model",
            "train_parameters": {"output_dir": "out", "max_seq_len": 64},
            "dataset": {"train_ds": "rows"},
            "dataset_preprocess": {
                "save_path": "rows",
                "packing_type": "best_fit",
                "chat_template": "t.jinja",
                "load_path": "a.jsonl",
            },
        }

    @property
    def prepare(self) -> Content:
        found: Content = self.content["dataset_preprocess"]
        return found

    def several(self) -> None:
        del self.prepare["load_path"]
        self.prepare["datasets"] = [
            {"load_path": "a.jsonl", "weight": 0.7},
            {"load_path": "b.jsonl", "weight": 1.5},
        ]
        self.prepare.update(val_split=0.2, eval_save_path="held")
        self.content["dataset"]["eval_ds"] = "held"

    def load(self) -> Config:
        Path("c.yaml").write_text(yaml.safe_dump(self.content))
        return load_config("c.yaml")

    def changed(self) -> list[str]:
        return changed_since(self.load(), "rows", read_manifest("rows"))

    def found(self) -> list[Finding]:
        return list(look(Surroundings(self.load(), "c.yaml", {"HOME": str(self.folder)})))


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    monkeypatch.chdir(tmp_path)
    return Files(tmp_path)


def put(**values: Any) -> Edit:
    return lambda prepare: prepare.update(values)


def of_entry(number: int, **values: Any) -> Edit:
    return lambda prepare: prepare["datasets"][number].update(values)


ONE: dict[str, tuple[Edit, str]] = {
    "learn": (put(learn="all"), "learn was 'assistant' and is 'all'"),
    "template": (put(chat_template="u.jinja"), "the text of chat_template is another"),
    "gone template": (put(chat_template="v.jinja"), "v.jinja cannot be read"),
    "no template": (lambda p: p.pop("chat_template"), "no chat template"),
    "format": (put(dataset_format="sharegpt"), "dataset_format was 'messages' and is 'sharegpt'"),
    "text": (
        lambda p: p.update(dataset_format="text", chat_template=None),
        "dataset_format was 'messages' and is 'text'",
    ),
    "place": (put(load_path="other.jsonl"), "load_path was a.jsonl and is other.jsonl"),
    "too long": (put(too_long="drop"), "too_long was 'cut' and is 'drop'"),
    "packing": (put(packing_type="full"), "packing_type was 'best_fit' and is 'full'"),
    "columns": (put(columns={"tools": "f"}), "columns was {} and is {'tools': 'f'}"),
}
SEVERAL: dict[str, tuple[Edit, str]] = {
    "learn": (put(learn="all"), "learn was 'assistant' and is 'all'"),
    "held out": (put(val_split=0.3), "val_split was 0.2 and is 0.3"),
    "template": (put(chat_template="u.jinja"), "the text of chat_template is another"),
    "weight": (of_entry(0, weight=0.5), "weight of source 1 was 0.7 and is 0.5"),
    "removed": (lambda p: p["datasets"].pop(), "the number of sources was 2 and is 1"),
    "one more": (
        lambda p: p["datasets"].append({"load_path": "other.jsonl"}),
        "the number of sources was 2 and is 3",
    ),
    "another": (of_entry(1, load_path="other.jsonl"), "load_path was b.jsonl and is other.jsonl"),
    "format": (of_entry(1, dataset_format="sharegpt"), "dataset_format of source 2 was 'messages'"),
    "column": (of_entry(0, columns={"tools": "f"}), "columns of source 1 was {} and is"),
}
EDITS = {**{f"one: {k}": v for k, v in ONE.items()}, **{f"two: {k}": v for k, v in SEVERAL.items()}}


@pytest.mark.parametrize("name", EDITS)
def test_what_changed_is_seen_by_all(name: str, files: Files) -> None:
    if name.startswith("two"):
        files.several()
    prepare_config(files.load())
    assert why_not(files.load()) is None
    assert files.changed() == []
    assert [finding for finding in files.found() if finding.severity != "note"] == []
    edit, said = EDITS[name]
    edit(files.prepare)
    assert any(said in text for text in files.changed()), files.changed()
    errors = [one for one in files.found() if one.severity == "error"]
    assert {one.where for one in errors} <= {"dataset.train_ds", "dataset.eval_ds"}
    assert said in errors[0].text
    assert "set that back: vectorlm preprocess --config c.yaml" in errors[0].cure
    if name not in ("one: gone template", "one: no template"):
        assert why_not(files.load()) is not None


def test_sources_need_not_be_there(files: Files) -> None:
    files.several()
    prepare_config(files.load())
    for path in files.folder.glob("*.jsonl"):
        path.unlink()
    assert files.changed() == []
    files.prepare["datasets"][0]["weight"] = 0.5
    assert files.changed() == ["weight of source 1 was 0.7 and is 0.5"]


def test_other_names_of_the_same_contents_are_taken_over(files: Files) -> None:
    for name in ("one", "two"):
        Path(name).mkdir()
        shutil.copy("a.jsonl", name)
    files.prepare["load_path"] = "one"
    prepare_config(files.load())
    before = read_manifest("rows")
    files.prepare["load_path"] = str(files.folder / "one")
    assert files.changed() == [], "the same place, said otherwise"
    files.prepare["load_path"] = "two"
    assert files.changed() == ["load_path was one and is two"]
    assert why_not(files.load()) is None
    prepare_config(files.load())
    assert files.changed() == []
    assert read_manifest("rows").fingerprint() == before.fingerprint(), "checkpoints go on"


def test_a_project_that_was_copied(files: Files) -> None:
    """A file of the same name and size, or one that is not there, is taken for the same."""
    Path("copy").mkdir()
    shutil.copy("a.jsonl", "copy")
    prepare_config(files.load())
    files.prepare["load_path"] = "copy/a.jsonl"
    assert files.changed() == []
    jsonl(Path("copy/a.jsonl"), chats("a", rows=41))
    assert files.changed() == ["load_path was a.jsonl and is copy/a.jsonl"]
    Path("copy/a.jsonl").unlink()
    assert files.changed() == []


def test_what_the_section_does_not_say_is_not_compared(files: Files) -> None:
    prepare_config(files.load())
    files.content["train_parameters"]["seed"] = 7
    assert files.changed() == [], "a sweep over seeds learns the same rows"
    files.prepare["learn"] = "all"
    files.prepare["save_path"] = "elsewhere"
    assert files.changed() == [], "the section makes another folder"
    files.content.pop("dataset_preprocess")
    assert files.changed() == [], "no section, nothing to compare"


def test_data_of_an_older_version(files: Files) -> None:
    """Its manifest names no sources."""
    prepare_config(files.load())
    path = Path("rows/manifest.json")
    before = read_manifest("rows")
    old = {
        k: v
        for k, v in json.loads(path.read_text()).items()
        if k not in ("sources", "cut_documents")
    }
    path.write_text(json.dumps(old))
    assert files.changed() == []
    assert read_manifest("rows").fingerprint() == before.fingerprint()
    files.prepare["load_path"] = "other.jsonl"
    assert files.changed() == []
