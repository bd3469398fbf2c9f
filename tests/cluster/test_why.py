"""What ended a run is named right: from recorded logs, from journals written with the real one, and
from Slurm's words. Near misses are not confused, and hostile files do no harm.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from vectorlm.cluster import journal
from vectorlm.cluster.causes import TABLE, Cause, as_markdown, diagnose
from vectorlm.cluster.evidence import Evidence, evidence_of_job, gather
from vectorlm.cluster.flight import Flight, Group, Operation
from vectorlm.cluster.joblog import Line, sections
from vectorlm.cluster.journal import EndRecord, Journal, RankRecord, new_start, past_starts
from vectorlm.cluster.why import explain
from vectorlm.errors import ClusterError

RECORDED = Path(__file__).parent / "recorded"
ROOT = Path(__file__).resolve().parents[2]
HOSTS = ["gpu07", "gpu07", "gpu08", "gpu08"]

# A job's log as the local Slurm writes it.
BANNER = "== vectorlm: job 17, start 1, 2026-11-03T08:12:44+01:00, on n[1-2]"
TERMINATING = """\
srun: launch/slurm: _step_signal: Terminating StepId=17.0
slurmstepd-n1: error: *** STEP 17.0 ON n1 CANCELLED AT 2026-11-21T11:23:01 ***
srun: error: n1: task 0: Terminated
srun: error: n2: tasks 2-3: Terminated
srun: Force Terminated StepId=17.0"""
CANCELLED = """\
srun: got SIGCONT
slurmstepd-n1: error: *** STEP 17.0 ON n1 CANCELLED AT 2026-11-21T11:23:10 ***
slurmstepd-n1: error: *** JOB 17 ON n1 CANCELLED AT 2026-11-21T11:23:10 ***
srun: forcing job termination
srun: error: n2: tasks 2-3: Terminated
srun: error: n1: tasks 0-1: Terminated"""
REQUEUED = (
    "slurmstepd-n1: error: *** JOB 17 ON n1 CANCELLED AT 2026-11-21T11:24:12 DUE TO JOB REQUEUE ***"
)
RUNNING = {"JobState": "RUNNING", "Reason": "None", "Restarts": "0", "PreemptTime": "None"}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No Slurm, no job, and a home of one's own."""
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.chdir(tmp_path)


@dataclass
class Run:
    """A run's folder, as its ranks write it."""

    folder: Path

    def start(
        self,
        failures: list[RankRecord] | None = None,
        end: EndRecord | None = None,
        job: str | None = "17",
        restart: int = 0,
        config: str = "",
    ) -> Evidence:
        record = replace(
            new_start(config),
            job=job,
            job_id=job,
            restart=restart,
            hosts=HOSTS,
            host="gpu07",
            pid=2**22 + 1,
            resumed_from=100,
        )
        diary, _ = Journal.begin(self.folder, record)
        for failure in failures or []:
            diary.failed(failure)
        if end:
            diary.ended(end)
        return Evidence(
            job=job, number=restart + 1, start=past_starts(self.folder)[-1], code=0 if end else 1
        )


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "output")


def failure(rank: int, kind: str, message: str, seconds: float = 0, code: int = 1) -> RankRecord:
    trace = (
        'Traceback (most recent call last):\n  File "/x/vectorlm/trainer.py", line 81, in step\n'
        f"    go()\n{kind}: {message}\n"
    )
    at = 1_790_000_000 + seconds
    return RankRecord(rank, HOSTS[rank], at, kind, message, trace, code, step=120)


def lost(rank: int, seconds: float) -> RankRecord:
    return failure(rank, "RankLostError", f"rank {rank}: another rank has left", seconds)


def stop(signal: str | None, saved: bool = True) -> EndRecord:
    return EndRecord(time.time(), "stopped", 120, signal, saved)


def log(text: str) -> list[Line]:
    return [Line(line, f"job.log:{i}") for i, line in enumerate(text.splitlines(), 1)]


def of_log(*parts: str, **more: object) -> Cause:
    evidence = Evidence(job="17", number=1, lines=log("\n".join([BANNER, *parts])))
    return diagnose(replace(evidence, **more))  # type: ignore[arg-type]


# --- recorded logs --------------------------------------------------------------------------------

# What the sentence must name, beside the rank and the host.
NAMED = {
    "collective-timeout.log": ("allreduce number 4711 of all ranks", 2, "gpu07"),
    "collective-timeout.group.log": ("allgather_base number 902 of mesh_shard", 6, "gpu08"),
    "disk-full.log": ("Disk quota exceeded", 0, "gpu07"),
    "driver-too-old.log": ("found version 11040", 0, "v100-02"),
    "driver-too-old.kernel.log": ("no kernel image", 0, "k80-02"),
    "file-system.log": ("Stale file handle: '/scratch", 1, "gpu07"),
    "gpu-broken.log": ("uncorrectable ECC", 2, "gpu07"),
    "gpu-broken.xid.log": ("Xid 79", None, None),
    "gpu-fault.log": ("illegal memory access", 4, "gpu08"),
    "gpu-out-of-memory.log": ("3.91 GiB", 5, "gpu08"),
    "host-out-of-memory.log": ("the kernel killed a process, after step 20", 6, "gpu08"),
    "host-out-of-memory.old.log": ("the kernel killed", 1, "gpu07"),
    "host-out-of-memory.refused.log": ("refused to the process", 0, "gpu07"),
    "network-failed.log": ("NET/IB: Got completion from peer", None, "gpu08"),
    "network-failed.exception.log": ("ibv_modify_qp failed", 3, "gpu07"),
    "no-gpu.log": ("No CUDA GPUs", 1, "gpu07"),
    "rank-killed.log": ("SIGSEGV", 1, "gpu07"),
    "ranks-cannot-meet.log": ("(gpu07, 14112)", 4, "gpu08"),
    "shared-memory-full.log": ("/dev/shm/nccl-WU3xOE", 0, "gpu07"),
    "shared-memory-full.bus.log": ("bus error", 5, "gpu08"),
    "software-missing.log": ("GLIBC_2.28 is missing", None, None),
    "software-missing.module.log": ('"cuda/12.9"', None, None),
    "software-missing.package.log": ("No module named 'peft'", None, None),
    "step-not-started.log": ("More processors requested than permitted", None, None),
    "step-not-started.credential.log": ("Job credential expired", None, None),
    "time-limit.log": ("before it had saved", None, None),
}


@pytest.mark.parametrize("path", sorted(RECORDED.glob("*.log")), ids=lambda path: path.stem)
def test_recorded_log_is_named_right(path: Path) -> None:
    words, rank, host = NAMED[path.name]
    [section] = sections(path)
    cause = diagnose(Evidence(job=section.job, number=section.number, lines=section.lines()))
    assert cause.name == path.name.split(".")[0]
    assert words in cause.sentence
    assert (cause.rank, cause.host) == (rank, host)
    assert rank is None or f"rank {rank}" in cause.sentence
    assert host is None or host in cause.sentence
    assert cause.cure
    # What is quoted stands there, at that line.
    lines = path.read_text().splitlines()
    for line in cause.proof:
        name, _, number = line.source.partition(":")
        assert name == path.name
        assert lines[int(number) - 1].strip().startswith(line.text.strip()[:200])


# --- what ranks have written down -----------------------------------------------------------------

OUT_OF_MEMORY = (
    "out of memory on rank 3, step 121, micro-batch 2: 16384 tokens, the longest document 4096 "
    "(CUDA out of memory. Tried to allocate 3.91 GiB). Set "
    "train_parameters.use_activation_checkpointing: true, lower dataset.train_bs"
)
FAILURES = {
    "gpu-out-of-memory": (
        "TrainingError",
        OUT_OF_MEMORY,
        "micro-batch 2: 16384 tokens, the longest",
    ),
    "host-out-of-memory": (
        "TrainingError",
        OUT_OF_MEMORY.replace("CUDA out of memory", "DefaultCPUAllocator: can't allocate memory"),
        "micro-batch 2: 16384 tokens",
    ),
    "loss-not-finite": (
        "TrainingError",
        "step 121: the loss is not a finite number on rank 3; all ranks stopped before the update.",
        "step 121: the loss",
    ),
    "disk-full": (
        "CheckpointError",
        "/runs/a: the checkpoint could not be saved: the disk is full or your quota is used up "
        "(needed 90.1 GB, free 2.0 GB); earlier checkpoints are intact.",
        "needed 90.1 GB",
    ),
    "mistake": (
        "DataError",
        "/data/train: was prepared with another tokenizer than that of /models/llama; prepare it "
        "again",
        "another tokenizer",
    ),
    "superseded": (
        "ClusterError",
        "/runs/a: now belongs to another start of the run (job 18 on gpu09); this one leaves "
        "without writing anything more",
        "job 18 on gpu09",
    ),
    "ranks-cannot-meet": (
        "ClusterError",
        "rank 3 of 4 cannot reach the others at gpu07:14112: timed out; check MASTER_ADDR",
        "gpu07:14112",
    ),
    "gpu-broken": (
        "AcceleratorError",
        "CUDA error: uncorrectable NVLink error detected during the execution",
        "NVLink",
    ),
    "file-system": ("OSError", "[Errno 5] Input/output error: '/data/a.arrow'", "/data/a.arrow"),
    "network-failed": (
        "DistBackendError",
        "NCCL error in: x.cpp:9, unhandled system error\nncclSystemError: System call failed\n"
        "Last error:\nsocketStartConnect: Connect to 10.0.0.8<36077> failed : No route to host",
        "No route to host",
    ),
    "rank-failed": ("KeyError", "'labels'", "KeyError: 'labels'"),
}
COMES_AGAIN = {
    "gpu-out-of-memory",
    "host-out-of-memory",
    "loss-not-finite",
    "disk-full",
    "mistake",
    "superseded",
    "rank-failed",  # of a KeyError
}


@pytest.mark.parametrize("name", FAILURES)
def test_first_failure_is_the_cause_and_lost_ranks_are_not(run: Run, name: str) -> None:
    """A storm of ranks that lost another one, written before, with and after the one real error."""
    kind, message, words = FAILURES[name]
    records = [lost(0, -1), lost(1, 0.1), failure(3, kind, message), lost(2, 5)]
    cause = diagnose(run.start(records))
    assert cause.name == name
    assert words in cause.sentence
    assert (cause.rank, cause.host, cause.step) == (3, "gpu08", 120)
    assert cause.may_pass == (name not in COMES_AGAIN)
    assert cause.proof[0].source == "rank-3.json"


def test_failed_rank_is_told_with_its_place_and_those_after_it(run: Run) -> None:
    records = [failure(3, "RuntimeError", "shape mismatch", 0), lost(0, 1), lost(2, 1)]
    cause = diagnose(run.start(records))
    assert cause.name == "rank-failed"
    assert "rank 3 on gpu08, after step 120 failed: RuntimeError: shape mismatch" in cause.sentence
    assert "ranks 0, 2 failed of that" in cause.sentence
    assert any("trainer.py" in line.text for line in cause.proof)
    assert cause.may_pass


def test_of_two_real_errors_the_first_in_time_counts(run: Run) -> None:
    records = [failure(0, "KeyError", "'late'", 9), failure(1, "ValueError", "early", 2)]
    assert diagnose(run.start(records)).rank == 1


def test_cure_for_memory_names_only_what_is_not_done(run: Run, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    key = "use_activation_checkpointing: "
    text = (ROOT / "configs/demo.yaml").read_text()
    config.write_text(text.replace(f"{key}false", f"{key}true"))
    bare = diagnose(run.start([failure(0, "OutOfMemoryError", "CUDA out of memory.")])).cure
    known = diagnose(
        run.start([failure(0, "OutOfMemoryError", "CUDA out of memory.")], config=str(config))
    ).cure
    assert "use_activation_checkpointing: true" in bare
    assert "use_activation_checkpointing" not in known
    assert "max_seq_len is" in known


def test_ranks_that_only_lost_one_name_the_silent_one(run: Run) -> None:
    evidence = run.start([lost(0, 0), lost(1, 0), lost(3, 0)])
    cause = diagnose(evidence)
    assert cause.name == "rank-silent"
    assert "rank 2 on gpu08 left without a word, after step 120" in cause.sentence
    everybody = diagnose(run.start([lost(rank, 0) for rank in range(4)]))
    assert everybody.name == "rank-silent"
    assert "lost each other" in everybody.sentence


def test_killed_rank_among_lost_ones(run: Run) -> None:
    evidence = run.start([lost(0, 1), lost(2, 1), lost(3, 1)])
    lines = log(f"{BANNER}\nsrun: error: n1: task 1: Killed\n{TERMINATING}")
    cause = diagnose(replace(evidence, lines=lines, code=143))
    assert cause.name == "rank-killed"
    assert "rank 1 on n1 was ended by SIGKILL" in cause.sentence
    assert cause.may_pass


# --- ends that were asked for ---------------------------------------------------------------------


def test_finished_whatever_came_after_it(run: Run) -> None:
    evidence = run.start(end=EndRecord(time.time(), "finished", 400))
    cause = diagnose(replace(evidence, code=143, lines=log(f"{BANNER}\n{TERMINATING}")))
    assert (cause.name, cause.step, cause.may_pass) == ("finished", 400, False)


def test_stop_by_signal(run: Run) -> None:
    cause = diagnose(run.start(end=stop("SIGUSR1")))
    assert cause.name == "stopped"
    assert "stopped on request by SIGUSR1; everything is saved, after step 120" in cause.sentence
    assert cause.may_pass


def test_stop_for_a_near_time_limit(run: Run) -> None:
    evidence = run.start(end=stop("SIGUSR1"))
    begun = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() - 3480))
    facts = {**RUNNING, "StartTime": begun, "TimeLimit": "01:00:00"}
    cause = diagnose(replace(evidence, facts=facts))
    assert cause.name == "stopped"
    assert re.search(r"its time limit was \d.* away; everything is saved", cause.sentence)
    facts["TimeLimit"] = "1-00:00:00"
    assert "on request" in diagnose(replace(evidence, facts=facts)).sentence


def test_stop_without_saving(run: Run) -> None:
    cause = diagnose(run.start(end=stop("SIGTERM", saved=False)))
    assert (cause.name, cause.may_pass) == ("stopped-unsaved", False)
    assert "checkpointing_enabled" in cause.cure


def test_preemption(run: Run) -> None:
    line = (
        "slurmstepd: error: *** JOB 17 ON n1 CANCELLED AT 2026-11-21T11:25:01 DUE TO PREEMPTION ***"
    )
    cause = of_log(line, TERMINATING)
    assert (cause.name, cause.may_pass) == ("preempted", True)
    # With a grace time the job still runs when its ranks have stopped.
    facts = {**RUNNING, "PreemptTime": "2026-11-21T11:25:14"}
    cause = diagnose(replace(run.start(end=stop("SIGUSR1")), facts=facts))
    assert cause.name == "preempted"
    assert "everything is saved, after step 120" in cause.sentence


def test_node_failure() -> None:
    cause = of_log(
        "srun: error: Node failure on n2",
        "slurmstepd-n1: error: *** STEP 17.0 ON n1 CANCELLED AT 2026-11-21T11:25:41 DUE TO NODE "
        "FAILURE, SEE SLURMCTLD LOG FOR DETAILS ***",
        "srun: error: n1: tasks 0-1: Terminated",
    )
    assert (cause.name, cause.host, cause.may_pass) == ("node-failed", "n2", True)
    facts = {"JobState": "NODE_FAIL", "Reason": "NodeDown", "Restarts": "0"}
    assert of_log(facts=facts).name == "node-failed"


def test_node_of_the_script_vanishes_without_a_word() -> None:
    """Then nothing ends in the log: the next start just follows."""
    assert of_log("step 10/400  epoch 0.1  loss 2.1", followed=True).name == "node-failed"
    assert of_log("step 10/400  epoch 0.1  loss 2.1").name == "unknown"


def test_requeue_from_outside() -> None:
    assert of_log(REQUEUED, TERMINATING).name == "requeued"


def test_requeue_that_slurm_has_counted_while_the_job_concludes(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    run.start(end=stop("SIGTERM"))
    facts = {**RUNNING, "JobState": "COMPLETING", "Restarts": "1"}
    assert diagnose(evidence_of_job(run.folder, 0, None, facts)).name == "requeued"
    facts["Restarts"] = "0"
    assert diagnose(evidence_of_job(run.folder, 0, None, facts)).name == "cancelled"


def test_cancel(run: Run) -> None:
    cause = of_log(CANCELLED, facts={"JobState": "CANCELLED", "Reason": "None", "Restarts": "0"})
    assert (cause.name, cause.may_pass) == ("cancelled", False)
    assert of_log(CANCELLED).name == "cancelled"
    # Its ranks may stop and save in time; the job must not rise again for that.
    facts = {**RUNNING, "JobState": "COMPLETING"}
    cause = diagnose(replace(run.start(end=stop("SIGTERM")), facts=facts))
    assert (cause.name, cause.may_pass) == ("cancelled", False)
    assert "everything is saved" in cause.sentence


def test_cancel_names_who_did_it() -> None:
    rows = [{"JobID": "17", "State": "CANCELLED by 0", "ExitCode": "0:0"}]
    cause = of_log(CANCELLED, rows=rows)
    assert "by root (scancel)" in cause.sentence
    before = diagnose(Evidence(job="17", number=1, rows=rows))
    assert "cancelled by root (scancel) before it began" in before.sentence


def test_cancelled_step_is_told_from_a_step_that_srun_ends() -> None:
    killed = "srun: error: n1: task 1: Killed"
    aborted = "srun: Job step aborted: Waiting up to 5 seconds for job step to finish."
    step = TERMINATING.split("\n")[1]
    for lines in ([step, aborted], [aborted, step], [killed, step], [killed, aborted], [aborted]):
        assert "its step was cancelled" in of_log(*lines, TERMINATING).sentence, lines
    assert of_log(killed, TERMINATING).name == "rank-killed"


def test_step_that_a_cancelled_job_could_not_create_is_no_cause() -> None:
    words = (
        "srun: error: Unable to create step for job 17: Job/step already completing or completed"
    )
    assert of_log(words, facts={"JobState": "CANCELLED"}).name == "cancelled"


def test_time_limit_by_slurms_words(run: Run) -> None:
    evidence = run.start()
    by_state = replace(evidence, facts={"JobState": "TIMEOUT", "TimeLimit": "08:00:00"})
    cause = diagnose(by_state)
    assert cause.name == "time-limit"
    assert "(08:00:00) was reached before it had saved; there is no checkpoint" in cause.sentence
    assert "signal_lead_s" in cause.cure
    completing = {"JobState": "COMPLETING", "Reason": "TimeLimit", "Restarts": "0"}
    assert diagnose(replace(evidence, facts=completing)).name == "time-limit"
    # The run had saved and left; only its script was still there.
    lines = log(f"{BANNER}\n{REQUEUED.replace('JOB REQUEUE', 'TIME LIMIT')}")
    saved = replace(run.start(end=stop("SIGUSR1")), facts={"JobState": "TIMEOUT"}, lines=lines)
    assert diagnose(saved).name == "stopped"


def test_run_that_saves_after_its_time_limit(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm asks with SIGTERM then, as for a cancel, and waits KillWait seconds."""
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    run.start(end=stop("SIGTERM"))
    facts = {**RUNNING, "JobState": "COMPLETING", "Reason": "TimeLimit", "Restarts": "0"}
    cause = diagnose(evidence_of_job(run.folder, 0, None, facts))
    assert (cause.name, cause.may_pass) == ("stopped", True)
    assert "everything is saved, after step 120" in cause.sentence


def test_killed_by_the_kernel_by_state_and_by_size(run: Run) -> None:
    rows = [
        {"JobID": "17", "State": "OUT_OF_MEMORY", "ExitCode": "0:125"},
        {"JobID": "17.0", "State": "OUT_OF_MEMORY", "MaxRSS": "118G"},
        {"JobID": "17.batch", "State": "OUT_OF_MEMORY", "MaxRSS": "9000K"},
    ]
    cause = diagnose(replace(run.start(), rows=rows))
    assert cause.name == "host-out-of-memory"
    assert "MaxRSS 118G" in [line.text for line in cause.proof]


def test_job_ended_by_its_script_alone_is_unknown_with_its_last_lines() -> None:
    cause = of_log("something odd", "the last words", code=9)
    assert cause.name == "unknown"
    assert "exit code 9" in cause.sentence
    assert "the last words" in [line.text for line in cause.proof]


def test_without_slurm_its_commands_are_not_named(run: Run) -> None:
    cause = diagnose(run.start(job=None))
    assert cause.name == "unknown"
    assert "sacct" not in cause.cure
    assert "df tells" in cause.cure or "df whether the disk is full" in cause.cure


def test_unknown_says_where_it_looked() -> None:
    cause = diagnose(Evidence(job="17", number=1))
    assert cause.name == "unknown"
    assert "no record of the start, no log, no Slurm on this machine" in cause.sentence


# --- not over -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "words", "cure"),
    [
        ("Priority", "other jobs come first", "starts by itself"),
        ("Resources", "waits for free nodes", "starts by itself"),
        ("QOSMaxGRESPerUser", "quality of service", "ask for less"),
        ("AssocGrpCPULimit", "limit of its account", "ask for less"),
        ("DependencyNeverSatisfied", "never start", "scancel it"),
        ("BeginTime", "may not start yet", "starts by itself"),
        ("ReqNodeNotAvail,_UnavailableNodes:n1", "down or reserved", "maintenance"),
        ("JobHeldUser", "held by its user", "scontrol release 17"),
        ("PartitionTimeLimit", "more time than", "lower slurm.time"),
        ("launch_failed_requeued_held", "launch_failed_requeued_held", "scontrol show job"),
    ],
)
def test_waiting(reason: str, words: str, cure: str) -> None:
    facts = {"JobState": "PENDING", "Reason": reason, "StartTime": "Unknown"}
    cause = diagnose(Evidence(job="17", number=1, facts=facts))
    assert cause.name == "waiting"
    assert words in cause.sentence
    assert cure in cause.cure


def test_running_and_stuck(run: Run) -> None:
    evidence = replace(run.start(), code=None, facts=RUNNING)
    assert diagnose(evidence).name == "running"
    later = diagnose(replace(evidence, now=time.time() + 4000))
    assert later.name == "stuck"
    assert "nothing was heard of it for 1 h 6 min" in later.sentence
    assert "--jobid 17 " in later.cure
    suspended = replace(evidence, facts={**RUNNING, "JobState": "SUSPENDED"})
    assert "suspended" in diagnose(suspended).sentence


def test_failure_is_told_while_the_job_still_runs(run: Run) -> None:
    evidence = replace(run.start([failure(3, "KeyError", "'x'")]), code=None, facts=RUNNING)
    assert diagnose(evidence).name == "rank-failed"


def test_healthy_run_with_a_traceback_in_its_log_runs(run: Run) -> None:
    """Libraries print tracebacks of what they have dealt with."""
    lines = log(
        f"{BANNER}\nTraceback (most recent call last):\n  File x\nOSError: handled\nstep 5/9  "
    )
    assert diagnose(replace(run.start(), code=None, facts=RUNNING, lines=lines)).name == "running"


def test_run_without_slurm_lives_by_its_own_sign(run: Run, tmp_path: Path) -> None:
    dead = replace(run.start(job=None), code=None)
    assert diagnose(dead).name == "unknown"
    record = replace(new_start(""), job=None, hosts=["here"])
    Journal.begin(run.folder, record)
    living = Evidence(number=1, start=past_starts(run.folder)[-1])
    assert diagnose(living).name == "running"


# --- near misses ----------------------------------------------------------------------------------


def test_words_in_training_text_are_no_evidence() -> None:
    cause = of_log(
        "sample 4: the pod was OOM-killed: CUDA out of memory, No space left on device",
        "DUE TO TIME LIMIT he said, and srun: error: n1: task 1: Killed",
        "  KeyError: 'x'",
        "TypeError: a line of a text, after no traceback",
        "step 10/400  epoch 0.1  loss 2.1",
        code=1,
    )
    assert cause.name == "unknown"


def test_what_the_conclusion_printed_is_not_read_again(tmp_path: Path) -> None:
    path = tmp_path / "job.log"
    path.write_text(
        f"{BANNER}\nstep 10/400  epoch 0.1\n"
        "vectorlm: stopped on request by SIGUSR1; everything is saved, after step 10\n"
        "vectorlm: starting again (start 2, of at most 51)\n"
        f"{REQUEUED}\n"
    )
    [section] = sections(path)
    assert [line.text for line in section.lines()] == [BANNER, "step 10/400  epoch 0.1"]


def test_terminated_ranks_are_a_consequence() -> None:
    cause = of_log("srun: error: n2: task 3: Exited with exit code 1", TERMINATING)
    assert cause.name == "unknown"
    assert "task 3: Exited with exit code 1" in cause.proof[0].text


def test_exit_code_two_of_a_missing_program_is_no_mistake() -> None:
    """srun leaves with 2 when it finds no python, too."""
    cause = of_log(
        "slurmstepd-n1: error: execve(): python: No such file or directory",
        "srun: error: n1: tasks 0-1: Exited with exit code 2",
    )
    assert cause.name == "software-missing"


@pytest.mark.parametrize("code", [126, 127])
def test_exit_codes_of_a_shell_that_found_no_program(code: int) -> None:
    """What it says of it may be lost: srun ends at the code."""
    end = f"srun: error: n1: task 0: Exited with exit code {code}"
    cause = of_log(end, TERMINATING)
    assert cause.name == "software-missing"
    assert f"n1: Exited with exit code {code}" in cause.sentence
    assert cause.proof[0].text == end
    assert of_log(f"{end}0").name == "unknown"


def test_mistake_before_the_folder_is_claimed_is_read_from_the_log() -> None:
    said = "config.yaml:3: train_parameters.epochs: must be a whole number"
    cause = of_log(said, said, "srun: error: n2: tasks 2-3: Exited with exit code 2", code=2)
    assert (cause.name, cause.sentence, cause.may_pass) == ("mistake", said, False)
    by_script = of_log(
        "c.yaml: no such file in /home/ada", facts={"JobState": "FAILED", "ExitCode": "2:0"}
    )
    assert by_script.name == "mistake"


def test_exception_in_the_log_alone_does_not_outweigh_slurm() -> None:
    lines = (
        "Traceback (most recent call last):\n  File x\nRuntimeError: cannot schedule new futures\n"
        "slurmstepd: error: *** JOB 17 ON n1 CANCELLED AT 2026-11-21T11:24:12 DUE TO PREEMPTION ***"
    )
    assert of_log(lines).name == "preempted"
    assert of_log(lines.rsplit("\n", 1)[0], code=1).name == "rank-failed"


def test_exception_that_was_ignored_is_ignored() -> None:
    lines = (
        "Exception ignored in: <function _Pool.__del__ at 0x7f>\n"
        "Traceback (most recent call last):\n  File x\nKeyError: 'gone'"
    )
    assert of_log(lines, code=1).name == "unknown"


def test_watchdog_abort_is_a_timeout_and_a_bare_abort_is_not() -> None:
    text = (RECORDED / "collective-timeout.log").read_text()
    aborted = "srun: error: gpu07: tasks 0-1,3: Aborted (core dumped)"
    assert aborted in text
    assert of_log(aborted).name == "rank-killed"
    assert of_log(aborted).cure.startswith("A native library gave up")


def test_network_that_fails_after_a_timeout_is_no_cause() -> None:
    timeout = (RECORDED / "collective-timeout.log").read_text()
    abort = "gpu07:1:2 [0] misc/socket.cc:881 NCCL WARN socketProgress: Connection closed by peer\n"
    assert of_log(timeout, abort).name == "collective-timeout"
    assert of_log(abort, timeout).name == "network-failed"


# --- flight recorders -----------------------------------------------------------------------------


def flight(rank: int, begun: int, ended: int, place: str | None = None) -> Flight:
    operations = {n: Operation(n, "all_reduce", "[[2]]", place) for n in range(1, begun + 1)}
    return Flight(rank, {"0": Group("0", "default_pg", frozenset(), begun, ended, operations)})


def test_flight_recorder_names_the_late_rank_and_what_it_did(run: Run) -> None:
    flights = {r: flight(r, 9, 8) for r in (0, 1, 3)}
    flights[2] = flight(2, 8, 8, "save in vectorlm/checkpoint.py:203")
    cause = diagnose(replace(run.start([lost(0, 0)]), flights=flights))
    assert (cause.name, cause.rank, cause.host) == ("collective-timeout", 2, "gpu08")
    assert "all_reduce number 9 of all ranks" in cause.sentence
    assert "last seen in all_reduce from save in vectorlm/checkpoint.py:203" in cause.sentence
    del flights[2]
    silent = diagnose(replace(run.start([lost(0, 0)]), flights=flights))
    assert "rank 2 on gpu08 was not in it; it wrote no record either" in silent.sentence


def test_late_rank_that_failed_is_the_failure_itself(run: Run) -> None:
    flights = {r: flight(r, 9, 8) for r in (0, 1, 3)}
    failed = failure(2, "RuntimeError", "DataLoader worker is killed by signal: Terminated")
    cause = diagnose(replace(run.start([failed]), flights=flights))
    assert cause.name == "collective-timeout"
    assert "it had failed of RuntimeError: DataLoader" in cause.sentence


def test_everybody_was_there(run: Run) -> None:
    cause = diagnose(
        replace(run.start([lost(0, 0)]), flights={r: flight(r, 9, 8) for r in range(4)})
    )
    assert "every rank was in it" in cause.sentence
    assert "slurm.network_interface" in cause.cure


# --- of a job that concludes ----------------------------------------------------------------------


def test_conclusion_sees_its_own_start_only(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.start([failure(0, "KeyError", "'of the start before'")], restart=0)
    path = tmp_path / "job.log"
    path.write_text(
        f"{BANNER}\n{(RECORDED / 'gpu-out-of-memory.log').read_text().split(chr(10), 1)[1]}"
        "== vectorlm: job 17, start 2, 2026-11-03T09:12:44+01:00, on n[1-2]\n"
        f"srun: error: n1: task 1: Killed\n{TERMINATING}\n"
    )
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    evidence = evidence_of_job(run.folder, 143, path, {**RUNNING, "Restarts": "1"})
    assert evidence.start is None
    assert diagnose(evidence).name == "rank-killed"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    evidence = evidence_of_job(run.folder, 1, path, RUNNING)
    assert evidence.start
    assert evidence.lines[0].text == BANNER
    assert all("start 2" not in line.text for line in evidence.lines)
    assert diagnose(evidence).name == "rank-failed"


def test_conclusion_where_the_disk_took_no_record() -> None:
    """The first rank's own lines then say what happened; a start that left with 0 did not fail."""
    cause = of_log("finished: /runs/a/final-model", code=0)
    assert (cause.name, cause.may_pass) == ("finished", False)
    line = "stopped by SIGUSR1: everything is saved; start the same command again to go on"
    cause = of_log(line, code=0)
    assert (cause.name, cause.may_pass) == ("stopped", True)
    cause = of_log("step 10/400  epoch 0.1", code=0)
    assert (cause.name, cause.may_pass) == ("unknown", False)


def test_conclusion_without_anything() -> None:
    assert diagnose(evidence_of_job("/nowhere", 1, None, None)).name == "unknown"


# --- what is printed ------------------------------------------------------------------------------


def test_explanation_of_a_job(run: Run, tmp_path: Path) -> None:
    run.start(end=stop("SIGUSR1"))
    run.start([failure(3, "TrainingError", OUT_OF_MEMORY)], restart=2)
    path = tmp_path / "vectorlm-17.log"
    path.write_text(
        f"{BANNER}\nstep 10/400  epoch 0.1\n"
        "== vectorlm: job 17, start 2, 2026-11-03T09:12:44+01:00, on n[1-2]\n"
        "srun: error: Node failure on n2\n"
        "== vectorlm: job 17, start 3, 2026-11-03T09:12:44+01:00, on n[1-2]\nstep 120/400  \n"
    )
    journal.remember_job("17", run.folder, str(path))
    text = explain("17").splitlines()
    assert text[0].startswith("job 17, start 3: the GPU's memory was used up on rank 3 on gpu08")
    assert text[1].startswith("Set train_parameters.use_activation_checkpointing: true")
    assert text[2] == "evidence:"
    assert text[3].startswith("    rank-3.json: TrainingError: out of memory on rank 3")
    earlier = text.index("earlier:")
    assert text[earlier + 1].startswith("    job 17, start 1: stopped on request by SIGUSR1; ")
    assert text[earlier + 2].startswith("    job 17, start 2: node n2 failed; ")
    assert explain(str(run.folder)).splitlines() == text


def test_explanation_of_a_run_without_slurm(run: Run) -> None:
    run.start(job=None, end=stop("SIGINT"))
    run.start([failure(1, "KeyError", "'x'")], job=None)
    text = explain(str(run.folder)).splitlines()
    assert text[0].startswith("start 2: rank 1 on gpu07, after step 120 failed: KeyError: 'x'")
    assert text[-1].startswith("    start 1: stopped on request by SIGINT")


def test_many_starts_are_told_in_few_lines(run: Run) -> None:
    for restart in range(15):
        run.start(end=stop("SIGUSR1"), restart=restart)
    text = explain(str(run.folder)).splitlines()
    assert sum(line.startswith("    job 17") for line in text) == 10
    assert "    4 more before these" in text


def test_log_in_the_current_folder_is_found_by_the_jobs_number(tmp_path: Path) -> None:
    (tmp_path / "vectorlm-4107.log").write_text((RECORDED / "no-gpu.log").read_text())
    journal.remember_job("4107", tmp_path / "output", None)
    assert "No CUDA GPUs are available" in explain("4107")


def test_what_is_not_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="nothing is noted"):
        explain("4711")
    with pytest.raises(ClusterError, match="no such folder"):
        explain(str(tmp_path / "absent"))


# --- hostile files --------------------------------------------------------------------------------


def test_hostile_log_neither_crashes_nor_reaches_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "vectorlm-17.log"
    path.write_bytes(
        BANNER.encode()
        + b"\n\x00\xff\xfe\x1b]0;owned\x07\x1b[2J\x1b[31mred\r\rover it\n"
        + b"(" * 100_000
        + b"\nTraceback (most recent call last):\n"
        + b"srun: error: n1: tasks 0-99999999999,,-,x: Exited with exit code 2\n"
        + b"\x1b[1;31mRuntimeError\xc3: \xf0\x9f\n"
        + b"cut in a character \xe2\x82"
    )
    journal.remember_job("17", tmp_path / "output", str(path))
    text = explain("17")
    assert text.isprintable() or set(text) - {"\n"} <= {c for c in text if c.isprintable()}
    assert "owned" not in text


@pytest.mark.parametrize(
    "name", ["start.json", "end.json", "rank-0.json", "rank-1.json"], ids=lambda name: name
)
@pytest.mark.parametrize("content", [b"", b"\x80\x04\xff", b"[]", b'{"time": "x"}'])
def test_damaged_records_do_not_crash(run: Run, name: str, content: bytes) -> None:
    evidence = run.start([failure(0, "KeyError", "'x'")])
    assert evidence.start
    (evidence.start.folder / name).write_bytes(content)
    (run.folder / "metrics.jsonl").write_bytes(content)
    explanation = explain(str(run.folder)) if past_starts(run.folder) else "none"
    assert explanation


def test_only_the_end_of_a_huge_log_is_read(tmp_path: Path) -> None:
    path = tmp_path / "vectorlm-17.log"
    noise = "x" * 99 + "\n"
    path.write_text(f"{BANNER}\n" + noise * 300_000 + "srun: error: n1: task 1: Killed\n")
    began = time.perf_counter()
    [section] = sections(path)
    lines = section.lines()
    assert time.perf_counter() - began < 2
    assert len(lines) < 3000
    assert lines[-1].source == "vectorlm-17.log:300002"
    assert diagnose(Evidence(lines=lines)).name == "rank-killed"


# --- the table ------------------------------------------------------------------------------------


def test_every_cause_is_covered_by_a_test() -> None:
    text = Path(__file__).read_text()
    recorded = {path.name.split(".")[0] for path in RECORDED.glob("*.log")}
    named = set(re.findall(r'"([a-z]+(?:-[a-z]+)*)"', text)) | recorded
    missing = [entry.name for entry in TABLE if entry.name not in named]
    assert not missing
    assert len({entry.name for entry in TABLE}) == len(TABLE)
    assert set(NAMED) == {path.name for path in RECORDED.glob("*.log")}


def test_documentation_shows_the_table() -> None:
    text = (ROOT / "docs/slurm.md").read_text()
    section = text.split("## What ended my run\n")[1].split("\n## ")[0]
    table = "\n".join(line for line in section.splitlines() if line.startswith("|"))
    assert table == as_markdown(), "run `python -m vectorlm.cluster.causes` and paste"


def test_gather_orders_jobs_of_a_folder_by_time(run: Run) -> None:
    run.start(end=stop("SIGUSR1"), job="9")
    run.start(end=stop("SIGUSR1"), job="17")
    assert [evidence.job for evidence in gather(str(run.folder))] == ["9", "17"]
