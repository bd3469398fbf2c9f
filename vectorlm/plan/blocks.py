"""The operations of one decoder block of each family, as transformers runs them. Floor 1, read by
`memory`.

Legend: T tokens of a micro-batch, h hidden, a heads x head_dim, c bytes of the compute type.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from vectorlm.plan.lora import Adapters
from vectorlm.plan.shapes import Matrix, ModelShape
from vectorlm.plan.tape import Backward, Tape, Tensor

# How attention is computed, by what it keeps: only math and eager keep the scores. `sdpa` is ours,
# document by document; `plain` is that of transformers.
Kernel = Literal["flash", "varlen", "sdpa", "plain", "math", "eager"]
FLOAT = 4


@dataclass(frozen=True)
class Tokens:
    """A micro-batch as attention sees it: `count` tokens, in documents of at most `longest`."""

    count: int
    longest: int

    @property
    def pairs(self) -> int:
        """Entries of the score matrices of one head."""
        whole, rest = divmod(self.count, self.longest)
        return whole * self.longest**2 + rest**2


@dataclass(frozen=True)
class BlockMemory:
    """Of one block, in bytes: what it keeps for the backward pass, the peak of that pass beside
    it, the input it was given, whether that input is among what it keeps, and the peak of a pass
    that keeps nothing."""

    kept_bytes: int
    backward_bytes: int
    input_bytes: int
    keeps_input: bool
    forward_bytes: int


def block_memory(
    shape: ModelShape,
    tokens: Tokens,
    compute_bytes: int,
    kernel: Kernel,
    adapters: Adapters | None,
    first: bool = False,
) -> BlockMemory:
    """`first`: with frozen weights, nothing asks the first block for the gradient of its input."""
    block = _Block(shape, tokens, compute_bytes, kernel, adapters)
    x = block.tape.tensor(block.wide(shape.hidden), adapters is None or not first)
    output = block.run(x)
    back: Backward = block.tape.backward(output)
    kept = {t for operation in block.tape.operations for t in operation.saved}
    return BlockMemory(
        back.saved_bytes,
        back.peak_bytes,
        block.tape.sizes[x],
        x in kept,
        block.tape.forward_bytes(),
    )


class _Block:
    def __init__(
        self,
        shape: ModelShape,
        tokens: Tokens,
        compute_bytes: int,
        kernel: Kernel,
        adapters: Adapters | None,
    ) -> None:
        self.shape, self.tokens, self.c, self.kernel = shape, tokens, compute_bytes, kernel
        self.adapters = adapters
        self.trains = adapters is None
        self.tape = Tape()
        self.linears = iter(shape.linears)
        self.q = shape.heads * shape.head_dim
        self.kv = shape.kv_heads * shape.head_dim
        self.whole: Tensor | None = None  # queries, keys and values in one, where a model has it so

    def wide(self, width: int, bytes_each: int | None = None) -> int:
        return self.tokens.count * width * (bytes_each or self.c)

    def run(self, x: Tensor) -> Tensor:
        shape, tape = self.shape, self.tape
        if shape.parallel:
            normed = self.norm(x)
            own = normed if shape.block_norms == 1 else self.norm(x)
            attended = self.attention(normed)
            return tape.run(
                tape.sizes[x],
                [self.add(self.feed_forward(own), attended), x],
                passes=True,
            )
        x = self.add(x, self.part(x, self.attention))
        return self.add(x, self.part(x, self.feed_forward))

    def part(self, x: Tensor, work: Callable[[Tensor], Tensor]) -> Tensor:
        """Attention or feed-forward with the norms around it."""
        before = not self.shape.family.norm_after
        y = work(self.norm(x) if before else x)
        after = not before or self.shape.block_norms == 4
        y = self.norm(y) if after else y
        if self.shape.drops:
            y = self.dropped(y)
        return self.scaled(y) if self.shape.family.name == "granite" else y

    def add(self, one: Tensor, other: Tensor) -> Tensor:
        return self.tape.run(self.tape.sizes[one], [one, other], passes=True)

    def dropped(self, x: Tensor) -> Tensor:
        """Dropout keeps a mask of a byte an entry."""
        return self.tape.run(self.tape.sizes[x], [x], extra_bytes=self.tape.sizes[x] // self.c)

    def scaled(self, x: Tensor) -> Tensor:
        return self.tape.run(self.tape.sizes[x], [x])

    # --- norms ------------------------------------------------------------------------------------

    def norm(self, x: Tensor) -> Tensor:
        tape, count = self.tape, self.tokens.count
        width = tape.sizes[x] // (count * self.c)
        kind = self.shape.family.norm
        if kind == "layer":
            return tape.run(
                tape.sizes[x], [x], saves=[x], extra_bytes=2 * FLOAT * count, trains=self.trains
            )
        x32 = x if self.c == FLOAT else tape.run(self.wide(width, FLOAT), [x])
        if kind == "bare":
            y = tape.run(tape.sizes[x32], [x32], saves=[x32], extra_bytes=2 * FLOAT * count)
            return y if self.c == FLOAT else tape.run(tape.sizes[x], [y])
        if kind == "scale":  # the mean is taken off twice: for the variance, and to be scaled
            squared = tape.run(tape.sizes[x32], [x32])
            tape.run(tape.sizes[x32], [squared], saves=[squared])
            x32 = tape.run(tape.sizes[x32], [x32])
        return self._root_mean_square(x, x32, kind)

    def _root_mean_square(self, x: Tensor, x32: Tensor, kind: str) -> Tensor:
        tape, rows = self.tape, FLOAT * self.tokens.count
        squares = tape.run(tape.sizes[x32], [x32], saves=[x32])
        scale = tape.run(rows, [squares], keeps_output=True)
        y = tape.run(tape.sizes[x32], [x32, scale], saves=[x32, scale])
        if kind == "rms":  # back to the compute type, then the weight
            y = y if self.c == FLOAT else tape.run(tape.sizes[x], [y])
            return tape.run(
                tape.sizes[x], [y], saves=[y] if self.trains else (), trains=self.trains
            )
        y = tape.run(tape.sizes[x32], [y], saves=[y] if self.trains else (), trains=self.trains)
        return y if self.c == FLOAT else tape.run(tape.sizes[x], [y])

    # --- linear layers ----------------------------------------------------------------------------

    def linear(self, x: Tensor, matrix: Matrix, rows: int | None = None) -> Tensor:
        rows = rows or self.tokens.count
        size = rows * matrix.outputs * self.c
        tape = self.tape
        if self.trains:
            return tape.run(size, [x], saves=[x], trains=True)
        y = tape.run(size, [x])
        if self.adapters is None or not self.adapters.adapts(matrix):
            return y
        thin = rows * self.adapters.rank * self.c
        dropped = self.dropped(x) if self.adapters.dropout else x
        down = tape.run(thin, [dropped], saves=[dropped], trains=True)
        up = tape.run(size, [down], saves=[down], trains=True)
        return tape.run(size, [y, tape.run(size, [up])], passes=True)

    # --- attention --------------------------------------------------------------------------------

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = self.projected(x)
        if self.shape.family.qk_norm:
            q, k = self.norm(q), self.norm(k)
        if self.shape.family.rotary and not self.shape.alibi:
            q, k = self.rotated(q), self.rotated(k)
        return self.linear(self.attended(q, k, v), next(self.linears))

    def projected(self, x: Tensor) -> list[Tensor]:
        if "qkv" not in self.shape.family.names:
            return [self.linear(x, next(self.linears)) for _ in range(3)]
        # Views of one tensor: who keeps one keeps it whole.
        self.whole = self.linear(x, next(self.linears))
        widths = (self.q, self.kv, self.kv)
        return [self.tape.run(self.wide(width), [self.whole]) for width in widths]

    def rotated(self, x: Tensor) -> Tensor:
        """x cos + rotate(x) sin: autograd keeps cos and sin, which all blocks share."""
        tape, size = self.tape, self.tape.sizes[x]
        straight = tape.run(size, [x])
        turned = tape.run(size, [tape.run(size, [x])])
        return tape.run(size, [straight, turned], passes=True)

    def attended(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.kernel in ("math", "eager"):
            return self.scored(q, k, v)
        tape, size = self.tape, self.tape.sizes[q]
        rows = self.tokens.count * self.shape.heads * FLOAT
        grouped = self.shape.kv_heads < self.shape.heads
        spread = 2 * size if grouped and self.kernel in ("flash", "plain") else 0
        kept = self.kept_views(q, k, v)
        if grouped and self.kernel in ("varlen", "sdpa"):
            k, v = tape.run(size, [k]), tape.run(size, [v])
            kept = (kept[0], k, v)
        out = tape.run(
            size,
            [q, k, v],
            saves=kept,
            keeps_output=True,
            extra_bytes=rows,
            scratch_bytes=self.wide(self.q, FLOAT) + rows + spread,
        )
        if self.kernel == "plain" and self.shape.family.turns_part:  # heads lie apart then
            return tape.run(size, [out])
        if self.kernel != "sdpa":
            return out
        return tape.run(size, [tape.run(size, [out])])  # documents joined, heads put together

    def kept_views(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        if self.whole is None or self.kernel in ("flash", "varlen"):  # these take copies
            return (q, k, v)
        turned = self.shape.family.rotary and not self.shape.alibi
        return (q, k, self.whole) if turned else (self.whole,) * 3

    def scored(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """All scores of all documents, in 32 bits; capped ones several times over."""
        tape, size = self.tape, self.tape.sizes[q]
        scores = self.shape.heads * self.tokens.pairs
        math = self.kernel == "math"
        c = FLOAT if math else self.c
        if math:  # each is scaled, in 32 bits
            wide = FLOAT // self.c
            q, k, v = (tape.run(tape.sizes[t] * wide, [t]) for t in (q, k, v))
        elif self.shape.kv_heads < self.shape.heads:
            k, v = tape.run(size, [k]), tape.run(size, [v])
        weights = tape.run(scores * c, [q, k], saves=[q, k])
        weights = tape.run(scores * c, [weights])
        if self.shape.scores_capped:
            weights = tape.run(scores * c, [weights], keeps_output=True)
            weights = tape.run(scores * c, [weights])
        weights = tape.run(scores * FLOAT, [weights], keeps_output=True)
        if c != FLOAT:
            weights = tape.run(scores * c, [weights])
        out = tape.run(size, [weights, v], saves=[weights, v])
        return tape.run(size, [out])

    # --- feed-forward -----------------------------------------------------------------------------

    def feed_forward(self, x: Tensor) -> Tensor:
        if self.shape.experts:
            return self.mixed(x)
        family, inner = self.shape.family, self.shape.intermediate
        if not family.gated:
            up = self.activated(self.linear(x, next(self.linears)))
            return self.linear(up, next(self.linears))
        if "gate_up" in family.names:
            both = self.linear(x, next(self.linears))
            gate = self.tape.run(self.wide(inner), [both])
            return self.linear(self.gated(gate, both, both), next(self.linears))
        gate = self.linear(x, next(self.linears))
        active = self.activated(gate)
        up = self.linear(x, next(self.linears))
        return self.linear(self.product(active, up), next(self.linears))

    def gated(self, gate: Tensor, both: Tensor, up: Tensor) -> Tensor:
        """Both halves are views of `both`, which is kept whole."""
        size = self.tape.sizes[gate]
        active = self.tape.run(size, [gate], saves=[both])
        half = self.tape.run(size, [up])
        return self.tape.run(size, [active, half], saves=[active, both])

    def product(self, one: Tensor, other: Tensor) -> Tensor:
        return self.tape.run(self.tape.sizes[one], [one, other], saves=[one, other])

    def activated(self, x: Tensor) -> Tensor:
        tape, size = self.tape, self.tape.sizes[x]
        if self.shape.activation == "relu":
            return tape.run(size, [x], keeps_output=True)
        if self.shape.activation != "gelu_new":
            return tape.run(size, [x], saves=[x])
        # Written out in Python: x (1 + tanh(x + x^3)) / 2, each step with a tensor of its own.
        half = tape.run(size, [x])
        cube = tape.run(size, [x], saves=[x])
        inner = tape.run(size, [x, tape.run(size, [cube])], passes=True)
        curved = tape.run(size, [tape.run(size, [inner])], keeps_output=True)
        return self.product(half, tape.run(size, [curved], passes=True))

    def mixed(self, x: Tensor) -> Tensor:
        """Experts: each token goes to some, and comes back as their weighted sum."""
        tape, shape = self.tape, self.shape
        up, down, _router = (next(self.linears) for _ in range(3))
        rows = self.tokens.count * shape.experts_per_token
        chosen = tape.run(rows * shape.hidden * self.c, [x])
        probabilities = self.tokens.count * shape.experts * FLOAT
        weights = tape.run(rows * self.c, [x], saves=[x], extra_bytes=probabilities)
        both = tape.run(
            rows * up.outputs * self.c,
            [chosen],
            saves=[chosen] if self.trains else (),
            trains=self.trains,
        )
        gate = tape.run(tape.sizes[both] // 2, [both])
        inner = self.gated(gate, both, both)
        out = tape.run(
            rows * down.outputs * self.c,
            [inner],
            saves=[inner] if self.trains else (),
            trains=self.trains,
        )
        weighted = tape.run(tape.sizes[out], [out, weights], saves=[out, weights])
        total = tape.run(tape.sizes[x], [weighted])
        return self.add(total, self.shared(x)) if shape.shared_intermediate else total

    def shared(self, x: Tensor) -> Tensor:
        gate, up = (self.linear(x, next(self.linears)) for _ in range(2))
        y = self.linear(self.product(self.activated(gate), up), next(self.linears))
        next(self.linears)  # its gate: a number a token
        return self.tape.run(self.tape.sizes[y], [y], saves=[y])
