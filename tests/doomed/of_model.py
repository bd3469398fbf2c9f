"""Model folders that are absent, incomplete, damaged, or of another kind."""

from __future__ import annotations

import json
import shutil

import numpy as np

from tests.doomed.case import Case
from tests.doomed.entry import doomed

POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4665dbca4665dbca4665dbca4665dbca4665dbca4665dbca4665dbca4665dbca\n"
    "size 4976698672\n"
)
COPY_AGAIN = r"copy|download|fetch|hf download|vectorlm prefetch"


def two_shards(case: Case) -> None:
    """The model's weights as two files and an index."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(case.model / "model.safetensors")
    (case.model / "model.safetensors").unlink()
    names, where = sorted(tensors), {}
    for number, part in ((1, names[::2]), (2, names[1::2])):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, case.model / file, {"format": "pt"})
        where.update(dict.fromkeys(part, file))
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (case.model / "model.safetensors.index.json").write_text(json.dumps(index))


@doomed(
    r"model.*nowhere",
    r"folder|path",
    "neither a folder here nor a model in the local Hugging Face cache",
)
def no_model_folder(case: Case) -> None:
    case.config["model"] = str(case.folder / "nowhere")


@doomed(
    r"model.*someone/tiny-llama.*(cache|not)",
    r"vectorlm prefetch|hf download",
    "neither a folder here nor a model in the local Hugging Face cache",
)
def a_hub_name_that_was_never_fetched(case: Case) -> None:
    case.config["model"] = "someone/tiny-llama"


@doomed(
    r"model.*someone/tiny-llama.*(incomplete|lack|weights|safetensors)",
    r"vectorlm prefetch|hf download",
    "its weights cannot be read: Error no file named model.safetensors",
)
def a_hub_download_that_was_broken_off(case: Case) -> None:
    snapshot = case.cached("someone/tiny-llama", case.model)
    (snapshot / "model.safetensors").unlink()
    case.config["model"] = "someone/tiny-llama"


@doomed(r"config\.json", COPY_AGAIN, "config.json")
def no_configuration(case: Case) -> None:
    (case.model / "config.json").unlink()


@doomed(r"config\.json.*(JSON|read|broken|cut)", COPY_AGAIN, "config.json cannot be used")
def a_configuration_that_was_cut(case: Case) -> None:
    case.cut(case.model / "config.json", 0.5)


@doomed(
    r"causal.*t5",
    r"language model",
    "has no causal language model",
)
def a_model_that_writes_nothing(case: Case) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    whole = {"model_type": "t5", "vocab_size": 320, **sizes}
    case.put(case.model / "config.json", json.dumps({**whole, "architectures": ["T5Model"]}))


@doomed(
    r"model_type.*llama9",
    r"transformers|model_type|update|newer",
    "its config.json cannot be used",
)
def a_model_type_that_transformers_lacks(case: Case) -> None:
    case.edit(case.model / "config.json", model_type="llama9")


@doomed(
    r"auto_map|code of its own|remote code|trust_remote_code",
    r"transformers|another|converted",
    "contains custom code which must be executed to correctly load the model",
)
def a_model_with_code_of_its_own(case: Case) -> None:
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    case.edit(case.model / "config.json", model_type="own", auto_map=auto_map)


@doomed(
    r"model.*(no weights|holds no|lacks)",
    COPY_AGAIN,
    "its weights cannot be read: Error no file named model.safetensors",
)
def no_weights(case: Case) -> None:
    (case.model / "model.safetensors").unlink()


@doomed(r"model\.safetensors.*(cut|size|short|bytes|incomplete)", COPY_AGAIN, "cannot be read")
def weights_that_were_cut(case: Case) -> None:
    case.cut(case.model / "model.safetensors", 0.7)


@doomed(r"model\.safetensors.*(empty|0 bytes|cut|short)", COPY_AGAIN, "cannot be read")
def weights_of_no_bytes(case: Case) -> None:
    case.put(case.model / "model.safetensors", b"")


@doomed(
    r"model\.safetensors.*([Ll][Ff][Ss]|pointer)",
    r"git lfs pull|hf download",
    "cannot be read (Error while deserializing header: header too large)",
)
def pointers_for_weights(case: Case) -> None:
    case.put(case.model / "model.safetensors", POINTER)


@doomed(r"model-00002-of-00002\.safetensors", COPY_AGAIN, "cannot be read")
def a_shard_is_missing(case: Case) -> None:
    two_shards(case)
    (case.model / "model-00002-of-00002.safetensors").unlink()


@doomed(r"model-00001-of-00002\.safetensors.*(cut|size|short|bytes)", COPY_AGAIN, "cannot be read")
def a_shard_was_cut(case: Case) -> None:
    two_shards(case)
    case.cut(case.model / "model-00001-of-00002.safetensors", 0.5)


@doomed(r"model\.safetensors\.index\.json", COPY_AGAIN, "cannot be read")
def an_index_that_was_cut(case: Case) -> None:
    two_shards(case)
    case.cut(case.model / "model.safetensors.index.json", 0.5)


@doomed(
    r"model.*(index|no weights)",
    COPY_AGAIN,
    "its weights cannot be read: Error no file named model.safetensors",
)
def the_index_is_missing(case: Case) -> None:
    two_shards(case)
    (case.model / "model.safetensors.index.json").unlink()


@doomed(
    r"(lack|missing|not in).*(layers\.2|block|layer)|layers",
    r"config\.json|copy",
    "its weights lack",
)
def a_configuration_of_more_layers(case: Case) -> None:
    case.edit(case.model / "config.json", num_hidden_layers=3)


@doomed(
    r"shape|intermediate|\[64, 32\]|128",
    r"config\.json|copy|two models",
    "the folder mixes two models, or its config was edited",
)
def a_configuration_of_other_shapes(case: Case) -> None:
    case.edit(case.model / "config.json", intermediate_size=128)


@doomed(
    r"max_seq_len.*256.*128 positions",
    r"at most 128",
    "256 is more than the 128 positions",
    verb="preprocess",
)
def rows_longer_than_the_model(case: Case) -> None:
    case.train["max_seq_len"] = 256


@doomed(r"tokenizer", COPY_AGAIN + r"|tokenizer\.json", "the tokenizer in")
def no_tokenizer(case: Case) -> None:
    (case.model / "tokenizer.json").unlink()


@doomed(r"tokenizer\.json.*(read|JSON|broken|cut)", COPY_AGAIN, "the tokenizer in")
def a_tokenizer_that_was_cut(case: Case) -> None:
    case.cut(case.model / "tokenizer.json", 0.5)


@doomed(
    r"tokenizer\.json.*([Ll][Ff][Ss]|pointer)",
    r"git lfs pull|hf download",
    "cannot be loaded (JSONDecodeError: Expecting value: line 1 column 1 (char 0))",
)
def a_pointer_for_a_tokenizer(case: Case) -> None:
    case.put(case.model / "tokenizer.json", POINTER)


@doomed(
    r"tokenizer.*(321|320).*vocabulary|vocabulary.*320",
    r"resize|embedding|tokenizer",
    "resize the model's embeddings",
)
def a_tokenizer_with_more_tokens_than_the_model(case: Case) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(case.model, local_files_only=True)
    tokenizer.add_tokens(["lanterns"])
    tokenizer.save_pretrained(case.folder / "grown")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        case.put(case.model / name, (case.folder / "grown" / name).read_bytes())
    case.prepare_again()


@doomed(
    r"adapter|config\.json.*missing",
    r"adapters.*merge|merge.*adapters",
    "its config.json cannot be used (Unrecognized model in",
)
def adapters_in_place_of_a_model(case: Case) -> None:
    for name in ("config.json", "model.safetensors"):
        (case.model / name).unlink()
    content = {"peft_type": "LORA", "base_model_name_or_path": "someone/base", "r": 8}
    case.put(case.model / "adapter_config.json", json.dumps(content))
    case.put(case.model / "adapter_model.safetensors", b"")


@doomed(
    r"final-model|hf-model",
    r"vectorlm convert|hf-model",
    "its config.json cannot be used (Unrecognized model in",
)
def an_output_that_was_not_converted(case: Case) -> None:
    case.config["model"] = str(case.surroundings.run() / "final-model")
    case.train["output_dir"] = str(case.folder / "second")


@doomed(
    r"quantiz|gptq",
    r"not quanti[sz]ed|unquanti[sz]ed",
    "Loading a GPTQ quantized model requires optimum",
)
def a_quantized_model(case: Case) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(case.model / "model.safetensors")
    for name in [name for name in tensors if "_proj." in name]:
        stem, whole = name.removesuffix("weight"), tensors.pop(name)
        tensors[f"{stem}qweight"] = np.zeros((whole.shape[1] // 8, whole.shape[0]), np.int32)
        tensors[f"{stem}scales"] = np.ones((1, whole.shape[0]), np.float16)
    (case.model / "model.safetensors").unlink()
    save_file(tensors, case.model / "model.safetensors", {"format": "pt"})
    quantized = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    case.edit(case.model / "config.json", quantization_config=quantized)


@doomed(
    r"gguf|GGUF|no weights",
    r"safetensors|Hugging Face|hf download|copy",
    "its weights cannot be read: Error no file named model.safetensors",
)
def weights_of_another_program(case: Case) -> None:
    case.put(case.model / "model-q4.gguf", b"GGUF" + bytes(100))
    (case.model / "model.safetensors").unlink()


@doomed(
    r"model.*(file|folder)",
    r"folder",
    "is neither a folder here nor a model in the local Hugging Face cache",
)
def a_file_in_place_of_a_model(case: Case) -> None:
    shutil.move(case.model / "model.safetensors", case.folder / "weights.safetensors")
    case.config["model"] = str(case.folder / "weights.safetensors")
