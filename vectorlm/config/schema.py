"""Every YAML key: its type, default, limits and one sentence. Floor 0: no torch, no transformers.

The classes are frozen and refuse unknown keys. Key names are the ones users of the original
VectorLM have in their files; `docs/config.md` and `configs/schema.json` are rendered from here
(`vectorlm.config.reference`). Rules that concern several keys live in `vectorlm.config.checks`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, Field

from vectorlm.config.job_schema import Slurm as Slurm
from vectorlm.config.job_schema import SlurmPreprocess as SlurmPreprocess
from vectorlm.config.job_schema import Sweep as Sweep
from vectorlm.config.section import Beta, Count, Ratio, said
from vectorlm.config.section import Section as Section

ShardingStrategy = Literal["FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD", "NO_SHARD"]
Precision = Literal["32-true", "bf16-mixed", "bf16-true", "16-mixed"]
ReduceType = Literal["float32", "compute"]
PackingType = Literal["full", "best_fit", "partial", "truncate", "none"]
SourceFormat = Literal[
    "auto",
    "text",
    "messages",
    "sharegpt",
    "alpaca",
    "prompt_completion",
    "tokenized",
    "hf",
    "json",
    "jsonl",
    "csv",
    "parquet",
]
FILE_KINDS = ("hf", "json", "jsonl", "csv", "parquet", "text")
Learn = Literal["assistant", "last_turn", "all"]
SchedulerType = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "reduce_lr_on_plateau",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
    "greedy",
    "plateau-with-warmup",
    "plataeu-with-warmup",
]
PLATEAU_SCHEDULERS = (
    "reduce_lr_on_plateau",
    "greedy",
    "plateau-with-warmup",
    "plataeu-with-warmup",
)


class Optimizer(Section):
    """The optimizer and its arguments."""

    name: str = Field("AdamW", description="Any optimizer of `torch.optim`, by its name there.")
    lr: float = Field(2e-5, gt=0, description="Peak learning rate.")
    weight_decay: float = Field(0.0, ge=0, description="Weight decay, on all parameters.")
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = Field(
        (0.9, 0.999),
        description="Decay rates of the two moments; only for optimizers that have them.",
    )
    eps: float = Field(
        1e-8, gt=0, description="Added to the denominator; only for optimizers that have it."
    )
    kwargs: dict[str, Any] = Field(
        {}, description="Any other argument of that optimizer, such as `momentum: 0.9` for SGD."
    )


class TrainParameters(Section):
    """How the model is trained."""

    output_dir: str = Field(
        min_length=1, description="Folder for checkpoints, metrics and the final model."
    )
    max_seq_len: int = Field(
        ge=2,
        description="Tokens in a row, at preprocessing and in training; at most what the model "
        "can take.",
    )
    epochs: Count = Field(1, description="Passes over the training data.")
    seed: int = Field(
        42, ge=0, lt=2**31, description="Seed of the data order, dropout and new weights."
    )

    sharding_strategy: ShardingStrategy = Field(
        "FULL_SHARD",
        description="`FULL_SHARD`: parameters, gradients and optimizer state spread over all "
        "ranks. `SHARD_GRAD_OP`: likewise, but parameters stay gathered between forward and "
        "backward. `HYBRID_SHARD`: spread inside a node, replicated across nodes. `NO_SHARD`: "
        "every rank holds all of it.",
    )
    shard_group_size: Count | None = Field(
        None,
        description="Ranks that share one copy under `HYBRID_SHARD`; by default the ranks of a "
        "node.",
    )
    precision: Precision | None = Field(
        None,
        description="`32-true`; `bf16-mixed` (32-bit masters, bf16 compute, 32-bit reduction); "
        "`bf16-true`; `16-mixed` (fp16 compute with a gradient scaler, for V100). By default what "
        "`use_mp` says.",
    )
    use_mp: bool = Field(
        False, description="`true` is short for `precision: bf16-mixed`, `false` for `32-true`."
    )
    use_activation_checkpointing: bool = Field(
        False,
        description="Recompute each block in the backward pass: far less memory, about 30 % more "
        "compute.",
    )
    compile: bool = Field(
        False,
        description="Compile each block with `torch.compile`: faster steps, after a first one that "
        "takes up to some minutes.",
    )
    use_liger_kernel: bool = Field(
        False,
        description="Take norms, rotary positions and gated layers from liger-kernel, on NVIDIA "
        "GPUs.",
    )
    use_flash_attention: bool = Field(
        True,
        description="Use flash-attn where it is installed, else torch's variable-length kernel, "
        "else per-document SDPA; the log says which was taken and why. `false` always takes "
        "per-document SDPA.",
    )
    low_cpu_mem_usage: bool = Field(
        True,
        description="Each rank reads only its shard of the weights. `false`: the first rank reads "
        "the whole model through transformers and sends the shards (for checkpoints that need "
        "converting).",
    )
    pad_vocab_to_multiple_of: Count | None = Field(
        None,
        description="Pad the vocabulary while training, for tensor cores; exports never show it.",
    )
    reduce_dtype: ReduceType = Field(
        "float32",
        description="Type in which ranks add up gradients: `float32`, or `compute`, the type of "
        "`precision`: half the traffic, rounded sums.",
    )
    lora_peft_config: dict[str, Any] | None = Field(
        None,
        description="Arguments of `peft.LoraConfig`; when given, only LoRA adapters are trained.",
    )

    max_grad_norm: float | None = Field(
        1.0,
        gt=0,
        description="Clip the gradient's global norm to this, once an optimizer step; `null`: no "
        "clipping.",
    )
    gradient_accumulation_steps: Count = Field(
        1, description="Micro-batches a rank adds up before an optimizer step."
    )
    optimizer: Optimizer = Field(Optimizer(), description="See below.")
    lr_scheduler_type: SchedulerType = Field(
        "cosine",
        description="Any of `transformers.SchedulerType`, or `plateau-with-warmup` (linear "
        "warm-up, then lower when the evaluation loss stops falling).",
    )
    lr_scheduler_kwargs: dict[str, Any] = Field(
        {}, description="Further arguments of that scheduler."
    )
    warmup_ratio: Ratio = Field(
        0.0, description="Share of all optimizer steps spent on linear warm-up."
    )

    checkpointing_enabled: bool = Field(
        True,
        description="Save checkpoints, and resume from the newest sound one when started again.",
    )
    logging_steps: Count = Field(
        10, description="Log the training loss and evaluate every so many optimizer steps."
    )
    save_frequency: float = Field(
        0.25, gt=0, le=1, description="Save a checkpoint each time this share of an epoch is done."
    )
    keep_checkpoints: Count = Field(2, description="How many of the newest checkpoints to keep.")
    async_checkpointing: bool = Field(
        True,
        description="Train on while a checkpoint is written from a copy in host memory, where "
        "that has room for it; `false`: training waits.",
    )
    resume_despite_changes: bool = Field(
        False,
        description="Resume although the data, seed or global batch differ from the checkpoint's.",
    )
    allow_foreign_checkpoints: bool = Field(
        False, description="Resume from a checkpoint that belongs to another user of the system."
    )
    collective_timeout_minutes: Count = Field(
        30, description="A rank that waits longer than this for the others gives up."
    )

    @property
    def effective_precision(self) -> Precision:
        return self.precision or ("bf16-mixed" if self.use_mp else "32-true")


class DatasetConfig(Section):
    """The prepared data and how it is batched."""

    ignore_index: int = Field(-100, lt=0, description="Label of tokens that are not learned.")
    train_bs: Count = Field(1, description="Rows in a micro-batch on each rank.")
    eval_bs: Count = Field(1, description="Rows in an evaluation batch on each rank.")
    longest_first: bool = Field(
        True,
        description="The first step of the first epoch learns the longest rows, so that a lack of "
        "memory shows at once.",
    )
    group_by_length: bool = Field(
        False,
        description="Each step learns rows about as long as one another, steps in random order: "
        "for data that is not packed.",
    )
    train_ds: str = Field(min_length=1, description="Folder of the prepared training data.")
    eval_ds: str | None = Field(
        None,
        min_length=1,
        description="Folder of the prepared evaluation data; `null`: no evaluation.",
    )


class DatasetPreprocess(Section):
    """How text and conversations become rows of tokens."""

    ignore_index: int = Field(
        -100, lt=0, description="Label written for tokens that are not learned."
    )
    load_path: str = Field(
        "",
        min_length=1,
        description="What to read: a folder saved by `datasets`, a JSONL, JSON, CSV, Parquet or "
        "text file, a folder or glob of such files, or a dataset's name on the hub.",
    )
    datasets: list[dict[str, Any]] = said(
        [],
        "a list of mappings such as {load_path: a.jsonl, weight: 0.5}",
        "Several sources instead of `load_path`: each with its own `load_path` and, where wanted, "
        "`weight` (1: every row once; 2.5: every row twice and half of them once more), `split`, "
        "`dataset_format`, `from_disk`, `data_field`, `columns`, `text_rows`.",
    )
    dataset_format: SourceFormat = Field(
        "auto",
        description="What a row is: `text`, `messages`, `sharegpt`, `alpaca`, `prompt_completion` "
        "or `tokenized`; by default found out from the names of the columns. Or what kind of "
        "files they are, where their endings do not say.",
    )
    columns: dict[str, str] = said(
        {},
        "a mapping such as {messages: dialog, tools: functions}",
        "Which column plays which role of the format, where it has another name.",
    )
    chat_template: str | None = Field(
        None,
        min_length=1,
        description="File with the chat template, in jinja; by default the model's own.",
    )
    learn: Learn = Field(
        "assistant",
        description="What of a conversation is learned: every turn of the `assistant`, all that it "
        "says after the last message of a user (`last_turn`), or `all`.",
    )
    from_disk: bool = Field(
        False,
        description="`load_path` is a folder saved by `datasets.save_to_disk` (found by itself, "
        "too).",
    )
    split: str | None = Field(
        None, description="Which split to read, where the source has several."
    )
    data_field: str = Field("text", min_length=1, description="The field that holds the text.")
    save_path: str = Field(min_length=1, description="Folder for the prepared data.")
    eval_load_path: str | None = Field(
        None, min_length=1, description="Source of the evaluation data; by default `load_path`."
    )
    eval_split: str | None = Field(None, description="Split of the evaluation data.")
    val_split: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Share of the rows held out of the training data and written to "
        "`eval_save_path`; equal rows fall on one side.",
    )
    eval_save_path: str | None = Field(
        None,
        min_length=1,
        description="When given, evaluation data is prepared too, with the same options, into it.",
    )
    packing_type: PackingType | None = Field(
        None,
        description="`full`: documents joined and cut at `max_seq_len`. `best_fit`: whole "
        "documents put together into rows, only longer ones cut. `partial`: each document "
        "cut by itself. `truncate`: each document's first `max_seq_len` tokens. `none`: a longer "
        "document is an error.",
    )
    too_long: Literal["cut", "drop"] = Field(
        "cut",
        description="What becomes of documents and conversations longer than `max_seq_len`: "
        "`cut`, as `packing_type` does; `drop`: left out, counted and listed.",
    )
    overlap: int = Field(
        0,
        ge=0,
        description="Tokens of context that a chunk repeats from the one before (`partial`).",
    )
    truncate: bool = Field(False, description="`true` is short for `packing_type: truncate`.")
    add_bos_eos_tokens: bool = Field(
        True,
        description="Begin each document with BOS (if the tokenizer has one) and end it with EOS.",
    )
    pre_pend: str | None = Field(None, description="Text put before each document.")
    separator: str | None = Field(
        None,
        min_length=1,
        validation_alias=AliasChoices("separator", "seperator"),
        description="What stands before it, and itself, is not learned. `seperator` is accepted "
        "too.",
    )
    skip_bad_rows: bool = Field(
        False,
        description="Skip and count rows that are broken or empty, instead of stopping at the "
        "first.",
    )
    text_rows: Literal["line", "paragraph", "file"] = Field(
        "line", description="What a document is in plain text files."
    )
    memory_mb: int = Field(
        300,
        ge=64,
        description="MiB that buffers may take while data is prepared, beside the libraries and "
        "the tokenizer. More lets `best_fit` choose among more documents.",
    )
    workers: Count | None = Field(
        None,
        description="Threads that tokenize, and processes that render conversations; by default as "
        "many as there are cores to use.",
    )

    @property
    def effective_packing(self) -> PackingType:
        return self.packing_type or ("truncate" if self.truncate else "none")

    @property
    def file_kind(self) -> str:
        """The kind that `dataset_format` names, where it does not name a format of rows."""
        return self.dataset_format if self.dataset_format in FILE_KINDS else "auto"

    @property
    def row_format(self) -> str | None:
        """The format of rows that `dataset_format` names; None: to be found out."""
        is_kind = self.dataset_format in (*FILE_KINDS, "auto") and self.dataset_format != "text"
        return None if is_kind else self.dataset_format


class Config(Section):
    """One file: what to train, on what, how."""

    model: str = Field(
        min_length=1,
        description="Folder (or hub name) of the model and its tokenizer, in the Hugging Face "
        "format.",
    )
    enable_wandb_logging: bool = Field(
        False, description="Log to Weights & Biases; offline where there is no network."
    )
    wandb_config: dict[str, Any] = Field(
        {}, description="Arguments of `wandb.init`, passed through."
    )
    enable_tensorboard_logging: bool = Field(
        False, description="Log to TensorBoard files in `output_dir/tensorboard`."
    )
    train_parameters: TrainParameters = Field(description="See below.")
    dataset: DatasetConfig | None = Field(None, description="See below; training needs it.")
    dataset_preprocess: DatasetPreprocess | None = Field(
        None, description="See below; preprocessing needs it."
    )
    slurm: Slurm | None = Field(
        None, description="See below; `vectorlm submit` and the job scripts need it."
    )
    sweep: Sweep | None = Field(None, description="See below; many runs from one file.")
