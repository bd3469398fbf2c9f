"""One start of a run: the folder it holds, and what is written down of it. Floor 3, used by
`assemble`.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from vectorlm.cluster import journal, slurm
from vectorlm.cluster.claim import Claim, take
from vectorlm.cluster.journal import EndRecord, Journal, RankRecord
from vectorlm.distributed import Ranks
from vectorlm.errors import EXIT_FAULT, ClusterError, VectorLMError


class Attempt:
    """Taken by all ranks together; whatever ends a rank inside of it is recorded."""

    def __init__(self, ranks: Ranks, output_dir: str, config_path: str) -> None:
        self.ranks = ranks
        self.step: Callable[[], int | None] = lambda: None
        record = replace(
            journal.new_start(config_path), hosts=ranks.gather(os.uname().nodename), log=None
        )
        claim = ranks.together(lambda: take(output_dir, record) if ranks.first else None)
        self._journal, self._record = None, record
        if ranks.first:
            self._begin_journal(output_dir)
        number, start_id = ranks.from_first((self._record.number, self._record.id))
        if number and not ranks.first:
            self._journal = Journal(Path(output_dir) / journal.STARTS / f"{number:04d}")
        self._claim = claim or Claim(output_dir, start_id)
        self._claim.watch(self._leave)

    def _begin_journal(self, output_dir: str) -> None:
        job = self._record.job
        log = _log_of(job) if job else None
        self._record = replace(self._record, log=log)
        with suppress(OSError):  # it is not needed to train
            self._journal, self._record = Journal.begin(output_dir, self._record)
        if job:
            journal.remember_job(job, output_dir, log)

    def located(self, resumed_from: int | None, total_steps: int) -> None:
        """Add where the run goes on, as soon as that is known."""
        self._record = replace(self._record, resumed_from=resumed_from, total_steps=total_steps)
        if self.ranks.first:
            self._write(lambda diary: diary.started(self._record))

    def require_folder(self) -> None:
        """Before anything is published: a start that has lost its folder ends here."""
        loss = self._claim.loss()
        if loss is not None:
            self._leave(loss)

    def ended(self, outcome: journal.Outcome, signal: str | None, saved: bool) -> None:
        """All is written. Ranks leave together: srun ends those that are late."""
        if self.ranks.first:
            end = EndRecord(time.time(), outcome, self.step(), signal, saved)
            self._write(lambda diary: diary.ended(end))
        self.ranks.barrier()

    def __enter__(self) -> Attempt:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._record_failure(error)
        self._claim.release()

    def _record_failure(self, error: BaseException) -> None:
        record = RankRecord(
            rank=self.ranks.rank,
            host=os.uname().nodename,
            time=time.time(),
            kind=type(error).__name__,
            message=str(error),
            traceback="".join(traceback.format_exception(error)),
            code=error.exit_code if isinstance(error, VectorLMError) else EXIT_FAULT,
            step=self.step(),
        )
        self._write(lambda diary: diary.failed(record))

    def _write(self, write: Callable[[Journal], None]) -> None:
        if self._journal is not None:
            with suppress(OSError):  # a full disk is told by what needs the disk
                write(self._journal)

    def _leave(self, loss: str) -> NoReturn:
        self._record_failure(ClusterError(loss))
        print(f"rank {self.ranks.rank}: {loss}", file=sys.stderr, flush=True)
        os._exit(EXIT_FAULT)


def _log_of(job: str) -> str | None:
    known = journal.job_facts(job)
    if known and known.get("log"):
        return str(known["log"])
    try:
        return (slurm.show_job(job) or {}).get("StdOut")
    except ClusterError:
        return None
