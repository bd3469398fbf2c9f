"""How long training waits for a checkpoint: written while it waits, and in the background.

    python benchmarks/checkpoint_stall.py [--write] [--rounds 7]

One process, a model of 140 MB, a checkpoint of three times that. Each round: steps without a save,
a save that training waits for, and one in the background with steps beside it until it is complete.
What is written is compared: the files of tensors of both must have the same hashes.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.paper import arguments, circumstances, say, spread, write

COMMAND = "python benchmarks/checkpoint_stall.py"
AIM = 0.10
PLAIN_STEPS = 3


def measure(rounds: int) -> dict[str, Any]:
    from benchmarks.subject import trainer

    times: dict[str, list[float]] = {
        name: [] for name in ("waiting", "background", "written", "plain step", "step beside")
    }
    settings = {"logging_steps": 1_000_000, "keep_checkpoints": 3}
    with tempfile.TemporaryDirectory() as folder:
        with trainer(Path(folder), 2000, **settings) as made:
            groups = made.data.groups_to_the_end(made.steps, made.position)
            made.step(next(groups))
            made.saver.look(made.tensors)
            for number in range(rounds + 1):
                say(f"round {number} of {rounds}")
                one_round(made, groups, times)
            size = sum(path.stat().st_size for path in made.checkpoints.find().folder.iterdir())
    return {"bytes": size, **times}


def one_round(made: Any, groups: Any, times: dict[str, list[float]]) -> None:
    def step() -> float:
        return timed(lambda: made.step(next(groups)))

    times["plain step"].append(median(step() for _ in range(PLAIN_STEPS)))
    times["waiting"].append(timed(lambda: save(made, True)))
    waited = hashes(made)
    made.steps_done += 1
    began = time.perf_counter()
    times["background"].append(timed(lambda: save(made, False)))
    beside = []
    while made.saver._underway is not None:
        beside.append(step())
        made.saver.look(made.tensors)
    times["written"].append(time.perf_counter() - began)
    times["step beside"].append(median(beside))
    assert hashes(made) == waited, "a save in the background wrote something else"


def save(made: Any, wait: bool) -> None:
    made.saver.save(made.steps_done, made.tensors(), made.state(), wait)


def hashes(made: Any) -> dict[str, str]:
    manifest = json.loads((made.checkpoints.find().folder / "MANIFEST.json").read_text())
    return {n: e["sha256"] for n, e in manifest["files"].items() if n.endswith(".distcp")}


def timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def table(times: dict[str, Any]) -> str:
    first = times["background"][0]
    of = {name: values[1:] for name, values in times.items() if name != "bytes"}
    pairs = zip(of["background"], of["waiting"], strict=True)
    share = median(background / waiting for background, waiting in pairs)
    slower = median(b / p for b, p in zip(of["step beside"], of["plain step"], strict=True))
    return "\n".join(
        [
            f"A checkpoint of {times['bytes'] / 1e6:.0f} MB. Seconds:",
            "",
            "| | training waits | until it is complete |",
            "|---|---|---|",
            f"| `async_checkpointing: false` | {spread(of['waiting'], '.2f')} | the same |",
            f"| `async_checkpointing: true` | {spread(of['background'], '.3f')} | "
            f"{spread(of['written'], '.2f')} |",
            "",
            f"Training waits **{share:.1%}** as long (the aim is at most {AIM:.0%}); for the first "
            f"save of a run {first:.3f} s, as memory for the copy is new. While one is written, a "
            f"step takes {slower:.2f} times as long.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(COMMAND, __doc__)
    parser.add_argument("--rounds", type=int, default=7, help="of measuring, 7 unless told")
    given = parser.parse_args(argv)
    load = os.getloadavg()[0]
    times = measure(given.rounds)
    told = circumstances(
        COMMAND,
        load,
        ("vectorlm", "torch"),
        f"One process; a Llama of 35 million parameters in 32 bits with AdamW; {given.rounds} "
        "rounds, the median (least-most).",
    )
    text = f"{told}\n\n{table(times)}"
    print(text, flush=True)
    if given.write:
        write(COMMAND, text)
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # gloo's threads may abort an orderly exit
