"""Is the data that a configuration names prepared, and from what the configuration says? Floor 4.

`python -m vectorlm.prepared --config F` says so in a line; exit code 0: yes, 1: no, or too much to
look at. `vectorlm submit --with-preprocess` asks, in a process of its own: to hash a tokenizer
takes transformers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from vectorlm.cli import add_config_arguments, run_door
from vectorlm.config.load import load_config
from vectorlm.config.schema import Config
from vectorlm.data.store import existing_manifest
from vectorlm.data.tokenize import load_tokenizer
from vectorlm.manifest import options_sha256
from vectorlm.preprocess import SLOW_HASH_BYTES, Job, changes, find_jobs


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="vectorlm.prepared", description=__doc__)
    add_config_arguments(parser)
    arguments = parser.parse_args(argv)
    return run_door(lambda: _tell(load_config(arguments.config, arguments.overrides)))


def _tell(config: Config) -> int:
    reason = why_not(config)
    print(reason or "The prepared data is up to date")
    return 1 if reason else 0


def why_not(config: Config) -> str | None:
    """Why data has to be prepared, or may have to be; None when preprocessing would do nothing."""
    jobs = find_jobs(config)
    for job in jobs:
        reason = _plain_reason(job)
        if reason:
            return reason
    tokenizer_sha256 = load_tokenizer(config.model).sha256
    for job in jobs:
        old = existing_manifest(job.save_path)
        made_from = {
            "tokenizer_sha256": tokenizer_sha256,
            "source_sha256": job.source.sha256(),
            "options": job.recipe,
        }
        reasons = changes(job, old, made_from) if old else ["it is gone"]
        if reasons:
            return f"{job.save_path}: {'; '.join(reasons)}"
    return None


def _plain_reason(job: Job) -> str | None:
    """What is seen without a tokenizer and without reading the source."""
    old = existing_manifest(job.save_path)
    if old is None:
        return f"{job.save_path} is not there yet"
    if old.options_sha256 != options_sha256(job.recipe):
        return f"{job.save_path} was prepared with other options"
    if job.source.total_bytes > SLOW_HASH_BYTES:
        size = f"{job.source.total_bytes / 2**30:,.1f} GiB"
        return f"{job.source.name} ({size}) is too large to be compared here, so a job does it"
    return None


if __name__ == "__main__":
    sys.exit(main())
