"""Conversations from end to end, through the command: files in, prepared folders out."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from subprocess import PIPE
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.chat.models import model_folder, said, source, user
from tests.data.conftest import MakeConfig
from tests.data.test_workers import is_gone
from vectorlm.cli import main
from vectorlm.config.schema import Config
from vectorlm.data.tokenize import load_tokenizer
from vectorlm.errors import DataError
from vectorlm.manifest import read_manifest
from vectorlm.preprocess import prepare_config

ROOT = Path(__file__).parents[3]
IGNORE = -100


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"), "chatml")


@pytest.fixture
def chat_config(make_config: MakeConfig, model: Path) -> MakeConfig:
    def make(load_path: Any, **options: Any) -> Config:
        return make_config(load_path, **{"model": model, "max_seq_len": 64} | options)

    return make


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def chats(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [
        {"messages": [user(f"Question {n}?"), said(f"Answer {n}.")]}
        for n in range(start, start + count)
    ]


def learned(folder: Path | str, model: Path) -> list[str]:
    """What is learned of each row, read."""
    backend = load_tokenizer(str(model)).backend
    rows = datasets.load_from_disk(str(folder))
    return [
        backend.decode([one for one in labels if one != IGNORE], skip_special_tokens=False)
        for labels in rows["labels"]
    ]


def test_the_command_prepares_conversations(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = jsonl(tmp_path / "chat.jsonl", chats(3))
    config = {
        "model": str(model),
        "train_parameters": {"output_dir": "out", "max_seq_len": 64},
        "dataset_preprocess": {
            "load_path": str(path),
            "save_path": str(tmp_path / "prepared"),
            "packing_type": "partial",
        },
    }
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    arguments = ["preprocess", "--config", str(tmp_path / "c.yaml")]
    assert main(arguments) == 0
    assert "rows of messages (by its columns messages)" in capsys.readouterr().out
    assert learned(tmp_path / "prepared", model) == [f"Answer {n}.<|im_end|>" for n in range(3)]
    options = read_manifest(tmp_path / "prepared").options
    assert (options["row_format"], options["learn"]) == ("messages", "assistant")
    assert main(arguments) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main([*arguments, "--set", "dataset_preprocess.learn=all"]) == 0
    assert "learn was 'assistant' and is 'all'" in capsys.readouterr().out


def write(kind: str, path: Path, rows: list[dict[str, Any]]) -> Path:
    if kind == "jsonl":
        return jsonl(path.with_suffix(".jsonl"), rows)
    if kind == "json":
        path.with_suffix(".json").write_text(json.dumps(rows))
        return path.with_suffix(".json")
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path.with_suffix(".parquet"))
        return path.with_suffix(".parquet")
    if kind == "csv":
        flat = [{key: json.dumps(value) for key, value in row.items()} for row in rows]
        datasets.Dataset.from_list(flat).to_csv(path.with_suffix(".csv"))
        return path.with_suffix(".csv")
    datasets.Dataset.from_list(rows).save_to_disk(path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "csv", "hf"])
def test_from_every_kind_of_file(
    kind: str, tmp_path: Path, chat_config: MakeConfig, model: Path
) -> None:
    rows = [{**row, "id": number} for number, row in enumerate(chats(3))]
    config = chat_config(write(kind, tmp_path / "chat", rows), packing_type="partial")
    prepare_config(config)
    assert learned(tmp_path / "prepared", model) == [f"Answer {n}.<|im_end|>" for n in range(3)]


ROWS: dict[str, dict[str, Any]] = {
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "alpaca": {"instruction": "a", "input": "", "output": "b"},
    "prompt_completion": {"prompt": [user("a")], "completion": "b"},
}


@pytest.mark.parametrize("row_format", ROWS)
@pytest.mark.parametrize("named", [False, True], ids=["found out", "named"])
def test_formats(
    row_format: str, named: bool, tmp_path: Path, chat_config: MakeConfig, model: Path
) -> None:
    path = jsonl(tmp_path / "c.jsonl", [ROWS[row_format]])
    prepare_config(chat_config(path, **({"dataset_format": row_format} if named else {})))
    assert learned(tmp_path / "prepared", model) == ["b<|im_end|>"]


def test_text_beside_conversations_stays_text_and_that_is_said(
    tmp_path: Path, chat_config: MakeConfig, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": "plain", **row} for row in chats(1)]
    config = chat_config(jsonl(tmp_path / "c.jsonl", rows))
    prepare_config(config)
    assert learned(tmp_path / "prepared", model) == ["plain</s>"]
    assert "set dataset_preprocess.dataset_format: messages" in capsys.readouterr().out


def test_a_template_by_path_is_part_of_what_was_used(
    tmp_path: Path, chat_config: MakeConfig, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = jsonl(tmp_path / "c.jsonl", chats(1))
    mine = tmp_path / "mine.jinja"
    mine.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}")
    config = chat_config(path, chat_template=str(mine))
    prepare_config(config)
    assert learned(tmp_path / "prepared", model) == ["Answer 0.</s>"]
    mine.write_text("{% for m in messages %}{{ m.role }}> {{ m.content }}</s>{% endfor %}")
    capsys.readouterr()
    prepare_config(config)
    assert "the text of chat_template is another" in capsys.readouterr().out


def test_a_bad_row_stops_or_is_counted(tmp_path: Path, chat_config: MakeConfig) -> None:
    rows = [*chats(1), {"messages": [user("a")]}, {"messages": [{"role": "x"}]}, *chats(1)]
    path = jsonl(tmp_path / "c.jsonl", rows)
    with pytest.raises(DataError, match=r"c.jsonl:2: no message is an assistant's, so there is"):
        prepare_config(chat_config(path))
    (made,) = prepare_config(chat_config(path, skip_bad_rows=True))
    assert made.skipped == {"nothing to learn": 1, "unknown role": 1}
    assert made.documents == 2


def test_what_is_cut_before_its_answer_is_counted(tmp_path: Path, chat_config: MakeConfig) -> None:
    rows = [*chats(1), {"messages": [user("long " * 100), said("b")]}]
    path = jsonl(tmp_path / "c.jsonl", rows)
    (made,) = prepare_config(chat_config(path, packing_type="truncate"))
    assert made.skipped == {"nothing to learn": 1}


def test_a_model_without_a_template_is_told(tmp_path: Path, make_config: MakeConfig) -> None:
    base = model_folder(tmp_path / "base", None)
    path = jsonl(tmp_path / "c.jsonl", chats(1))
    with pytest.raises(DataError, match="has no chat template"):
        prepare_config(make_config(path, model=base))


# --- several sources, and rows held out -----------------------------------------------------------


def test_sources_with_weights(tmp_path: Path, chat_config: MakeConfig, model: Path) -> None:
    entries = [
        {"load_path": str(jsonl(tmp_path / "a.jsonl", chats(40))), "weight": 0.5},
        {"load_path": str(jsonl(tmp_path / "b.jsonl", chats(20, 100))), "weight": 2},
        {"load_path": str(jsonl(tmp_path / "c.jsonl", chats(40, 200))), "weight": 1.25},
        {
            "load_path": str(jsonl(tmp_path / "d.jsonl", [{"body": "some text"}])),
            "data_field": "body",
        },
    ]
    config = chat_config("-", packing_type="partial")
    options = config.model_dump(exclude_defaults=True)
    options["dataset_preprocess"] |= {"datasets": entries}
    del options["dataset_preprocess"]["load_path"]
    config = Config.model_validate(options)
    (made,) = prepare_config(config)
    found = learned(tmp_path / "prepared", model)
    numbers = [int(one.split()[1].split(".")[0]) for one in found if one.startswith("Answer")]
    parts = [
        [n for n in numbers if low <= n < high] for low, high in ((0, 100), (100, 200), (200, 300))
    ]
    assert len(set(parts[0])) == len(parts[0])
    assert 10 < len(parts[0]) < 30
    assert sorted(parts[1]) == sorted([*range(100, 120)] * 2)
    assert set(parts[2]) == set(range(200, 240))
    assert 42 < len(parts[2]) < 60
    assert found[-1] == "some text</s>"
    assert [one["weight"] for one in made.options["sources"]] == [0.5, 2, 1.25, 1]
    (again,) = prepare_config(config)
    assert again == made


def test_a_weight_that_takes_nothing(tmp_path: Path, chat_config: MakeConfig) -> None:
    options = chat_config("-").model_dump(exclude_defaults=True)
    del options["dataset_preprocess"]["load_path"]
    path = str(jsonl(tmp_path / "a.jsonl", chats(3)))
    options["dataset_preprocess"]["datasets"] = [{"load_path": path, "weight": 1e-9}]
    with pytest.raises(DataError, match="its weight takes none of its rows"):
        prepare_config(Config.model_validate(options))


def test_what_is_odd_about_a_template_is_said_once(
    tmp_path: Path, chat_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine.jinja"
    mine.write_text(source("chatml").replace("<|im_end|>", "<|stop|>"))
    rows = [{"messages": [user("a"), said("b", "thought")]}] * 40
    config = chat_config(
        jsonl(tmp_path / "c.jsonl", rows + chats(300)),
        chat_template=str(mine),
        val_split=0.1,
        eval_save_path=str(tmp_path / "held"),
    )
    prepare_config(config)
    told = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert len(told) == 2
    assert "rows have thinking (reasoning_content) that the chat template does not write" in told[0]
    assert "writes <|stop|>, which this tokenizer does not know as one token" in told[1]


def test_rows_are_held_out_without_leaking(
    tmp_path: Path, chat_config: MakeConfig, model: Path
) -> None:
    rows = [{**row, "id": n} for n, row in enumerate(chats(300) + chats(300))]
    config = chat_config(
        jsonl(tmp_path / "c.jsonl", rows),
        packing_type="partial",
        val_split=0.1,
        eval_save_path=str(tmp_path / "held"),
    )
    train, held = prepare_config(config)
    sides = [learned(tmp_path / name, model) for name in ("prepared", "held")]
    assert len(sides[0]) + len(sides[1]) == 600
    assert not set(sides[0]) & set(sides[1])
    assert 30 < len(sides[1]) < 100
    assert (train.options["held_out"], held.options["held_out"]) == (False, True)
    other = config.model_dump(exclude_defaults=True)
    other["train_parameters"]["seed"] = 7
    prepare_config(Config.model_validate(other))
    assert set(learned(tmp_path / "held", model)) != set(sides[1])


# --- several processes ----------------------------------------------------------------------------


def mixed_rows(count: int) -> list[Any]:
    """Every tenth has no answer, every eleventh is none at all."""
    rows: list[Any] = chats(count)
    for number in range(0, count, 10):
        rows[number]["messages"].pop()
    for number in range(5, count, 11):
        rows[number] = {"body": "none"}
    return rows


def test_the_number_of_processes_changes_nothing(
    tmp_path: Path, chat_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = [
        {"load_path": str(jsonl(tmp_path / "a.jsonl", mixed_rows(700))), "weight": 1.5},
        {"load_path": str(jsonl(tmp_path / "b.jsonl", [{"text": str(n)} for n in range(50)]))},
        {"load_path": str(jsonl(tmp_path / "c.jsonl", chats(400, 1000)))},
    ]
    content = chat_config("-", packing_type="best_fit").model_dump(exclude_defaults=True)
    prepare = content["dataset_preprocess"]
    del prepare["load_path"]
    prepare |= {"datasets": entries, "skip_bad_rows": True, "dataset_format": "auto"}
    found = {}
    for workers in (1, 2, 3):
        prepare |= {"workers": workers, "save_path": str(tmp_path / f"w{workers}")}
        capsys.readouterr()
        prepare_config(Config.model_validate(content))
        told = capsys.readouterr().out.split("\n  skipped ")[1]
        told = told.replace(prepare["save_path"], "the folder")
        files = {one.name: one.read_bytes() for one in (tmp_path / f"w{workers}").iterdir()}
        found[workers] = (files, told)
    assert found[1] == found[2] == found[3]
    assert "a.jsonl:1: no message is an assistant's" in found[1][1]
    assert read_manifest(tmp_path / "w2").skipped == {"field absent": 64, "nothing to learn": 64}


def test_the_first_bad_row_stops_whoever_meets_it(tmp_path: Path, chat_config: MakeConfig) -> None:
    rows = chats(900)
    rows[700] = rows[850] = {"messages": []}
    config = chat_config(jsonl(tmp_path / "c.jsonl", rows), workers=3)
    with pytest.raises(DataError, match=r"c.jsonl:701: the conversation has no messages"):
        prepare_config(config)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["c.jsonl"]


FOREVER = (
    "{% if messages[0].content == 'Question 700?' %}{% for a in range(99999) %}"
    "{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
)


def test_an_interrupt_ends_all_of_it(tmp_path: Path, chat_config: MakeConfig, model: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text(FOREVER + source("chatml"))
    path = jsonl(tmp_path / "c.jsonl", chats(900))
    load_tokenizer(str(model))  # kept, so that nothing takes long but the template
    config = chat_config(path, workers=2, chat_template=str(template))
    command = [sys.executable, "-c", SHOWS_WORKERS, config.model_dump_json(exclude_defaults=True)]
    with subprocess.Popen(command, cwd=ROOT, stdout=PIPE, stderr=PIPE, text=True) as running:
        assert running.stdout
        try:
            shown = next(line for line in running.stdout if line.startswith("workers "))
            time.sleep(0.5)
            running.send_signal(signal.SIGINT)
            _, errors = running.communicate(timeout=20)
        finally:
            running.kill()
    assert "KeyboardInterrupt" in errors
    pids = [int(pid) for pid in shown.split()[1:]]
    assert len(pids) == 2
    assert all(map(is_gone, pids))


SHOWS_WORKERS = """\
import sys, threading, time
from vectorlm import preprocess
from vectorlm.config.schema import Config
from vectorlm.data import workers
made = []
class Shown(workers.Workers):
    def __init__(self, *given):
        super().__init__(*given)
        made.append(self)
preprocess.Workers = Shown
def show():
    while not made or len(made[0].processes) < 2:
        time.sleep(0.01)
    print("workers", *[process.pid for process in made[0].processes], flush=True)
threading.Thread(target=show, daemon=True).start()
preprocess.prepare_config(Config.model_validate_json(sys.argv[1]))
"""


# --- interruptions --------------------------------------------------------------------------------

DIES = """\
import json, os, sys
from vectorlm import preprocess
from vectorlm.config.schema import Config
from vectorlm import readers
from vectorlm.data import mixture, store
config, batches = json.loads(sys.argv[1]), int(sys.argv[2])
readers.BATCH_BYTES = store.BATCH_TOKENS = 1 << 10
store.SHARD_BYTES = 1 << 14
encode, count = mixture.MixedEncoder.encode, 0
def counted(self, batch):
    global count
    count += 1
    if count == batches:
        os._exit(9)
    return encode(self, batch)
mixture.MixedEncoder.encode = counted
preprocess.prepare_config(Config.model_validate(config))
"""


def prepare_until(config: dict[str, Any], batches: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", DIES, json.dumps(config), str(batches)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_an_interrupted_run_is_gone_on_with(tmp_path: Path, chat_config: MakeConfig) -> None:
    some = [row for chat in chats(600) for row in ([chat, {"text": "x"}])]
    entries = [
        {"load_path": str(jsonl(tmp_path / "a.jsonl", some)), "weight": 1.5},
        {"load_path": str(jsonl(tmp_path / "b.jsonl", [{"text": "x"}, *chats(400)]))},
    ]
    entries[1]["dataset_format"] = "messages"
    content = chat_config("-", packing_type="partial").model_dump(exclude_defaults=True)
    prepare = content["dataset_preprocess"]
    del prepare["load_path"]
    prepare |= {"datasets": entries, "skip_bad_rows": True, "workers": 2}
    folders = {}
    for name, deaths in (("whole", []), ("broken", [40, 60])):
        prepare["save_path"] = str(tmp_path / name)
        for batches in deaths:
            assert prepare_until(content, batches).returncode == 9
        done = prepare_until(content, 0)
        assert (done.returncode, done.stderr) == (0, "")
        assert ("going on with an interrupted run" in done.stdout) == bool(deaths)
        folders[name] = {one.name: one.read_bytes() for one in (tmp_path / name).iterdir()}
    assert folders["whole"] == folders["broken"]
    assert read_manifest(tmp_path / "whole").skipped == {"field absent": 601}
