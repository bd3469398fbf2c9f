"""What the training loop costs beside forward, backward and optimizer of the same model.

    python benchmarks/loop_overhead.py [--write] [--rounds 40] [--precision 32-true bf16-mixed]

One process trains through `Trainer.fit`. Before each of its steps a bare step on the same batch
is timed: the same model, loss, clipping and optimizer, and nothing else. A step of the loop lasts
from its beginning until the next step's batches are there: reading, counting, agreeing, logging.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.paper import arguments, circumstances, say, spread, write

COMMAND = "python benchmarks/loop_overhead.py"
WARM_UP = 4
AIM = 1.03


def measure(precision: str, rounds: int) -> dict[str, list[float]]:
    import torch

    from benchmarks.subject import trainer

    def bare(group: Any) -> None:
        (batch,) = group.batches
        with made.model.micro_batch(batch, True, 1 / batch.supervised_tokens) as loss:
            (loss / batch.supervised_tokens).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        made.optimizer.step()
        made.optimizer.zero_grad(set_to_none=True)

    times: dict[str, list[float]] = {"loop": [], "bare": []}
    began: list[float] = []

    def step(group: Any) -> Any:
        entered = time.perf_counter()
        if began:
            times["loop"].append(entered - began.pop())
        bare(group)
        began.append(time.perf_counter())
        times["bare"].append(began[0] - entered)
        return loop_step(group)

    settings = {"precision": precision, "logging_steps": 10, "checkpointing_enabled": False}
    with tempfile.TemporaryDirectory() as folder:
        with trainer(Path(folder), WARM_UP + rounds + 1, **settings) as made:
            parameters = list(made.model.trainable().values())
            loop_step, made.step = made.step, step
            made.fit()
            made.metrics.close()
    return {name: values[WARM_UP : WARM_UP + rounds] for name, values in times.items()}


def in_a_process(precision: str, rounds: int) -> dict[str, list[float]]:
    command = [sys.executable, __file__, "--inside", precision, "--rounds", str(rounds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=3600)
    result: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return result


def table(results: dict[str, dict[str, list[float]]]) -> str:
    lines = [
        "| precision | bare step, ms | step of the loop, ms | loop over bare, median |",
        "|---|---|---|---|",
    ]
    for precision, times in results.items():
        loop, bare = ([1000 * value for value in times[name]] for name in ("loop", "bare"))
        ratio = median(a / b for a, b in zip(loop, bare, strict=True))
        lines.append(
            f"| `{precision}` | {spread(bare, '.0f')} | {spread(loop, '.0f')} | **{ratio:.3f}** |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(COMMAND, __doc__)
    parser.add_argument("--rounds", type=int, default=40, help="of measuring, 40 unless told")
    parser.add_argument("--precision", nargs="+", default=["32-true", "bf16-mixed"])
    parser.add_argument("--inside", help="the precision to measure in this process, as JSON")
    given = parser.parse_args(argv)
    if given.inside:
        print("\n" + json.dumps(measure(given.inside, given.rounds)), flush=True)
        os._exit(0)
    load = os.getloadavg()[0]
    results = {}
    for precision in given.precision:
        say(precision)
        results[precision] = in_a_process(precision, given.rounds)
    told = circumstances(
        COMMAND,
        load,
        ("vectorlm", "torch", "transformers"),
        f"One process; a Llama of 35 million parameters, rows of 512 tokens, one a step; "
        f"{given.rounds} pairs of steps. The median (least-most); the aim is {AIM}.",
    )
    text = f"{told}\n\n{table(results)}"
    print(text)
    if given.write:
        write(COMMAND, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
