"""An Outlook for people: a verdict, a bar of memory, tables. Floor 1, called by `plan_door`.

80 columns suffice; without a terminal there are neither colours nor anything but ASCII.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vectorlm.plan.changes import Change
from vectorlm.plan.gpus import GIB
from vectorlm.plan.memory import stage
from vectorlm.plan.outlook import CLOSE, Outlook, counted
from vectorlm.plan.simulated import Simulated

BAR = 60
MARGIN, FREE = "margin", "free"
# Each part's letter, where there are no colours, and its colour.
_LOOKS = {
    "parameters": ("P", "blue"),
    "gradients": ("G", "cyan"),
    "optimizer": ("O", "magenta"),
    "activations": ("A", "yellow"),
    "logits": ("L", "red"),
    "communication": ("C", "green"),
    "step": ("S", "bright_black"),
    MARGIN: ("m", "white"),
    FREE: (".", "bright_black"),
}
_WORDS = {
    "step": "the optimizer's temporaries",
    "logits": "logits and loss",
    "communication": "gathered weights, gradients on their way",
    MARGIN: "margin: CUDA, libraries, fragmentation",
}


def show(outlook: Outlook, console: Console) -> None:
    console.print(_title(outlook), soft_wrap=True)
    console.print(_verdict(outlook), soft_wrap=True)
    console.print()
    _memory(outlook, console)
    console.print()
    console.print(_facts(outlook))
    for note in outlook.notes:
        console.print(Text(f"note: {note}"), soft_wrap=True)


def show_changes(changes: Sequence[Change], console: Console) -> None:
    if not changes:
        console.print("No single change that is known here makes it fit.")
        return
    table = _table("#", "change", "GiB a GPU", "time a token", "fits")
    for number, change in enumerate(changes, 1):
        table.add_row(
            str(number),
            change.title,
            f"{gib(change.outlook.needed_bytes):.1f}",
            _share(change.slower),
            _answer(change.outlook),
        )
    console.print(table)
    for number, change in enumerate(changes, 1):
        console.print(Text(f"{number}  {change.words}"), soft_wrap=True)
    console.print("--apply N writes one into the file.")


def show_comparison(rows: Sequence[tuple[str, Outlook]], console: Console) -> None:
    table = _table("strategy", "GiB a GPU", "a step", "tokens/s", "fits")
    for name, outlook in rows:
        seconds, rate = outlook.seconds_per_step, outlook.tokens_per_second
        table.add_row(
            name,
            f"{gib(outlook.needed_bytes):.1f}",
            span(seconds) if seconds else "?",
            f"{rate:,.0f}" if rate else "?",
            _answer(outlook),
        )
    console.print(table)


def to_json(outlook: Outlook, **more: Any) -> str:
    hardware = outlook.hardware
    values = {
        "fits": outlook.fits,
        "why_open": outlook.why_open,
        "peak_gib": gib(outlook.peak_bytes),
        "breakdown_gib": {name: gib(size) for name, size in outlook.breakdown.items()},
        "moment": outlook.moment,
        "margin_gib": gib(outlook.margin_bytes),
        "needed_gib": gib(outlook.needed_bytes),
        "doubt_gib": gib(outlook.doubt_bytes),
        "capacity_gib": None if outlook.capacity_bytes is None else gib(outlook.capacity_bytes),
        "gpu": hardware.gpu.name if hardware.gpu else None,
        "ranks": hardware.ranks,
        "ranks_per_node": hardware.ranks_per_node,
        "micro_batch": outlook.micro_batch,
        "attention": outlook.kernel,
        "parameters": outlook.parameters,
        "trained_parameters": outlook.trained_parameters,
        "host_gib": gib(outlook.host_bytes),
        "host_copies_gib": gib(outlook.copies_bytes),
        "disk_gib": gib(outlook.disk_bytes),
        "checkpoint_gib": gib(outlook.checkpoint_bytes),
        "final_model_gib": gib(outlook.final_bytes),
        "data_gib": gib(outlook.data_bytes),
        "tokens_per_step": outlook.tokens_per_step,
        "supervised_tokens": outlook.supervised_tokens,
        "steps": outlook.steps,
        "time_s": dataclasses.asdict(outlook.time) if outlook.time else None,
        "seconds_per_step": outlook.seconds_per_step,
        "tokens_per_second": outlook.tokens_per_second,
        "hours_per_billion_tokens": outlook.hours_per_billion_tokens,
        "hours": outlook.hours,
        "requeues": outlook.requeues,
        "gpu_hours": outlook.gpu_hours,
        "notes": list(outlook.notes),
    }
    return json.dumps(values | more, indent=1)


def show_simulated(outlook: Outlook, simulated: Simulated, console: Console) -> None:
    found, planned = simulated.peak_bytes, outlook.peak_bytes
    console.print(
        f"simulated: {_sum(found, outlook)}, in the {stage(simulated.moment)}; the formulas' peak "
        f"is {planned / found - 1:+.1%} off",
        soft_wrap=True,
    )


def simulated_values(simulated: Simulated) -> dict[str, Any]:
    return {
        "peak_gib": gib(simulated.peak_bytes),
        "breakdown_gib": {name: gib(size) for name, size in simulated.breakdown.items()},
        "moment": stage(simulated.moment),
    }


def change_values(change: Change) -> dict[str, Any]:
    return {
        "title": change.title,
        "patch": change.patch,
        "peak_gib": gib(change.outlook.peak_bytes),
        "seconds_per_step": change.outlook.seconds_per_step,
        "fits": change.fits,
    }


def gib(size_bytes: float) -> float:
    return round(size_bytes / GIB, 3)


# --- parts of the picture -------------------------------------------------------------------------


def _title(outlook: Outlook) -> Text:
    hardware = outlook.hardware
    number = hardware.ranks_per_node
    nodes = hardware.ranks // number
    where = f"{number} x {hardware.gpu.name}" if hardware.gpu else counted(number, "GPU")
    where += f" on each of {nodes} nodes" * (nodes > 1)
    trained = ""
    if outlook.trained_parameters != outlook.parameters:
        trained = f", {outlook.trained_parameters:,} trained"
    return Text(f"{outlook.parameters:,} parameters{trained}; {where}")


def _verdict(outlook: Outlook) -> Text:
    if outlook.obstacle:
        return Text(f"WILL NOT RUN: {outlook.obstacle}", style="bold red")
    if outlook.capacity_bytes is None:
        return Text(f"Needs {_sum(outlook.peak_bytes, outlook)}; {outlook.why_open}")
    have = _sum(outlook.peak_bytes, outlook)
    if outlook.fits is None:
        why = outlook.why_open.removeprefix(CLOSE)
        return Text(f"TOO CLOSE TO CALL: {have}; {why}", style="bold yellow")
    if outlook.fits:
        return Text(f"FITS: {have}", style="bold green")
    return Text(f"DOES NOT FIT: {have}", style="bold red")


def _sum(peak_bytes: int, outlook: Outlook) -> str:
    """Rounded so that it adds up for whoever looks at it."""
    peak, margin = rounded([peak_bytes, outlook.margin_bytes])
    room = outlook.capacity_bytes
    of = "" if room is None else f" of {room / GIB:.2f} GiB"
    return f"peak {peak:.2f} GiB + margin {margin:.2f} GiB = {peak + margin:.2f} GiB{of} a GPU"


def rounded(sizes_bytes: Sequence[int]) -> list[float]:
    """GiB in hundredths that add up to their rounded sum."""
    sums = [round(total / GIB, 2) for total in itertools.accumulate(sizes_bytes, initial=0)]
    return [round(after - before, 2) for before, after in itertools.pairwise(sums)]


def _memory(outlook: Outlook, console: Console) -> None:
    parts = {name: size for name, size in outlook.breakdown.items() if size}
    parts[MARGIN] = outlook.margin_bytes
    room = outlook.capacity_bytes
    whole = max(room or 0, outlook.needed_bytes)
    if room and room > outlook.needed_bytes:
        parts[FREE] = room - outlook.needed_bytes
    console.print(bar(parts, whole, room, console.is_terminal))
    table = Table(box=None, show_header=False, padding=(0, 1))
    for name, size in zip(parts, rounded(list(parts.values())), strict=True):
        sign = _sign(name, console.is_terminal)
        table.add_row(sign, _WORDS.get(name, name), Text(f"{size:8.2f} GiB"))
    console.print(table)
    console.print(Text(f"peak: {outlook.moment}; attention {outlook.kernel}"), soft_wrap=True)


def bar(parts: dict[str, int], whole: int, room: int | None, colours: bool) -> Text:
    """The parts in proportion; `|` is where the GPU's memory ends, if they go beyond it."""
    text, before = Text("["), 0
    end = round(BAR * room / whole) if room and room < whole else None
    for name, size in parts.items():
        after = before + size
        for cell in range(round(BAR * before / whole), round(BAR * after / whole)):
            if cell == end:
                text.append("|")
            text.append(_sign(name, colours))
        before = after
    return text.append("]")


def _sign(name: str, colours: bool) -> Text:
    letter, colour = _LOOKS[name]
    return Text("█", style=colour) if colours else Text(letter)


def _facts(outlook: Outlook) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 1))
    learned = outlook.supervised_tokens
    rows = [
        ("a step", f"{outlook.tokens_per_step:,} tokens" + _seconds(outlook)),
        ("speed", _speed(outlook)),
        ("steps", f"{outlook.steps:,}" if outlook.steps else ""),
        ("learned", f"{learned:,} tokens in each pass over the data" if learned else ""),
        ("in all", _hours(outlook)),
        (
            "disk",
            f"{_gib(outlook.disk_bytes)}, of that a checkpoint "
            f"{_gib(outlook.checkpoint_bytes)}, final-model and hf-model "
            f"{_gib(outlook.final_bytes // 2)} each",
        ),
        ("host memory", f"{_gib(outlook.host_bytes)} on the first node" + _copies(outlook)),
    ]
    for name, value in rows:
        if value:
            table.add_row(name, value)
    return table


def _copies(outlook: Outlook) -> str:
    if not outlook.copies_bytes:
        return ""
    return (
        f"; {_gib(outlook.copies_bytes)} more a node for copies that checkpoints are written from"
    )


def _seconds(outlook: Outlook) -> str:
    if outlook.time is None:
        return ""
    time = outlook.time
    parts = [f"{span(time.compute_s)} computing"]
    if time.links_s:
        parts.append(f"{span(time.waits_s)} waiting for links")
    return f" in {span(time.total_s)} ({', '.join(parts)}, {span(time.update_s)} updating)"


def _speed(outlook: Outlook) -> str:
    rate, hours = outlook.tokens_per_second, outlook.hours_per_billion_tokens
    if rate is None or hours is None:
        return ""
    return f"{rate:,.0f} tokens/s, {span(hours * 3600)} for a billion tokens"


def _hours(outlook: Outlook) -> str:
    if outlook.hours is None or outlook.gpu_hours is None:
        return ""
    again = f", {counted(outlook.requeues, 'requeue')}" if outlook.requeues else ""
    if outlook.requeues is None:
        again = " of training, and no end"
    spent = outlook.gpu_hours
    gpu_hours = f"{spent:,.1f}" if spent >= 0.1 else f"{spent:.2f}"
    return f"{span(outlook.hours * 3600)}{again}, {gpu_hours} GPU hours"


def span(seconds: float) -> str:
    """A time as one would say it."""
    if seconds < 1e-4:
        return "under 0.1 ms"
    if seconds < 0.1:
        return f"{seconds * 1e3:.1f} ms"
    if seconds < 119.5:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 3570:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:,.1f} hours"


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:,.1f} GiB"


def _share(slower: float | None) -> str:
    if slower is None:
        return "?"
    return "as now" if abs(slower - 1) < 0.005 else f"x {slower:.2f}"


def _answer(outlook: Outlook) -> str:
    if outlook.fits is None:
        return "?" if outlook.capacity_bytes is None else "close"
    return "yes" if outlook.fits else "no"


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 1))
    for column in columns:
        texts = ("#", "change", "strategy")
        table.add_column(column, justify="left" if column in texts else "right")
    return table
