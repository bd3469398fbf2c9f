"""What ended a run, in a sentence, and what to change: `vectorlm why JOB|DIR`; a job that concludes
decides by the same. Floor 1.

`diagnose` looks a cause up in the table (`causes`); `evidence_of_job` and `gather` (`evidence`)
bring together what there is to look at.
"""

from __future__ import annotations

from collections.abc import Iterator

from vectorlm.cluster.causes import Cause, diagnose
from vectorlm.cluster.evidence import Evidence, evidence_of_job, gather

__all__ = ["Cause", "Evidence", "diagnose", "evidence_of_job", "explain", "gather"]

SHOWN_STARTS = 10
SHOWN_LINES = 4
QUOTED_CHARACTERS = 160


def explain(given: str) -> str:
    """What `vectorlm why` prints of a job or a folder."""
    *earlier, newest = gather(given)
    return "\n".join([*_newest(newest), *_earlier(earlier)])


def _newest(evidence: Evidence) -> Iterator[str]:
    cause = diagnose(evidence)
    yield f"{_name(evidence)}: {cause.sentence}"
    yield f"{cause.cure}."
    if cause.proof:
        yield "evidence:"
    for line in cause.proof[:SHOWN_LINES]:
        text = line.text.strip()
        short = text if len(text) <= QUOTED_CHARACTERS else text[:QUOTED_CHARACTERS] + "..."
        yield f"    {line.source}: {short}"


def _earlier(found: list[Evidence]) -> Iterator[str]:
    if not found:
        return
    yield "earlier:"
    if len(found) > SHOWN_STARTS:
        yield f"    {len(found) - SHOWN_STARTS} more before these"
    for evidence in found[-SHOWN_STARTS:]:
        yield f"    {_name(evidence)}: {diagnose(evidence).sentence}"


def _name(evidence: Evidence) -> str:
    if evidence.job:
        return f"job {evidence.job}, start {evidence.number}"
    number = evidence.start.start.number if evidence.start else evidence.number
    return f"start {number}"
