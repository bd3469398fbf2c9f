"""The peak of a rank's GPU memory, and when it comes. Floor 1, called by `outlook`.

A step is followed through the moments at which memory can be highest, with FSDP2's buffers as they
are alive then; the peak is the largest of them. docs/planner.md has the formulas.

Legend: T tokens of a micro-batch, V vocabulary, P parameters of a unit (a block, or the root: all
that is outside of blocks), N ranks that share one copy, c, m and r bytes of the compute type, the
master type and the type that gradients are added up in.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from vectorlm.config.schema import TrainParameters
from vectorlm.plan.blocks import FLOAT, BlockMemory, Kernel, Tokens, block_memory
from vectorlm.plan.gpus import Gpu
from vectorlm.plan.links import COMPUTE_BYTES, MASTER_BYTES, reduced_bytes
from vectorlm.plan.lora import Adapters, adapters_of
from vectorlm.plan.optimizers import keeps
from vectorlm.plan.shapes import ModelShape

PARTS = (
    "parameters",
    "gradients",
    "optimizer",
    "activations",
    "logits",
    "communication",
    "step",
)


# Of logits in 32 bits, as `model.loss` cuts them; LEAST_ROWS of a chunk.
CHUNK_BYTES, SLICE_BYTES = 512 * 2**20, 128 * 2**20
LEAST_ROWS = 64

# What a simulation tells apart, which sees blocks begin and end; and what is within it.
BEGINNING, FORWARD_END = "beginning of the forward pass", "end of the forward pass"
LOSS, BACKWARD_END = "backward of the loss", "end of the backward pass"
OPTIMIZER_STEP, EVALUATION = "the optimizer's step", "evaluation"
_WITHIN = {
    "softmax of the logits": FORWARD_END,
    "gradients of the logits": FORWARD_END,
    "whole logits": FORWARD_END,
    "gathering the last block": LOSS,
    "reducing the gradients of the blocks": "backward of the blocks",
    "backward of the embedding": BACKWARD_END,
    "reducing the gradients of the root": BACKWARD_END,
}


def stage(moment: str) -> str:
    """As the formulas and the simulation both tell a moment. Blocks are alike, and a byte decides
    in which of them the peak comes: so they have no number."""
    plain = re.sub(r"block \d+( of \d+)?", "the blocks", moment)
    return _WITHIN.get(plain, plain)


@dataclass(frozen=True)
class Moment:
    name: str
    parts: dict[str, int]

    @property
    def total_bytes(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Memory:
    """The peak, its parts in bytes, and its moment; `moments` are all that were compared."""

    peak_bytes: int
    breakdown: dict[str, int]
    moment: str
    moments: tuple[Moment, ...]


@dataclass(frozen=True)
class Load:
    """What a rank is given: a micro-batch of `rows` rows of `length` tokens, and to evaluate."""

    rows: int
    length: int
    accumulation: int = 1
    evaluation_rows: int = 0

    def tokens(self, rows: int) -> Tokens:
        return Tokens(max(rows, 1) * self.length, self.length)


def shard_group(train: TrainParameters, ranks: int, ranks_per_node: int) -> int:
    """Ranks that share one copy."""
    if train.sharding_strategy == "NO_SHARD":
        return 1
    if train.sharding_strategy == "HYBRID_SHARD":
        return min(train.shard_group_size or ranks_per_node, ranks)
    return ranks


def choose_kernel(
    shape: ModelShape, train: TrainParameters, gpu: Gpu | None, flash_attn: bool
) -> tuple[Kernel, str]:
    """How attention will run on that GPU, and why: what `model.attention` chooses there."""
    if shape.scores_capped:
        return "eager", "its scores are capped, so all of them are computed"
    if not shape.packs:
        wide = COMPUTE_BYTES[train.effective_precision] == FLOAT
        grouped = shape.kv_heads < shape.heads and (wide or not (gpu is None or gpu.has_bf16))
        if shape.alibi or shape.kv_heads == 1 or grouped:
            return "math", "torch has no kernel for this attention that does without all scores"
        return "plain", "its attention cannot be replaced: SDPA, one document a padded row"
    if not train.use_flash_attention:
        return "sdpa", "use_flash_attention is false"
    if COMPUTE_BYTES[train.effective_precision] == FLOAT:
        return "sdpa", "flash kernels take bf16 or fp16, this run computes in 32 bits"
    if gpu is not None and not gpu.has_bf16:
        return "sdpa", "flash kernels need an Ampere GPU or newer"
    if flash_attn:
        return "flash", "flash-attn"
    if shape.drops_scores:
        return "sdpa", "torch's variable-length kernel has no dropout"
    return "varlen", "torch's variable-length kernel"


def peak(
    shape: ModelShape,
    train: TrainParameters,
    load: Load,
    ranks: int,
    ranks_per_node: int,
    kernel: Kernel,
) -> Memory:
    step = _Step(shape, train, load, shard_group(train, ranks, ranks_per_node), kernel)
    moments = tuple(step.moments())
    worst = max(moments, key=lambda moment: moment.total_bytes)
    breakdown = {name: worst.parts.get(name, 0) for name in PARTS}
    return Memory(worst.total_bytes, breakdown, worst.name, moments)


class _Step:
    def __init__(
        self, shape: ModelShape, train: TrainParameters, load: Load, group: int, kernel: Kernel
    ) -> None:
        self.real = shape
        self.shape = shape.padded(train.pad_vocab_to_multiple_of)
        self.train, self.load, self.group, self.kernel = train, load, group, kernel
        self.adapters = adapters_of(train.lora_peft_config, self.shape)
        self.c = COMPUTE_BYTES[train.effective_precision]
        self.m = MASTER_BYTES[train.effective_precision]
        self.r = reduced_bytes(train)
        self.tokens = load.tokens(load.rows)
        self.reshards = train.sharding_strategy in ("FULL_SHARD", "HYBRID_SHARD")
        self.replicas = train.sharding_strategy in ("HYBRID_SHARD", "NO_SHARD")
        self.recomputes = train.use_activation_checkpointing
        self.block = self._block(first=False)
        self.first = self._block(first=True) if self.adapters else self.block
        self._count()

    def _block(self, first: bool) -> BlockMemory:
        return block_memory(self.shape, self.tokens, self.c, self.kernel, self.adapters, first)

    def _count(self) -> None:
        """Numbers of parameters: of a block and of the root, all and trained."""
        shape, layers = self.shape, self.shape.layers
        self.block_all = (shape.parameters - shape.root_parameters) // layers
        self.root_held = shape.root_parameters
        self.block_trained, self.root_trained = self.block_all, self.root_held
        if self.adapters:
            self.block_trained = self.adapters.block_parameters(shape)
            self.root_trained = self.adapters.root_parameters(shape)
            self.block_all += self.block_trained
            self.root_held += self.root_trained
        held = layers * self.block_all + self.root_held
        self.trained = layers * self.block_trained + self.root_trained
        self.frozen = held - self.trained

    # --- what is there all the time ---------------------------------------------------------------

    def held(self, gradients: int) -> dict[str, int]:
        own = self.trained * self.m // self.group
        frozen = self.frozen * self.c // self.group
        states = keeps(self.train.optimizer).states
        return {
            "parameters": own + frozen,
            "gradients": gradients,
            "optimizer": int(own * states),
        }

    def gradients(self, blocks: int) -> int:
        """Sharded gradients once that many blocks are done. With several micro-batches all are
        there from the second one on."""
        reduced = blocks * self.block_trained
        other = reduced if self.m != self.r else 0  # reduced in one type, and cast to another
        if self.replicas and self.load.accumulation > 1:  # kept as copies will add them up
            return (self.trained * self.r + other * self.m) // self.group
        every = self.trained if self.load.accumulation > 1 else reduced
        total = every * self.m
        if self.replicas:  # what copies add up stays to the end
            total += other * self.r
        return total // self.group

    # --- activations ------------------------------------------------------------------------------

    def kept(self, blocks: int) -> int:
        """Kept of the first `blocks` blocks."""
        if blocks == 0:
            return 0
        if self.recomputes:
            return blocks * self.block.input_bytes
        return self.first.kept_bytes + (blocks - 1) * self.block.kept_bytes

    @property
    def constant(self) -> int:
        """Of the batch itself: ids, targets, positions; cos and sin, which all blocks share."""
        turns = 2 * self.shape.head_dim * self.c if self.shape.family.rotary else 0
        return self.tokens.count * (3 * 8 + turns)

    @property
    def last_norm(self) -> int:
        """Kept by the last norm."""
        size = self.tokens.count * self.shape.hidden
        if self.shape.family.norm in ("layer", "bare"):
            return size * self.c
        wide = size * FLOAT
        if self.adapters:
            return wide
        return wide + size * (self.c if self.shape.family.norm == "rms" else FLOAT)

    @property
    def hidden(self) -> int:
        """What the head is given; all tokens are taken to be learned."""
        return self.tokens.count * self.shape.hidden * self.c

    # --- buffers of the shards --------------------------------------------------------------------

    @property
    def block_gathered(self) -> int:
        return self.block_all * self.c

    @property
    def coming(self) -> int:
        """The next block's parameters on their way, where there is anyone to send them."""
        return self.block_gathered if self.group > 1 and self.reshards else 0

    def stays(self, blocks: int) -> int:
        """Parameters of blocks that stay gathered between forward and backward."""
        return 0 if self.reshards else blocks * self.block_gathered

    @property
    def root_bytes(self) -> int:
        return self.root_held * self.c

    @property
    def head_gradient(self) -> int:
        return self.head_trained * self.c

    @property
    def head_trained(self) -> int:
        trains = self.adapters is None or self.adapters.root_parameters(self.shape)
        return self.shape.embedding_parameters if trains else 0

    def reduced(self, trained: int, last: int = 0) -> int:
        """Gradients as they are reduced: all of them, beside what they are copied from or, when
        that is gone but for the `last` one, what becomes of them."""
        cast = self.m if self.m != self.r else 0
        made = trained * (self.r + cast) // self.group + (last if self.group > 1 else 0)
        return trained * self.r + max(trained * self.c, made)

    # --- moments ----------------------------------------------------------------------------------

    def moments(self) -> Iterator[Moment]:
        yield self._beginning()
        yield from self._forward()
        yield from self._loss()
        yield self._gathering_again()
        for k in reversed(range(self.shape.layers)):
            yield from self._blocks(k)
        yield from self._end()
        if self.load.evaluation_rows:
            yield from self._evaluation()

    def _moment(self, name: str, gradients: int, **parts: int) -> Moment:
        return Moment(name, self.held(gradients) | parts)

    def _beginning(self) -> Moment:
        """The root's parameters twice, as they came and as they are used."""
        arrived = self.root_bytes if self.group > 1 else 0
        return self._moment(
            BEGINNING,
            self.gradients(0),
            activations=self.constant + self.tokens.count * self.shape.hidden * self.c,
            logits=0,
            communication=self.root_bytes + arrived,
        )

    def _forward(self) -> Iterator[Moment]:
        """Each unit stays twice, as it came and as it is used, until the next one has come."""
        arrives = self.group > 1
        for k in sorted({1, self.shape.layers}):
            before = self.root_bytes if k == 1 else self.block_gathered
            came = arrives * (before + self.block_gathered)
            yield self._moment(
                f"forward of block {k}",
                self.gradients(0),
                activations=self.kept(k - 1) + self.block.input_bytes + self.constant,
                logits=0,
                communication=self.stays(k - 1) + self.root_bytes + came + self.block_gathered,
            )

    def _loss(self) -> Iterator[Moment]:
        """A chunk of logits, which turns into its gradients slice by slice; the head's add up in
        32 bits where there are several chunks."""
        if self.adapters and self.adapters.adapts_head:
            yield from self._whole_logits()
            return
        first, second = self._chunks()
        part, whole = self.head_gradient, self.head_trained * FLOAT if second else 0
        sums = whole if self.c < FLOAT else 0  # in 32 bits the first part is the sum
        softmax, gradients = "softmax of the logits", "gradients of the logits"
        yield self._in_the_loss(softmax, self._softmax_bytes(first), 0)
        yield self._in_the_loss(gradients, self._logit_bytes(first), part + sums)
        if second:
            yield self._in_the_loss(softmax, self._softmax_bytes(second), whole)
            yield self._in_the_loss(gradients, self._logit_bytes(second), part + whole)
        yield self._moment(
            LOSS,
            self.gradients(0),
            activations=self._kept_of_all() + self.hidden,
            logits=0,
            communication=self._gathered_at_the_loss() + part + sums,
        )

    def _in_the_loss(self, name: str, logits: int, gradient: int) -> Moment:
        return self._moment(
            name,
            self.gradients(0),
            activations=self._kept_of_all() + 2 * self.hidden,
            logits=logits,
            communication=self._gathered_at_the_loss() + gradient,
        )

    def _gathering_again(self) -> Moment:
        block = self.block_gathered if self.reshards else 0
        return self._moment(
            "gathering the last block",
            self.gradients(0),
            activations=self._kept_of_all() + self.hidden,
            logits=0,
            communication=self._gathered_at_the_loss() + self.head_gradient + block,
        )

    def _chunks(self) -> tuple[int, int]:
        """Rows of the first chunk, and of the second."""
        first = min(self.tokens.count, chunk_rows(self.shape.vocab_size))
        return first, min(self.tokens.count - first, first)

    def _logit_bytes(self, rows: int) -> int:
        return rows * self.shape.vocab_size * self.c

    def _softmax_bytes(self, rows: int) -> int:
        """A chunk, and of a slice of it what is made in 32 bits: a copy, the softmax; or, of logits
        that are capped, what comes in between."""
        made = (self.c < FLOAT) + (3 if self.shape.logits_capped else 1)
        entries = min(rows, slice_rows(self.shape.vocab_size)) * self.shape.vocab_size
        return self._logit_bytes(rows) + entries * made * FLOAT

    def _kept_of_all(self) -> int:
        return self.kept(self.shape.layers) + self.last_norm + self.constant

    def _gathered_at_the_loss(self) -> int:
        """With the last block as it came, until the next one comes."""
        last = self.block_gathered if self.group > 1 else 0
        return self.stays(self.shape.layers) + self.root_bytes + last

    def _whole_logits(self) -> Iterator[Moment]:
        """Of a head that adapters are in."""
        wide = self.tokens.count * self.real.vocab_size * FLOAT
        logits = self.tokens.count * self.shape.vocab_size * self.c
        copy = 0 if self.c == FLOAT else wide
        for name, size in (("whole logits", logits + copy + wide), (LOSS, 3 * wide)):
            yield self._moment(
                name,
                self.gradients(0),
                activations=self._kept_of_all() + self.hidden,
                logits=size,
                communication=self._gathered_at_the_loss(),
            )

    def _blocks(self, k: int) -> Iterator[Moment]:
        """Backward of block k (from 0); the blocks after it are done."""
        layers = self.shape.layers
        block = self.first if k == 0 else self.block
        kept = self.kept(k + 1)
        if self.recomputes:
            again = block.kept_bytes - (block.input_bytes if block.keeps_input else 0)
            kept += again
        coming = self.coming if k else 0
        gradient = self.block_trained * self.c
        reducing = self.block_trained * self.r if k < layers - 1 else 0
        here = self.stays(k) + self.root_bytes + self.head_gradient
        yield self._moment(
            f"backward of block {k + 1}",
            self.gradients(layers - 1 - k),
            activations=kept + block.backward_bytes + self.constant,
            logits=0,
            communication=here + self.block_gathered + coming + gradient + reducing,
        )
        yield self._moment(
            f"reducing the gradients of block {k + 1}",
            self.gradients(layers - 1 - k),
            activations=self.kept(k) + block.input_bytes + self.constant,
            logits=0,
            communication=here + coming + self.reduced(self.block_trained),
        )

    def _end(self) -> Iterator[Moment]:
        layers = self.shape.layers
        trained = self.root_trained
        waiting = self.block_trained * self.r
        # Of a tied matrix: the head's, the embedding's, and their sum.
        twice = 2 * self.head_gradient if self.shape.tied else 0
        yield self._moment(
            "backward of the embedding",
            self.gradients(layers),
            activations=self.tokens.count * self.shape.hidden * self.c + self.constant,
            logits=0,
            communication=self.root_bytes + trained * self.c + twice + waiting,
        )
        yield self._moment(
            "reducing the gradients of the root",
            self.gradients(layers),
            activations=self.constant,
            logits=0,
            communication=self.reduced(trained, last=self.head_gradient),
        )
        own = self.trained * self.m // self.group
        yield self._moment(
            OPTIMIZER_STEP,
            own,
            activations=0,
            logits=0,
            step=int(own * keeps(self.train.optimizer).temporaries),
        )

    def _evaluation(self) -> Iterator[Moment]:
        """Without gradients: no activations are kept, but a batch may be larger."""
        tokens = self.load.tokens(self.load.evaluation_rows)
        block = block_memory(self.shape, tokens, self.c, self.kernel, None)
        # Callers still hold the hidden states in three shapes; scores are held as if kept.
        passing = block.forward_bytes + 3 * block.input_bytes
        yield self._moment(
            EVALUATION,
            0,
            activations=block.kept_bytes if self.kernel == "eager" else passing,
            logits=0,
            communication=self._gathered_at_the_loss() + self.coming,
        )
        rows = min(tokens.count, chunk_rows(self.shape.vocab_size))
        yield self._moment(
            EVALUATION,
            0,
            activations=tokens.count * self.shape.hidden * self.c,
            logits=self._softmax_bytes(rows),
            communication=self._gathered_at_the_loss(),
        )


def chunk_rows(vocabulary: int) -> int:
    """Rows of logits that are computed at once."""
    return max(CHUNK_BYTES // (FLOAT * vocabulary), LEAST_ROWS)


def slice_rows(vocabulary: int) -> int:
    """Rows whose softmax is made at once, on a GPU."""
    return max(SLICE_BYTES // (FLOAT * vocabulary), 1)


def trained_parameters(shape: ModelShape, adapters: Adapters | None) -> int:
    return shape.parameters if adapters is None else adapters.parameters(shape)
