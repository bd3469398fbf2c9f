"""Preprocessing, as a pipeline over `vectorlm.data`: source, encoder, packer, prepared folder.
Floor 3.

Called by the doors (`preprocess_data.py`, `vectorlm preprocess`). It runs outside the training job,
on one CPU node. Reading, encoding, and packing with writing go on at the same time, each a few
batches ahead of the next; what is held in memory does not grow with the corpus. An interrupted run
is gone on with from its last complete shard, and makes the same files to the byte.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vectorlm.config.schema import Config, DatasetPreprocess
from vectorlm.data.ahead import Ahead, Later
from vectorlm.data.best_fit import BestFitPacker, window_tokens
from vectorlm.data.documents import Documents, Encoder, RowEncoder
from vectorlm.data.engine import IdsDiffer
from vectorlm.data.mixture import (
    HeldOut,
    MixedEncoder,
    Mixture,
    Part,
    find_part,
    find_parts,
    joined_source,
)
from vectorlm.data.pack import Packer, make_packer
from vectorlm.data.progress import Progress, make_progress
from vectorlm.data.sources import Source
from vectorlm.data.store import RowWriter, existing_manifest, open_rows
from vectorlm.data.text_encoder import TextEncoder
from vectorlm.data.tokenize import TextTokenizer, load_tokenizer
from vectorlm.data.workers import Workers
from vectorlm.errors import ConfigError, DataError
from vectorlm.manifest import Manifest, options_sha256
from vectorlm.row_batch import BadRow, Position, RowBatch

BAD_ROWS_SHOWN = 3
SLOW_HASH_BYTES = 2 << 30
BATCHES_AHEAD = 1


@dataclass(frozen=True)
class Job:
    """One prepared folder to make: from what, how, and where to."""

    name: str
    source: Source
    save_path: str
    split: str | None
    max_seq_len: int
    seed: int
    options: DatasetPreprocess
    model: str
    parts: tuple[Part, ...]
    held: bool | None = None  # with val_split: whether it is the side held out


def prepare_config(config: Config) -> list[Manifest]:
    """Prepares the training data and, if asked for, the evaluation data; what is up to date is
    left as it is."""
    jobs = find_jobs(config)
    # Mistakes in any of them come out before hours are spent on the first.
    for job in jobs:
        existing_manifest(job.save_path)
    check_length(config)
    if jobs[0].options.workers:
        # Read by the libraries when they start their threads; otherwise they take all cores that
        # this process may use.
        os.environ["RAYON_NUM_THREADS"] = str(jobs[0].options.workers)
    tokenizer = load_tokenizer(config.model)
    encoders = [make_encoder(job, tokenizer) for job in jobs]
    tell_formats(jobs)
    texts = any(part.rows.is_text for job in jobs for part in job.parts)
    if texts and jobs[0].options.add_bos_eos_tokens and tokenizer.bos_id is None:
        print("The tokenizer has no BOS token: documents end with EOS but begin with nothing.")
    return [prepare(job, encoder) for job, encoder in zip(jobs, encoders, strict=True)]


def check_length(config: Config) -> None:
    """Rows that the model cannot take are refused before hours are spent on making them."""
    try:
        model = json.loads((Path(config.model) / "config.json").read_text(encoding="utf-8"))
        limit = model.get("text_config", model).get("max_position_embeddings")
    except (OSError, ValueError, AttributeError):
        return  # a tokenizer alone is enough to prepare data; training looks at the model
    wanted = config.train_parameters.max_seq_len
    if isinstance(limit, int) and wanted > limit:
        raise ConfigError(
            f"train_parameters.max_seq_len: {wanted} is more than the {limit} positions that "
            f"{config.model} has; set at most {limit}"
        )


def find_jobs(config: Config) -> list[Job]:
    options = config.dataset_preprocess
    if options is None:
        raise ConfigError(
            "dataset_preprocess: this section is needed to prepare data; see docs/config.md."
        )
    held = None if options.val_split is None else False
    jobs = [make_job(config, "training data", options.save_path, find_parts(options), held)]
    if options.eval_save_path:
        if held is not None:
            parts = find_parts(options, once=True)
        else:
            alone = options.model_copy(update={"datasets": []})
            path = options.eval_load_path or options.load_path
            parts = [find_part(alone, path, options.eval_split)]
        held = None if held is None else True
        jobs.append(make_job(config, "evaluation data", options.eval_save_path, parts, held))
    return jobs


def make_job(
    config: Config, name: str, save_path: str, parts: list[Part], held: bool | None
) -> Job:
    train = config.train_parameters
    assert config.dataset_preprocess is not None
    return Job(
        name,
        joined_source(parts),
        save_path,
        parts[0].split,
        train.max_seq_len,
        train.seed,
        config.dataset_preprocess,
        config.model,
        tuple(parts),
        held,
    )


def make_encoder(job: Job, tokenizer: TextTokenizer) -> Encoder:
    encoders = [make_part_encoder(job, part, tokenizer) for part in job.parts]
    if isinstance(job.source, Mixture):
        return MixedEncoder(job.source, encoders, job.seed)
    return encoders[0]


def make_part_encoder(job: Job, part: Part, tokenizer: TextTokenizer) -> Encoder:
    options = part.options
    encoder: RowEncoder
    if part.rows.is_text:
        encoder = TextEncoder(
            tokenizer,
            add_bos_eos_tokens=options.add_bos_eos_tokens,
            pre_pend=options.pre_pend,
            separator=options.separator,
            ignore_index=options.ignore_index,
        )
    else:
        from vectorlm.data.chat import encoder as chat

        encoder = chat.make_encoder(options, part.rows, tokenizer, job.model, part.source.kind)
    if job.held is None or options.val_split is None:
        return encoder
    return HeldOut(encoder, options.val_split, job.seed, job.held)


def packer_for(job: Job) -> Packer:
    options = job.options
    if options.effective_packing == "best_fit":
        window = window_tokens(options.memory_mb)
        return BestFitPacker(
            job.max_seq_len, options.ignore_index, seed=job.seed, window_tokens=window
        )
    return make_packer(
        options.effective_packing, job.max_seq_len, options.ignore_index, options.overlap
    )


def used_options(job: Job) -> dict[str, Any]:
    """What shapes the rows, besides the tokenizer and the source's contents; a change of it means
    preparing anew."""
    options = job.options
    packing = options.effective_packing
    # Keys that say nothing for other packings are left out, so that what is prepared stays so.
    best_fit = {"seed": job.seed, "memory_mb": options.memory_mb} if packing == "best_fit" else {}
    used: dict[str, Any] = best_fit | {
        "max_seq_len": job.max_seq_len,
        "packing_type": packing,
        "overlap": options.overlap if packing == "partial" else 0,
        "add_bos_eos_tokens": options.add_bos_eos_tokens,
        "pre_pend": options.pre_pend,
        "separator": options.separator,
        "ignore_index": options.ignore_index,
        "skip_bad_rows": options.skip_bad_rows,
    }
    if isinstance(job.source, Mixture):
        parts = [used_of_part(job, part) | {"weight": part.weight} for part in job.parts]
        used |= {"sources": parts, "seed": job.seed}
    else:
        used |= used_of_part(job, job.parts[0])
    if job.held is not None:
        used |= {"val_split": options.val_split, "held_out": job.held, "seed": job.seed}
    return used


def used_of_part(job: Job, part: Part) -> dict[str, Any]:
    options, kind = part.options, part.source.kind
    used = {
        "source_format": kind,
        "split": part.split,
        "data_field": options.data_field,
        "text_rows": options.text_rows if kind == "text" else None,
    }
    if not part.rows.is_text:
        from vectorlm.data.chat import encoder as chat

        used |= chat.used_options(options, part.rows.row_format, job.model)
    return used


# --- one folder ---------------------------------------------------------------------


def prepare(job: Job, encoder: Encoder) -> Manifest:
    if job.source.total_bytes > SLOW_HASH_BYTES:
        size = f"{job.source.total_bytes / 2**30:,.1f} GiB"
        print(f"Reading {job.source.name} once more for its hash ({size}) ...", flush=True)
    making = Making(job, encoder)
    old = existing_manifest(job.save_path)
    if old is not None:
        reasons = changes(job, old, making.made_from())
        if not reasons:
            size = f"{old.rows:,} rows, {old.tokens:,} tokens"
            print(f"{job.save_path} is up to date ({size}): nothing to do")
            return old
        print(f"{job.save_path} is prepared anew: {'; '.join(reasons)}")
    try:
        return making.make()
    except IdsDiffer as difference:
        print(f"{job.save_path} is begun anew, with tokenizers: {difference}", flush=True)
        return Making(job, encoder).make()


def changes(job: Job, old: Manifest, made_from: dict[str, Any]) -> list[str]:
    options = made_from["options"]
    reasons = []
    if old.options_sha256 != options_sha256(options):
        changed = [
            key for key in {**old.options, **options} if old.options.get(key) != options.get(key)
        ]
        reasons += [
            f"{key} was {old.options.get(key)!r} and is {options.get(key)!r}" for key in changed
        ]
    if old.tokenizer_sha256 != made_from["tokenizer_sha256"]:
        reasons.append("the tokenizer changed")
    if old.source_sha256 != made_from["source_sha256"]:
        reasons.append("the source's contents changed")
    return reasons or damage(job.save_path)


def damage(folder: str) -> list[str]:
    try:
        open_rows(folder)
    except DataError:
        return ["its files are damaged"]
    return []


class Making:
    """One prepared folder while it is made. The source is hashed meanwhile: nothing waits for the
    hash but the manifest, and the search for an interrupted run."""

    def __init__(self, job: Job, encoder: Encoder) -> None:
        self.job = job
        self.encoder = encoder
        self.packer = packer_for(job)
        self.bad_rows = BadRows(job.options.skip_bad_rows)
        self.source_sha256 = Later(job.source.sha256)
        self.position = Position()

    def made_from(self) -> dict[str, Any]:
        return {
            "tokenizer_sha256": self.encoder.tokenizer.sha256,
            "tokenizer_file_sha256": self.encoder.tokenizer.file_sha256,
            "source_sha256": self.source_sha256.value(),
            "options": used_options(self.job),
        }

    def make(self) -> Manifest:
        job, start = self.job, time.monotonic()
        with RowWriter(
            job.save_path, max_seq_len=job.max_seq_len, ignore_index=job.options.ignore_index
        ) as writer:
            self.resume(writer)
            with make_progress(job.name) as progress:
                self.write_rows(writer, progress)
            skipped = self.bad_rows.counts + self.packer.skipped
            if not writer.supervised_tokens:
                raise DataError(nothing_left(job, skipped, self.bad_rows))
            made_from = self.made_from()
            job.source.check_unchanged()
            manifest = writer.publish(documents=self.packer.documents, skipped=skipped, **made_from)
        print(summary(job, manifest, self.packer, self.bad_rows, time.monotonic() - start))
        return manifest

    def write_rows(self, writer: RowWriter, progress: Progress) -> None:
        source, tokenizer = self.job.source, self.encoder.tokenizer
        workers = Workers(self.job.options.workers, self.job.options.memory_mb)
        with (
            Ahead(self.encoder.rows(source, self.position), BATCHES_AHEAD) as batches,
            Ahead(encoded(self.encoder, batches, workers), BATCHES_AHEAD) as all_documents,
            workers,  # ended first, so that nothing waits for them
        ):
            for documents, bad, after in all_documents:
                if progress.documents == 0 and tokenizer.engine:
                    print(f"Encoding with {tokenizer.engine}: {tokenizer.reason}", flush=True)
                self.bad_rows.add(bad)
                for block in self.packer.add(documents):
                    writer.add(block)
                self.position = after
                if writer.rest() and self.source_sha256.done:
                    writer.record(self.made_from(), self.state())
                progress.update(len(documents.offsets) - 1, len(documents.ids), source.fraction())
        for block in self.packer.finish():
            writer.add(block)
        writer.flush()

    # --- interruptions ---

    def state(self) -> dict[str, Any]:
        return {
            "packer": self.packer.state(),
            "bad_rows": self.bad_rows.state(),
            "position": list(self.position),
        }

    def resume(self, writer: RowWriter) -> None:
        state = writer.resume(self.made_from)
        if state is None:
            return
        self.packer.load_state(state["packer"])
        self.bad_rows.load_state(state["bad_rows"])
        self.position = Position(*state["position"])
        print(
            f"{self.job.save_path}: going on with an interrupted run, "
            f"from {writer.tokens:,} tokens on",
            flush=True,
        )


def encoded(
    encoder: Encoder, batches: Iterable[RowBatch], workers: Workers
) -> Iterator[tuple[Documents, list[BadRow], Position]]:
    for batch in encoder.ready(batches, workers):
        documents, bad = encoder.encode(batch)
        yield documents, batch.bad + bad, batch.after


class BadRows:
    """Stops at the first bad row, or counts them by reason and keeps the first few to show."""

    def __init__(self, skip: bool) -> None:
        self.skip = skip
        self.counts: Counter[str] = Counter()
        self.shown: list[str] = []

    def add(self, bad_rows: Iterable[BadRow]) -> None:
        for bad in bad_rows:
            if not self.skip:
                raise DataError(
                    f"{bad.where}: {bad.detail}.\n"
                    "Mend the row, "
                    "or set dataset_preprocess.skip_bad_rows: true to skip and count such rows."
                )
            self.counts[bad.reason] += 1
            if len(self.shown) < BAD_ROWS_SHOWN:
                self.shown.append(f"{bad.where}: {bad.detail}")

    def state(self) -> dict[str, Any]:
        return {"counts": dict(self.counts), "shown": self.shown}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.counts, self.shown = Counter(state["counts"]), list(state["shown"])


# --- what is said -------------------------------------------------------------------


def tell_formats(jobs: list[Job]) -> None:
    """What the rows were taken for, where they are no plain texts."""
    for line in dict.fromkeys(
        f"{part.source.name}: rows of {part.rows.row_format} ({part.rows.reason})"
        for job in jobs
        for part in job.parts
        if part.rows.reason
    ):
        print(line)


def summary(job: Job, made: Manifest, packer: Packer, bad_rows: BadRows, seconds: float) -> str:
    lines = [
        f"{job.name}: {job.save_path}, in {seconds:,.1f} s",
        f"  rows       {made.rows:,} of at most {made.max_seq_len:,} tokens; {made.fill:.1%} full",
        f"  documents  {made.documents:,}",
        f"  tokens     {made.tokens:,}; {made.supervised_tokens:,} of them learned",
    ]
    if packer.cut_documents:
        lost = f"{packer.cut_tokens:,} tokens of {packer.cut_documents:,} documents"
        lines.append(f"  cut off    {lost} (packing_type: truncate)")
    if made.skipped:
        lines.append(f"  skipped    {counts_text(made.skipped)}")
    return "\n".join(lines + [f"    {line}" for line in bad_rows.shown])


def counts_text(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.items()))


def nothing_left(job: Job, skipped: Mapping[str, int], bad_rows: BadRows) -> str:
    why = (
        f"skipped: {counts_text(skipped)}"
        if skipped
        else "it is empty, or all of its tokens stand before a separator"
    )
    return "\n".join(
        [f"load_path: {job.source.name} leaves nothing to learn ({why}).", *bad_rows.shown]
    )
