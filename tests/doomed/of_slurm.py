"""Requests that Slurm refuses, or takes and can never meet; asked of a real one.

Its nodes, n1 and n2, have 64 CPUs, 500,000 MB and four GPUs of type a100 each. See conftest.py.
"""

from __future__ import annotations

import shutil
from functools import partial
from typing import Any

from tests.doomed.case import Case
from tests.doomed.entry import doomed

EITHER = ("error", "warning")
submitted = partial(doomed, verb="submit", on_cluster=True)


def request(case: Case, **keys: Any) -> None:
    case.slurm(**{"gpus_per_node": 1, "time": "00:10:00", **keys})


@submitted(r"slurm\.partition.*gpu-long", r"a100.*urgent|slurm\.partition", "invalid partition")
def a_partition_that_is_not_there(case: Case) -> None:
    request(case, partition="gpu-long")


@submitted(
    r"slurm\.gpu_type.*h100",
    r"a100",
    "sbatch refused the job: ",
)
def a_gpu_type_that_is_not_there(case: Case) -> None:
    request(case, gpu_type="h100")


@submitted(r"slurm\.gpus_per_node.*8", r"at most 4|\b4\b", "sbatch refused the job: ")
def more_gpus_than_a_node_has(case: Case) -> None:
    request(case, gpus_per_node=8)


@submitted(r"slurm\.nodes.*5", r"at most 2|\b2\b", "But it cannot start")
def more_nodes_than_there_are(case: Case) -> None:
    request(case, nodes=5)


@submitted(r"slurm\.mem.*900G", r"(488|500,?000|GiB|MB|G\b)", "sbatch refused the job: ")
def more_memory_than_a_node_has(case: Case) -> None:
    request(case, mem="900G")


@submitted(r"slurm\.cpus_per_gpu.*(128|32)", r"\b(16|64)\b", "sbatch refused the job: ")
def more_cores_than_a_node_has(case: Case) -> None:
    request(case, gpus_per_node=4, cpus_per_gpu=32)


@submitted(
    r"slurm\.time.*(08:00:00|8 h|480|8:00)",
    r"(00:30:00|30 min|0:30)|another partition",
    "cannot start",
)
def more_time_than_the_partition_gives(case: Case) -> None:
    request(case, partition="short", time="08:00:00")


@submitted(
    r"slurm\.nodes.*2",
    r"at most 1|\b1\b|another partition",
    "But it cannot start: it asks for more than the partition has",
)
def more_nodes_than_the_partition_gives(case: Case) -> None:
    request(case, partition="single", nodes=2)


@submitted(
    r"slurm\.partition.*closed.*(down|DOWN|not up|INACTIVE)",
    r"another|a100|slurm\.partition",
    "pending: PartitionDown",
    severities=EITHER,
)
def a_partition_that_is_closed(case: Case) -> None:
    request(case, partition="closed")


@submitted(r"slurm\.constraint.*v100", r"slurm\.constraint|feature", "Invalid feature")
def a_feature_that_no_node_has(case: Case) -> None:
    request(case, constraint="v100")


@submitted(
    r"slurm\.reservation.*course", r"slurm\.reservation|reservation", "reservation is invalid"
)
def a_reservation_that_is_not_there(case: Case) -> None:
    request(case, reservation="course")


@submitted(r"slurm\.exclude.*gpu03", r"n1.*n2|slurm\.exclude", "Invalid node name")
def a_node_to_avoid_that_is_not_there(case: Case) -> None:
    request(case, exclude="gpu03")


@submitted(
    r"slurm\.exclude.*(n1|all|every|no node)",
    r"slurm\.exclude|exclude fewer",
    "Requested node configuration is not available",
)
def all_nodes_avoided(case: Case) -> None:
    request(case, exclude="n[1-2]")


@submitted(r"slurm\.account.*def-prof", r"\blab\b", "Invalid account")
def an_account_that_is_not_ours(case: Case) -> None:
    request(case, account="def-prof")


@submitted(r"slurm\.qos.*gold", r"normal|quick", "Invalid qos")
def a_quality_of_service_that_is_not_ours(case: Case) -> None:
    request(case, qos="gold")


@submitted(
    r"(slurm\.(time|qos)).*quick",
    r"1 h|01:00:00|60|another",
    "pending: QOSMaxWallDurationPerJobLimit",
)
def more_time_than_the_quality_of_service_gives(case: Case) -> None:
    request(case, qos="quick", time="08:00:00")


@submitted(r"(slurm\.(gpus_per_node|nodes|qos)).*quick", r"\b2\b", "pending: QOSMaxGRESPerUser")
def more_gpus_than_the_quality_of_service_gives(case: Case) -> None:
    request(case, qos="quick", gpus_per_node=4)


@submitted(
    r"slurm\.preprocess\.partition.*cpu-only",
    r"\bcpu\b|slurm\.preprocess\.partition",
    "invalid partition specified: cpu-only",
    verb="submit --with-preprocess",
)
def a_partition_for_the_data_that_is_not_there(case: Case) -> None:
    shutil.rmtree(case.data)
    request(case, preprocess={"partition": "cpu-only"})


@submitted(r"slurm\.extra_flags.*--fly|--fly", r"slurm\.extra_flags|remove", "unrecognized option")
def a_flag_that_sbatch_does_not_know(case: Case) -> None:
    request(case, extra_flags=["--fly"])


@submitted(
    r"extra_flags.*(secret|WANDB_API_KEY|key)",
    r"remove|wandb login|environment|file",
    "trains, as .../output/submitted/0001/config.yaml says",
    severities=EITHER,
)
def a_key_in_a_flag_of_sbatch(case: Case) -> None:
    """Silent: it stands in the job's script, and in every checkpoint."""
    flag = "--export=ALL,WANDB_API_KEY=0123456789abcdef0123456789abcdef01234567"
    request(case, extra_flags=[flag])


@submitted(
    r"slurm\.setup.*/opt/team/env/bin/activate",
    r"mend the path|slurm\.setup|path",
    "/opt/team/env/bin/activate: No such file or directory",
    verb="job",
    severities=EITHER,
)
def an_environment_that_is_not_there(case: Case) -> None:
    request(case, setup=["source /opt/team/env/bin/activate"], gpus_per_node=0, max_requeues=0)


@submitted(
    r"slurm\.container_image.*torch\.sif",
    r"mend the path|slurm\.container_image|path",
    "FATAL: could not open image",
    verb="job",
    seen=False,
    severities=EITHER,
)
def a_container_that_is_not_there(case: Case) -> None:
    request(case, container_image=str(case.folder / "torch.sif"))


@submitted(
    r"output_dir.*(node|nodes)",
    r"all nodes share|shared|another",
    "another rank has left or does not answer",
    verb="job",
    seen=False,
    severities=EITHER,
)
def an_output_that_only_one_of_two_nodes_sees(case: Case) -> None:
    """Each node has a folder of that name, and half of every checkpoint in it."""
    case.rows(64, rows=64)
    case.train["output_dir"] = "/tmp/output-of-two-nodes"
    request(case, nodes=2)
