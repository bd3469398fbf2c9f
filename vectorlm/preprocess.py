"""Preprocessing, as a pipeline over `vectorlm.data`: source, tokenizer, packer, prepared folder.
Floor 3.

Called by the doors (`preprocess_data.py`, `vectorlm preprocess`). It runs outside the training job,
on one CPU node; what it holds in memory is one batch of texts and one batch of rows, however large
the corpus.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from vectorlm.config.schema import Config, DatasetPreprocess
from vectorlm.data.pack import Document, Packer, make_packer
from vectorlm.data.readers import BadRow, TextRow
from vectorlm.data.sources import Source, find_source
from vectorlm.data.store import RowWriter, existing_manifest, open_rows
from vectorlm.data.tokenize import DocumentEncoder, TextTokenizer, batches, load_tokenizer
from vectorlm.errors import ConfigError, DataError
from vectorlm.hub_cache import find_model
from vectorlm.manifest import Manifest, options_sha256
from vectorlm.tokenizer_files import tokenizer_file_sha256

BAD_ROWS_SHOWN = 3
PLAIN_EVERY_S = 5.0
SLOW_HASH_BYTES = 2 << 30

Good = TypeVar("Good", TextRow, Document)


@dataclass(frozen=True)
class Job:
    """One prepared folder to make: from what, how, and where to."""

    name: str
    source: Source
    save_path: str
    split: str | None
    max_seq_len: int
    options: DatasetPreprocess


def prepare_config(config: Config) -> list[Manifest]:
    """Prepares the training data and, if asked for, the evaluation data; what is up to date is
    left as it is."""
    jobs = find_jobs(config)
    # Mistakes in any of them come out before hours are spent on the first.
    for job in jobs:
        existing_manifest(job.save_path)
    check_length(config)
    tokenizer = replace(load_tokenizer(config.model), file_sha256=_file_sha256(config.model))
    encoders = [make_encoder(job, tokenizer) for job in jobs]
    if jobs[0].options.add_bos_eos_tokens and tokenizer.bos_id is None:
        print("The tokenizer has no BOS token: documents end with EOS but begin with nothing.")
    return [prepare(job, encoder) for job, encoder in zip(jobs, encoders, strict=True)]


def _file_sha256(model: str) -> str | None:
    folder = Path(os.path.expanduser(model))
    found = folder if folder.is_dir() else find_model(model)
    return tokenizer_file_sha256(found) if found else None


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
    max_seq_len = config.train_parameters.max_seq_len
    wanted = [("training data", options.load_path, options.split, options.save_path)]
    if options.eval_save_path:
        path = options.eval_load_path or options.load_path
        wanted.append(("evaluation data", path, options.eval_split, options.eval_save_path))
    return [
        Job(name, find_source(options, path, split), save_path, split, max_seq_len, options)
        for name, path, split, save_path in wanted
    ]


def make_encoder(job: Job, tokenizer: TextTokenizer) -> DocumentEncoder:
    options = job.options
    return DocumentEncoder(
        tokenizer,
        add_bos_eos_tokens=options.add_bos_eos_tokens,
        pre_pend=options.pre_pend,
        separator=options.separator,
        ignore_index=options.ignore_index,
    )


def used_options(job: Job) -> dict[str, Any]:
    """What shapes the rows, besides the tokenizer and the source's contents; a change of it means
    preparing anew."""
    options = job.options
    packing = options.effective_packing
    return {
        "max_seq_len": job.max_seq_len,
        "packing_type": packing,
        "overlap": options.overlap if packing == "partial" else 0,
        "add_bos_eos_tokens": options.add_bos_eos_tokens,
        "pre_pend": options.pre_pend,
        "separator": options.separator,
        "ignore_index": options.ignore_index,
        "source_format": job.source.kind,
        "split": job.split,
        "data_field": options.data_field,
        "text_rows": options.text_rows if job.source.kind == "text" else None,
        "skip_bad_rows": options.skip_bad_rows,
    }


# --- one folder ---------------------------------------------------------------------


def prepare(job: Job, encoder: DocumentEncoder) -> Manifest:
    if job.source.total_bytes > SLOW_HASH_BYTES:
        size = f"{job.source.total_bytes / 2**30:,.1f} GiB"
        print(f"Reading {job.source.name} once for its hash ({size}) ...", flush=True)
    made_from = {
        "tokenizer_sha256": encoder.tokenizer.sha256,
        "tokenizer_file_sha256": encoder.tokenizer.file_sha256,
        "source_sha256": job.source.sha256(),
        "options": used_options(job),
    }
    old = existing_manifest(job.save_path)
    if old is not None:
        reasons = changes(job, old, made_from)
        if not reasons:
            size = f"{old.rows:,} rows, {old.tokens:,} tokens"
            print(f"{job.save_path} is up to date ({size}): nothing to do")
            return old
        print(f"{job.save_path} is prepared anew: {'; '.join(reasons)}")
    return build(job, encoder, made_from)


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


def build(job: Job, encoder: DocumentEncoder, made_from: dict[str, Any]) -> Manifest:
    options = job.options
    packer = make_packer(
        options.effective_packing, job.max_seq_len, options.ignore_index, options.overlap
    )
    bad_rows = BadRows(options.skip_bad_rows)
    start = time.monotonic()
    with RowWriter(
        job.save_path, max_seq_len=job.max_seq_len, ignore_index=options.ignore_index
    ) as writer:
        with make_progress(job) as progress:
            write_rows(job.source, encoder, packer, bad_rows, writer, progress)
        skipped = bad_rows.counts + packer.skipped
        if not writer.supervised_tokens:
            raise DataError(nothing_left(job, skipped, bad_rows))
        job.source.check_unchanged()
        manifest = writer.publish(documents=packer.documents, skipped=skipped, **made_from)
    print(summary(job, manifest, packer, bad_rows, time.monotonic() - start))
    return manifest


def write_rows(
    source: Source,
    encoder: DocumentEncoder,
    packer: Packer,
    bad_rows: BadRows,
    writer: RowWriter,
    progress: Progress,
) -> None:
    for texts in batches(bad_rows.filter(source.rows())):
        documents = list(bad_rows.filter(encoder.encode(texts)))
        for document in documents:
            for row in packer.add(document):
                writer.add(row)
        progress.update(
            len(documents), sum(len(document.ids) for document in documents), source.fraction()
        )
    for row in packer.finish():
        writer.add(row)
    writer.flush()


class BadRows:
    """Stops at the first bad row, or counts them by reason and keeps the first few to show."""

    def __init__(self, skip: bool) -> None:
        self.skip = skip
        self.counts: Counter[str] = Counter()
        self.shown: list[str] = []

    def filter(self, items: Iterable[Good | BadRow]) -> Iterator[Good]:
        for item in items:
            if isinstance(item, BadRow):
                self.add(item)
            else:
                yield item

    def add(self, bad: BadRow) -> None:
        if not self.skip:
            raise DataError(
                f"{bad.where}: {bad.detail}.\n"
                "Mend the row, "
                "or set dataset_preprocess.skip_bad_rows: true to skip and count such rows."
            )
        self.counts[bad.reason] += 1
        if len(self.shown) < BAD_ROWS_SHOWN:
            self.shown.append(f"{bad.where}: {bad.detail}")


# --- what is said -------------------------------------------------------------------


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


# --- progress -----------------------------------------------------------------------


class Progress:
    """Counts, and says every few seconds how far it is: one plain line, for logs."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.documents = self.tokens = 0
        self.start = self.said = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self, documents: int, tokens: int, fraction: float) -> None:
        self.documents += documents
        self.tokens += tokens
        self.show(min(fraction, 1.0))

    def show(self, fraction: float) -> None:
        now = time.monotonic()
        if now - self.said >= PLAIN_EVERY_S:
            self.said = now
            left = (now - self.start) * (1 - fraction) / max(fraction, 1e-9)
            print(
                f"{self.name}: {fraction:.0%}, {self.rates()}, about {duration(left)} left",
                flush=True,
            )

    def rates(self) -> str:
        seconds = max(time.monotonic() - self.start, 1e-9)
        return f"{self.documents / seconds:,.0f} documents/s, {self.tokens / seconds:,.0f} tokens/s"


class TerminalProgress(Progress):
    """The same as a bar."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        from rich import progress

        columns = (
            "{task.description}",
            progress.BarColumn(),
            progress.TaskProgressColumn(),
            "{task.fields[rates]}",
        )
        self.bar = progress.Progress(*columns, progress.TimeRemainingColumn(), transient=True)
        self.task = self.bar.add_task(name, total=1.0, rates="")

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.refresh()  # a quick run may end between two of its ticks
        self.bar.stop()

    def show(self, fraction: float) -> None:
        self.bar.update(self.task, completed=fraction, rates=self.rates())


def make_progress(job: Job) -> Progress:
    return (TerminalProgress if sys.stdout.isatty() else Progress)(job.name)


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
