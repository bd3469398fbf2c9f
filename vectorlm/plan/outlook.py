"""What is to be expected of a run: memory, disk, hours. Floor 1, called by `plan_door`, `check` and
`changes`.

`make_outlook` brings the parts together; everything `plan` says is in the Outlook it returns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from importlib.util import find_spec

from vectorlm.config.job_text import megabytes
from vectorlm.config.schema import Config
from vectorlm.errors import DataError
from vectorlm.manifest import Manifest, read_manifest
from vectorlm.plan.calibration import correction
from vectorlm.plan.disk import FREE_SHARE, copies_bytes, disk, host_bytes, running_bytes
from vectorlm.plan.duration import StepTime, Work, least_start_s, requeues, step_time
from vectorlm.plan.gpus import GIB, KNOWN, Gpu, find_gpu
from vectorlm.plan.lora import adapters_of
from vectorlm.plan.memory import Load, Memory, choose_kernel, peak, shard_group, stage
from vectorlm.plan.optimizers import NOT_ON_SHARDS, NOT_USABLE
from vectorlm.plan.shapes import ModelShape, read_shape
from vectorlm.steps import Steps

CONTEXT_BYTES = int(0.6 * GIB)  # CUDA's context and the libraries' kernels
LIBRARY_BYTES = int(0.15 * GIB)  # cuBLAS and its kin
NCCL_BYTES = int(0.5 * GIB)  # buffers of one group of ranks
FRAGMENTS = 0.04  # of what comes and goes, lost in gaps between blocks of other sizes
# A verdict needs more room, or more lack of it, than these shares of what comes and goes and of
# all, and what drivers differ by.
DOUBT = 0.03
ROUGH_DOUBT = 0.2
DOUBT_OF_ALL = 0.005
DRIVER_BYTES = GIB // 4
WAITS = 0.3  # of a step: more of it is worth a word
CLOSE = "too close to call: "


@dataclass(frozen=True)
class Hardware:
    """What is planned for: ranks, and the GPU (None: not known)."""

    gpu: Gpu | None
    ranks: int
    ranks_per_node: int


@dataclass(frozen=True)
class Outlook:
    """Bytes and seconds; of memory, of one rank, and of host memory, of a node: what it needs, and
    `copies_bytes` where checkpoints are not to be waited for. `fits` is None when it cannot be
    said, for `why_open`, and False whatever the memory where the run would be refused, for an
    `obstacle`. What is None is not known: times without a GPU, steps without prepared data."""

    fits: bool | None
    why_open: str
    obstacle: str
    peak_bytes: int
    breakdown: dict[str, int]
    moment: str
    margin_bytes: int
    doubt_bytes: int
    capacity_bytes: int | None
    host_bytes: int
    copies_bytes: int
    disk_bytes: int
    checkpoint_bytes: int
    final_bytes: int
    data_bytes: int
    hardware: Hardware
    micro_batch: int
    kernel: str
    parameters: int
    trained_parameters: int
    tokens_per_step: int
    supervised_tokens: int | None
    steps: int | None
    rows: int | None
    time: StepTime | None
    seconds_per_step: float | None
    hours: float | None
    requeues: int | None
    gpu_hours: float | None
    notes: tuple[str, ...]

    @property
    def needed_bytes(self) -> int:
        """What has to be there for the peak to fit without luck."""
        return self.peak_bytes + self.margin_bytes

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens_per_step / self.seconds_per_step if self.seconds_per_step else None

    @property
    def hours_per_billion_tokens(self) -> float | None:
        rate = self.tokens_per_second
        return 1e9 / rate / 3600 if rate else None


def make_outlook(
    config: Config,
    gpu: Gpu | None = None,
    count: int | None = None,
    micro_batch: int | None = None,
    shape: ModelShape | None = None,
) -> Outlook:
    """`gpu` and `count` (a node's, where the config has nodes) instead of what the config says;
    `shape` where the caller has read it already."""
    hardware = planned_for(config, gpu, count)
    shape = shape or read_shape(config.model)
    rows = micro_batch or (config.dataset.train_bs if config.dataset else 1)
    return outlook_for(config, shape, hardware, rows)


def outlook_for(
    config: Config, shape: ModelShape, hardware: Hardware, rows: int, corrects: bool = True
) -> Outlook:
    """With micro-batches of `rows`; `corrects`: by what was measured on this GPU before."""
    return _Outlook(config, shape, hardware, rows, corrects).made()


def planned_for(config: Config, gpu: Gpu | None = None, count: int | None = None) -> Hardware:
    slurm = config.slurm
    if gpu is None and slurm and slurm.gpu_type:
        gpu = find_gpu(slurm.gpu_type)
    per_node = count or (slurm.ranks_per_node if slurm else 1)
    return Hardware(gpu, per_node * (slurm.nodes if slurm else 1), per_node)


class _Outlook:
    def __init__(
        self, config: Config, shape: ModelShape, hardware: Hardware, rows: int, corrects: bool
    ) -> None:
        self.config, self.shape, self.hardware, self.rows = config, shape, hardware, rows
        self.corrects = corrects
        self.train = config.train_parameters
        self.gpu = hardware.gpu
        slurm = config.slurm
        self.on_gpus = self.gpu is not None or slurm is None or slurm.gpus_per_node > 0
        self.manifest, self.notes = _manifest(config)
        self.adapters = adapters_of(self.train.lora_peft_config, shape)
        evaluation = config.dataset.eval_bs if config.dataset and config.dataset.eval_ds else 0
        length = self.train.max_seq_len
        longest = min(self.manifest.longest_row, length) if self.manifest else length
        self.load = Load(rows, max(longest, 2), self.train.gradient_accumulation_steps, evaluation)

    def made(self) -> Outlook:
        hardware, train, shape = self.hardware, self.train, self.shape
        kernel, why = choose_kernel(shape, train, self.gpu, find_spec("flash_attn") is not None)
        memory = peak(shape, train, self.load, hardware.ranks, hardware.ranks_per_node, kernel)
        memory = self._corrected(memory)
        margin, doubt = self._margin(memory), self._doubt(memory)
        trained = self.adapters.parameters(shape) if self.adapters else shape.parameters
        obstacle = self._obstacle(trained)
        fits, why_open = self._verdict(memory.peak_bytes, margin, doubt)
        if obstacle:
            fits, why_open = False, obstacle
        self._note(memory)
        written = disk(shape, train, self.adapters, self.manifest.tokens if self.manifest else 0)
        copies = copies_bytes(
            written.checkpoint_bytes, train, hardware.ranks, hardware.ranks_per_node
        )
        self._note_copies(copies, memory)
        time = self._time()
        steps = self._steps()
        run_s = time.total_s * steps if time and steps else None
        again = None
        if run_s is not None:
            again = requeues(run_s, self.config.slurm, written.checkpoint_bytes)
            self._note_requeues(again, written.checkpoint_bytes)
        self._note_waits(time)
        return Outlook(
            fits=fits,
            why_open=why_open,
            obstacle=obstacle,
            peak_bytes=memory.peak_bytes,
            breakdown=memory.breakdown,
            moment=stage(memory.moment),
            margin_bytes=margin,
            doubt_bytes=doubt,
            capacity_bytes=self.gpu.memory_bytes if self.gpu else None,
            host_bytes=self._host(memory),
            copies_bytes=copies,
            disk_bytes=written.total_bytes,
            checkpoint_bytes=written.checkpoint_bytes,
            final_bytes=written.final_bytes,
            data_bytes=written.data_bytes,
            hardware=hardware,
            micro_batch=self.rows,
            kernel=f"{kernel}: {why}",
            parameters=shape.parameters,
            trained_parameters=trained,
            tokens_per_step=round(self._rank_tokens() * hardware.ranks),
            supervised_tokens=self.manifest.supervised_tokens if self.manifest else None,
            steps=steps,
            rows=self.manifest.rows if self.manifest else None,
            time=time,
            seconds_per_step=time.total_s if time else None,
            hours=run_s / 3600 if run_s is not None else None,
            requeues=again,
            gpu_hours=run_s * hardware.ranks / 3600 if run_s is not None else None,
            notes=tuple(self.notes),
        )

    # --- memory -----------------------------------------------------------------------------------

    def _corrected(self, memory: Memory) -> Memory:
        if self.gpu is None or not self.corrects:
            return memory
        factor = correction(self.gpu)
        if factor is None:
            self.notes.append(
                f"step time and margin are formulas, not yet measured on {self.gpu.name}"
            )
            return memory
        self.notes.append(
            f"memory is corrected by {factor - 1:+.1%}, as measured on {self.gpu.name}; step time "
            "is a formula"
        )
        parts = {name: round(size * factor) for name, size in memory.breakdown.items()}
        return replace(memory, peak_bytes=sum(parts.values()), breakdown=parts)

    def _moving(self, memory: Memory) -> int:
        """What comes and goes within a step."""
        parts = memory.breakdown
        return memory.peak_bytes - parts["parameters"] - parts["optimizer"]

    def _margin(self, memory: Memory) -> int:
        """What is taken beside the tensors that torch counts."""
        groups = 0
        if self.hardware.ranks > 1:
            sharing = shard_group(self.train, self.hardware.ranks, self.hardware.ranks_per_node)
            groups = 1 + (1 < sharing < self.hardware.ranks)
        lost = int(FRAGMENTS * self._moving(memory))
        return CONTEXT_BYTES + LIBRARY_BYTES + groups * NCCL_BYTES + lost

    def _doubt(self, memory: Memory) -> int:
        share = ROUGH_DOUBT if self.shape.rough else DOUBT
        return int(share * self._moving(memory) + DOUBT_OF_ALL * memory.peak_bytes) + DRIVER_BYTES

    def _verdict(self, peak_bytes: int, margin: int, doubt: int) -> tuple[bool | None, str]:
        if self.gpu is None:
            return None, (
                "the GPU is not known; give slurm.gpu_type, or --gpu with one of: "
                + ", ".join(KNOWN)
            )
        spare = self.gpu.memory_bytes - peak_bytes - margin
        if abs(spare) > doubt:
            return spare > 0, ""
        return None, (
            f"{CLOSE}{abs(spare) / GIB:.2f} GiB {'to spare' if spare >= 0 else 'too much'}, and "
            f"the estimate may be off by {doubt / GIB:.2f} GiB"
        )

    def _host(self, memory: Memory) -> int:
        """A run that asks Slurm for no GPUs trains in the host's memory."""
        per_node = self.hardware.ranks_per_node
        libraries = host_bytes(self.shape, self.train, self.adapters, per_node, self.on_gpus)
        return libraries if self.on_gpus else libraries + memory.peak_bytes * per_node

    def _obstacle(self, trained: int) -> str:
        """What keeps the run from starting on that GPU, however much memory there is."""
        train, limit = self.train, self.shape.max_positions
        if self.gpu and not self.gpu.has_bf16 and train.effective_precision.startswith("bf16"):
            return f"{self.gpu.name} has no bf16; set train_parameters.precision: 16-mixed"
        if train.optimizer.name in (*NOT_USABLE, *NOT_ON_SHARDS):
            return f"{train.optimizer.name} cannot be used with sharded parameters; take another"
        if limit and train.max_seq_len > limit:
            return f"max_seq_len {train.max_seq_len} is more than the model's {limit} positions"
        if not trained:
            return "lora_peft_config.target_modules matches no layer, so nothing would be trained"
        return ""

    def _note(self, memory: Memory) -> None:
        if self.gpu and self.gpu.assumed:
            self.notes.append(self.gpu.assumed)
        if self.gpu and self.gpu.is_amd:
            self.notes.append(
                f"{self.gpu.name} is planned with kernels as fast and as sparing as NVIDIA's "
                "(fused optimizers, flash attention); nothing was ever measured there"
            )
        if self.shape.rough:
            self.notes.append(
                f"the family {self.shape.model_type} is not known here and is taken for a Llama: "
                "this is rougher than usual"
            )
        if self.hardware.ranks % shard_group(
            self.train, self.hardware.ranks, self.hardware.ranks_per_node
        ):
            self.notes.append("the ranks cannot be split evenly into groups that share a copy")
        changed = [name for name in ("compile", "use_liger_kernel") if getattr(self.train, name)]
        if changed:
            self.notes.append(
                f"memory and time are planned as without {' and '.join(changed)}; what that "
                "changes is not known"
            )
        if memory.moment == "evaluation":
            self.notes.append("the peak comes with an evaluation: lower dataset.eval_bs")

    def _note_copies(self, copies: int, memory: Memory) -> None:
        given = megabytes(self.config.slurm.mem) << 20 if self.config.slurm else 0
        taken = running_bytes(self.hardware.ranks_per_node, self.on_gpus)
        taken += 0 if self.on_gpus else memory.peak_bytes * self.hardware.ranks_per_node
        if given and copies > FREE_SHARE * max(given - taken, 0):
            self.notes.append(
                "training waits for each checkpoint: slurm.mem leaves no room for copies of "
                f"{copies / GIB:.1f} GiB a node"
            )

    def _note_waits(self, time: StepTime | None) -> None:
        if time and time.waits_s > WAITS * time.total_s:
            self.notes.append(
                f"{time.waits_s / time.total_s:.0%} of a step waits for links: --compare shows "
                "other ways to share"
            )
        slurm = self.config.slurm
        if time and slurm and slurm.nodes > 1 and "node_gbit_per_s" not in slurm.model_fields_set:
            self.notes.append(
                f"a node is taken to send {slurm.node_gbit_per_s} Gbit/s to others; if that is not "
                "so, set slurm.node_gbit_per_s (`vectorlm preflight` measures it)"
            )

    def _note_requeues(self, again: int | None, checkpoint_bytes: int) -> None:
        slurm = self.config.slurm
        if again is None:
            self.notes.append(
                "the run never ends: to start and to save takes about "
                f"{least_start_s(checkpoint_bytes) / 60:,.0f} minutes, and slurm.time less "
                "signal_lead_s must be well above that"
            )
        elif slurm and again and not slurm.requeue:
            self.notes.append(
                "the time limit ends it before it is done, and slurm.requeue is false"
            )
        elif slurm and again > slurm.max_requeues:
            self.notes.append(
                f"it needs {counted(again, 'requeue')}, and slurm.max_requeues is "
                f"{slurm.max_requeues}"
            )

    # --- time -------------------------------------------------------------------------------------

    def _rank_tokens(self) -> float:
        """Tokens of a rank in a step, on average."""
        length = float(self.train.max_seq_len)
        if self.manifest and self.manifest.rows:
            length = self.manifest.tokens / self.manifest.rows
        return self.rows * self.train.gradient_accumulation_steps * length

    def _context(self) -> float:
        if self.manifest and self.manifest.documents:
            documents = max(self.manifest.documents, self.manifest.rows)
            return self.manifest.tokens / documents
        return float(self.train.max_seq_len)

    def _learned(self) -> float:
        if self.manifest and self.manifest.tokens:
            return self.manifest.supervised_tokens / self.manifest.tokens
        return 1.0

    def _time(self) -> StepTime | None:
        if self.gpu is None:
            return None
        micro = self.train.gradient_accumulation_steps
        work = Work(
            micro,
            round(self._rank_tokens() / micro),
            self._context(),
            self.hardware.ranks,
            self.hardware.ranks_per_node,
            self._learned(),
        )
        slurm = self.config.slurm
        between = slurm.node_bytes_per_s if slurm else math.inf  # without it, there is one node
        return step_time(self.shape, self.train, self.adapters, work, self.gpu, between)

    def _steps(self) -> int | None:
        if self.manifest is None or not self.manifest.rows:
            return None
        batch = self.rows * self.train.gradient_accumulation_steps * self.hardware.ranks
        steps = Steps(self.manifest.rows, batch, self.train.epochs)
        return math.ceil(steps.per_epoch * self.train.epochs)


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _manifest(config: Config) -> tuple[Manifest | None, list[str]]:
    if config.dataset is None:
        return None, ["the configuration has no dataset: a micro-batch of one row is planned"]
    try:
        return read_manifest(config.dataset.train_ds), []
    except DataError:
        return None, [
            f"{config.dataset.train_ds} is not prepared yet: steps and hours follow when it is"
        ]
