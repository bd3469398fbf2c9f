"""How fast training is where the link between two nodes is slow, and how much crosses that link.

    python benchmarks/slow_link.py [--write]      as root, where there are Slurm and tc

Two nodes of two ranks train a random Llama: a real Slurm, from tests/slurm, and the job script that
`vectorlm submit` writes. No part of VectorLM knows of it. A new line in metrics.jsonl is the end of
a step, and at that moment the byte counters of the nodes' networks are read.

In every round each job has its turn at every speed while Slurm suspends the others, so what else
goes on on the machine strikes all of them alike.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.paper import ROOT, arguments, circumstances, say, spread, write
from tests.slurm.lab import ENDED, Lab, missing

COMMAND = "python benchmarks/slow_link.py"

NODES, RANKS_A_NODE = 2, 2
RANKS = NODES * RANKS_A_NODE
ROUNDS = 3
TOKENS = 64  # in a row; one row is a micro-batch of a rank
STEPS = {1: 4, 8: 1}  # that are measured in a turn at each speed, by accumulation
UNLIMITED = "40gbit"
SPEEDS = {"unlimited": UNLIMITED, "1 Gb/s": "1gbit", "200 Mb/s": "200mbit"}
MAX_DEVIATION = 0.03
POLL_S = 0.003
START_S, STEP_S = 180.0, 180.0  # limits for waiting


# --- theory ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    strategy: str
    accumulation: int

    def __str__(self) -> str:
        return f"{self.strategy}, accumulation {self.accumulation}"

    def theory(self, model: Model) -> float:
        return step_bytes(model, self.strategy, self.accumulation)


SETTINGS = tuple(
    Setting(strategy, accumulation)
    for strategy in ("FULL_SHARD", "HYBRID_SHARD")
    for accumulation in STEPS
)
NAIVE, BEST = SETTINGS[0], SETTINGS[-1]


def step_bytes(model: Model, strategy: str, micro_batches: int) -> float:
    """What a node sends to the other in an optimizer step, in 32 bits.

    Rings: of all ranks, only the last of a node sends to the other node; of two ranks on two nodes,
    both do. FSDP gathers each block in the forward and again in the backward pass, and what is
    in no block once for both.
    """
    if strategy == "HYBRID_SHARD":  # inside a node nothing crosses the link
        return RANKS_A_NODE * _all_reduce(model.bytes / RANKS_A_NODE, NODES)
    gathered = _all_gather(2 * model.bytes - model.root_bytes, RANKS)
    return micro_batches * (gathered + _reduce_scatter(model.bytes, RANKS))


def _all_gather(size: float, ranks: int) -> float:
    """What a rank sends; `size` is that of the result."""
    return size * (ranks - 1) / ranks


def _all_reduce(size: float, ranks: int) -> float:
    return 2 * size * (ranks - 1) / ranks


def _reduce_scatter(size: float, ranks: int) -> float:
    """Gloo has none: torch does an all-reduce and keeps a part. NCCL's sends half of this."""
    return _all_reduce(size, ranks)


# --- what is trained ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    folder: Path
    parameters: int
    in_blocks: int  # of these parameters

    @property
    def bytes(self) -> int:
        return 4 * self.parameters

    @property
    def root_bytes(self) -> int:
        return 4 * (self.parameters - self.in_blocks)


def make_model(folder: Path, **shape: int) -> Model:
    """A random Llama, about 8 million parameters unless said. All its tensors can be cut in four,
    so nothing is padded.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    from tests.tiny import BOS, EOS, SEED, tiny_tokenizer

    logging.disable_progress_bar()
    usual = {"hidden_size": 256, "intermediate_size": 896, "num_hidden_layers": 8}
    config = LlamaConfig(
        vocab_size=1024,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=BOS,
        eos_token_id=EOS,
        **{**usual, **shape},
    )
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(config)
    assert all(parameter.shape[0] % RANKS == 0 for parameter in model.parameters())
    model.save_pretrained(folder)
    in_all = sum(p.numel() for p in model.parameters())
    in_blocks = sum(p.numel() for p in model.model.layers.parameters())
    return Model(tiny_tokenizer(folder), in_all, in_blocks)


def make_rows(folder: Path, model: Model, rows: int) -> Path:
    import numpy as np

    from tests.tiny import VOCABULARY, write_rows
    from vectorlm.data.tokenize import load_tokenizer

    numbers = np.random.default_rng(0).integers(3, VOCABULARY, (rows, TOKENS)).tolist()
    fingerprint = load_tokenizer(str(model.folder)).sha256
    return write_rows(folder, [[row] for row in numbers], TOKENS, tokenizer_sha256=fingerprint)


def make_config(
    folder: Path, model: Model, data: Path, setting: Setting, epochs: int
) -> dict[str, Any]:
    return {
        "model": str(model.folder),
        "train_parameters": {
            "output_dir": str(folder / "output"),
            "max_seq_len": TOKENS,
            "epochs": epochs,
            "sharding_strategy": setting.strategy,  # HYBRID_SHARD: a copy in each node
            "gradient_accumulation_steps": setting.accumulation,
            "logging_steps": 1,
            "checkpointing_enabled": False,
            "lr_scheduler_type": "constant",
        },
        "dataset": {"train_ds": str(data), "train_bs": 1},
        "slurm": {
            "nodes": NODES,
            "gpus_per_node": 0,
            "processes_per_node": RANKS_A_NODE,
            "cpus_per_gpu": 1,
            "mem": "1900M",
            "time": "00:30:00",
            "requeue": False,
        },
    }


# --- what is measured -----------------------------------------------------------------------------


class Odometer:
    """The bytes that every node has received from its network so far.

    What a node sent counts double where the link dropped a packet; what arrived has crossed it.
    """

    def __init__(self, lab: Lab) -> None:
        self._counters = [self._of_node(lab, node) for node in lab.nodes]

    @staticmethod
    def _of_node(lab: Lab, node: str) -> Path:
        holder = (lab.folder / "run" / f"node.{node}.pid").read_text(encoding="utf-8").strip()
        first = Path(f"/proc/{holder}/task/{holder}/children").read_text().split()[0]
        return Path(f"/proc/{first}/net/dev")

    def read(self) -> float:
        """The mean of the nodes."""
        return mean(self._received(path.read_text()) for path in self._counters)

    @staticmethod
    def _received(text: str) -> int:
        found = re.search(r"^\s*eth0:\s*(\d+)", text, re.M)
        assert found, text
        return int(found[1])


@dataclass(frozen=True)
class StepEnd:
    step: int
    received: float


@dataclass(frozen=True)
class Window:
    """Some steps of a job, one after the other."""

    steps: int
    tokens_s: float  # by the trainer's own clock
    step_bytes: float  # that cross the link in each direction


class Job:
    """A training job, watched from outside."""

    def __init__(self, lab: Lab, folder: Path, config: dict[str, Any]) -> None:
        from vectorlm.cluster.script import render
        from vectorlm.config.load import load_config

        folder.mkdir(parents=True)
        path, script = folder / "config.yaml", folder / "job.sh"
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        script.write_text(render(load_config(path), str(path)), encoding="utf-8")
        self.lab, self._log = lab, folder / "output" / "metrics.jsonl"
        self._odometer = Odometer(lab)
        self.id = lab.sbatch(f"--output={folder}/log", script, cwd=ROOT)

    def end_of(self, step: int, limit_s: float = STEP_S) -> StepEnd:
        """Wait for the end of that step; of a later one, if that has ended meanwhile."""
        deadline = time.monotonic() + limit_s
        look_after = time.monotonic() + 5
        while (done := self.steps_done()) < step:
            now = time.monotonic()
            if now > look_after:
                look_after = now + 5
                assert self.lab.state(self.id) not in ENDED, self.lab.account(self.id)
            assert now < deadline, f"no step {step} in {limit_s} s: {self.lab.account(self.id)}"
            time.sleep(POLL_S)
        return StepEnd(done, self._odometer.read())

    def steps_done(self) -> int:
        try:
            return self._log.read_bytes().count(b"\n")
        except FileNotFoundError:
            return 0

    def window(self, first: StepEnd, last: StepEnd) -> Window:
        """The steps after the one until the other."""
        lines = self._log.read_text(encoding="utf-8").splitlines()[first.step - 1 : last.step]
        before, *steps = map(json.loads, lines)
        return Window(
            len(steps),
            (steps[-1]["tokens"] - before["tokens"]) / sum(step["seconds"] for step in steps),
            (last.received - first.received) / len(steps),
        )

    def suspend(self) -> None:
        self.lab.run("scontrol", "suspend", self.id)

    def resume(self) -> None:
        self.lab.run("scontrol", "resume", self.id)


def start_jobs(lab: Lab, folder: Path, model: Model) -> dict[Setting, Job]:
    """Each job past its first step, in which connections are made, and suspended."""
    data = make_rows(folder / "data", model, rows=RANKS * max(s.accumulation for s in SETTINGS))
    jobs = {}
    for setting in SETTINGS:
        place = folder / f"{setting.strategy}-{setting.accumulation}"
        config = make_config(place, model, data, setting, epochs=10_000)
        job = jobs[setting] = Job(lab, place, config)
        job.end_of(1, START_S)
        job.suspend()
        say(f"{setting}: started")
    return jobs


def take_turn(lab: Lab, job: Job, steps: int) -> dict[str, Window]:
    lab.limit(UNLIMITED)
    job.resume()
    windows = {}
    first = job.end_of(job.steps_done() + 1)  # suspending cut into this step
    for speed, rate in SPEEDS.items():
        lab.limit(rate)  # takes some 0.05 s of a step that has just begun
        last = job.end_of(first.step + steps)
        windows[speed] = job.window(first, last)
        first = last
    job.suspend()
    return windows


def measure(lab: Lab, jobs: dict[Setting, Job]) -> list[dict[Setting, dict[str, Window]]]:
    rounds = []
    for number in range(1, ROUNDS + 1):
        rounds.append({s: take_turn(lab, job, STEPS[s.accumulation]) for s, job in jobs.items()})
        for setting, windows in rounds[-1].items():
            rates = ", ".join(f"{speed} {w.tokens_s:.0f}" for speed, w in windows.items())
            say(f"round {number}, {setting}, tokens/s: {rates}")
    return rounds


# --- what is told ---------------------------------------------------------------------------------

Rounds = Sequence[dict[Setting, dict[str, Window]]]


def counted(rounds: Rounds, setting: Setting) -> list[float]:
    """The bytes of a step, in every window of all speeds."""
    return [w.step_bytes for turn in rounds for w in turn[setting].values()]


def table(rounds: Rounds, model: Model) -> str:
    speeds = " | ".join(SPEEDS)
    lines = [
        f"| | accumulation | MB a step | theory | furthest off | {speeds} |",
        "|---|---|---|---|---|" + "---|" * len(SPEEDS),
    ]
    for setting in SETTINGS:
        theory, found = setting.theory(model), counted(rounds, setting)
        furthest = max((n / theory - 1 for n in found), key=abs)
        cells = [f"`{setting.strategy}`", str(setting.accumulation)]
        cells += [f"{median(found) / 1e6:.1f}", f"{theory / 1e6:.1f}", f"{furthest:+.1%}"]
        for speed in SPEEDS:
            cells.append(spread([turn[setting][speed].tokens_s for turn in rounds], ".0f"))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def ratios(rounds: Rounds) -> str:
    lines = [
        f"From `{NAIVE.strategy}` with accumulation {NAIVE.accumulation} to `{BEST.strategy}` with "
        f"{BEST.accumulation}, tokens a second rise by a factor of",
        "",
    ]
    for speed in SPEEDS:
        found = [turn[BEST][speed].tokens_s / turn[NAIVE][speed].tokens_s for turn in rounds]
        lines.append(f"- {speed}: **{spread(found, '.1f')}**")
    return "\n".join(lines)


def about(lab: Lab, model: Model, load: float) -> str:
    slurm = lab.run("sinfo", "--version").stdout.split()[-1]
    return circumstances(
        COMMAND,
        load,
        ("vectorlm", "torch", "transformers"),
        f"Slurm {slurm}; gloo; the cores are for all {RANKS} ranks. A Llama of "
        f"{model.parameters:,} parameters in 32 bits; a micro-batch of a rank is one row of "
        f"{TOKENS} tokens. MB a step: what crosses the link in each direction. The last "
        f"{len(SPEEDS)} columns are tokens a second of all ranks: the median of {ROUNDS} rounds "
        "(least-most).",
    )


def main(argv: Sequence[str] | None = None) -> int:
    writes = arguments(COMMAND, __doc__).parse_args(argv).write
    reason = missing()
    if reason:
        print(reason, file=sys.stderr)
        return 2
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="vectorlm-slow-link-") as name:
        lab = Lab(networks=True)
        lab.env["TMPDIR"] = name  # what the jobs leave behind goes with it
        try:
            model = make_model(Path(name) / "model")
            rounds = measure(lab, start_jobs(lab, Path(name), model))
            told = [about(lab, model, load), table(rounds, model), ratios(rounds)]
        finally:
            lab.close()
    text = "\n\n".join(told)
    print(text)
    if writes:
        write(COMMAND, text)
    return 0 if _as_theory_says(rounds, model) else 1


def _as_theory_says(rounds: Rounds, model: Model) -> bool:
    wrong = [
        setting
        for setting in SETTINGS
        if abs(median(counted(rounds, setting)) / setting.theory(model) - 1) > MAX_DEVIATION
    ]
    for setting in wrong:
        say(f"{setting}: the bytes are more than {MAX_DEVIATION:.0%} off the theory")
    return not wrong


if __name__ == "__main__":
    sys.exit(main())
