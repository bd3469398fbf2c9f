"""A configuration -> jobs in Slurm's queue. Floor 1, called by `vectorlm submit`.

    make_plan   everything that can be refused without Slurm; nothing is written
    submit      output_dir/submitted/0001/ gets the configuration as it is now and the job script,
                a sweep's runs a folder each, output_dir/000, 001, ...; then sbatch, or
                submitit (`submitit_door`)

The configuration is frozen, so that what is edited while a job waits does not change the job.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vectorlm.cluster import journal, queue, slurm
from vectorlm.cluster.freeze import freeze, write_private
from vectorlm.cluster.refusal import explained
from vectorlm.cluster.script import POINT_NAME, render, render_preprocess, slurm_section
from vectorlm.config.load import load_config, required_section
from vectorlm.config.schema import Config, Slurm
from vectorlm.config.sweep import overrides_of, sweep_points
from vectorlm.errors import ClusterError

SUBMITTED = "submitted"
LOGS = "logs"
CONFIG = "config.yaml"
MANIFEST = "manifest.json"  # of prepared data
SCRIPT = "job.sh"
PREPROCESS_SCRIPT = "preprocess.sh"
NEVER = ("PartitionConfig", "PartitionNodeLimit", "PartitionTimeLimit", "BadConstraints")
SBATCH_PATIENCE_S = 120.0
COMPARE_PATIENCE_S = 120.0


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    number: int
    changes: dict[str, Any]
    config: Config

    @property
    def folder(self) -> Path:
        return Path(self.config.train_parameters.output_dir)


@dataclass(frozen=True)
class Plan:
    """What is to be submitted; `points` is empty without a sweep."""

    config: Config
    config_path: str
    overrides: tuple[str, ...]
    points: tuple[Point, ...]
    script: str
    preprocess_script: str | None

    @property
    def output_dir(self) -> Path:
        return Path(self.config.train_parameters.output_dir)

    @property
    def section(self) -> Slurm:
        return slurm_section(self.config, self.config_path)


@dataclass(frozen=True)
class Staged:
    """A plan on disk. sbatch starts `job.sh` with `argument`: the frozen configuration, or the
    folder of a sweep."""

    plan: Plan
    folder: Path
    argument: Path

    @property
    def config(self) -> Path:
        return self.folder / CONFIG

    def log(self, name: str) -> Path:
        return (self.plan.output_dir / LOGS / f"vectorlm-{name}.log").absolute()


@dataclass(frozen=True)
class Submitted:
    """What a launcher made of a plan: the job, its name for each run of a sweep, and their logs."""

    job: str
    runs: tuple[str, ...]
    log: Callable[[str], Path]


Launcher = Callable[[Staged, "str | None"], Submitted]


# --- planning -------------------------------------------------------------------------------------


def make_plan(config_path: str, overrides: Sequence[str], with_preprocess: bool = False) -> Plan:
    """Every mistake that can be found here is found now, not after hours in the queue."""
    config = load_config(config_path, overrides)
    section = slurm_section(config, config_path)
    required_section(config, "dataset", config_path)
    points = _points(config, config_path, overrides)
    script = render(config, config_path, SCRIPT, len(points) or None)
    read_by_bash(section.setup)
    preprocess_script = None
    if with_preprocess:
        required_section(config, "dataset_preprocess", config_path)
        _one_preparation(points)
        preprocess_script = render_preprocess(config, config_path, PREPROCESS_SCRIPT)
    return Plan(config, config_path, tuple(overrides), points, script, preprocess_script)


def _points(config: Config, config_path: str, overrides: Sequence[str]) -> tuple[Point, ...]:
    found = []
    for number, changes in enumerate(sweep_points(config)):
        own = load_config(config_path, [*overrides, *overrides_of(changes)])
        folder = Path(config.train_parameters.output_dir) / (POINT_NAME % number)
        train = own.train_parameters.model_copy(update={"output_dir": str(folder)})
        update = {"train_parameters": train, "sweep": None}
        found.append(Point(number, changes, own.model_copy(update=update)))
    return tuple(found)


def read_by_bash(setup: Sequence[str]) -> None:
    """An open quote, bracket or here-document would swallow the lines of ours that follow."""
    text = os.fsencode("\n".join(setup) + "\n")
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, timeout=30, check=False)
    if done.returncode or done.stderr:
        reason = done.stderr.decode(errors="replace").strip().replace("\n", "; ")
        raise ClusterError(f"slurm.setup: bash cannot read these lines: {reason}")


def _one_preparation(points: Sequence[Point]) -> None:
    kinds = {
        json.dumps(
            [
                point.config.model,
                point.config.train_parameters.max_seq_len,
                point.config.dataset_preprocess and point.config.dataset_preprocess.model_dump(),
            ]
        )
        for point in points
    }
    if len(kinds) > 1:
        raise ClusterError(
            f"sweep: its runs ask for {len(kinds)} kinds of prepared data, and --with-preprocess "
            "makes one; prepare each with its own save_path, and submit without it"
        )


def show(plan: Plan) -> None:
    """The scripts alone on standard output, to be read or redirected into a file."""
    scripts = [text for text in (plan.preprocess_script, plan.script) if text]
    sys.stdout.buffer.write(os.fsencode("\n".join(scripts)))
    sys.stdout.flush()
    if plan.overrides:
        print(
            "The script only names the configuration; `vectorlm submit` gives it a copy with --set",
            file=sys.stderr,
        )


# --- submitting -----------------------------------------------------------------------------------


def submit_sbatch(staged: Staged, earlier: str | None) -> Submitted:
    """Hand the script to sbatch, to start when the job `earlier` has succeeded."""
    points = staged.plan.points
    after = [f"--dependency=afterok:{earlier}", "--kill-on-invalid-dep=yes"] if earlier else []
    job = _sbatch(staged, "%A_%a" if points else "%j", after, SCRIPT, staged.argument)
    return Submitted(job, tuple(f"{job}_{point.number}" for point in points), staged.log)


def submit(plan: Plan, launch: Launcher = submit_sbatch) -> str:
    """The id of the job that trains."""
    _refuse_used_folders(plan)
    _warn_of_missing_data(plan)
    needs_data = plan.preprocess_script is not None and not _is_prepared(plan)
    staged = _stage(plan)
    try:
        earlier = _submit_preprocess(staged) if needs_data else None
        submitted = _submit_after(staged, earlier, launch)
    except ClusterError:
        shutil.rmtree(staged.folder, ignore_errors=True)
        raise
    _remember(plan, submitted)
    _tell(staged, submitted, earlier)
    return submitted.job


def _submit_after(staged: Staged, earlier: str | None, launch: Launcher) -> Submitted:
    try:
        return launch(staged, earlier)
    except ClusterError:
        if earlier:
            slurm.call(["scancel", earlier])
        raise


def _submit_preprocess(staged: Staged) -> str:
    points = staged.plan.points
    config = points[0].folder / CONFIG if points else staged.config
    return _sbatch(staged, "data-%j", [], PREPROCESS_SCRIPT, config)


def _sbatch(staged: Staged, log: str, flags: Sequence[str], script: str, argument: Path) -> str:
    # In a file's name, Slurm takes % for the beginning of a pattern of its own.
    folder = str(staged.log("")).rpartition("/")[0].replace("%", "%%")
    output = f"--output={folder}/vectorlm-{log}.log"
    command = ["sbatch", "--parsable", output, *flags, str(staged.folder / script), str(argument)]
    try:
        said = slurm.call(command, SBATCH_PATIENCE_S, environ=environment())
    except ClusterError as error:
        raise explained(error) from None
    return said.strip().split(";")[0]


def environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Submitted from inside a job, its variables would tell the new job what it is not."""
    return {
        name: value
        for name, value in environ.items()
        if name == "SLURM_CONF" or not name.startswith("SLURM_")
    }


# --- what is there already ------------------------------------------------------------------------


def _refuse_used_folders(plan: Plan) -> None:
    """Two jobs in one folder would wait for hours for one of them to be refused."""
    folders = {
        os.path.realpath(path) for path in (plan.output_dir, *(p.folder for p in plan.points))
    }
    queued = dict(
        line.split() for line in slurm.call(["squeue", "-h", "--me", "-o", "%F %T"]).splitlines()
    )
    for job, facts in journal.known_jobs().items():
        state = queued.get(job.partition("_")[0])
        if state and os.path.realpath(facts["output_dir"]) in folders:
            raise ClusterError(
                f"{facts['output_dir']}: job {job} ({state}) works in it; wait for its end, "
                f"scancel {job}, or give another train_parameters.output_dir"
            )
    for point in plan.points:
        _refuse_another_run(point)


def _refuse_another_run(point: Point) -> None:
    """A run of an earlier sweep would be taken for the beginning of this one."""
    path = point.folder / CONFIG
    begun = path.exists() and (point.folder / journal.STARTS).is_dir()
    if point.config.train_parameters.resume_despite_changes or not begun:
        return
    before = load_config(path)
    kept = ("model", "train_parameters", "dataset")
    changed = [name for name in kept if getattr(before, name) != getattr(point.config, name)]
    if changed:
        raise ClusterError(
            f"{path}: belongs to a run with other settings ({', '.join(changed)}); give the sweep "
            "another train_parameters.output_dir, or remove this folder"
        )


def _warn_of_missing_data(plan: Plan) -> None:
    if plan.preprocess_script is not None:
        return
    data = [point.config.dataset for point in plan.points] or [plan.config.dataset]
    folders = {path for one in data if one for path in (one.train_ds, one.eval_ds) if path}
    for folder in sorted(folders):
        if not (Path(folder) / MANIFEST).is_file():
            print(
                f"There is no prepared data in {folder} yet: prepare it before the job starts, or "
                "submit with --with-preprocess."
            )


def _is_prepared(plan: Plan) -> bool:
    """Whether preprocessing would find nothing to do. Hashing the tokenizer takes transformers, so
    another process does it, and only where there is prepared data at all."""
    config = plan.points[0].config if plan.points else plan.config
    options = config.dataset_preprocess
    assert options is not None
    folders = [path for path in (options.save_path, options.eval_save_path) if path]
    if not all((Path(path) / MANIFEST).is_file() for path in folders):
        return False
    print("Comparing the prepared data with the configuration ...", flush=True)
    point = overrides_of(plan.points[0].changes) if plan.points else []
    command = [sys.executable, "-m", "vectorlm.prepared", "--config", plan.config_path]
    command += [f"--set={text}" for text in (*plan.overrides, *point)]
    try:
        done = subprocess.run(
            command,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=COMPARE_PATIENCE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        print("That takes too long here; the preprocessing job will do it.")
        return False
    lines = (done.stdout.strip() or done.stderr.strip() or "no reason given").splitlines()
    if done.returncode == 0:
        print(f"{lines[-1]}: no preprocessing job is needed.")
        return True
    print(f"The data is prepared first: {lines[-1]}.")
    return False


# --- writing --------------------------------------------------------------------------------------


def _stage(plan: Plan) -> Staged:
    try:
        folder = _new_folder(plan.output_dir / SUBMITTED)
        (plan.output_dir / LOGS).mkdir(exist_ok=True, mode=0o700)
        staged = Staged(plan, folder, plan.output_dir if plan.points else folder / CONFIG)
        if plan.section.launcher == "sbatch":
            write_private(folder / SCRIPT, plan.script)
        if plan.preprocess_script is not None:
            write_private(folder / PREPROCESS_SCRIPT, plan.preprocess_script)
        freeze(plan.config, staged.config, _origin(plan))
        for point in plan.points:
            point.folder.mkdir(exist_ok=True)
            freeze(point.config, point.folder / CONFIG, _origin(plan, point))
    except OSError as error:
        raise ClusterError(
            f"{plan.output_dir}: cannot be written ({error.strerror}); give another "
            "train_parameters.output_dir"
        ) from None
    return staged


def _new_folder(root: Path) -> Path:
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    number = len(list(root.iterdir())) + 1
    while True:
        folder = root / f"{number:04d}"
        try:
            folder.mkdir(mode=0o700)
            return folder
        except FileExistsError:
            number += 1


def _origin(plan: Plan, point: Point | None = None) -> str:
    texts = [*plan.overrides, *(overrides_of(point.changes) if point else [])]
    words = " ".join(f"--set {json.dumps(text)}" for text in texts)
    return f"# {json.dumps(plan.config_path)} {words}".rstrip() + ", as it was when submitted.\n"


# --- afterwards -----------------------------------------------------------------------------------


def _remember(plan: Plan, submitted: Submitted) -> None:
    job = submitted.job
    journal.remember_job(job, plan.output_dir, None if plan.points else str(submitted.log(job)))
    for point, name in zip(plan.points, submitted.runs, strict=True):
        journal.remember_job(name, point.folder, str(submitted.log(name)))


def _tell(staged: Staged, submitted: Submitted, earlier: str | None) -> None:
    plan, job = staged.plan, submitted.job
    is_array = plan.points and submitted.runs != (job,)
    log = submitted.log(f"{job}_*" if is_array else job)
    if plan.points:
        print(table(plan.points))
    if earlier:
        print(f"Job {earlier} prepares the data; its log is {staged.log(f'data-{earlier}')}")
    then = f", when job {earlier} has succeeded" if earlier else ""
    runs = f" {len(plan.points)} runs" if plan.points else ""
    print(f"Job {job} trains{runs}{then}, as {staged.config} says.")
    print(f"  its log         {log}")
    print(f"  how it goes     vectorlm status {job}")
    print(f"  why it ended    vectorlm why {job}")
    _warn_if_stuck(job)


def _warn_if_stuck(job: str) -> None:
    """Many sites let sbatch take what no node has; such a job waits for ever."""
    with suppress(ClusterError):  # the job may be over already
        reason = slurm.call(["squeue", "-h", "-j", job, "-o", "%r"]).split("\n")[0]
        if reason in NEVER:
            what = queue.REASONS.get(reason, reason)
            print(f"But it cannot start: it {what}. scancel {job}, and change the keys of slurm.")


def table(points: Sequence[Point]) -> str:
    """A sweep's runs, a line each."""
    names = list(dict.fromkeys(name for point in points for name in point.changes))
    rows = [["run", *names]]
    for point in points:
        values = [json.dumps(point.changes[n]) if n in point.changes else "" for n in names]
        rows.append([str(point.folder), *values])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)
