"""`vectorlm status`: runs as tables on the terminal, live or as JSON. Floor 4, used by `cli`, and
started without torch.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.table import Table
from rich.text import Text

from vectorlm.cluster import queue as slurm_queue
from vectorlm.cluster import status, why
from vectorlm.cluster.queue import Queue, in_words
from vectorlm.cluster.status import Run, SweepRun, SweepRuns
from vectorlm.errors import ClusterError

REFRESH_S = 5.0
QUEUE_REFRESH_S = 30.0  # the controller is everybody's
WIDTH_OF_A_FILE = 200
FOLDED = 24  # the width below which a text is not folded
NARROWEST = 10  # of a text that is
GAP = 2
COLORS = {
    "running": "green",
    "finished": "bold green",
    "failed": "bold red",
    "cut off": "bold red",
    "never started": "red",
    "stopped": "yellow",
    "missing": "red",
}
View = Run | SweepRuns | list[Run | SweepRuns]


class Watcher:
    """Looks at the same runs again and again, and asks Slurm more rarely than the files."""

    def __init__(self, given: str | None) -> None:
        self.folder: Path | None = status.find(given) if given else None
        self._queue = Queue()
        self._asked = -math.inf

    def look(self) -> View:
        noted = status.noted_jobs()
        self._ask_slurm(bool(noted))
        if self.folder is None:
            return status.overview(self._queue, noted)
        return status.look(self.folder, self._queue, noted)

    def _ask_slurm(self, needed: bool) -> None:
        due = time.monotonic() - self._asked >= QUEUE_REFRESH_S
        if due and (needed or self.folder is not None):
            uid = os.getuid() if self.folder is None else status.owner_of(self.folder)
            self._queue = slurm_queue.ask(uid)
            self._asked = time.monotonic()


def show(given: str | None, watch: bool, as_json: bool) -> None:
    watcher = Watcher(given)
    if not watch:
        _print(watcher.look(), as_json)
        return
    try:
        if as_json or not sys.stdout.isatty():
            _print_changes(watcher, as_json)
        else:
            _live(watcher)
    except KeyboardInterrupt:  # the way to end it
        return


def _live(watcher: Watcher) -> None:
    view = watcher.look()
    with Live(render(view), console=Console(), auto_refresh=False) as live:
        while not over(view):
            time.sleep(REFRESH_S)
            view = watcher.look()
            live.update(render(view), refresh=True)


def _print_changes(watcher: Watcher, as_json: bool) -> None:
    shown = None
    while True:
        view = watcher.look()
        if (news := _news(view)) != shown:
            _print(view, as_json, indent=None)
            shown = news
        if over(view):
            return
        time.sleep(REFRESH_S)


def over(view: View) -> bool:
    return all(entry.over for entry in view) if isinstance(view, list) else view.over


def _news(view: View) -> Any:
    """What is worth a new print: times go on by themselves."""
    if isinstance(view, list):
        return [_news(entry) for entry in view]
    if isinstance(view, SweepRuns):
        return [entry.run and _news(entry.run) for entry in view.runs]
    return view.state, view.job, view.step, view.checkpoint_step, len(view.starts)


def _print(view: View, as_json: bool, indent: int | None = 1) -> None:
    if as_json:
        print(json.dumps(_plain(view), indent=indent, default=str), flush=True)
        return
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDTH_OF_A_FILE
    Console(file=sys.stdout, width=width).print(render(view))


def _plain(view: View) -> Any:
    if isinstance(view, list):
        return [asdict(entry) for entry in view]
    return asdict(view) | ({"cause": _cause(view)} if isinstance(view, Run) else {})


def _cause(run: Run) -> dict[str, str] | None:
    """What ended a run before its time, as `vectorlm why` tells it: the log is looked into."""
    if not run.over or run.state not in ("stopped", "failed", "cut off"):
        return None
    with suppress(ClusterError):
        cause = why.diagnose(why.gather(run.folder)[-1])
        return {"name": cause.name, "sentence": cause.sentence, "cure": cause.cure}
    return None


# --- tables ---------------------------------------------------------------------------------------


def render(view: View) -> RenderableType:
    if isinstance(view, list):
        return _overview(view)
    return _sweep(view) if isinstance(view, SweepRuns) else _run(view)


def _overview(entries: list[Run | SweepRuns]) -> RenderableType:
    if not entries:
        return Text(
            "No jobs of yours are known. For a run without Slurm, or of somebody else, give its "
            "output_dir: vectorlm status DIR"
        )
    sheet = Sheet(
        Column("Job"),
        Column("State", folds=True),
        Column("Step"),
        Column("Loss", spare=2),
        Column("Tokens/s", spare=4),
        Column("ETA", spare=1),
        Column("Starts", spare=5),
        Column("Checkpoint", spare=3),
        below=Column("Folder", folds=True),
    )
    for entry in entries:
        if isinstance(entry, SweepRuns):
            cells = [_text(entry.job), _counts(entry), *[Text("")] * 6, _text(entry.folder)]
        else:
            cells = [_text(entry.job), _state(entry), *_figures(entry), _text(entry.folder)]
        sheet.add(*cells)
    return Group(sheet, *_notes([(entry.job, run) for entry in entries for run in _runs(entry)]))


def _runs(entry: Run | SweepRuns) -> list[Run]:
    return [entry] if isinstance(entry, Run) else [part.run for part in entry.runs if part.run]


def _figures(run: Run) -> list[Text]:
    return [
        _text(_steps(run)),
        _text(_number(run.metrics.get("loss"), ".4f")),
        _text(_number(run.metrics.get("tokens_per_s"), ",.0f")),
        _text(_eta(run)),
        _text(len(run.starts) or None),
        _text(_checkpoint(run)),
    ]


def _notes(runs: list[tuple[str | None, Run]]) -> list[Text]:
    """Each with the name of its run; what holds for all of them is told once."""
    notes = [f"{name}: {note}" for name, run in runs for note in run.notes]
    silent = [f"{run.silent}; told by their files alone" for _, run in runs if run.silent]
    return [_text(f"note: {note}") for note in dict.fromkeys(notes + silent)]


def _run(run: Run) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_column()
    grid.add_column(overflow="fold")  # else paths would be cut
    cause = _cause(run) or {}
    told = [("cause", cause.get("sentence")), ("what to do", cause.get("cure"))]
    for name, value in [*_facts(run), *told]:
        if value:
            text = value if isinstance(value, Text) else _text(value)
            grid.add_row(Text(name, style="bold"), text)
    silent = f"{run.silent}; told by its files alone" if run.silent else None
    for note in filter(None, [run.stalled, *run.notes, silent]):
        grid.add_row(Text("note", style="bold yellow"), _text(note))
    return Group(grid, *([_starts(run)] if len(run.starts) > 1 else []))


def _facts(run: Run) -> list[tuple[str, Any]]:
    values = run.metrics
    return [
        ("run", run.folder),
        ("job", run.job and run.job + (f" on {run.nodes}" if run.nodes else "")),
        ("state", _state(run)),
        ("step", _steps(run) and f"{_steps(run)}{_when(run.idle_s)}"),
        ("epoch", _number(values.get("epoch"), ".2f")),
        ("loss", _number(values.get("loss"), ".4f")),
        ("eval loss", _number(values.get("eval_loss"), ".4f")),
        ("learning rate", _number(values.get("lr"), ".3g")),
        ("gradient norm", _number(values.get("grad_norm"), ".3g")),
        ("tokens/s", _number(values.get("tokens_per_s"), ",.0f")),
        ("MFU", _number(values.get("mfu"), ".1%")),
        ("memory", _number(values.get("memory_gib"), ".1f") and f"{values['memory_gib']:.1f} GiB"),
        ("ETA", _eta(run) and f"{_eta(run)}, at {_clock(time.time() + (run.eta_s or 0.0))}"),
        ("time limit", run.time_left and f"in {run.time_left}"),
        ("checkpoint", _checkpoint(run)),
        ("starts", len(run.starts) or None),
        ("results", ", ".join(run.results)),
        ("log", run.log),
    ]


def _starts(run: Run) -> RenderableType:
    sheet = Sheet(
        Column("Start"),
        Column("At", spare=1),
        Column("Job"),
        Column("Host", spare=2),
        Column("Ranks", spare=4),
        Column("From step", spare=3),
        Column("Ended", folds=True),
    )
    for start in run.starts:
        cells = (start.number, _clock(start.time), start.job, start.host, start.ranks)
        sheet.add(*map(_text, cells), _text(start.resumed_from), _text(start.ended or "lasts"))
    return sheet


def _sweep(sweep: SweepRuns) -> RenderableType:
    names = [key.rpartition(".")[2] for key in sweep.keys]
    headers = [n if names.count(n) == 1 else k for n, k in zip(names, sweep.keys, strict=True)]
    best = f"{'lowest' if sweep.goal == 'min' else 'highest'} {sweep.metric}"
    sheet = Sheet(
        Column("Run"),
        *(Column(header, folds=True) for header in headers),
        Column(best, folds=True),
        Column("at step", spare=2),
        Column("Step", spare=1),
        Column("ETA", spare=3),
        Column("State", folds=True),
    )
    for entry in sweep.runs:
        values = [_text(_value(entry.values.get(key))) for key in sweep.keys]
        sheet.add(_text(entry.name), *values, *_result(entry))
    head = _text(f"sweep {sweep.folder}" + (f", job {sweep.job}" if sweep.job else ""))
    notes = [_text(f"note: {note}") for note in sweep.notes]
    return Group(head, sheet, *notes, *_notes([(e.name, e.run) for e in sweep.runs if e.run]))


def _result(entry: SweepRun) -> list[Text]:
    run = entry.run
    state = _state(run) if run else Text("missing", style=COLORS["missing"])
    found = [_text(_number(entry.best, ".4f")), _text(entry.best_step)]
    return [*found, _text(_steps(run) if run else None), _text(_eta(run) if run else None), state]


def _counts(sweep: SweepRuns) -> Text:
    states = [entry.run.state if entry.run else "missing" for entry in sweep.runs]
    return _text("sweep: " + ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states)))


# --- tables that fit the terminal -----------------------------------------------------------------


@dataclass(eq=False)
class Column:
    name: str
    spare: int = 0  # left out where there is no room, the highest first; 0: never
    folds: bool = False  # words may go on in the next line
    cells: list[Text] = field(default_factory=list)

    @property
    def width(self) -> int:
        return max(cell_len(self.name), *(cell.cell_len for cell in self.cells))

    @property
    def least(self) -> int:
        return min(self.width, FOLDED) if self.folds else self.width


class Sheet:
    """A table for any width: `below` gets lines of its own, then what can be spared is left out,
    then words are folded."""

    def __init__(self, *columns: Column, below: Column | None = None) -> None:
        self._columns, self._below = columns, below

    def add(self, *cells: Text) -> None:
        columns = [*self._columns, *([self._below] if self._below else [])]
        for column, cell in zip(columns, cells, strict=True):
            column.cells.append(cell)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        below = [self._below] if self._below else []
        taken = sum(column.width + GAP for column in below)
        if _room(self._columns, options.max_width) >= taken:
            yield _table([*self._columns, *below], options.max_width)
            return
        columns = list(self._columns)
        while _room(columns, options.max_width) < 0 and any(c.spare for c in columns):
            columns.remove(max(columns, key=lambda column: column.spare))
        yield _table(columns, options.max_width)
        if below:
            yield _table([columns[0], *below], options.max_width)
        absent = [column.name for column in self._columns if column not in columns]
        if absent:
            yield Text(f"no room for {', '.join(absent)}", style="dim")


def _room(columns: Sequence[Column], width: int) -> int:
    """What is left of a line, each with a gap behind it."""
    return width - sum(column.least + GAP for column in columns)


def _widths(columns: list[Column], width: int) -> dict[Column, int]:
    """The last ones get what room there is, or give what is wanting."""
    room, widths = _room(columns, width), {}
    for column in reversed(columns):
        more = min(room, column.width - column.least)
        if room < 0:
            more = -min(-room, max(column.least - NARROWEST, 0)) if column.folds else 0
        room -= more
        widths[column] = column.least + more
    return widths


def _table(columns: list[Column], width: int) -> Table:
    table = Table(box=None, padding=(0, GAP, 0, 0), header_style="bold")
    widths = _widths(columns, width)
    for column in columns:
        table.add_column(Text(column.name), width=widths[column], overflow="fold")
    for cells in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*cells)
    return table


# --- cells ----------------------------------------------------------------------------------------


def _text(value: Any) -> Text:
    """Names and messages come from files: they must not steer the terminal."""
    words = "" if value is None else str(value)
    return Text("".join(c if c.isprintable() else " " for c in words))


def _state(run: Run) -> Text:
    words = _text(": ".join(part for part in (run.state, run.why or run.stalled) if part))
    words.stylize(COLORS.get(run.state, ""), 0, len(run.state))
    return words


def _steps(run: Run) -> str | None:
    if run.step is None and run.total_steps is None:
        return None
    return f"{run.step or 0}" + (f"/{run.total_steps}" if run.total_steps else "")


def _when(seconds: float | None) -> str:
    return "" if seconds is None else f", {in_words(seconds)} ago"


def _checkpoint(run: Run) -> str | None:
    if run.checkpoint_step is None:
        return None
    return f"step {run.checkpoint_step}{_when(run.checkpoint_age_s)}"


def _eta(run: Run) -> str | None:
    return None if run.eta_s is None else str(timedelta(seconds=round(run.eta_s)))


def _clock(moment: float) -> str:
    return f"{datetime.fromtimestamp(moment):%Y-%m-%d %H:%M:%S}"


def _number(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)


def _value(value: Any) -> str | None:
    return f"{value:g}" if isinstance(value, float) else None if value is None else str(value)
