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
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vectorlm.chat.formats import TURNS
from vectorlm.config.data_parts import FolderToMake, folders_of
from vectorlm.config.schema import Config, DatasetPreprocess
from vectorlm.data.account import MOST_LISTED, REFUSED_NAME, Account, Refused
from vectorlm.data.ahead import Ahead, Later
from vectorlm.data.best_fit import BestFitPacker, window_tokens
from vectorlm.data.documents import Documents, Encoder, RowEncoder, without_longer
from vectorlm.data.engine import IdsDiffer
from vectorlm.data.mixture import (
    HeldOut,
    MixedEncoder,
    Mixture,
    Part,
    find_part,
    joined_source,
)
from vectorlm.data.pack import Packer, make_packer
from vectorlm.data.progress import Progress, make_progress
from vectorlm.data.sources import Source
from vectorlm.data.store import RowWriter, existing_manifest, open_rows, rewrite_manifest
from vectorlm.data.text_encoder import TextEncoder
from vectorlm.data.tokenize import TextTokenizer, load_tokenizer
from vectorlm.data.workers import Workers
from vectorlm.errors import ConfigError, DataError
from vectorlm.manifest import Manifest, SourceCounts, options_sha256
from vectorlm.recipe import Found, differences, other_places, recipe
from vectorlm.row_batch import BadRow, Position, RowBatch

SLOW_HASH_BYTES = 2 << 30
BATCHES_AHEAD = 1


@dataclass(frozen=True)
class Job:
    """One prepared folder to make: from what, how, and where to."""

    name: str
    source: Source
    folder: FolderToMake
    max_seq_len: int
    seed: int
    options: DatasetPreprocess
    model: str
    parts: tuple[Part, ...]
    recipe: dict[str, Any]

    @property
    def save_path(self) -> str:
        return self.folder.path


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
    tell_formats(jobs, tokenizer)
    texts = any(part.rows.is_text for job in jobs for part in job.parts)
    if texts and jobs[0].options.add_bos_eos_tokens and tokenizer.bos_id is None:
        print("The tokenizer has no BOS token: documents end with EOS but begin with nothing.")
    pairs = list(zip(jobs, encoders, strict=True))
    if jobs[0].folder.held is not None:
        # Where no row is held out, the training data is left as it is.
        return [prepare(*pair) for pair in reversed(pairs)][::-1]
    return [prepare(*pair) for pair in pairs]


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
    names = ("training data", "evaluation data")
    return [make_job(config, *pair) for pair in zip(names, folders_of(options), strict=False)]


def make_job(config: Config, name: str, folder: FolderToMake) -> Job:
    train = config.train_parameters
    assert config.dataset_preprocess is not None
    parts = tuple(find_part(*source) for source in folder.sources)
    found = [Found(part.source.kind, part.rows.row_format) for part in parts]
    return Job(
        name,
        joined_source(parts),
        folder,
        train.max_seq_len,
        train.seed,
        config.dataset_preprocess,
        config.model,
        parts,
        recipe(config, folder, found),
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
    held = job.folder.held
    if held is None or options.val_split is None:
        return encoder
    return HeldOut(encoder, options.val_split, job.seed, held)


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
            note_places(job, old)
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
    reasons = []
    if old.options_sha256 != options_sha256(made_from["options"]):
        reasons += differences(old.options, made_from["options"]) or ["its options changed"]
    if old.tokenizer_sha256 != made_from["tokenizer_sha256"]:
        reasons.append("the tokenizer changed")
    same_places = len(old.sources) == len(job.folder.sources) and not other_places(job.folder, old)
    if old.source_sha256 != made_from["source_sha256"] and (same_places or not reasons):
        reasons.append("the source's contents changed")
    return reasons or damage(job.save_path)


def sources_of(job: Job) -> list[SourceCounts]:
    return [
        SourceCounts(load_path=named.load_path, weight=named.weight, bytes=part.source.total_bytes)
        for named, part in zip(job.folder.sources, job.parts, strict=True)
    ]


def note_places(job: Job, old: Manifest) -> None:
    """The same contents may be named otherwise now; training and `check` compare the names."""
    if other_places(job.folder, old):
        named = zip(old.sources, sources_of(job), strict=True)
        sources = [one.model_copy(update={"load_path": now.load_path}) for one, now in named]
        rewrite_manifest(job.save_path, old.model_copy(update={"sources": sources}))


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
        self.refused = Refused(job.options.skip_bad_rows)
        self.account = Account(sources_of(job), job.options.ignore_index)
        self.source_sha256 = Later(job.source.sha256)
        self.position = Position()

    def made_from(self) -> dict[str, Any]:
        return {
            "tokenizer_sha256": self.encoder.tokenizer.sha256,
            "tokenizer_file_sha256": self.encoder.tokenizer.file_sha256,
            "source_sha256": self.source_sha256.value(),
            "options": self.job.recipe,
        }

    def make(self) -> Manifest:
        job, start = self.job, time.monotonic()
        ignore_index = job.options.ignore_index
        with (
            RowWriter(
                job.save_path, max_seq_len=job.max_seq_len, ignore_index=ignore_index
            ) as writer,
            self.refused,
        ):
            self.refused.open(writer.temporary)
            self.resume(writer)
            with make_progress(job.name) as progress:
                self.write_rows(writer, progress)
            self.refused.close()
            skipped = self.refused.counts + self.packer.skipped
            if not writer.supervised_tokens:
                raise DataError(nothing_left(self, skipped))
            made_from = self.made_from()
            job.source.check_unchanged()
            manifest = writer.publish(
                documents=self.packer.documents,
                cut_documents=self.packer.cut_documents,
                sources=self.account.sources,
                skipped=skipped,
                **made_from,
            )
        print(summary(self, manifest, time.monotonic() - start))
        return manifest

    def encoded(
        self, batches: Iterable[RowBatch], workers: Workers
    ) -> Iterator[tuple[RowBatch, Documents, list[BadRow]]]:
        for batch in self.encoder.ready(batches, workers):
            documents, bad = self.encoder.encode(batch)
            yield batch, documents, batch.bad + bad

    def write_rows(self, writer: RowWriter, progress: Progress) -> None:
        source, tokenizer = self.job.source, self.encoder.tokenizer
        workers = Workers(self.job.options.workers, self.job.options.memory_mb)
        with (
            Ahead(self.encoder.rows(source, self.position), BATCHES_AHEAD) as batches,
            Ahead(self.encoded(batches, workers), BATCHES_AHEAD) as all_documents,
            workers,  # ended first, so that nothing waits for them
        ):
            for batch, documents, bad in all_documents:
                if progress.documents == 0 and tokenizer.engine:
                    print(f"Encoding with {tokenizer.engine}: {tokenizer.reason}", flush=True)
                long: list[BadRow] = []
                if self.job.options.too_long == "drop":
                    documents, long = without_longer(documents, self.job.max_seq_len)
                self.refused.add(bad if batch.again else bad + long)
                self.account.add(batch, documents, len(bad), len(long))
                for block in self.packer.add(documents):
                    writer.add(block)
                self.position = batch.after
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
            "refused": self.refused.state(),
            "account": self.account.state(),
            "position": list(self.position),
        }

    def resume(self, writer: RowWriter) -> None:
        state = writer.resume(self.made_from)
        if state is None:
            if writer.place.why_anew:
                print(
                    f"{self.job.save_path}: an unfinished attempt was found; beginning again, "
                    f"because {writer.place.why_anew}",
                    flush=True,
                )
            return
        self.packer.load_state(state["packer"])
        self.refused.load_state(state["refused"], writer.temporary)
        self.account.load_state(state["account"])
        self.position = Position(*state["position"])
        print(
            f"{self.job.save_path}: going on with an interrupted run, "
            f"from {writer.tokens:,} tokens on",
            flush=True,
        )


# --- what is said -------------------------------------------------------------------


def tell_formats(jobs: list[Job], tokenizer: TextTokenizer) -> None:
    """What the rows were taken for, where they are no plain texts, and what is odd about them."""
    lines = [line for job in jobs for part in job.parts for line in told_of(job, part, tokenizer)]
    for line in dict.fromkeys(lines):
        print(line)


def told_of(job: Job, part: Part, tokenizer: TextTokenizer) -> Iterator[str]:
    name, rows = part.source.name, part.rows
    if rows.reason:
        yield f"{name}: rows of {rows.row_format} ({rows.reason})"
    if rows.row_format in TURNS:
        from vectorlm.data.chat.encoder import oddities_of

        for text in oddities_of(part.options, part.source, rows.row_format, tokenizer, job.model):
            yield f"warning: {name}: {text}; see docs/chat.md"


def summary(making: Making, made: Manifest, seconds: float) -> str:
    job, packer, refused = making.job, making.packer, making.refused
    lines = [
        f"{job.name}: {job.save_path}, in {seconds:,.1f} s",
        f"  rows       {made.rows:,} of at most {made.max_seq_len:,} tokens; {made.fill:.1%} full",
        f"  documents  {made.documents:,}",
        f"  tokens     {made.tokens:,}; {made.supervised_tokens:,} of them learned",
    ]
    if packer.cut_documents:
        lines.append(f"  cut        {cut_text(job, packer)}")
    if made.skipped:
        lines.append(f"  skipped    {counts_text(made.skipped)}")
    lines += [f"    {line}" for line in refused.shown.values()]
    if refused.counts:
        total, rows = refused.counts.total(), sum(one.rows for one in making.account.sources)
        which = f"; the first {MOST_LISTED:,} are" if total > MOST_LISTED else ","
        listed = f"listed in {os.path.join(job.save_path, REFUSED_NAME)}"
        lines.append(f"    {total:,} of {rows:,} rows ({total / rows:.1%}){which} {listed}")
    sources = making.account.lines()
    lines += ["  sources", *sources] if sources else []
    if any(part.rows.row_format == "tokenized" for part in job.parts):
        lines.append(TOKENIZED)
    return "\n".join(lines + making.account.unused())


TOKENIZED = (
    "  tokenized  that ids are below the tokenizer's end was checked; that they are those of this "
    "tokenizer cannot be"
)


def cut_text(job: Job, packer: Packer) -> str:
    chats = all(part.rows.row_format in TURNS for part in job.parts)
    count, name = packer.cut_documents, "conversation" if chats else "document"
    what = f"{count:,} {name}" if count == 1 else f"{count:,} {name}s"
    packing = job.options.effective_packing
    if packing == "truncate":
        return f"{packer.cut_tokens:,} tokens of {what} left out (packing_type: truncate)"
    if packing == "full":
        return f"{what} at the end of a row (packing_type: full)"
    return (
        f"{what} longer than {job.max_seq_len:,} tokens, into pieces that do not see each other "
        "(too_long: drop leaves them out)"
    )


def counts_text(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.items()))


def nothing_left(making: Making, skipped: Mapping[str, int]) -> str:
    job = making.job
    if job.folder.held and not skipped:
        return (
            f"dataset_preprocess.val_split: {job.options.val_split:g} holds out no row of "
            f"{job.source.name}.\nRaise it, or give evaluation data with eval_load_path."
        )
    return "\n".join(
        [
            f"dataset_preprocess: {job.source.name} leaves nothing to learn "
            f"({why_nothing(making, skipped)}).",
            *making.refused.shown.values(),
        ]
    )


def why_nothing(making: Making, skipped: Mapping[str, int]) -> str:
    if skipped:
        return f"skipped: {counts_text(skipped)}"
    if making.account.unused():
        return "its weight takes none of its rows: raise it"
    if any(part.options.separator for part in making.job.parts):
        return "it is empty, or all of its tokens stand before the separator"
    return "it is empty"
