"""Prepared data that is absent, damaged, stale or of no use, and sources that cannot be read."""

from __future__ import annotations

import json
import shutil

from tests.doomed.case import Case
from tests.doomed.entry import doomed
from tests.tiny import write_rows

PREPARE = r"preprocess"
EITHER = ("error", "warning")


@doomed(
    r"train_ds.*prepared", PREPARE, "there is no such folder of prepared data", severities=EITHER
)
def data_that_was_never_prepared(case: Case) -> None:
    shutil.rmtree(case.data)


@doomed(r"train_ds.*nowhere", PREPARE + "|train_ds", "there is no such folder of prepared data")
def data_that_nobody_prepares(case: Case) -> None:
    case.dataset["train_ds"] = str(case.folder / "nowhere")


@doomed(r"train_ds.*(empty|manifest|not prepared)", PREPARE, "no manifest.json", severities=EITHER)
def an_empty_data_folder(case: Case) -> None:
    shutil.rmtree(case.data)
    case.data.mkdir()


@doomed(
    r"train_ds.*(jsonl|raw|prepared|manifest)",
    r"save_path|prepared|preprocess",
    "no manifest.json, so this is no prepared data",
)
def raw_data_in_place_of_prepared(case: Case) -> None:
    case.dataset["train_ds"] = str(case.raw)
    del case.config["dataset_preprocess"]


@doomed(
    r"train_ds.*(manifest|prepared)|save_path.*no prepared data",
    PREPARE + "|another save_path|remove it",
    "no manifest.json",
)
def data_saved_by_datasets_itself(case: Case) -> None:
    (case.data / "manifest.json").unlink()


@doomed(r"manifest\.json", r"prepare|preprocess", "manifest.json: cannot be read")
def a_manifest_that_was_cut(case: Case) -> None:
    case.cut(case.data / "manifest.json", 0.5)


@doomed(r"manifest\.json.*newer|format 9", r"[Uu]pdate|prepare", "by a newer VectorLM")
def data_of_a_newer_version(case: Case) -> None:
    case.edit(case.data / "manifest.json", format=9)


@doomed(r"data-00000.*arrow.*(missing|not there|gone|no )", r"prepare|preprocess", "cannot be read")
def a_part_of_the_data_is_missing(case: Case) -> None:
    next(case.data.glob("*.arrow")).unlink()


@doomed(
    r"data-00000.*arrow|rows", r"prepare|preprocess", "cannot be read (Expected to be able to read"
)
def a_part_of_the_data_was_cut(case: Case) -> None:
    case.cut(next(case.data.glob("*.arrow")), 0.6)


@doomed(r"state\.json", r"prepare|preprocess", "state.json: cannot be read")
def data_whose_list_of_files_is_missing(case: Case) -> None:
    (case.data / "state.json").unlink()


@doomed(r"rows.*(9,?999|manifest)|9,?999", r"prepare|preprocess", "manifest.json says 9,999")
def fewer_rows_than_promised(case: Case) -> None:
    case.edit(case.data / "manifest.json", rows=9999)


@doomed(r"max_seq_len.*64.*32|max_seq_len.*32.*64", r"32|64|prepare|preprocess", "max_seq_len 64")
def data_of_another_length(case: Case) -> None:
    case.train["max_seq_len"] = 32
    del case.config["dataset_preprocess"]


@doomed(r"ignore_index.*-100.*-1\b|ignore_index.*-1\b.*-100", r"-100|prepare", "ignore_index -100")
def data_with_another_label(case: Case) -> None:
    case.dataset["ignore_index"] = -1
    del case.config["dataset_preprocess"]


@doomed(r"tokenizer", r"prepare|preprocess", "was prepared with another tokenizer")
def data_of_another_tokenizer(case: Case) -> None:
    case.other_tokenizer(case.model)


@doomed(
    r"(train_ds|save_path|prepared/train).*(packing|options|add_bos)",
    PREPARE,
    "was prepared otherwise than dataset_preprocess says now",
)
def data_made_with_other_options(case: Case) -> None:
    case.prepare.update(packing_type="truncate", add_bos_eos_tokens=False)


@doomed(
    r"(train_ds|save_path|prepared/train).*(source|train\.jsonl|changed|older|stale)",
    PREPARE,
    "finished: .../output/final-model",
    severities=EITHER,
)
def data_whose_source_has_changed(case: Case) -> None:
    """Silent: what was added since is never learned."""
    case.put(case.raw / "train.jsonl", '{"text": "A text that came later."}\n' * 30)


@doomed(
    r"(train_ds|prepared/train).*(no rows|0 rows|empty)",
    r"prepare|preprocess|source",
    "holds no rows; nothing can be learned from it",
)
def data_of_no_rows(case: Case) -> None:
    import pyarrow as pa

    from vectorlm.data.store import SCHEMA

    file = next(case.data.glob("*.arrow"))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, SCHEMA):
        pass
    case.put(file, sink.getvalue().to_pybytes())
    changes = {"rows": 0, "documents": 0, "tokens": 0, "supervised_tokens": 0, "longest_row": 0}
    case.edit(case.data / "manifest.json", **changes)
    del case.config["dataset_preprocess"]


@doomed(
    r"(train_ds|prepared/train).*(supervised|learned|learn)",
    r"separator|prepare|preprocess",
    "loss 0.0000",
)
def data_in_which_nothing_is_learned(case: Case) -> None:
    shutil.rmtree(case.data)
    hashed = case.surroundings.tokenizer_sha256()
    # A document of one token: what stands before everything is not learned.
    write_rows(case.data, [[[3]], [[4]], [[5]], [[6]]], 64, tokenizer_sha256=hashed)
    del case.config["dataset_preprocess"]


@doomed(
    r"(train_ds|prepared/train).*3 rows.*16|16.*3 rows",
    r"train_bs|gradient_accumulation_steps|fewer|more data",
    "1 steps of 16 rows, 1 epochs of 1 steps",
    seen=False,
    severities=EITHER,
)
def fewer_rows_than_ranks(case: Case) -> None:
    """Most of the GPUs learn nothing at every step."""
    case.rows(64, rows=3)
    case.train["gradient_accumulation_steps"] = 1
    case.dataset["train_bs"] = 1
    case.slurm(nodes=2, gpus_per_node=8, gpu_type="a100")


@doomed(
    r"token 319.*vocabulary|vocabulary.*300|319.*300",
    r"resize|tokenizer|prepare",
    "holds token 319, but .../model has a vocabulary of 300",
)
def tokens_that_the_model_does_not_know(case: Case) -> None:
    """Weights, vocabulary and configuration of 300 tokens, data with token 319."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(case.model / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:300].copy()
    (case.model / "model.safetensors").unlink()
    save_file(tensors, case.model / "model.safetensors", {"format": "pt"})
    case.edit(case.model / "config.json", vocab_size=300)


@doomed(r"eval_ds.*nowhere", PREPARE + "|eval_ds", "there is no such folder of prepared data")
def no_evaluation_data(case: Case) -> None:
    case.dataset["eval_ds"] = str(case.folder / "nowhere")


@doomed(
    r"eval_ds.*max_seq_len.*32|prepared/eval.*max_seq_len.*32",
    r"prepare|preprocess|32",
    "was prepared with max_seq_len 32",
)
def evaluation_data_of_another_length(case: Case) -> None:
    shutil.rmtree(case.eval)
    hashed = case.surroundings.tokenizer_sha256()
    write_rows(case.eval, [[[3, 4, 5]]], 32, tokenizer_sha256=hashed)
    del case.config["dataset_preprocess"]


@doomed(
    r"eval_ds.*(same|train_ds|training data)",
    r"eval_ds|other|held",
    "finished: .../output/final-model",
    severities=EITHER,
)
def evaluation_on_what_is_learned(case: Case) -> None:
    """Silent: the evaluation loss falls, whatever is learned."""
    case.dataset["eval_ds"] = str(case.data)


@doomed(
    r"train_ds.*dataset_preprocess\.save_path",
    r"one folder",
    "finished: .../output/final-model",
    severities=("warning",),
)
def other_data_than_is_prepared(case: Case) -> None:
    """Silent: what is prepared is never learned"""
    case.prepare["save_path"] = str(case.folder / "prepared/new")


@doomed(
    r"load_path.*gone\.jsonl",
    r"load_path|path|file",
    "there is no file or folder",
    verb="preprocess",
)
def a_source_that_is_not_there(case: Case) -> None:
    shutil.rmtree(case.data)
    case.prepare["load_path"] = str(case.raw / "gone.jsonl")


@doomed(
    r"load_path.*(train, test|several splits|splits)",
    r"split",
    "holds several splits",
    verb="preprocess",
)
def a_source_of_several_splits(case: Case) -> None:
    shutil.rmtree(case.data)
    case.prepare["load_path"] = str(case.raw)


@doomed(
    r"data_field.*(content|text)|content.*text",
    r"data_field|text",
    "content",
    verb="preprocess",
)
def a_field_that_the_source_lacks(case: Case) -> None:
    shutil.rmtree(case.data)
    case.prepare["data_field"] = "content"


@doomed(
    r"load_path.*(known kind|no file)",
    r"dataset_format|jsonl",
    "holds no file of a known kind",
    verb="preprocess",
)
def a_source_of_no_known_kind(case: Case) -> None:
    shutil.rmtree(case.data)
    folder = case.folder / "archives"
    folder.mkdir()
    (folder / "texts.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    case.prepare["load_path"] = str(folder)


@doomed(
    r"save_path.*(prepared data|not ours|manifest)",
    r"another save_path|remove",
    "exists and is no prepared data of ours",
    verb="preprocess",
)
def a_save_path_that_holds_something_else(case: Case) -> None:
    shutil.rmtree(case.data)
    case.put(case.data / "thesis.tex", "years of work")


@doomed(
    r"load_path.*someone/texts.*(cache|hub|offline|network|fetch)",
    r"vectorlm prefetch|download|fetch",
    "someone/texts",
    verb="preprocess",
)
def a_dataset_of_the_hub_without_a_network(case: Case) -> None:
    shutil.rmtree(case.data)
    case.prepare["load_path"] = "someone/texts"


@doomed(
    r"(train|raw).*jsonl.*(row|line|JSON)",
    r"skip_bad_rows|[Mm]end",
    "broken JSON: Invalid control character",
    verb="preprocess",
)
def a_source_that_is_broken_at_once(case: Case) -> None:
    shutil.rmtree(case.data)
    case.put(case.raw / "train.jsonl", '{"text": "an end is miss\n' + json.dumps({"text": "x"}))


@doomed(r"train\.jsonl looks cut", r"copy it again", "broken JSON", verb="preprocess")
def a_source_whose_copy_was_broken_off(case: Case) -> None:
    shutil.rmtree(case.data)
    case.cut(case.raw / "train.jsonl", 0.6)
