"""What is said of each source, and the list of refused rows."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.data.conftest import MakeConfig
from vectorlm.config.schema import Config
from vectorlm.data import account
from vectorlm.data.account import Refused
from vectorlm.errors import DataError
from vectorlm.manifest import Manifest, read_manifest
from vectorlm.preprocess import prepare_config
from vectorlm.row_batch import BadRow


def jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def mixed(tmp_path: Path, make_config: MakeConfig) -> Config:
    """Two sources of 200 texts, a bad row in each; a third of one row and a small weight."""
    texts = [{"text": f"text {n}"} for n in range(200)]
    for name in "ab":
        jsonl(tmp_path / f"{name}.jsonl", [*texts, {"text": 3}])
    jsonl(tmp_path / "c.jsonl", [{"text": "the only one"}])
    content = make_config("-").model_dump(exclude_defaults=True)
    weights = {"a": 0.25, "b": 2.5, "c": 1e-9}
    content["dataset_preprocess"] |= {
        "load_path": "",
        "datasets": [
            {"load_path": str(tmp_path / f"{name}.jsonl"), "weight": weight}
            for name, weight in weights.items()
        ],
        "val_split": 0.2,
        "eval_save_path": str(tmp_path / "held"),
        "skip_bad_rows": True,
    }
    del content["dataset_preprocess"]["load_path"]
    return Config.model_validate(content)


def test_every_source_has_its_account(mixed: Config, capsys: pytest.CaptureFixture[str]) -> None:
    made, held = prepare_config(mixed)
    a, b, c = made.sources
    assert (a.rows, a.refused, b.rows, b.refused, c.rows) == (201, 1, 201, 1, 1)
    assert a.held_out == b.held_out == held.sources[0].rows == held.sources[0].documents
    left = 200 - a.held_out
    assert 0.1 * left < a.documents < 0.4 * left
    assert 2.3 * left < b.documents < 2.7 * left
    assert (c.documents, c.held_out) == (0, 0)
    assert sum(one.documents for one in made.sources) == made.documents
    assert sum(one.tokens for one in made.sources) == made.tokens
    said = capsys.readouterr().out
    assert f"a.jsonl: 201 rows read; 1 refused; {a.held_out} held out; {a.documents} docu" in said
    assert "weight 0.25: 25 % of its rows, once an epoch" in said
    assert "weight 2.5: each row 2.5 times an epoch, on average" in said
    assert "warning: " in said
    assert "c.jsonl gives nothing: of its 1 rows, weight 1e-09 takes none" in said


def test_one_source_is_the_folder(
    tmp_path: Path, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": "a text"}] * 3)
    (made,) = prepare_config(make_config(path, packing_type="best_fit"))
    assert [(one.rows, one.documents, one.tokens) for one in made.sources] == [(3, 3, made.tokens)]
    said = capsys.readouterr().out
    assert "sources" not in said
    assert "cut " not in said
    assert not (tmp_path / "prepared/refused.jsonl").exists()


# --- refused rows ---------------------------------------------------------------------------------


def bad(number: int, reason: str = "empty") -> BadRow:
    return BadRow(f"/data/a:b.jsonl:{number}", reason, "it is empty")


def test_the_list_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(account, "MOST_LISTED", 3)
    refused = Refused(skip=True)
    refused.open(tmp_path)
    for number in range(5):
        refused.add([bad(number)])
    refused.close()
    lines = (tmp_path / "refused.jsonl").read_text().splitlines()
    assert [json.loads(line)["line"] for line in lines] == [0, 1, 2]
    assert json.loads(lines[0])["source"] == "/data/a:b.jsonl"
    assert refused.counts == {"empty": 5}


def test_the_list_goes_on_where_it_was_recorded(tmp_path: Path) -> None:
    first = Refused(skip=True)
    first.open(tmp_path)
    first.add([bad(1)])
    state = json.loads(json.dumps(first.state()))
    first.add([bad(2), bad(3)])
    first.close()
    second = Refused(skip=True)
    second.load_state(state, tmp_path)
    second.add([BadRow("x.parquet: row 7", "empty", "it is empty")])
    second.close()
    lines = (tmp_path / "refused.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert [one.get("line", one.get("row")) for one in found] == [1, 7]
    assert (found[1]["source"], second.counts) == ("x.parquet", {"empty": 2})


# --- too long -------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["full", "best_fit", "partial", "truncate", "none"])
def test_what_is_too_long_is_left_out_if_asked(
    packing: str, tmp_path: Path, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": "a fox"}, {"text": "a long text " * 20}, {"text": "a dog"}]
    options = {"packing_type": packing, "too_long": "drop"}
    made = prepare(make_config(jsonl(tmp_path / "a.jsonl", rows), max_seq_len=16, **options))
    assert (made.documents, made.skipped) == (2, {"longer than max_seq_len": 1})
    assert (made.sources[0].too_long, made.sources[0].rows) == (1, 3)
    assert made.longest_row <= 16
    said = capsys.readouterr().out
    assert "a.jsonl:2: " in said
    assert "max_seq_len is 16" in said
    listed = json.loads((tmp_path / "prepared/refused.jsonl").read_text())
    assert (listed["line"], listed["reason"]) == (2, "longer than max_seq_len")


def prepare(config: Config) -> Manifest:
    (made,) = prepare_config(config)
    assert config.dataset_preprocess is not None
    assert read_manifest(config.dataset_preprocess.save_path) == made
    return made


@pytest.mark.parametrize(
    ("packing", "said"),
    [
        ("best_fit", "1 document longer than 16 tokens, into pieces"),
        ("partial", "1 document longer than 16 tokens, into pieces"),
        ("full", "1 document at the end of a row (packing_type: full)"),
    ],
)
def test_what_is_cut_is_counted(
    packing: str,
    said: str,
    tmp_path: Path,
    make_config: MakeConfig,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [{"text": "a fox"}, {"text": "a long text " * 10}]
    config = make_config(jsonl(tmp_path / "a.jsonl", rows), 16, packing_type=packing)
    assert prepare(config).cut_documents == 1
    assert said in capsys.readouterr().out


def test_held_out_but_nothing_falls_out(tmp_path: Path, make_config: MakeConfig) -> None:
    """Told before the training data, which is there, is replaced."""
    path = jsonl(tmp_path / "a.jsonl", [{"text": "a fox"}, {"text": "a dog"}])
    before = prepare(make_config(path))
    held = {"val_split": 1e-9, "eval_save_path": str(tmp_path / "held")}
    with pytest.raises(DataError, match=r"val_split: 1e-09 holds out no row of .*a.jsonl"):
        prepare_config(make_config(path, **held))
    assert read_manifest(tmp_path / "prepared") == before


def test_a_full_disk_is_told_by_its_list_too(tmp_path: Path) -> None:
    os.symlink("/dev/full", tmp_path / "refused.jsonl")
    with Refused(skip=True) as refused:
        refused.open(tmp_path)
        with pytest.raises(DataError, match="the disk is full"):
            refused.add(bad(number) for number in range(10_000))
    assert refused.file is None
