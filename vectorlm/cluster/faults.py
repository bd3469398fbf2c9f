"""Recognizes what ended a rank from within: memory, the loss, disks, GPUs, software, mistakes.
Floor 1, used by `causes`.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from vectorlm.cluster.evidence import Evidence, Finding
from vectorlm.cluster.joblog import Line
from vectorlm.cluster.said import Fault
from vectorlm.errors import EXIT_USER

USER_ERRORS = {
    "ConfigError",
    "DataError",
    "ModelError",
    "CheckpointError",
    "ExportError",
    "ClusterError",
    "TrainingError",
}
# Python's own words for a fault in the program: they come again.
PROGRAM_ERRORS = {
    "AssertionError",
    "AttributeError",
    "IndexError",
    "KeyError",
    "NameError",
    "NotImplementedError",
    "RecursionError",
    "SyntaxError",
    "TypeError",
    "UnboundLocalError",
    "ValueError",
    "ZeroDivisionError",
}
SHOWN_CHARACTERS = 300
_MEMORY = re.compile(
    r"OutOfMemoryError|MemoryError|out of memory|can't allocate memory|Cannot allocate memory"
    r"|not enough memory|CUBLAS_STATUS_ALLOC_FAILED"
)
_GPU = re.compile(r"cuda|hip out of|cublas|gpu \d", re.I)
_BATCH = re.compile(r"out of memory on rank \d+, step \d+, (.*?)(?: \(|\. Set |$)", re.S)
_SHARED = re.compile(r"/dev/shm|shared memory|torch_shm_manager|: Bus error")
_NOT_SHARED = re.compile(r"CUDA error|Triton|out of resource")
_DISK = re.compile(
    r"the disk is full|your quota is used up|\[Errno (?:28|122)\]|No space left on device"
    r"|Disk quota exceeded|a checkpoint of this run needs .* but only"
)
_FILES = re.compile(
    r"\[Errno (?:5|107|108|116|121)\]|Stale file handle|Input/output error|Remote I/O error"
    r"|Transport endpoint"
)
_SOFTWARE = re.compile(
    r"(?:Import|ModuleNotFound)Error|GLIBC\w*_[\d.]+. not found|cannot open shared object file"
    r"|undefined symbol"
)
_SOFTWARE_LINE = re.compile(
    r"(?:slurmstepd\S* error: execve\(\): .*No such file or directory"
    r"|.*\bpython\S*: (?:command )?not found|.*: module: command not found"
    r"|VectorLM cannot be imported here.*|.*GLIBC\w*_[\d.]+. not found"
    r"|.*The following module\(s\) are unknown|FATAL: .*image|.*pyxis: .*(?:failed|error).*)"
)
_NO_PROGRAM = [f"Exited with exit code {code}" for code in (126, 127)]  # of a shell
_LIBRARY = re.compile(r"GLIBC\w*_[\d.]+")
_SHARED_LINE = re.compile(
    r".*NCCL WARN .*(?:/dev/shm/|posix_fallocate failed|creating shared memory segment)"
    r"|ERROR: Unexpected bus error encountered in worker"
)
_XID = re.compile(r".*NVRM: Xid \(PCI:([0-9a-f:.]+)\S*: (\d+),")
XIDS_OF_HARDWARE = {48, 62, 63, 64, 74, 79, 92, 94, 95, 119, 120, 136, 140, 143, 149}


def failed_of(pattern: re.Pattern[str], sentence: str) -> Callable[[Evidence], Finding | None]:
    """A recognizer of what the first exception says; the sentence may ask for {who} and {said}."""

    def find(evidence: Evidence) -> Finding | None:
        fault = evidence.fault
        if fault is None or not pattern.search(fault.text):
            return None
        words = sentence.format(who=who(evidence, fault), said=brief(fault))
        return told(evidence, fault, words)

    return find


def told(
    evidence: Evidence,
    fault: Fault,
    sentence: str,
    cure: str | None = None,
    may_pass: bool | None = None,
) -> Finding:
    host = fault.host or evidence.host_of(fault.rank)
    step = _step(evidence, fault)
    return Finding(sentence, fault.proof, fault.rank, host, step, cure, may_pass)


def who(evidence: Evidence, fault: Fault) -> str:
    host = fault.host or evidence.host_of(fault.rank)
    name = "a rank" if fault.rank is None else f"rank {fault.rank}"
    return name + (f" on {host}" if host else "") + at_step(_step(evidence, fault))


def _step(evidence: Evidence, fault: Fault) -> int | None:
    return evidence.last_step if fault.step is None else fault.step


def at_step(step: int | None) -> str:
    """Steps are counted when they are done."""
    return "" if step is None else f", after step {step}"


def brief(fault: Fault) -> str:
    """The message in a line: ours whole, of libraries the first line, of NCCL the last one."""
    first, _, rest = fault.message.partition("\n")
    last = rest.rpartition("Last error:\n")
    text = fault.message if fault.kind in USER_ERRORS else last[2] if last[1] else first
    text = " ".join(text.split()) or fault.kind
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."


# --- memory ---------------------------------------------------------------------------------------


def gpu_memory(evidence: Evidence) -> Finding | None:
    fault = evidence.fault
    if fault is None or not _MEMORY.search(fault.text) or not _GPU.search(fault.text):
        return None
    sentence = f"the GPU's memory was used up on {who(evidence, fault)}{_batch(fault)}"
    return told(evidence, fault, sentence, cure=_less_gpu_memory(evidence))


def host_memory(evidence: Evidence) -> Finding | None:
    """Refused to a rank; what the kernel killed is another thing."""
    fault = evidence.fault
    if fault is None or not _MEMORY.search(fault.text):
        return None
    return told(
        evidence,
        fault,
        f"the host's memory was used up on {who(evidence, fault)}{_batch(fault)}: it was refused "
        "to the process",
    )


def _batch(fault: Fault) -> str:
    match = _BATCH.search(fault.message)
    if match:
        return f", in {' '.join(match[1].split())}"
    wanted = re.search(r"Tried to allocate ([\d.]+ \w+)", fault.message)
    return f", where {wanted[1]} more were asked for" if wanted else ""


def _less_gpu_memory(evidence: Evidence) -> str | None:
    """Only what is not done yet, where the configuration can be read."""
    config = evidence.config
    if config is None or config.dataset is None:
        return None
    train = config.train_parameters
    batch = config.dataset.train_bs
    ways = []
    if not train.use_activation_checkpointing:
        ways.append("set train_parameters.use_activation_checkpointing: true")
    if batch > 1:
        ways.append(
            f"lower dataset.train_bs (now {batch}) and raise "
            "train_parameters.gradient_accumulation_steps by the same factor"
        )
    if train.sharding_strategy != "FULL_SHARD":
        ways.append("set train_parameters.sharding_strategy: FULL_SHARD")
    if train.lora_peft_config is None:
        ways.append("train adapters only (train_parameters.lora_peft_config)")
    ways += [
        "use more GPUs, over which the model is sharded",
        f"prepare shorter rows (train_parameters.max_seq_len is {train.max_seq_len})",
    ]
    text = "; or ".join(ways)
    return text[0].upper() + text[1:]


# --- disks ----------------------------------------------------------------------------------------


def shared_memory(evidence: Evidence) -> Finding | None:
    fault = evidence.fault
    if fault and _SHARED.search(fault.text) and not _NOT_SHARED.search(fault.text):
        return told(evidence, fault, f"/dev/shm is full for {who(evidence, fault)}: {brief(fault)}")
    seen = evidence.search(_SHARED_LINE)
    if seen and (evidence.over or evidence.task_ends):
        return Finding("/dev/shm is full on a node: shared memory could not be had", [seen[1]])
    for end in evidence.task_ends:
        if end.first and end.words == "Bus error":
            where = f"rank {end.ranks[0]} on {end.host}" if end.ranks else end.host
            return Finding(
                f"{where} ended with a bus error: /dev/shm or a file it maps was cut or is full",
                [end.line],
                end.ranks[0] if end.ranks else None,
                end.host,
            )
    return None


disk = failed_of(_DISK, "the disk or your quota is full for {who}: {said}")
files = failed_of(_FILES, "the file system did not answer {who}: {said}")


# --- GPUs -----------------------------------------------------------------------------------------

_BROKEN = re.compile(
    r"ECC error|fallen off the bus|GPU is lost|uncorrectable NVLink|or a hardware error"
    r"|CUDA error: unknown error|busy or unavailable|hardware stack error"
)
_GPU_FAULT = re.compile(
    r"illegal memory access|device-side assert|misaligned address|unspecified launch failure"
    r"|illegal instruction was encountered|launch timed out|CUBLAS_STATUS|CUDNN_STATUS|CUDA error"
)
_DRIVER = re.compile(
    r"driver on your system is too old|driver version is insufficient|no kernel image is available"
    r"|forward compatibility was attempted|not compatible with the current PyTorch"
    r"|unsupported toolchain"
)
_NO_GPU = re.compile(
    r"No CUDA GPUs are available|no CUDA-capable device|Found no NVIDIA driver"
    r"|has no GPU: this node shows|invalid device ordinal"
)


def gpu_broken(evidence: Evidence) -> Finding | None:
    fault = evidence.fault
    if fault and _BROKEN.search(fault.text):
        host = fault.host or evidence.host_of(fault.rank)
        return told(
            evidence,
            fault,
            f"a GPU failed under {who(evidence, fault)}: {brief(fault)}",
            cure=host
            and f"It may pass on another node: set slurm.exclude: {host}, and report "
            f"{host} to those who run the cluster",
        )
    seen = evidence.search(_XID) if evidence.over else None
    if seen and int(seen[0][2]) in XIDS_OF_HARDWARE:
        return Finding(f"a GPU failed: the driver reported Xid {seen[0][2]}", [seen[1]])
    return None


gpu_fault = failed_of(_GPU_FAULT, "a GPU kernel failed on {who}: {said}")
driver = failed_of(_DRIVER, "the GPU's driver does not fit torch on {who}: {said}")
no_gpu = failed_of(_NO_GPU, "no GPU could be used by {who}: {said}")


# --- the run, its software, its configuration -----------------------------------------------------

superseded = failed_of(
    re.compile(r"now belongs to another start of the run"), "another start took the folder: {said}"
)
not_finite = failed_of(re.compile(r"is not a finite number"), "the numbers diverged: {said}")


def software(evidence: Evidence) -> Finding | None:
    fault = evidence.fault
    if fault and _SOFTWARE.search(fault.text):
        library = _LIBRARY.search(fault.text)
        lack = f"{library[0]} is missing" if library else "software is missing or does not fit"
        return told(evidence, fault, f"{lack} for {who(evidence, fault)}: {brief(fault)}")
    seen = evidence.search(_SOFTWARE_LINE) if evidence.over or evidence.task_ends else None
    if seen:
        return Finding(f"software is missing on a node: {seen[1].text}", [seen[1]])
    # The shell says which, but srun may end before it has passed that on.
    ends = [end for end in evidence.task_ends if end.first and end.words in _NO_PROGRAM]
    if not ends:
        return None
    said = f"a program is not there, or may not be run ({ends[0].host}: {ends[0].words})"
    return Finding(f"software is missing on a node: {said}", [ends[0].line])


def mistake(evidence: Evidence) -> Finding | None:
    """What a rank refused, by its record; or by exit code 2 and the last lines before it."""
    fault = evidence.fault
    if fault and not fault.weak and fault.kind in USER_ERRORS:
        return told(evidence, fault, brief(fault))
    if fault or _code(evidence) != EXIT_USER:
        return None
    lines = [line for line in _before_the_end(evidence) if line.text]
    if not lines:
        return None
    said = list({line.text: line for line in lines[-8:]}.values())
    return Finding(said[-1].text[:SHOWN_CHARACTERS], said[-4:])


def _code(evidence: Evidence) -> int | None:
    """Of the tasks that left first, else of the script."""
    for end in evidence.task_ends:
        match = re.fullmatch(r"Exited with exit code (\d+)", end.words)
        if end.first:
            return int(match[1]) if match else None
    if evidence.code is not None:
        return evidence.code
    said = evidence.facts.get("ExitCode") or (evidence.rows[0]["ExitCode"] if evidence.rows else "")
    code = said.partition(":")[0]
    return int(code) if code.isdecimal() else None


def _before_the_end(evidence: Evidence) -> list[Line]:
    """What was printed before srun tells of the end, without the banner."""
    found = []
    for line in evidence.lines:
        if line.text.startswith(("srun: ", "slurmstepd")):
            break
        if not line.text.startswith("== "):
            found.append(line)
    return found


def rank_failed(evidence: Evidence) -> Finding | None:
    fault = evidence.fault
    if fault is None or fault.weak:
        return None
    others = sorted({f.rank for f in evidence.start.failures} if evidence.start else set())
    rest = [rank for rank in others if rank != fault.rank]
    after = f"; rank{'s' * (len(rest) > 1)} {_some(rest)} failed of that" if rest else ""
    sentence = f"{who(evidence, fault)} failed: {fault.kind}: {brief(fault)}{after}"
    return told(evidence, fault, sentence, may_pass=fault.kind not in PROGRAM_ERRORS)


def _some(ranks: list[int]) -> str:
    text = ", ".join(map(str, ranks[:8]))
    return text + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
