"""Rows shown as a person would read them: what is learned, where documents begin, and how long."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.data.chat.models import model_folder, said, user
from tests.test_layout import run_without_heavy_libraries
from tests.tiny import write_rows
from vectorlm.cli import main
from vectorlm.data.store import open_rows
from vectorlm.data.tokenize import load_tokenizer
from vectorlm.inspect_door import (
    DIM,
    GREEN,
    PLAIN,
    Reader,
    document_lengths,
    evenly,
    histogram,
    load_backend,
    row_of,
    visible,
)
from vectorlm.row import Row

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", params=["bytes", "pieces"])
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations that are prepared."""
    folder = tmp_path_factory.mktemp("inspect")
    model = model_folder(folder / "model", "chatml", pieces=request.param == "pieces")
    rows = [{"messages": [user(f"Grüße {n}?"), said(f"=  🙂 {n}.")]} for n in range(40)]
    (folder / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {
        "model": str(model),
        "train_parameters": {"output_dir": "out", "max_seq_len": 128},
        "dataset": {"train_ds": str(folder / "prepared")},
        "dataset_preprocess": {
            "load_path": str(folder / "c.jsonl"),
            "save_path": str(folder / "prepared"),
            "packing_type": "full",
        },
    }
    (folder / "c.yaml").write_text(json.dumps(content))
    assert main(["preprocess", "--config", str(folder / "c.yaml")]) == 0
    return folder / "c.yaml"


def test_rows_as_a_person_would_read_them(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "inspect", "--config", str(config), "--rows", "2"]) == 0
    said = capsys.readouterr().out
    assert "documents  40" in said
    assert " of them learned (" in said
    first = "--- document 1: tokens 0 to "
    text = "[[=  🙂 0.<|im_end|>]]"
    assert said.index("=== row 0: 128 tokens, ") < said.index(first) < said.index(text)
    assert "Grüße 0?<|im_end|>" in said
    assert said.count("=== row ") == 2
    assert "\033" not in said


def test_what_would_be_prepared_otherwise_now(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["data", "inspect", "--config", str(config), "--rows", "1"]
    assert main([*arguments, "--set", "dataset_preprocess.learn=all"]) == 0
    first, *_ = capsys.readouterr().out.splitlines()
    told = f"Prepared otherwise than {config} says now: learn was 'assistant' and is 'all'"
    assert first == told
    assert main(arguments) == 0
    assert "Prepared otherwise" not in capsys.readouterr().out


def test_another_folder_and_another_tokenizer(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = json.loads(config.read_text())["model"]
    made = {"tokenizer_sha256": load_tokenizer(model).sha256, "tokenizer_file_sha256": "bytes:0"}
    write_rows(tmp_path / "rows", [[[3, 4, 5]]], 8, cut_documents=7, **made)
    arguments = ["data", "inspect", "--config", str(config), "--folder", str(tmp_path / "rows")]
    assert main(arguments) == 0, "other bytes, the same ids"
    said = capsys.readouterr().out
    assert "=== row 0: 3 tokens, 2 learned, documents: 1" in said
    assert "pieces of documents by length" in said
    assert "7 documents were cut: one that is shown may be a piece" in said
    for file_sha256 in ("content:0", None):
        shutil.rmtree(tmp_path / "rows")
        write_rows(tmp_path / "rows", [[[3, 4, 5]]], 8, tokenizer_file_sha256=file_sha256)
        assert main(arguments) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        words = f"rows: was prepared with another tokenizer than that of {model}; prepare it again"
        assert words in shown.err
    assert main([*arguments[:-1], str(tmp_path / "gone")]) == 2
    assert "there is no such folder of prepared data" in capsys.readouterr().err


def test_it_starts_without_heavy_libraries(config: Path) -> None:
    words = ["data", "inspect", "--config", str(config)]
    done = run_without_heavy_libraries(f"from vectorlm.cli import main\nsys.exit(main({words!r}))")
    assert done.returncode == 0, done.stderr


def test_what_else_can_be_asked_of_data() -> None:
    command = [sys.executable, "-m", "vectorlm.cli", "data"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "inspect" in done.stderr


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colour_on_a_terminal(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = config.parent
    row = row_of(open_rows(folder / "prepared"), 0)
    backend = load_backend(str(folder / "model"))
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = "\n".join(Reader(backend, Terminal()).lines(0, row))
    assert f"{GREEN}=  🙂 0.<|im_end|>{PLAIN}{DIM}" in text
    monkeypatch.setenv("NO_COLOR", "1")
    assert GREEN not in "\n".join(Reader(backend, Terminal()).lines(0, row))


def test_texts_do_not_steer_the_terminal() -> None:
    assert visible("a\x1b[31m\r\x9b\tb\n") == "a\\x1b[31m\\x0d\\x9b\tb\n"


def test_lengths_of_all_documents(tmp_path: Path) -> None:
    rows = [[[1] * 3, [1] * 5], [[1] * 8], [[1] * 1, [1] * 2, [1] * 4]]
    write_rows(tmp_path / "rows", rows, 8)
    lengths = document_lengths(open_rows(tmp_path / "rows"))
    assert lengths.tolist() == [3, 5, 8, 1, 2, 4]


def test_histogram() -> None:
    lines = histogram(np.array([1, 4, 5, 7, 16])).splitlines()
    assert lines[0] == "  documents by length (median 5 tokens)"
    counts = [line.split()[:4] for line in lines[1:]]
    assert counts == [
        ["1", "-", "1", "1"],
        ["2", "-", "3", "0"],
        ["4", "-", "7", "3"],
        ["8", "-", "15", "0"],
        ["16", "-", "31", "1"],
    ]
    assert lines[3].endswith("#" * 40)


@pytest.mark.parametrize(
    ("total", "wanted", "shown"), [(100, 4, [0, 25, 50, 75]), (2, 5, [0, 1]), (5, 1, [0])]
)
def test_rows_from_all_over_the_folder(total: int, wanted: int, shown: list[int]) -> None:
    assert evenly(total, wanted) == shown


def test_rows_are_read_whole(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows", [[[1, 2], [3]], [[4]]], 8)
    row = row_of(open_rows(tmp_path / "rows"), 0)
    assert isinstance(row, Row)
    assert [part.tolist() for part in row] == [[1, 2, 3], [-100, 2, -100], [0, 2]]
