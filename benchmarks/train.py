"""How fast training is beside HF Trainer and TRL: the same model, the same documents, this machine.

    python benchmarks/train.py [--chat] [--write] [--rounds 3] [--ranks 1 2] [--precision fp32 bf16]

A contender is a run of its own that trains on and on; all are started, and in every round each has
its turn while the others are stopped, so what else goes on on the machine strikes all alike. A rate
is real tokens, padding not counted, over the seconds of whole steps. TRL has to be there:
pip install -c constraints.txt trl
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.contenders import Run, begin_stopped, vectorlm
from benchmarks.paper import ROOT, arguments, circumstances, say, spread, write
from benchmarks.subject import LENGTH, SHAPE, VOCABULARY, make_model, whole_vocabulary

COMMAND = "python benchmarks/train.py"
BATCH = 8  # rows or documents of all ranks
DOCUMENTS = 4000
SUPERVISED = 0.3  # of a chat's tokens
TURN_S = 10.0  # a turn is whole steps that take at least this

OURS = "VectorLM, best_fit"
ALL_LEARNED = "VectorLM, every token learned"
COPIES = "VectorLM, NO_SHARD"  # each rank holds the whole model, as with its peers
PEERS = {
    "HF Trainer, dynamic padding": "dynamic",
    "HF Trainer, packed": "packed",
    "TRL SFTTrainer, packed": "trl",
}
AIMS = {"HF Trainer, dynamic padding": 1.9, "HF Trainer, packed": 1.2, ALL_LEARNED: 1.3}


# --- what is trained --------------------------------------------------------------------


def make_documents(path: Path, learned: float) -> Path:
    """Log-normal lengths, 215 tokens on average; of each, the last part is learned."""
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(5.1, 0.8, DOCUMENTS), 16, LENGTH).astype(int)
    with open(path, "w", encoding="utf-8") as file:
        for length in lengths:
            ids = random.integers(3, VOCABULARY, length).tolist()
            prompt = round(length * (1 - learned))
            labels = [-100] * prompt + ids[prompt:]
            file.write(json.dumps({"input_ids": ids, "labels": labels}) + "\n")
    return path


# --- contenders -------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    ranks: int
    precision: str
    chat: bool

    def __str__(self) -> str:
        data = "chat data" if self.chat else "plain text"
        return f"{self.ranks} rank{'s' * (self.ranks > 1)}, {self.precision}, {data}"


class Subject(NamedTuple):
    model: Path
    documents: dict[bool, Path]  # of chats, or of plain text


def start(name: str, setting: Setting, subject: Subject, folder: Path) -> Run:
    folder.mkdir(parents=True)
    out = folder / "out"
    out.mkdir()
    if name in (OURS, ALL_LEARNED, COPIES):
        chat = setting.chat and name != ALL_LEARNED
        strategy = "NO_SHARD" if name == COPIES else "FULL_SHARD"
        command = ours(setting, subject.model, subject.documents[chat], folder, strategy)
    else:
        command = peer(PEERS[name], setting, subject.model, subject.documents[setting.chat], out)
    threads = max(len(os.sched_getaffinity(0)) // setting.ranks, 1)
    return begin_stopped(name, command, folder, threads)


def peer(which: str, setting: Setting, model: Path, documents: Path, out: Path) -> list[str]:
    command = [sys.executable]
    if setting.ranks > 1:
        command += ["-m", "torch.distributed.run", f"--nproc-per-node={setting.ranks}"]
        command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    command += [str(ROOT / "benchmarks" / "peers.py"), which, "--model", str(model)]
    command += ["--data", str(documents), "--out", str(out), "--precision", setting.precision]
    return [*command, "--batch", str(BATCH // setting.ranks), "--length", str(LENGTH)]


def ours(setting: Setting, model: Path, documents: Path, folder: Path, strategy: str) -> list[str]:
    config = {
        "model": str(model),
        "train_parameters": {
            "output_dir": str(folder / "out"),
            "max_seq_len": LENGTH,
            "epochs": 1000,
            "precision": {"fp32": "32-true", "bf16": "bf16-mixed"}[setting.precision],
            "logging_steps": 1,
            "checkpointing_enabled": False,
            "sharding_strategy": strategy,
            "optimizer": {"lr": 5e-5},
        },
        "dataset": {"train_ds": str(folder / "rows"), "train_bs": BATCH // setting.ranks},
        "dataset_preprocess": {
            "load_path": str(documents),
            "save_path": str(folder / "rows"),
            "dataset_format": "tokenized",
            "packing_type": "best_fit",
        },
    }
    command = vectorlm(config, folder, setting.ranks)
    prepare = [sys.executable, str(ROOT / "preprocess_data.py"), "--config", "config.yaml"]
    subprocess.run(prepare, check=True, stdout=subprocess.DEVNULL, cwd=folder)
    return command


# --- measuring and telling --------------------------------------------------------------


def contenders(setting: Setting) -> list[str]:
    """TRL, whose memory is large and who gains nothing from tokens that are not learned, takes part
    in plain text alone."""
    if setting.chat:
        return [OURS, ALL_LEARNED, *(name for name in PEERS if PEERS[name] != "trl")]
    own = [OURS, COPIES] if setting.ranks > 1 else [OURS]
    return [*own, *(name for name in PEERS if PEERS[name] != "trl" or find_spec("trl"))]


def measure(setting: Setting, subject: Subject, folder: Path, rounds: int) -> list[Run]:
    runs: list[Run] = []
    try:
        for number, name in enumerate(contenders(setting)):
            runs.append(start(name, setting, subject, folder / str(number)))
        for turn in range(rounds):
            for run in runs:
                run.take_turn(1, TURN_S)
            rates = ", ".join(f"{run.name} {run.rates[-1]:,.0f}" for run in runs)
            say(f"{setting}, round {turn + 1}: {rates} tokens/s")
    finally:
        for run in runs:
            run.end()
    return runs


def table(setting: Setting, runs: Sequence[Run]) -> str:
    mine = runs[0]
    lines = [
        f"{str(setting)[0].upper()}{str(setting)[1:]}:",
        "",
        "| | tokens a second | VectorLM's are times that | GiB a rank |",
        "|---|---|---|---|",
    ]
    for run in runs:
        ratios = [a / b for a, b in zip(mine.rates, run.rates, strict=True)]
        lines.append(
            f"| {run.name} | {spread(run.rates, ',.0f')} | {spread(ratios, '.2f')} "
            f"| {run.memory_gib:.2f} |"
        )
    return "\n".join(lines)


def failures(found: dict[Setting, list[Run]]) -> list[str]:
    wrong = []
    for setting, runs in found.items():
        mine, gains = runs[0], ratios_of(runs)
        for name, least in AIMS.items():
            least = least if setting.ranks == 1 or name == ALL_LEARNED else 1.0
            if gains.get(name, least) < least:
                wrong.append(f"{setting}: {gains[name]:.2f} times {name}, the aim is {least}")
        more = [run.name for run in runs[1:] if mine.memory_gib > run.memory_gib]
        if more:
            wrong.append(f"{setting}: more memory than {', '.join(more)}")
    return wrong


def ratios_of(runs: Sequence[Run]) -> dict[str, float]:
    return {
        run.name: median([a / b for a, b in zip(runs[0].rates, run.rates, strict=True)])
        for run in runs[1:]
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(COMMAND, __doc__)
    parser.add_argument("--rounds", type=int, default=3, help="of measuring, 3 unless told")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="how many of each")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), nargs="+", default=["fp32", "bf16"]
    )
    parser.add_argument("--chat", action="store_true", help="of few tokens learned, not of all")
    chosen = parser.parse_args(argv)
    command = f"{COMMAND} --chat" if chosen.chat else COMMAND
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the contenders end with this process
    load = os.getloadavg()[0]
    settings = [
        Setting(ranks, precision, chosen.chat)
        for ranks in chosen.ranks
        for precision in chosen.precision
    ]
    found: dict[Setting, list[Run]] = {}
    with tempfile.TemporaryDirectory(prefix="vectorlm-train-") as name:
        folder = Path(name)
        model = make_model(folder / "model")
        whole_vocabulary(model, VOCABULARY)
        documents = {
            chat: make_documents(folder / f"{chat}.jsonl", SUPERVISED if chat else 1.0)
            for chat in (False, True)
        }
        subject = Subject(model, documents)
        for number, setting in enumerate(settings):
            place = folder / f"setting-{number}"
            found[setting] = measure(setting, subject, place, chosen.rounds)
            shutil.rmtree(place)
    learned = f"; {SUPERVISED:.0%} of the tokens are learned" if chosen.chat else ""
    about = (
        f"A Llama of 35 M parameters (hidden size {SHAPE['hidden_size']}, "
        f"{SHAPE['num_hidden_layers']} layers, a vocabulary of {VOCABULARY:,}), documents "
        f"of 215 tokens on average and at most {LENGTH}, {BATCH} rows or documents a step, divided "
        f"among the ranks{learned}. A rate is the "
        f"median of {chosen.rounds} turns of whole steps, {TURN_S:.0f} s or more (least-most); GiB "
        "is a rank's largest resident memory."
    )
    packages = ("vectorlm", "torch", "transformers", *(["trl"] if find_spec("trl") else []))
    tables = [table(setting, runs) for setting, runs in found.items()]
    text = "\n\n".join([circumstances(command, load, packages, about), *tables])
    print(text)
    wrong = failures(found)
    for problem in wrong:
        say(problem)
    if chosen.write:
        write(command, text)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
