"""Prepared data that is missing, damaged or made for something else; sources that do not read."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from typing import Any

import pytest

from tests.check.project import Project, says, write_tokenizer
from vectorlm.check.data_folder import look
from vectorlm.config.data_parts import folders_of
from vectorlm.config.load import load_config
from vectorlm.manifest import SourceCounts
from vectorlm.recipe import Found, recipe
from vectorlm.source_files import contents_sha256

Spoil = Callable[[Project], object]


def manifest(project: Project, **changes: Any) -> None:
    path = project.data / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def arrow(project: Project) -> Any:
    return next(project.data.glob("*.arrow"))


def preprocess(project: Project, **options: Any) -> None:
    paths = {"load_path": str(project.raw), "save_path": str(project.data)}
    project.config["dataset_preprocess"] = {**paths, **options}


def prepared(project: Project, **options: Any) -> None:
    """As if preprocessing had made the rows, of texts."""
    preprocess(project, **options)
    config = load_config(project.write())
    assert config.dataset_preprocess is not None
    folder = folders_of(config.dataset_preprocess)[0]
    made = recipe(config, folder, [Found("jsonl", "text")] * len(folder.sources))
    sources = [SourceCounts(load_path=s.load_path, weight=s.weight) for s in folder.sources]
    sha256 = contents_sha256(project.folder, [project.raw])
    project.prepare(options=made, sources=sources, source_sha256=sha256)


def unprepared(project: Project, **options: Any) -> None:
    for path in project.data.iterdir():
        path.unlink()
    project.data.rmdir()
    preprocess(project, **options)


def test_sound_data(project: Project) -> None:
    assert project.find(look) == []


SPOILED: dict[str, tuple[Spoil, str, str]] = {
    "nowhere": (
        lambda p: p.config.update(dataset={"train_ds": "nowhere"}),
        "train_ds: there is no prepared data in nowhere",
        "dataset_preprocess",
    ),
    "raw data": (
        lambda p: p.config.update(dataset={"train_ds": str(p.raw)}),
        "is a file",
        "prepare",
    ),
    "no manifest": (
        lambda p: (p.data / "manifest.json").unlink(),
        "no manifest.json",
        "vectorlm preprocess",
    ),
    "cut manifest": (
        lambda p: (p.data / "manifest.json").write_text('{"format": 1'),
        "manifest.json: cannot be read",
        "[Pp]repare it anew",
    ),
    "newer": (lambda p: manifest(p, format=9), "format 9 by a newer", "Update VectorLM"),
    "rows that are gone": (
        lambda p: manifest(p, rows=65),
        "holds 64 rows, and its manifest says 65",
        "anew",
    ),
    "no rows": (lambda p: manifest(p, rows=0), "holds no rows", "source"),
    "nothing learned": (
        lambda p: manifest(p, supervised_tokens=0),
        "no token that is learned",
        "separator",
    ),
    "a file is gone": (lambda p: arrow(p).unlink(), "data-00000.*arrow cannot be read", "anew"),
    "a file is cut": (
        lambda p: arrow(p).write_bytes(arrow(p).read_bytes()[:2000]),
        "data-00000.*arrow cannot be read|rows",
        "anew",
    ),
    "no state": (lambda p: (p.data / "state.json").unlink(), "state.json cannot be read", "anew"),
    "another length": (
        lambda p: p.train.update(max_seq_len=16),
        "prepared with max_seq_len 8, .* says 16",
        "set it to 8",
    ),
    "another label": (
        lambda p: p.config["dataset"].update(ignore_index=-1),
        "prepared with ignore_index -100, .* says -1",
        "set it to -100",
    ),
    "unknown tokens": (lambda p: manifest(p, max_token_id=320), "token 320, .* of 320", "resize"),
    "another tokenizer": (
        lambda p: write_tokenizer(p.model, 300),
        "another tokenizer",
        "vectorlm preprocess",
    ),
}


@pytest.mark.parametrize("name", SPOILED)
def test_spoiled_data(name: str, project: Project) -> None:
    spoil, text, cure = SPOILED[name]
    spoil(project)
    assert says(project.one(look), text, cure)


def test_evaluation_data_is_looked_at_too(project: Project) -> None:
    project.config["dataset"]["eval_ds"] = "nowhere"
    assert says(project.one(look), "eval_ds: .* nowhere", "dataset_preprocess")


def test_evaluation_on_what_is_learned(project: Project) -> None:
    project.config["dataset"]["eval_ds"] = f"{project.data}/"
    assert says(project.one(look, "warning"), "eval_ds: is the training data", "other data")


def test_of_other_bytes_of_a_large_tokenizer_nothing_is_sure(project: Project) -> None:
    manifest(project, tokenizer_file_sha256="bytes:00")
    assert says(project.one(look, "warning"), "another tokenizer", "preprocess")


def test_data_of_an_older_version_has_no_digest(project: Project) -> None:
    project.prepare(tokenizer_file_sha256=None)
    write_tokenizer(project.model, 300)
    assert project.find(look) == []


def test_few_rows_for_many_ranks(project: Project) -> None:
    project.slurm(nodes=2, processes_per_node=40)
    found = project.one(look, "warning")
    assert says(found, "64 rows for 80 ranks", "fewer GPUs")
    project.slurm(nodes=1, processes_per_node=8)
    project.train["gradient_accumulation_steps"] = 9
    assert says(project.one(look, "warning"), "72 rows .*64 in all: .* single step", "lower")
    project.train["gradient_accumulation_steps"] = 8
    assert project.find(look) == []


def test_few_rows_for_any_number_of_ranks(project: Project) -> None:
    project.config["dataset"]["train_bs"] = 65
    text = r"65 rows \(1 rank x train_bs 65 .*64 in all: .* single step"
    assert says(project.one(look, "warning"), text, "lower")


def test_a_job_needs_data(project: Project) -> None:
    del project.config["dataset"]
    assert project.find(look) == []  # preprocessing alone needs none
    project.slurm()
    assert says(project.one(look), "dataset: the section is missing", "train_ds")


# --- what dataset_preprocess says now -------------------------------------------------------------


def test_data_made_with_other_options(project: Project) -> None:
    prepared(project, packing_type="full")
    assert project.find(look) == []
    preprocess(project, packing_type="truncate", separator="##")
    text = "packing_type was 'full' and is 'truncate'; separator was None and is '##'"
    assert says(project.one(look), text, "vectorlm preprocess")


def test_a_source_that_has_changed(project: Project) -> None:
    prepared(project)
    os.utime(project.raw)
    assert project.find(look) == [], "touched, and still the same"
    project.raw.write_text('{"text": "new"}\n')
    later = (project.data / "manifest.json").stat().st_mtime + 1
    os.utime(project.raw, (later, later))
    assert says(project.one(look, "warning"), "source has changed .*raw.jsonl", "preprocess")


def test_what_a_job_prepares_is_not_told_to_be_prepared(project: Project) -> None:
    preprocess(project)
    project.train["max_seq_len"] = 16
    assert says(project.one(look), "max_seq_len", "prepare")
    assert project.find(look, prepares=True) == []
    project.raw.unlink()
    assert says(project.find(look, prepares=True)[0], "load_path: there is no file", "mend")


def test_other_data_than_is_prepared(project: Project) -> None:
    preprocess(project, save_path=str(project.folder / "other"))
    text = "train_ds: is .*rows, and dataset_preprocess.save_path is .*other"
    assert says(project.one(look, "warning"), text, "one folder")
    project.config["sweep"] = {"metric": "loss", "grid": {"dataset.train_ds": [str(project.data)]}}
    assert project.find(look) == [], "data prepared apart, one folder for each run"


def test_other_evaluation_data_than_is_prepared(project: Project) -> None:
    project.data.rename(project.folder / "held-out")
    project.prepare()
    preprocess(project, eval_load_path="x.jsonl", eval_save_path=str(project.folder / "eval"))
    project.config["dataset"]["eval_ds"] = str(project.folder / "held-out")
    text = "eval_ds: is .*held-out, and dataset_preprocess.eval_save_path is .*eval"
    assert says(project.one(look, "warning"), text, "one folder")
    del project.config["dataset"]["eval_ds"]
    assert says(
        project.one(look, "note"), "eval_ds: .*evaluates nothing", "dataset.eval_ds: .*eval"
    )


def test_a_source_that_is_gone_after_its_data_was_prepared(project: Project) -> None:
    project.raw.unlink()
    preprocess(project)
    text = "load_path: there is no file .*raw.jsonl; what was prepared from it is in .*rows"
    assert says(project.one(look, "note"), text, "before the data is prepared again")
    preprocess(project, load_path="some/texts")
    assert says(project.one(look, "note"), "some/texts .*training needs no more", "put it back")
    assert [one.severity for one in project.find(look, prepares=True)] == ["warning"]


# --- sources --------------------------------------------------------------------------------------


def test_data_that_can_be_prepared(project: Project) -> None:
    unprepared(project)
    found = project.one(look, "warning")
    assert says(found, "is not prepared yet", "vectorlm preprocess --config")


def test_a_file_in_two_sources(project: Project) -> None:
    unprepared(project)
    del project.config["dataset_preprocess"]["load_path"]
    entries = [{"load_path": str(project.raw)}, {"load_path": str(project.folder / "*.jsonl")}]
    project.config["dataset_preprocess"]["datasets"] = entries
    (twice,) = (one for one in project.find(look) if one.where.endswith("datasets"))
    assert says(twice, "raw.jsonl is in two sources", "weight of 2")
    assert twice.severity == "warning"


SOURCES: dict[str, tuple[Spoil, str, str]] = {
    "gone": (lambda p: unprepared(p, load_path="gone.jsonl"), "load_path: .*gone.jsonl", "mend"),
    "another field": (
        lambda p: unprepared(p, data_field="body"),
        "data_field: .* no field 'body'; its fields: text",
        "set data_field to one of text",
    ),
    "another name for conversations": (
        lambda p: (unprepared(p), p.raw.write_text('{"dialog": [], "tools": []}\n')),
        "its fields: dialog, tools",
        "dataset_format: messages and columns: {messages: dialog}",
    ),
    "questions": (
        lambda p: (unprepared(p), p.raw.write_text('{"Question": "a", "answer": "b"}\n')),
        "its fields: Question, answer",
        "dataset_format: alpaca and columns: {instruction: Question, output: answer}",
    ),
    "columns that are not there": (
        lambda p: unprepared(p, data_field="body", columns={"messages": "dialog"}),
        "its fields: text",
        r"columns names a field that is not there \(messages: dialog\)",
    ),
    "semicolons": (
        lambda p: (
            (p.folder / "x.csv").write_text("id;text\n1;a\n"),
            unprepared(p, load_path=str(p.folder / "x.csv")),
        ),
        "its fields: id;text",
        "separated by semicolons; convert it to commas",
    ),
    "tabs": (
        lambda p: (
            (p.folder / "x.csv").write_text("id\ttext\n1\ta\n"),
            unprepared(p, load_path=str(p.folder / "x.csv")),
        ),
        "its fields: id\ttext",
        "separated by tabs; convert it to commas",
    ),
    "a broken row": (
        lambda p: (unprepared(p), p.raw.write_text('{"text": "no end\n{"text": "x"}\n')),
        "raw.jsonl:1: broken JSON",
        "skip_bad_rows",
    ),
    "no object": (
        lambda p: (unprepared(p), p.raw.write_text('["text"]\n["text"]\n')),
        "raw.jsonl:1: a JSON object is expected, not a list",
        "skip_bad_rows",
    ),
    "no parquet": (
        lambda p: (
            (p.folder / "x.parquet").write_text("x"),
            unprepared(p, load_path=str(p.folder / "x.parquet")),
        ),
        "x.parquet: cannot be read",
        "whole",
    ),
    "a cut end": (
        lambda p: (unprepared(p), p.raw.write_text('{"text": "x"}\n' * 9 + '{"text": "no e')),
        "raw.jsonl looks cut: its last line is no whole JSON$",
        "copy it again",
    ),
    "an end of zeros": (
        lambda p: (unprepared(p), p.raw.write_bytes(b'{"text": "x"}\n' + bytes(4096))),
        "raw.jsonl looks cut",
        "copy it again",
    ),
    "a long row that is cut": (
        lambda p: (unprepared(p), p.raw.write_text('{"text": "x"}\n{"text": "' + "y" * 2**21)),
        "raw.jsonl looks cut",
        "copy it again",
    ),
    "other files that are cut": (
        lambda p: (
            shards(p, '{"text": "x"}\n', '{"text": "x"}\n{"te', '{"text": "a lone li'),
            unprepared(p, load_path=str(p.folder / "shards")),
        ),
        "shards/1.jsonl looks cut: .*, and 1 more look so",
        "copy it again",
    ),
    "empty": (
        lambda p: (unprepared(p), p.raw.write_text("")),
        "raw.jsonl holds no rows",
        "give a file that has some",
    ),
    "something else there": (
        lambda p: (unprepared(p), p.data.mkdir(), (p.data / "thesis.tex").write_text("x")),
        "save_path: .* no prepared data of ours",
        "another save_path",
    ),
}


def shards(project: Project, *texts: str) -> None:
    folder = project.folder / "shards"
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number}.jsonl").write_text(text)


@pytest.mark.parametrize(
    "text",
    [
        '{"text": "x"}\n{"text": "no newline behind it"}',
        '{"text": "x"}\n\n  \r\n',
        '{"text": "x"}\n{"text": "' + "y" * 2**21 + '"}\n',
    ],
    ids=["no newline", "empty lines", "a long row"],
)
def test_a_source_with_a_whole_end(text: str, project: Project) -> None:
    unprepared(project)
    project.raw.write_text(text)
    assert says(project.one(look, "warning"), "is not prepared yet", "preprocess")


def test_a_cut_end_that_is_skipped(project: Project) -> None:
    unprepared(project, skip_bad_rows=True)
    project.raw.write_text('{"text": "x"}\n{"text": "no e')
    assert {finding.severity for finding in project.find(look)} == {"warning"}


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_that_does_not_read(name: str, project: Project) -> None:
    spoil, text, cure = SOURCES[name]
    spoil(project)
    errors = [finding for finding in project.find(look) if finding.where != "dataset.train_ds"]
    assert len(errors) == 1
    assert says(errors[0], text, cure)


def test_a_dataset_of_the_hub(project: Project) -> None:
    unprepared(project, load_path="some/texts")
    found = project.find(look)
    assert {finding.severity for finding in found} == {"warning"}  # fetched when it is prepared
    project.environ["HF_HUB_OFFLINE"] = "1"
    first = next(finding for finding in project.find(look) if finding.severity == "error")
    assert says(first, "some/texts", "vectorlm prefetch")
    folder = project.folder / "home/.cache/huggingface/datasets/some___texts"
    folder.mkdir(parents=True)
    assert len(project.find(look)) == 1


@pytest.mark.parametrize("ending", ["csv", "jsonl.gz"])
def test_other_kinds_of_sources(project: Project, ending: str) -> None:
    path = project.folder / f"more.{ending}"
    if ending == "csv":
        path.write_text("title,text\na,b\n")
    else:
        path.write_bytes(gzip.compress(b'{"title": "a", "text": "b"}\n'))
    unprepared(project, load_path=str(path))
    assert len(project.find(look)) == 1
    preprocess(project, load_path=str(path), data_field="body")
    errors = [finding for finding in project.find(look) if finding.severity == "error"]
    assert says(errors[0], "its fields: title, text", "title, text")


BAD_TEXTS = {
    "jsonl": (b'{"text": "a"}\n{"text": " "}\n', ":2: field 'text' is empty"),
    "json": (b'[{"text": "a"}, {"text": 3}]', ": row 2: field 'text' is of type int"),
    "csv": (b"text,n\na,1\nb\n", ":3: 1 fields, but the header has 2"),
    "csv.gz": (gzip.compress(b"text,n\na,1\nb\n"), ":3: 1 fields, but the header has 2"),
    "txt": (b"a\n\xff\n", ":2: not valid UTF-8"),
}


@pytest.mark.parametrize("ending", BAD_TEXTS)
def test_a_row_that_preprocessing_would_stop_at(project: Project, ending: str) -> None:
    content, text = BAD_TEXTS[ending]
    path = project.folder / f"more.{ending}"
    path.write_bytes(content)
    unprepared(project, load_path=str(path))
    (found,) = [one for one in project.find(look) if one.where != "dataset.train_ds"]
    assert says(found, f"more.{ending}{text}", "skip_bad_rows")
    assert found.severity == "error"
    preprocess(project, load_path=str(path), skip_bad_rows=True)
    assert {one.severity for one in project.find(look)} == {"warning"}


BROKEN = {
    "json": (b'[{"text": "a"}, {"te', "broken JSON array", "mend the file"),
    "csv": (b'text\n"a\n', "a quote is opened here and never closed", "mend the file"),
    "jsonl.gz": (gzip.compress(b'{"text": "a"}\n' * 99)[:-9], "cannot be read", "whole"),
}


@pytest.mark.parametrize("ending", BROKEN)
def test_a_file_that_cannot_be_read_on(project: Project, ending: str) -> None:
    content, text, cure = BROKEN[ending]
    path = project.folder / f"more.{ending}"
    path.write_bytes(content)
    unprepared(project, load_path=str(path))
    (found,) = [one for one in project.find(look) if one.where != "dataset.train_ds"]
    assert says(found, f"more.{ending}.*{text}", cure)
