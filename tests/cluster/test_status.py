"""Runs and sweeps from the files they leave, and which is asked for. With Slurm: tests/slurm."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster import actor
from tests.cluster.actor import log, metrics_of, save
from tests.cluster.test_verdict import NO_SLURM, begin, failure, queued, record
from tests.distributed.cases import make_rows, prepared
from tests.distributed.ranks import LIMIT_S
from tests.distributed.runs import STEPS, Run, logged, wait_for
from vectorlm.cluster import journal, status
from vectorlm.cluster.journal import EndRecord, Journal
from vectorlm.cluster.queue import Queue
from vectorlm.cluster.status import SweepRuns
from vectorlm.errors import EXIT_OK, ClusterError

NOBODY = 65534


@pytest.fixture(autouse=True)
def _own_notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def read(folder: Path, queue: Queue = NO_SLURM) -> status.Run:
    return status.read_run(folder, queue, status.jobs_of(folder, status.noted_jobs()))


def running(folder: Path, total: int = 100, **given: Any) -> None:
    """This process as a run that has logged steps 2, 4 and 6, each after 2 s a step."""
    begin(folder, total_steps=total, **given)
    metrics = metrics_of(folder)
    for step in (2, 4, 6):
        log(metrics, step, seconds=4.0, steps=2)


# --- how far a run is -----------------------------------------------------------------------------


def test_a_real_run_while_it_trains_and_afterwards(tmp_path: Path, model_folder: Any) -> None:
    model = model_folder("llama")
    data = prepared(tmp_path / "data", model, make_rows(40))
    shared = {"model": model, "data": data, "eval": data}
    run = Run(tmp_path / "run", shared)
    process = run.start(1)
    wait_for(logged(run, 4), process)
    found = read(run.output)
    assert (found.state, found.over, found.total_steps) == ("running", False, 2 * STEPS)
    assert found.step is not None
    assert 4 <= found.step < 2 * STEPS
    assert found.eta_s is not None
    assert found.eta_s > 0
    assert process.wait(timeout=LIMIT_S) == EXIT_OK, run.log
    found = read(run.output)
    assert (found.state, found.over, found.step) == ("finished", True, 2 * STEPS)
    assert found.metrics == run.steps()[-1]
    assert found.eta_s is None
    assert found.checkpoint_step == 2 * STEPS
    assert found.results == ["final-model"]
    assert [(s.number, s.ranks, s.ended) for s in found.starts] == [(1, 1, "finished")]
    assert found.notes == []


def test_the_time_that_is_left(tmp_path: Path) -> None:
    running(tmp_path, host="elsewhere")
    start_earlier(tmp_path, 0)
    found = read(tmp_path)
    assert (found.state, found.step, found.total_steps) == ("running", 6, 100)
    assert found.eta_s == pytest.approx((100 - 6) * 2.0, abs=5)
    start_earlier(tmp_path, 600)
    touch(tmp_path / "metrics.jsonl", 60)
    assert read(tmp_path).eta_s == pytest.approx((100 - 6) * 2.0 - 60, abs=5)


def touch(path: Path, seconds_ago: float) -> None:
    then = time.time() - seconds_ago
    os.utime(path, (then, then))


def start_earlier(folder: Path, seconds: float) -> None:
    """As if the last start had been on another machine, and earlier."""
    past = journal.past_starts(folder)[-1]
    Journal(past.folder).started(replace(past.start, time=past.start.time - seconds))
    claim_file = {"id": past.start.id}
    journal.write_json(folder / "owner.json", claim_file)


def test_a_run_that_stands_still(tmp_path: Path) -> None:
    running(tmp_path, host="elsewhere")
    start_earlier(tmp_path, 3600)
    touch(tmp_path / "metrics.jsonl", 100)
    assert read(tmp_path).stalled is None
    touch(tmp_path / "metrics.jsonl", 12 * 60 + 5)
    found = read(tmp_path)
    assert found.state == "running"
    assert found.stalled == "no step for 12 min"
    assert found.eta_s is None
    log(metrics_of(tmp_path), 8, seconds=600.0)  # it logs every 10 min
    touch(tmp_path / "metrics.jsonl", 12 * 60 + 5)
    assert read(tmp_path).stalled is None


def test_a_start_without_a_step(tmp_path: Path) -> None:
    running(tmp_path, host="elsewhere")
    start_earlier(tmp_path, 300)
    touch(tmp_path / "metrics.jsonl", 86400)
    assert read(tmp_path).stalled is None  # the model is being loaded
    start_earlier(tmp_path, 600)
    assert read(tmp_path).stalled == "no step for 15 min, since it was started"


def test_where_a_resumed_run_is(tmp_path: Path) -> None:
    begin(tmp_path, job="17", host="n1", hosts=["n1", "n2"]).failed(failure(1, 1.0, "OSError", "x"))
    begin(tmp_path, job="18", host="n1", resumed_from=40, total_steps=100)
    found = read(tmp_path, queued("RUNNING", job="18"))
    assert (found.state, found.job, found.step, found.nodes) == ("running", "18", 40, "n1")
    history = [(s.job, s.ranks, s.resumed_from, s.ended) for s in found.starts]
    assert history == [("17", 2, None, "failed rank 1 on n1: OSError: x"), ("18", 1, 40, "")]
    gone = read(tmp_path, queued("TIMEOUT", job="18"))
    assert (gone.state, gone.why) == ("cut off", "its time limit was reached")
    assert [s.ended for s in gone.starts][-1] == "cut off"


def test_the_job_that_has_the_run(tmp_path: Path) -> None:
    journal.remember_job("16", tmp_path, None)
    begin(tmp_path, job="16", host="elsewhere")
    journal.remember_job("17", tmp_path, "/logs/17")
    both = Queue({**queued("RUNNING", job="16").jobs, **queued("PENDING", job="17").jobs})
    assert (read(tmp_path, both).job, read(tmp_path, both).state) == ("16", "running")
    waits = read(tmp_path, queued("PENDING", job="17"))
    assert (waits.job, waits.state, waits.log) == ("17", "pending", "/logs/17")
    begin(tmp_path, job="16", host="elsewhere", log="/logs/16")
    again = read(tmp_path, queued("PENDING", job="16"))
    assert (again.job, again.state, again.log) == ("16", "requeued", "/logs/16")


def test_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    journal.remember_job("17", tmp_path / "out", None)
    found = read(tmp_path / "out", queued("PENDING"))
    assert (found.state, found.step, found.starts) == ("pending", None, [])


def test_slurm_is_silent(tmp_path: Path) -> None:
    begin(tmp_path, job="17", host="elsewhere")
    found = read(tmp_path)
    assert (found.state, found.silent) == ("unknown", NO_SLURM.silent)
    begin(tmp_path)  # without Slurm
    assert read(tmp_path).silent is None


def test_a_run_from_before_there_was_a_journal(tmp_path: Path) -> None:
    log(metrics_of(tmp_path), 3)
    assert read(tmp_path).state == "unknown"
    (tmp_path / "final-model").mkdir()
    found = read(tmp_path)
    assert (found.state, found.why, found.step) == (
        "finished",
        "it kept no record of its starts",
        3,
    )


def test_damaged_records_are_passed_over(tmp_path: Path) -> None:
    running(tmp_path)
    begin(tmp_path).folder.joinpath("start.json").write_text('{"number": 2, "ti')
    (tmp_path / "starts" / "0001" / "rank-0.json").write_text("")
    (tmp_path / "checkpoints").write_text("no folder")
    found = read(tmp_path)
    assert (found.state, found.step, len(found.starts)) == ("running", 6, 1)


# --- what another user may not see ----------------------------------------------------------------


@pytest.fixture
def open_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Not pytest's: nobody else may enter that."""
    if os.getuid() != 0:
        pytest.skip("becoming another user needs root")
    folder = Path(tempfile.mkdtemp(prefix="vectorlm-status-"))
    folder.chmod(0o755)
    monkeypatch.setenv("XDG_STATE_HOME", str(folder / "state"))
    yield folder
    shutil.rmtree(folder)


@contextmanager
def nobody() -> Iterator[None]:
    os.setresuid(NOBODY, NOBODY, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


def test_a_run_of_another_user(open_folder: Path) -> None:
    running(open_folder)
    save(open_folder, 4)
    (open_folder / "checkpoints").chmod(0o700)
    os.chown(open_folder / "metrics.jsonl", NOBODY, NOBODY)
    os.chown(open_folder, 0, 0)
    with nobody():
        assert status.find(str(open_folder)) == open_folder
        found = read(open_folder)
    assert (found.state, found.step, found.checkpoint_step) == ("unknown", 6, None)
    assert found.notes == [
        "starts/ cannot be read: Permission denied",
        "checkpoints/ cannot be read: Permission denied",
    ]


def test_a_folder_that_cannot_be_entered(open_folder: Path) -> None:
    folder = open_folder / "out"
    running(folder)
    folder.chmod(0o700)
    with nobody():
        with pytest.raises(ClusterError, match="cannot be read: it belongs to another user"):
            status.find(str(folder))
        assert read(folder).why == "its folder cannot be read: Permission denied"
    folder.chmod(0o744)
    with nobody():
        assert read(folder).why == "its folder cannot be entered: Permission denied"


# --- a sweep --------------------------------------------------------------------------------------

LR = "train_parameters.optimizer.lr"


def make_sweep(folder: Path, runs: int = 4, **given: Any) -> Path:
    """As `vectorlm submit` leaves it: the configuration, and a folder with its own for each run."""
    config: dict[str, Any] = {
        "model": "somewhere",
        "train_parameters": {"output_dir": str(folder), "max_seq_len": 8},
        "dataset": {"train_ds": "train", "eval_ds": "eval"},
    }
    values = [1e-4, 2e-4, 3e-4, 4e-4][:runs]
    sweep = {"grid": {LR: values}, **given}
    write(folder / "submitted" / "0001" / "config.yaml", config)
    write(folder / "submitted" / "0002" / "config.yaml", {**config, "sweep": sweep})
    for number in range(runs):
        write(folder / f"{number:03d}" / "config.yaml", config)
    return folder


def write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(yaml.safe_dump(content))


def run_of(folder: Path, *losses: float) -> Journal:
    diary = begin(folder, total_steps=len(losses))
    for step, loss in enumerate(losses, 1):
        log(metrics_of(folder), step, eval_loss=loss, tokens_per_s=loss * 10)
    return diary


def look(folder: Path) -> SweepRuns:
    found = status.look(folder, NO_SLURM, status.noted_jobs())
    assert isinstance(found, SweepRuns)
    return found


def test_a_sweeps_results_best_first(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "sweep")
    for name, losses in {"000": (3.0, 2.5), "001": (2.0, 1.0, 1.5), "002": (2.0, 2.0)}.items():
        run_of(folder / name, *losses).ended(EndRecord(time.time(), "finished", len(losses)))
    run_of(folder / "003", 0.1).failed(failure(0, 1.0, "OSError", "no"))
    found = look(folder)
    assert (found.metric, found.goal, found.keys, found.over) == ("eval_loss", "min", [LR], True)
    table = [(r.name, r.values[LR], r.best, r.best_step, r.run and r.run.state) for r in found.runs]
    assert table == [
        ("001", 2e-4, 1.0, 2, "finished"),
        ("002", 3e-4, 2.0, 1, "finished"),
        ("000", 1e-4, 2.5, 2, "finished"),
        ("003", 4e-4, 0.1, 1, "failed"),
    ]
    assert found.notes == []


def test_another_metric_of_which_more_is_better(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "sweep", runs=2, metric="tokens_per_s", goal="max")
    run_of(folder / "000", 3.0, 2.5)
    run_of(folder / "001", 2.0, 4.0)
    assert [(r.name, r.best, r.best_step) for r in look(folder).runs] == [
        ("001", 40.0, 2),
        ("000", 30.0, 1),
    ]
    assert not look(folder).over


def test_runs_of_a_sweep_that_are_missing_or_wait(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "sweep")
    journal.remember_job("20", folder, None)
    for number in range(4):
        journal.remember_job(f"20_{number}", folder / f"{number:03d}", None)
    shutil.rmtree(folder / "001")
    run_of(folder / "002", 2.0)
    waits = queued("PENDING", job="20_3").jobs | queued("CANCELLED", job="20_0").jobs
    found = status.look(folder, Queue(waits), status.noted_jobs())
    assert isinstance(found, SweepRuns)
    assert found.job == "20"
    states = [(r.name, r.run.state if r.run else None) for r in found.runs]
    assert states == [
        ("002", "running"),
        ("003", "pending"),
        ("000", "never started"),
        ("001", None),
    ]


def test_a_sweep_whose_configuration_is_gone(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "sweep", runs=2)
    (folder / "submitted" / "0002" / "config.yaml").write_text("model: [")
    run_of(folder / "001", 2.0)
    found = look(folder)
    assert [(r.name, r.best) for r in found.runs] == [("001", 2.0), ("000", None)]
    assert found.notes == ["submitted/*/config.yaml says nothing of the sweep"]


# --- which runs -----------------------------------------------------------------------------------


def test_a_job_leads_to_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal.remember_job("17", tmp_path / "out", None)
    journal.remember_job("18_2", tmp_path / "sweep" / "002", None)
    assert status.find("17") == tmp_path / "out"
    assert status.find("18_2") == tmp_path / "sweep" / "002"
    running(tmp_path / "017")
    running(tmp_path / "17")
    monkeypatch.chdir(tmp_path)
    assert status.find("17") == tmp_path / "out"
    assert status.find("./17") == tmp_path / "17"
    assert status.find("017") == tmp_path / "017"


def test_what_holds_no_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="job 17: nothing is noted of a run under this number"):
        status.find("17")
    with pytest.raises(ClusterError, match="absent: no such folder; give the output_dir of a run"):
        status.find(str(tmp_path / "absent"))
    with pytest.raises(
        ClusterError, match=r"holds no run \(starts/, metrics.jsonl or checkpoints/"
    ):
        status.find(str(tmp_path))
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ClusterError, match="no such folder"):
        status.find(str(file))
    journal.remember_job("17", tmp_path, None)  # it waits, and has made nothing yet
    assert status.find(str(tmp_path)) == tmp_path


def test_the_newest_runs(tmp_path: Path) -> None:
    for number in range(25):
        begin(tmp_path / f"run{number}", job=str(number), host="elsewhere")
        remember(str(number), tmp_path / f"run{number}", float(number))
    remember("100", tmp_path / "run7", 100.0)  # goes on with that of job 7
    sweep = make_sweep(tmp_path / "sweep", runs=2)
    remember("99", sweep, 99.0)
    remember("99_0", sweep / "000", 101.0)
    found = status.overview(Queue(), status.noted_jobs())
    jobs = [(entry.job, Path(entry.folder).name) for entry in found]
    assert jobs[:4] == [("100", "run7"), ("99", "sweep"), ("24", "run24"), ("23", "run23")]
    assert len(jobs) == status.SHOWN_RUNS


def remember(job: str, folder: Path, when: float) -> None:
    journal.remember_job(job, folder, None)
    path = Path(os.environ["XDG_STATE_HOME"]) / "vectorlm" / "jobs" / f"{job}.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps(facts | {"time": time.time() + when}))


def test_the_actor_keeps_a_journal_as_training_does(tmp_path: Path) -> None:
    """Guards the tests that start it."""
    process = actor.start(tmp_path, wait_s=0)
    assert process.wait(timeout=10) == 0
    found = read(tmp_path)
    assert (found.state, found.step, found.checkpoint_step) == ("finished", 100, 4)
    assert found.results == ["final-model"]
    assert record().host == found.starts[0].host


# --- several jobs of one folder -------------------------------------------------------------------


def shared_folder(folder: Path, *jobs: str) -> None:
    """Of the jobs noted for it, 17 has it and trains."""
    for job in jobs:
        journal.remember_job(job, folder, None)
    begin(folder, job="16").ended(EndRecord(time.time(), "stopped", 2, "SIGUSR1"))
    running(folder, job="17")


def in_the_queue(**states: str) -> Queue:
    """`j18="PENDING"`: job 18 waits."""
    rows = [queued(state, time.time(), job=name[1:]) for name, state in states.items()]
    return Queue({job: row for queue in rows for job, row in queue.jobs.items()})


def told(queue: Queue) -> list[tuple[str | None, str, int | None]]:
    runs = [run for run in status.overview(queue, status.noted_jobs()) if run.kind == "run"]
    return [(run.job, run.state, run.step) for run in runs]


def test_a_second_job_of_a_folder_is_told(tmp_path: Path) -> None:
    shared_folder(tmp_path / "out", "16", "17", "18")
    queue = in_the_queue(j17="RUNNING", j18="PENDING")
    assert told(queue) == [("17", "running", 6), ("18", "pending", None)]
    second = status.overview(queue, status.noted_jobs())[1]
    assert isinstance(second, status.Run)
    assert second.folder == str(tmp_path / "out")
    assert second.notes == ["shares its folder with job 17, and a folder has one run at a time"]
    assert second.metrics == {}
    assert told(in_the_queue(j17="RUNNING", j18="RUNNING"))[1] == ("18", "starting", None)
    assert told(in_the_queue(j17="RUNNING", j16="PENDING"))[-1] == ("16", "requeued", 2)


def test_a_later_job_that_never_got_the_folder_is_told(tmp_path: Path) -> None:
    shared_folder(tmp_path / "out", "15", "16", "18", "17")
    later = ("18", "never started", None)
    assert told(in_the_queue(j17="RUNNING")) == [("17", "running", 6), later]
    assert told(in_the_queue(j17="RUNNING", j18="FAILED"))[1] == later


def test_jobs_that_had_the_folder_before_are_starts_of_the_run(tmp_path: Path) -> None:
    shared_folder(tmp_path / "out", "9", "16", "17")
    assert told(in_the_queue(j17="RUNNING")) == [("17", "running", 6)]
    assert len(told(NO_SLURM)) == 1, "nothing is known of the others"
