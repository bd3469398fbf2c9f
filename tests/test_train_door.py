"""The training door as a user meets it: mistakes are told once, with where, what and the cure.

The door is called in this process, on one rank; once as a command.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.tiny import MAX_POSITIONS, VOCABULARY, write_rows
from vectorlm import checkpoint
from vectorlm.config.load import load_config
from vectorlm.errors import EXIT_OK, EXIT_USER
from vectorlm.preprocess import prepare_config
from vectorlm.stop import STOP_SIGNALS
from vectorlm.train import main

ROOT = Path(__file__).resolve().parent.parent
MAX_SEQ_LEN = 32
ROWS = 8


def tokenizer_sha256(model: Path) -> str:
    from vectorlm.data.tokenize import load_tokenizer

    return load_tokenizer(str(model)).sha256


def make_rows(seed: int = 0, largest: int = VOCABULARY) -> list[list[list[int]]]:
    generator = np.random.default_rng(seed)
    return [[generator.integers(3, largest, 12).tolist()] for _ in range(ROWS)]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, model_folder: Any) -> dict[str, Path]:
    folder, model = tmp_path_factory.mktemp("door"), model_folder("llama", False)
    data = write_rows(
        folder / "data", make_rows(), MAX_SEQ_LEN, tokenizer_sha256=tokenizer_sha256(model)
    )
    return {"model": model, "data": data}


@pytest.fixture(autouse=True)
def unchanged_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The door takes over signals, and reads what a launcher would set."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Run:
    """A configuration on disk; `train(...)` and `dataset(...)` change what it says."""

    def __init__(self, folder: Path, shared: dict[str, Path]) -> None:
        self.file, self.folder, self.output = folder / "config.yaml", folder, folder / "output"
        self.content: dict[str, Any] = {
            "model": str(shared["model"]),
            "train_parameters": {
                "output_dir": str(self.output),
                "max_seq_len": MAX_SEQ_LEN,
                "gradient_accumulation_steps": 2,
                "optimizer": {"lr": 1e-3},
                "save_frequency": 1.0,
            },
            "dataset": {"train_ds": str(shared["data"])},
        }

    def model(self, folder: Path | str) -> Run:
        self.content["model"] = str(folder)
        return self

    def train(self, **changes: Any) -> Run:
        self.content["train_parameters"] |= changes
        return self

    def dataset(self, **changes: Any) -> Run:
        self.content["dataset"] |= changes
        return self

    def start(self) -> int:
        self.file.write_text(yaml.safe_dump(self.content))
        return main(["--config", str(self.file)])


@pytest.fixture
def run(tmp_path: Path, shared: dict[str, Path]) -> Run:
    return Run(tmp_path, shared)


def assert_told(run: Run, capfd: pytest.CaptureFixture[str], *said: Any) -> None:
    """Starting fails as a user's mistake, in one message that says all of `said`."""
    capfd.readouterr()
    assert run.start() == EXIT_USER
    shown = capfd.readouterr()
    message = shown.err.strip()
    for part in map(str, said):
        assert part in message, message
    assert message.count(message.splitlines()[0]) == 1
    assert len(message) < 700, message
    assert "Traceback" not in shown.out + shown.err
    assert message not in shown.out
    assert not (run.output / "final-model").exists() or checkpoint.newest(run.output)


# --- data ----------------------------------------------------------------------------


def test_missing_data(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    absent = run.folder / "nowhere"
    run.dataset(train_ds=str(absent))
    assert_told(run, capfd, absent, "no such folder", "vectorlm preprocess --config")


def test_missing_evaluation_data(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    absent = run.folder / "nowhere"
    run.dataset(eval_ds=str(absent))
    assert_told(run, capfd, absent, "no such folder", "vectorlm preprocess --config")


def test_a_model_folder_as_data(
    run: Run, shared: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    run.dataset(train_ds=str(shared["model"]))
    assert_told(run, capfd, shared["model"], "no manifest.json", "vectorlm preprocess")


def test_data_of_another_tokenizer(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    data = write_rows(run.folder / "data", make_rows(), MAX_SEQ_LEN)
    run.dataset(train_ds=str(data))
    said = (
        "prepared with another tokenizer than that of",
        run.content["model"],
        "prepare it again",
    )
    assert_told(run, capfd, data, *said)


def test_evaluation_data_of_another_tokenizer(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    data = write_rows(run.folder / "data", make_rows(), MAX_SEQ_LEN)
    run.dataset(eval_ds=str(data))
    assert_told(run, capfd, data, "another tokenizer")


def test_a_token_beyond_the_vocabulary(
    run: Run, shared: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    rows = [*make_rows(), [[5, VOCABULARY, 6]]]
    sha256 = tokenizer_sha256(shared["model"])
    data = write_rows(run.folder / "data", rows, MAX_SEQ_LEN, tokenizer_sha256=sha256)
    run.dataset(train_ds=str(data))
    said = (f"token {VOCABULARY}", f"vocabulary of {VOCABULARY}", "resize")
    assert_told(run, capfd, data, *said)


def test_data_that_the_file_would_not_make_now(
    run: Run, shared: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    texts = [{"text": "The quick brown fox jumps."}] * 40
    raw = run.folder / "raw.jsonl"
    raw.write_text("".join(json.dumps(row) + "\n" for row in texts))
    prepare = {"load_path": str(raw), "save_path": str(run.folder / "rows"), "packing_type": "full"}
    run.content["dataset_preprocess"] = prepare
    run.dataset(train_ds=prepare["save_path"])
    run.file.write_text(yaml.safe_dump(run.content))
    prepare_config(load_config(run.file))
    raw.unlink()  # training needs it no more
    prepare["packing_type"] = "partial"
    said = ("packing_type was 'full' and is 'partial'", "prepare it again, or set that back")
    assert_told(run, capfd, prepare["save_path"], *said)
    prepare["packing_type"] = "full"
    assert run.start() == EXIT_OK


def test_what_is_chosen_otherwise_is_said(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    run.train(async_checkpointing=False, precision="bf16-mixed", reduce_dtype="compute")
    run.dataset(group_by_length=True, longest_first=False)
    assert run.start() == EXIT_OK
    said = capfd.readouterr().out
    for line in ("async_checkpointing: false", "reduce_dtype: ", "group_by_length: ", "longest_f"):
        assert said.count(f"\n{line}") == 1, said
    assert "compile" not in said


def test_another_row_length(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    run.train(max_seq_len=16)
    said = ("max_seq_len 32", "says 16", "set it to 32, or prepare")
    assert_told(run, capfd, run.content["dataset"]["train_ds"], *said)


def test_more_positions_than_the_model_has(
    run: Run, shared: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    long, sha256 = MAX_POSITIONS + 1, tokenizer_sha256(shared["model"])
    data = write_rows(run.folder / "data", make_rows(), long, tokenizer_sha256=sha256)
    run.train(max_seq_len=long).dataset(train_ds=str(data))
    said = (f"{long} is more than the {MAX_POSITIONS} positions", f"at most {MAX_POSITIONS}")
    assert_told(run, capfd, "train_parameters.max_seq_len", *said, "prepare the data again")


# --- the model -----------------------------------------------------------------------


@pytest.fixture
def own_model(run: Run, shared: dict[str, Path]) -> Path:
    """A copy of the model, which the run uses."""
    folder = shutil.copytree(shared["model"], run.folder / "model")
    run.model(folder)
    return folder


@pytest.mark.parametrize("name", ["./models/llama-7b", "someone/llama-7b"])
def test_a_missing_model(run: Run, capfd: pytest.CaptureFixture[str], name: str) -> None:
    run.model(name)
    assert_told(run, capfd, "model", name, "folder")


def test_a_broken_config(run: Run, own_model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    os.truncate(own_model / "config.json", 40)
    assert_told(run, capfd, own_model, "config.json cannot be used")


def test_no_tokenizer(run: Run, own_model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for path in own_model.glob("tokenizer*"):
        path.unlink()
    assert_told(run, capfd, own_model, "tokenizer")


def test_an_incomplete_shard(run: Run, own_model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = own_model / "model.safetensors"
    os.truncate(path, path.stat().st_size // 2)
    assert_told(run, capfd, path, "cannot be read", "copy the model folder again")


# --- LoRA and the optimizer ----------------------------------------------------------


def test_targets_that_match_nothing(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    run.train(lora_peft_config={"r": 2, "target_modules": ["query_key_value"]})
    assert_told(run, capfd, "train_parameters.lora_peft_config", "query_key_value", "not found")


def test_an_unknown_lora_argument(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    run.train(lora_peft_config={"r": 2, "lora_alhpa": 4, "target_modules": ["q_proj"]})
    assert_told(run, capfd, "train_parameters.lora_peft_config", "lora_alhpa", "peft.LoraConfig")


def test_an_unknown_optimizer(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    run.train(optimizer={"name": "Adamw"})
    assert_told(run, capfd, "train_parameters.optimizer.name", "'Adamw'", "allowed", "AdamW")


def test_an_unknown_schedule_argument(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    run.train(lr_scheduler_kwargs={"cycles": 2})
    assert_told(run, capfd, "train_parameters.lr_scheduler_kwargs", "cosine", "cycles")


# --- where it writes -----------------------------------------------------------------


def test_a_file_in_place_of_the_output(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    run.output.write_text("")
    assert_told(run, capfd, run.output, "train_parameters.output_dir", "cannot be written")


# --- going on ------------------------------------------------------------------------


@pytest.fixture
def trained(run: Run) -> Run:
    """A run of one epoch that has ended, to be continued with a second."""
    assert run.start() == EXIT_OK
    assert run.train(epochs=2).start() == EXIT_OK
    assert json.loads((run.output / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 8
    return run.train(epochs=3)


def other_data(run: Run, shared: dict[str, Path]) -> Run:
    sha256 = tokenizer_sha256(shared["model"])
    data = write_rows(run.folder / "other", make_rows(1), MAX_SEQ_LEN, tokenizer_sha256=sha256)
    return run.dataset(train_ds=str(data))


def test_changes_are_refused_and_allowed_on_request(
    trained: Run, shared: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    """One run for all changes: each is put back before the next."""
    cure = ("use another output_dir", "train_parameters.resume_despite_changes: true")
    before = checkpoint.newest(trained.output)

    trained.train(seed=7)
    assert_told(trained, capfd, trained.output, "seed (was 42, is 7)", *cure)
    trained.train(seed=42)

    trained.train(precision="bf16-mixed")
    assert_told(trained, capfd, trained.output, "precision (was 32-true, is bf16-mixed)", *cure)
    trained.train(precision="32-true")

    data = trained.content["dataset"]["train_ds"]
    other_data(trained, shared)
    assert_told(trained, capfd, trained.output, "the training data", *cure)
    trained.dataset(train_ds=data)

    trained.dataset(train_bs=2)
    said = ("with 2 rows a step", "is 4 now", "dataset.train_bs", "gradient_accumulation_steps")
    assert_told(trained, capfd, trained.output, *said, cure[1])
    assert checkpoint.newest(trained.output) == before

    assert trained.train(resume_despite_changes=True, seed=7).start() == EXIT_OK
    newest = checkpoint.newest(trained.output)
    assert newest is not None
    state = checkpoint.read_state(newest)
    assert (state["global_batch"], state["epoch"], state["step"]) == (4, 3, 8 + 2)


def test_the_same_batch_otherwise_is_no_change(
    trained: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two rows a micro-batch instead of two micro-batches of one; and another job."""
    trained.content["slurm"] = {"job_name": "model", "time": 90}
    trained.content["sweep"] = {"runs": [{"model": "x"}], "metric": "loss"}
    capfd.readouterr()
    assert trained.train(gradient_accumulation_steps=1).dataset(train_bs=2).start() == EXIT_OK
    told = [line for line in capfd.readouterr().out.splitlines() if "changed since" in line]
    assert [line.split(": ")[1].split()[0] for line in told] == ["train_parameters.epochs"]


def test_another_models_checkpoint(
    trained: Run, model_folder: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    model = trained.content["model"]
    other = model_folder("qwen3", False)
    trained.model(other)
    assert_told(trained, capfd, trained.output, f"model (was {model}, is {other})")
    trained.train(resume_despite_changes=True)
    assert_told(trained, capfd, trained.output, "does not fit this run", "another model")


# --- as a command --------------------------------------------------------------------


def test_the_command(run: Run) -> None:
    """Exit code 2, and nothing but the message."""
    run.dataset(train_ds=str(run.folder / "nowhere"))
    run.file.write_text(yaml.safe_dump(run.content))
    command = [sys.executable, "-W", "error", "-m", "vectorlm.train", "--config", str(run.file)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == EXIT_USER
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        f"{run.folder / 'nowhere'}: there is no such folder of prepared data.",
        "Prepare it with: vectorlm preprocess --config <your config.yaml>",
    ]
