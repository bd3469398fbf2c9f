"""`vectorlm plan`: does it fit, how long does it take, and what would have to change? Floor 4.

Answers from the model's config.json alone, without torch; `--simulate` runs the real model on fake
tensors in a process of its own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from vectorlm.config.load import load_config
from vectorlm.config.schema import Config
from vectorlm.config.sweep import overrides_of, sweep_points
from vectorlm.errors import EXIT_OK, ConfigError
from vectorlm.plan import calibration, picture
from vectorlm.plan.changes import (
    Change,
    Patch,
    accumulation_for,
    compared,
    find_changes,
    largest_batch,
)
from vectorlm.plan.edit import apply
from vectorlm.plan.gpus import KNOWN, Gpu, find_gpu
from vectorlm.plan.measured import read_run
from vectorlm.plan.outlook import Outlook, counted, make_outlook, outlook_for
from vectorlm.plan.shapes import read_shape
from vectorlm.plan.simulated import Job, Simulated, simulate_apart

MOST_GPUS = 4096
MOST_POINTS = 64


@dataclass(frozen=True)
class Asked:
    """The configuration that is planned, and for what."""

    config: Config
    path: str
    overrides: Sequence[str]
    gpu: Gpu | None
    count: int | None


def plan(arguments: argparse.Namespace) -> int:
    gpu, count = parse_gpu(arguments.gpu)
    if arguments.calibrate:
        return _calibrate(arguments.calibrate, gpu)
    config, overrides, note = _heaviest(arguments.config, arguments.overrides, gpu, count)
    asked = Asked(config, arguments.config, overrides, gpu, count)
    console = Console(soft_wrap=False, highlight=False, markup=False)
    if note and not arguments.json:
        console.print(note)
    if arguments.find_batch:
        return _find_batch(asked, arguments.json, console)
    if arguments.compare:
        return _compare(asked, arguments.json, console)
    outlook = make_outlook(config, gpu, count)
    if arguments.apply is not None:
        return _apply(asked, outlook, arguments.apply)
    simulated = _simulate(config, outlook) if arguments.simulate else None
    helps = outlook.fits is not True and not outlook.obstacle
    changes = find_changes(config, outlook, gpu, count) if helps else []
    if arguments.json:
        values = [picture.change_values(change) for change in changes]
        more = {"simulated": picture.simulated_values(simulated)} if simulated else {}
        print(picture.to_json(outlook, changes=values, **more))
        return EXIT_OK
    picture.show(outlook, console)
    if simulated:
        picture.show_simulated(outlook, simulated, console)
    if helps and outlook.hardware.gpu:
        console.print()
        picture.show_changes(changes, console)
    return EXIT_OK


def parse_gpu(text: str | None) -> tuple[Gpu | None, int | None]:
    """`a100-80:4` -> (that GPU, 4)."""
    if text is None:
        return None, None
    name, colon, number = text.rpartition(":")
    if not colon:
        name, number = text, ""
    gpu = find_gpu(name)
    if gpu is None:
        raise ConfigError(
            f"plan --gpu: {name!r} is no GPU known here; known are {', '.join(KNOWN)}"
        )
    if not colon:
        return gpu, None
    if not number.isdecimal() or not 1 <= int(number) <= MOST_GPUS:
        raise ConfigError(
            f"plan --gpu: {number!r} is no number of GPUs; must be NAME or NAME:COUNT, such as "
            "a100-80:4"
        )
    return gpu, int(number)


def _heaviest(
    path: str, overrides: Sequence[str], gpu: Gpu | None, count: int | None
) -> tuple[Config, Sequence[str], str]:
    """The configuration; of a sweep, the run that needs most memory."""
    config = load_config(path, overrides)
    points = sweep_points(config)
    if not points:
        return config, overrides, ""
    runs = [[*overrides, *overrides_of(point)] for point in points[:MOST_POINTS]]
    configs = [load_config(path, run) for run in runs]
    needs = [make_outlook(run, gpu, count).needed_bytes for run in configs]
    worst = needs.index(max(needs))
    said = json.dumps(points[worst], ensure_ascii=False)
    seen = f"the first {MOST_POINTS} of " if len(points) > MOST_POINTS else ""
    runs_said = f"a sweep of {counted(len(points), 'run')}; of {seen}them"
    note = f"{runs_said} this one needs most memory: {said}"
    return configs[worst], runs[worst], note


# --- what else can be asked for -------------------------------------------------------------------


def _find_batch(asked: Asked, as_json: bool, console: Console) -> int:
    rows, outlook = largest_batch(asked.config, asked.gpu, asked.count)
    times = accumulation_for(asked.config, max(rows, 1))
    if as_json:
        found = {"largest_micro_batch": rows, "gradient_accumulation_steps": times}
        print(picture.to_json(outlook, **found))
        return EXIT_OK
    if outlook.capacity_bytes is None:
        console.print(f"The largest micro-batch is not known: {outlook.why_open}", soft_wrap=True)
    elif not rows:
        console.print("Not even a micro-batch of one row fits for sure.")
        picture.show(outlook, console)
    else:
        console.print(
            f"The largest micro-batch that fits has {counted(rows, 'row')}: "
            f"dataset.train_bs: {rows}, train_parameters.gradient_accumulation_steps: {times}"
            f"{_compared(asked, outlook)}",
            soft_wrap=True,
        )
        picture.show(outlook, console)
    return EXIT_OK


def _compared(asked: Asked, then: Outlook) -> str:
    """What a larger micro-batch changes beside memory."""
    now = make_outlook(asked.config, asked.gpu, asked.count)
    said = ""
    if now.tokens_per_step != then.tokens_per_step:
        said += f". A step then has {then.tokens_per_step:,} tokens, and now "
        said += f"{now.tokens_per_step:,}: mind the learning rate"
    if now.seconds_per_step and then.seconds_per_step:
        before = now.tokens_per_step / now.seconds_per_step
        gain = then.tokens_per_step / then.seconds_per_step / before - 1
        said += (
            f". Tokens a second: {gain:+.0%}" if abs(gain) >= 0.005 else ". As many tokens a second"
        )
    return said


def _compare(asked: Asked, as_json: bool, console: Console) -> int:
    rows = list(compared(asked.config, asked.gpu, asked.count))
    if as_json:
        values = [{"strategy": name, **json.loads(picture.to_json(o))} for name, o in rows]
        print(json.dumps(values, indent=1))
    else:
        picture.show_comparison(rows, console)
    return EXIT_OK


def _apply(asked: Asked, outlook: Outlook, number: int) -> int:
    if outlook.fits:
        raise ConfigError("plan --apply: the run fits, so there is nothing to apply")
    changes = find_changes(asked.config, outlook, asked.gpu, asked.count)
    if not 1 <= number <= len(changes):
        raise ConfigError(
            f"plan --apply: there is no change {number}; `vectorlm plan` lists {len(changes)}"
        )
    change: Change = changes[number - 1]
    patch: Patch = change.patch
    if not patch:
        raise ConfigError(
            f"plan --apply: {change.title} is nothing that the file says; start the run on more "
            "GPUs, or give it a section slurm"
        )
    apply(asked.path, asked.overrides, patch)
    ranks = change.outlook.hardware.ranks
    more = ranks > outlook.hardware.ranks and asked.config.slurm is None
    print(f"{asked.path}: {change.words}" + (f"; and start it on {ranks} GPUs" if more else ""))
    return EXIT_OK


def _simulate(config: Config, outlook: Outlook) -> Simulated:
    hardware = outlook.hardware
    capability = (8, 0) if hardware.gpu is None or hardware.gpu.has_bf16 else (7, 0)
    return simulate_apart(Job(config, hardware.ranks, hardware.ranks_per_node, capability))


def _calibrate(folder: str, gpu: Gpu | None) -> int:
    run = read_run(Path(folder), gpu)
    gpu = run.hardware.gpu
    assert gpu
    rows = run.config.dataset.train_bs if run.config.dataset else 1
    planned = outlook_for(
        run.config, read_shape(run.config.model), run.hardware, rows, corrects=False
    )
    name = str(Path(folder).resolve())
    ratio = calibration.record(gpu, name, planned.peak_bytes, run.peak_bytes)
    print(
        f"{gpu.name}: {run.peak_bytes / 2**30:.2f} GiB measured, {planned.peak_bytes / 2**30:.2f} "
        f"GiB planned ({ratio - 1:+.1%}); plans for {gpu.name} are corrected by "
        f"{(calibration.correction(gpu) or 1) - 1:+.1%} from now on"
    )
    return EXIT_OK
