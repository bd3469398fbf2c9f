"""Variants that are sound, however unusual: `check` must find no error in them and no warning."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

from tests.doomed.case import ROOT, Case
from tests.doomed.entry import SOUND, Sound, sound
from tests.doomed.large import large_model
from tests.doomed.of_model import two_shards

FAMILIES = (
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "phi",
    "gpt2",
    "opt",
    "gpt_neox",
    "falcon",
    "falcon_alibi",
    "gemma",
)


@sound()
def as_it_is(case: Case) -> None:
    pass


@sound()
def adapters(case: Case) -> None:
    case.train["lora_peft_config"] = {"task_type": "CAUSAL_LM", "r": 8, "lora_dropout": 0.1}


@sound()
def adapters_on_chosen_layers(case: Case) -> None:
    case.train["lora_peft_config"] = {
        "r": 4,
        "target_modules": ["q_proj", "v_proj"],
        "layers_to_transform": [1],
    }


@sound()
def adapters_on_all_linear_layers(case: Case) -> None:
    case.train["lora_peft_config"] = {"r": 4, "target_modules": "all-linear", "use_rslora": True}


@sound()
def adapters_by_a_pattern(case: Case) -> None:
    case.train["lora_peft_config"] = {"r": 4, "target_modules": r".*\.(q|k)_proj"}


@sound()
def no_evaluation(case: Case) -> None:
    case.dataset["eval_ds"] = None


@sound()
def a_source_that_is_gone(case: Case) -> None:
    """What was prepared from it is there."""
    (case.raw / "train.jsonl").unlink()


@sound()
def groups_of_one(case: Case) -> None:
    case.train.update(sharding_strategy="HYBRID_SHARD", shard_group_size=1)


@sound()
def an_optimizer_with_all_its_arguments(case: Case) -> None:
    kwargs = {"momentum": 0.9, "dampening": 0, "nesterov": True, "foreach": None, "fused": False}
    case.train["optimizer"] = {"name": "SGD", "lr": 1e-3, "kwargs": kwargs}


@sound()
def only_training(case: Case) -> None:
    del case.config["dataset_preprocess"]


@sound()
def only_preparing(case: Case) -> None:
    del case.config["dataset"]


@sound()
def processors_only(case: Case) -> None:
    case.slurm(gpus_per_node=0, processes_per_node=2, cpus_per_gpu=1, mem="4G", time="00:10:00")


@sound(on_site=True)
def a_job_written_where_there_is_no_slurm(case: Case) -> None:
    case.rows(64, rows=640)
    case.slurm(nodes=2, gpus_per_node=4, gpu_type="a100", partition="gpu", account="def-prof")


@sound()
def a_sweep(case: Case) -> None:
    case.slurm(gpus_per_node=0, processes_per_node=2, cpus_per_gpu=1)
    case.config["sweep"] = {
        "grid": {"train_parameters.optimizer.lr": [1e-4, 1e-3], "train_parameters.seed": [1, 2]}
    }


@sound()
def a_run_that_goes_on(case: Case) -> None:
    """Its last checkpoint and its final model are still to come."""
    case.finished_run()
    shutil.rmtree(case.output / "final-model")
    shutil.rmtree(case.output / "checkpoints/step_00000006")
    for end in case.output.glob("starts/*/end.json"):
        end.unlink()


@sound()
def a_run_that_goes_on_with_another_rate(case: Case) -> None:
    a_run_that_goes_on(case)
    case.train["optimizer"] = {"lr": 5e-4}


@sound()
def an_output_folder_where_jobs_were_submitted(case: Case) -> None:
    for name in ("submitted/0001", "logs"):
        (case.output / name).mkdir(parents=True)
    case.put(case.output / "submitted/0001/config.yaml", "{}")


@sound()
def an_output_folder_that_is_a_link(case: Case) -> None:
    (case.folder / "scratch").mkdir()
    case.output.symlink_to(case.folder / "scratch")


@sound()
def data_behind_a_link(case: Case) -> None:
    shutil.move(case.data, case.folder / "elsewhere")
    case.data.symlink_to(case.folder / "elsewhere")


@sound()
def tied_embeddings(case: Case) -> None:
    case.use_model(case.surroundings.family("llama", tied=True))


@sound()
def weights_in_two_files(case: Case) -> None:
    two_shards(case)


@sound()
def weights_of_an_old_format(case: Case) -> None:
    import torch
    from safetensors.torch import load_file

    tensors = load_file(case.model / "model.safetensors")
    (case.model / "model.safetensors").unlink()
    torch.save(tensors, case.model / "pytorch_model.bin")


@sound()
def more_files_in_the_model_folder(case: Case) -> None:
    for name in ("README.md", "model-q4.gguf", ".gitattributes", "original/consolidated.00.pth"):
        case.put(case.model / name, "x")


@sound()
def a_model_in_the_cache(case: Case) -> None:
    case.cached("someone/tiny-llama", case.model)
    shutil.rmtree(case.model)
    case.config["model"] = "someone/tiny-llama"


@sound()
def a_cache_elsewhere(case: Case) -> None:
    case.cached("someone/tiny-llama", case.model)
    case.config["model"] = "someone/tiny-llama"
    shutil.move(case.folder / "home/.cache/huggingface", case.folder / "hf")
    case.environ["HF_HOME"] = str(case.folder / "hf")


@sound()
def rows_as_long_as_the_model(case: Case) -> None:
    case.rows(128)


@sound()
def loggers(case: Case) -> None:
    case.config.update(
        enable_wandb_logging=True,
        enable_tensorboard_logging=True,
        wandb_config={"project": "tokenizers", "tags": ["key-value", "secret-santa"]},
    )


@sound()
def a_token_of_ones_own(case: Case) -> None:
    token = case.folder / "home/.cache/huggingface/token"
    case.put(token, "hf_abcdefghijklmnopqrstuvwxyz01234567")
    token.chmod(0o600)
    case.environ["WANDB_API_KEY"] = "0123456789abcdef0123456789abcdef01234567"
    case.slurm(gpus_per_node=0, setup=["export HF_TOKEN=$(cat ~/.token)", "module load cuda"])


@sound()
def an_environment_and_a_container_of_the_site(case: Case) -> None:
    case.slurm(
        gpus_per_node=0,
        setup=["module purge", "source ~/env/bin/activate", 'source "$SCRATCH/env.sh"'],
        container_image="docker://nvcr.io/nvidia/pytorch:25.01-py3",
        container_mounts=[str(case.folder)],
    )


@sound()
def another_optimizer_and_schedule(case: Case) -> None:
    case.train.update(
        optimizer={"name": "SGD", "lr": 0.1, "kwargs": {"momentum": 0.9, "nesterov": True}},
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": 1e-6},
    )


@sound()
def a_plateau(case: Case) -> None:
    case.train.update(
        lr_scheduler_type="plateau-with-warmup", lr_scheduler_kwargs={"patience": 3, "factor": 0.5}
    )


@sound()
def a_padded_vocabulary(case: Case) -> None:
    case.train["pad_vocab_to_multiple_of"] = 128


@sound()
def a_table_as_the_source(case: Case) -> None:
    for name in ("train", "test"):
        rows = map(json.loads, (case.raw / f"{name}.jsonl").read_text().splitlines())
        lines = ["body", *('"' + row["text"].replace('"', '""') + '"' for row in rows)]
        case.put(case.raw / f"{name}.csv", "\n".join(lines) + "\n")
    case.prepare.update(
        load_path=str(case.raw / "train.csv"),
        eval_load_path=str(case.raw / "test.csv"),
        data_field="body",
    )
    case.prepare_again()


@sound()
def a_source_saved_by_datasets(case: Case) -> None:
    from datasets import Dataset, DatasetDict

    rows = [json.loads(line) for line in (case.raw / "train.jsonl").read_text().splitlines()]
    parts = {"train": Dataset.from_list(rows[8:]), "validation": Dataset.from_list(rows[:8])}
    DatasetDict(parts).save_to_disk(case.folder / "saved")
    del case.prepare["eval_load_path"]
    case.prepare.update(
        load_path=str(case.folder / "saved"), split="train", eval_split="validation"
    )
    case.prepare_again()


@sound()
def a_source_that_has_gone_since(case: Case) -> None:
    """The raw data is on another file system, the prepared data is all that training reads."""
    shutil.rmtree(case.raw)
    del case.config["dataset_preprocess"]


@sound(on_site=True, large=True)
def seven_billion_on_eight_gpus(case: Case) -> None:
    large_model(case, "7b")
    case.rows(512, rows=256)
    case.train.update(use_mp=True, use_activation_checkpointing=True)
    case.slurm(gpus_per_node=8, gpu_type="h100")


@sound(on_site=True, large=True)
def seven_billion_by_adapters_on_one_gpu(case: Case) -> None:
    large_model(case, "7b")
    case.rows(512, rows=256)
    case.train.update(
        use_mp=True, use_activation_checkpointing=True, lora_peft_config={"r": 8, "lora_alpha": 32}
    )
    case.slurm(gpus_per_node=1, gpu_type="h100")


@sound(on_site=True, large=True)
def one_billion_in_halves_on_a_v100(case: Case) -> None:
    large_model(case, "1b")
    case.rows(512, rows=256)
    case.train.update(precision="16-mixed", use_activation_checkpointing=True)
    case.slurm(gpus_per_node=4, gpu_type="v100")


@sound(on_cluster=True)
def a_job_on_a_cluster(case: Case) -> None:
    case.slurm(partition="a100", gpus_per_node=4, gpu_type="a100", time="08:00:00", mem="64G")


@sound(on_cluster=True)
def copies_in_each_of_two_nodes(case: Case) -> None:
    case.rows(64, rows=64)
    case.train.update(sharding_strategy="HYBRID_SHARD", gradient_accumulation_steps=1)
    case.slurm(nodes=2, gpus_per_node=4, partition="urgent,a100", account="lab")


@sound(on_cluster=True)
def a_quality_of_service_and_a_node_to_avoid(case: Case) -> None:
    case.slurm(gpus_per_node=2, qos="quick", time="00:30:00", exclude="n1", cpus_per_gpu=32)


@sound(on_cluster=True)
def a_short_partition_for_short_work(case: Case) -> None:
    case.slurm(gpus_per_node=1, partition="short", time="00:30:00", preprocess={"partition": "cpu"})


@sound(on_cluster=True)
def features_and_a_reservation(case: Case) -> None:
    case.slurm(gpus_per_node=1, constraint="ib&nvlink", reservation="workshop", time="00:30:00")


@sound(on_cluster=True)
def one_feature_or_another(case: Case) -> None:
    case.slurm(gpus_per_node=1, constraint="ib|nvlink", extra_flags=["--exclusive", "--nice=100"])


@sound()
def settings_of_one_submodule(case: Case) -> None:
    case.train["lora_peft_config"] = {
        "r": 4,
        "target_modules": ["self_attn.q_proj", "lm_head"],
        "modules_to_save": ["embed_tokens"],
        "rank_pattern": {"q_proj": 8},
        "use_dora": True,
    }


@sound()
def a_cache_of_links(case: Case) -> None:
    """As the hub's library leaves it: the files lie elsewhere, under their hashes."""
    snapshot = case.cached("someone/tiny-llama", case.model)
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(blobs / f"{number:040x}")
        path.symlink_to(Path("../../blobs") / f"{number:040x}")
    case.config["model"] = "someone/tiny-llama"


def _of_family(case: Case, family: str) -> None:
    case.use_model(case.surroundings.family(family))
    case.prepare_again()


SOUND.extend(Sound(f"family {family}", partial(_of_family, family=family)) for family in FAMILIES)


def shipped(case: Case, name: str) -> None:
    """A configuration of ours on a cluster that it is meant for, with the paths filled in."""
    case.text = (ROOT / "configs" / name).read_text(encoding="utf-8")
    raw = case.folder / "texts"
    raw.mkdir()
    for split in ("train", "validation"):
        text = (case.raw / "train.jsonl").read_text(encoding="utf-8")
        (raw / f"{split}.jsonl").write_text(text * SHIPPED_COPIES, encoding="utf-8")
    if name == "demo.yaml":
        case.overrides += [f"dataset_preprocess.load_path={raw}/train.jsonl"]
        case.overrides += [f"dataset_preprocess.eval_load_path={raw}/validation.jsonl"]
    else:
        large_model(case, "7b")
        case.overrides += [f"dataset_preprocess.load_path={raw}"]
        if name == "config.yaml":
            case.overrides[-1] += "/train.jsonl"
            case.overrides += [f"dataset_preprocess.eval_load_path={raw}/validation.jsonl"]
    case.overrides += [
        f"model={case.model}",
        f"train_parameters.output_dir={case.train['output_dir']}",
        f"dataset.train_ds={case.data}",
        f"dataset.eval_ds={case.eval}",
        f"dataset_preprocess.save_path={case.data}",
        f"dataset_preprocess.eval_save_path={case.eval}",
    ]
    case.prepare_again()


SHIPPED_COPIES = 180
SHIPPED = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))
SOUND.extend(
    Sound(f"configs/{name}", partial(shipped, name=name), on_cluster=True, on_site=True)
    for name in SHIPPED
)
