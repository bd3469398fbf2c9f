"""How tokens a second grow with ranks, and what accumulation saves, through the real trainer.

    python benchmarks/scaling.py [--write] [--rounds 5]

A rank has one thread and micro-batches of one row, so its work is the same however many there are.
All runs are started; in every round each has its turn while the others are stopped, so what else
goes on on the machine strikes all alike. Times are those that the runs log of their own steps.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.contenders import Run, begin_stopped, vectorlm
from benchmarks.paper import arguments, circumstances, say, spread, write
from benchmarks.subject import make_model, make_rows, whole_vocabulary

COMMAND = "python benchmarks/scaling.py"
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 4096,
}
PARAMETERS = "4.2 million"
LENGTH = 128
MOST_RANKS = 4
ACCUMULATIONS = (1, 2, 4, 8, 16)
FEW, MANY = ACCUMULATIONS[0], ACCUMULATIONS[-1]


@dataclass(frozen=True)
class Setting:
    ranks: int
    strategy: str
    accumulation: int

    def __str__(self) -> str:
        ranks = f"{self.ranks} rank{'s' * (self.ranks > 1)}"
        return f"{ranks}, {self.strategy}, accumulation {self.accumulation}"


@dataclass(frozen=True)
class Turn:
    """Tokens a second of all ranks, and the seconds of a step."""

    tokens_s: float
    step_s: float


Turns = dict[Setting, list[Turn]]


def replicating(ranks: int) -> str:
    """The strategy with copies: each rank has one, or each pair of four."""
    return "HYBRID_SHARD" if ranks > 2 else "NO_SHARD"


def settings(counts: Sequence[int]) -> list[Setting]:
    """Every number of ranks with the least and the most accumulation; the largest with all."""
    found = [Setting(1, "FULL_SHARD", accumulation) for accumulation in (FEW, MANY)]
    for ranks in sorted(set(counts) - {1}):
        for strategy in ("FULL_SHARD", replicating(ranks)):
            swept = ACCUMULATIONS if ranks == max(counts) else (FEW, MANY)
            found += [Setting(ranks, strategy, accumulation) for accumulation in swept]
    return found


# --- measuring ------------------------------------------------------------------------------------


def start(setting: Setting, model: Path, data: Path, folder: Path) -> Run:
    folder.mkdir()
    config = {
        "model": str(model),
        "train_parameters": {
            "output_dir": str(folder / "out"),
            "max_seq_len": LENGTH,
            "epochs": 100_000,
            "precision": "32-true",
            "sharding_strategy": setting.strategy,
            "gradient_accumulation_steps": setting.accumulation,
            "logging_steps": 1,
            "checkpointing_enabled": False,
            "lr_scheduler_type": "constant",
        },
        "dataset": {"train_ds": str(data)},
    }
    if setting.strategy == "HYBRID_SHARD":
        config["train_parameters"]["shard_group_size"] = 2  # type: ignore[index]
    command = vectorlm(config, folder, setting.ranks)
    return begin_stopped(str(setting), command, folder, threads=1)


def take_turn(run: Run, setting: Setting) -> Turn:
    """As many micro-batches in every setting."""
    lines = run.take_turn(MANY // setting.accumulation)
    seconds = sum(line["seconds"] for line in lines)
    tokens = setting.ranks * setting.accumulation * LENGTH * len(lines)
    return Turn(tokens / seconds, seconds / len(lines))


def measure(counts: Sequence[int], rounds: int, folder: Path) -> tuple[Turns, float]:
    """What each turn gave, and the memory of the largest rank in GiB."""
    model = make_model(folder / "model", **SHAPE)
    whole_vocabulary(model, SHAPE["vocab_size"])
    rows = max(counts) * MANY
    data = make_rows(folder / "data", model, rows, LENGTH, SHAPE["vocab_size"])
    runs: dict[Setting, Run] = {}
    turns: Turns = {setting: [] for setting in settings(counts)}
    try:
        for number, setting in enumerate(turns):
            runs[setting] = start(setting, model, data, folder / str(number))
            say(f"{setting}: started")
        for turn in range(1, rounds + 1):
            for setting, run in runs.items():
                turns[setting].append(take_turn(run, setting))
                rate = turns[setting][-1].tokens_s
                say(f"round {turn}, {setting}: {rate:,.0f} tokens/s")
    finally:
        for run in runs.values():
            run.end()
    return turns, max(run.memory_gib for run in runs.values())


# --- what is told ---------------------------------------------------------------------------------


def weak(turns: Turns) -> str:
    lines = [
        "| ranks | strategy | accumulation | tokens a second of all | of ranks x one rank's |",
        "|---|---|---|---|---|",
    ]
    for setting, taken in turns.items():
        if setting.accumulation not in (FEW, MANY):
            continue
        alone = turns[Setting(1, "FULL_SHARD", setting.accumulation)]
        shares = [
            own.tokens_s / one.tokens_s / setting.ranks
            for own, one in zip(taken, alone, strict=True)
        ]
        strategy = "" if setting.ranks == 1 else f"`{setting.strategy}`"
        share = "" if setting.ranks == 1 else spread(shares, ".0%")
        rates = spread([turn.tokens_s for turn in taken], ",.0f")
        lines.append(
            f"| {setting.ranks} | {strategy} | {setting.accumulation} | {rates} | {share} |"
        )
    return "\n".join(lines)


def accumulated(turns: Turns, ranks: int) -> str:
    found = [setting for setting in turns if setting.ranks == ranks]
    strategies = list(dict.fromkeys(setting.strategy for setting in found))
    lines = [
        f"{ranks} ranks, by accumulation:",
        "",
        "| | " + " | ".join(map(str, ACCUMULATIONS)) + " |",
        "|---|" + "---|" * len(ACCUMULATIONS),
    ]
    for strategy in strategies:
        sweep = [turns[Setting(ranks, strategy, a)] for a in ACCUMULATIONS]
        rates = [spread([turn.tokens_s for turn in taken], ",.0f") for taken in sweep]
        steps = [spread([1000 * turn.step_s for turn in taken], ",.0f") for taken in sweep]
        lines.append(f"| `{strategy}`, tokens a second | {' | '.join(rates)} |")
        lines.append(f"| `{strategy}`, a step, ms | {' | '.join(steps)} |")
    lines += ["", "A step's parts, from the shortest and the longest:", ""]
    for strategy in strategies:
        micro, beside = parts(turns, ranks, strategy)
        lines.append(
            f"- `{strategy}`: {spread(micro, ',.0f')} ms a micro-batch, and "
            f"{spread(beside, ',.0f')} ms beside them"
        )
    return "\n".join(lines)


def parts(turns: Turns, ranks: int, strategy: str) -> tuple[list[float], list[float]]:
    """Milliseconds of a micro-batch, and of a step beside its micro-batches, by rounds: what is
    left if a step is a line over its accumulation.
    """
    few, many = (turns[Setting(ranks, strategy, a)] for a in (FEW, MANY))
    pairs = [(1000 * f.step_s, 1000 * m.step_s) for f, m in zip(few, many, strict=True)]
    micro = [(long - short) / (MANY - FEW) for short, long in pairs]
    return micro, [short - FEW * m for (short, _), m in zip(pairs, micro, strict=True)]


def about(counts: Sequence[int], rounds: int, load: float, memory_gib: float) -> str:
    told: list[Any] = [
        f"A Llama of {PARAMETERS} parameters in 32 bits; one thread a rank, gloo; a micro-batch "
        f"is one row of {LENGTH} tokens, and a turn has {MANY} of them.",
        f"The median of {rounds} rounds (least-most); a share is of the same round.",
        f"A rank takes at most {memory_gib:.2f} GiB.",
    ]
    if max(counts) < MOST_RANKS:
        told.append(f"{MOST_RANKS} ranks would need as many cores.")
    return circumstances(COMMAND, load, ("vectorlm", "torch", "transformers"), " ".join(told))


def main(argv: Sequence[str] | None = None) -> int:
    cores = len(os.sched_getaffinity(0))
    counts = [ranks for ranks in (1, 2, MOST_RANKS) if ranks <= max(cores, 2)]
    parser = arguments(COMMAND, __doc__)
    parser.add_argument("--rounds", type=int, default=5, help="of measuring, 5 unless told")
    given = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the runs end with this process
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="vectorlm-scaling-") as name:
        turns, memory_gib = measure(counts, given.rounds, Path(name))
    told = [about(counts, given.rounds, load, memory_gib)]
    told += [weak(turns), accumulated(turns, max(counts))]
    text = "\n\n".join(told)
    print(text)
    if given.write:
        write(COMMAND, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
