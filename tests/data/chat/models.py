"""Tokenizers and templates for the tests of conversations; the templates were written for them, in
the ways that the families they are named after write theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.tiny import SENTENCES
from vectorlm.chat.formats import Conversation, Message
from vectorlm.chat.spans import Finder
from vectorlm.chat.template import ChatTemplate

FOLDER = Path(__file__).parent / "templates"
ROOT = Path(__file__).parents[3]
TEMPLATES = sorted(path.stem for path in FOLDER.glob("*.jinja"))
SHIPPED = ["configs/chatml", "configs/plain_chat"]
SOUND = [name for name in TEMPLATES if name != "hopeless"] + SHIPPED
NAMED = {"bos_token": "<s>", "eos_token": "</s>"}
SPECIAL = [
    "<s>",
    "</s>",
    "<unk>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_CALLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
]
PLAIN = ["<think>", "</think>", "<tool_call>", "</tool_call>"]

TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "<Tells> it.", "parameters": {"type": "object"}},
}


def system(text: str) -> Message:
    return {"role": "system", "content": text}


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def said(text: str, thought: str | None = None) -> Message:
    more = {} if thought is None else {"reasoning_content": thought, "thinking": thought}
    return {"role": "assistant", "content": text, **more}


def calls(name: str, text: str = "", **arguments: Any) -> Message:
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": text, "tool_calls": [call]}


def result(text: str) -> Message:
    return {"role": "tool", "content": text}


def conversation(
    *messages: Message, tools: list[dict[str, Any]] | None = None, flags: Any = None
) -> Conversation:
    return Conversation(list(messages), flags or [None] * len(messages), tools)


def path_of(name: str) -> Path:
    return (ROOT if name in SHIPPED else FOLDER) / f"{name}.jinja"


def source(name: str) -> str:
    return path_of(name).read_text(encoding="utf-8")


def template(name: str) -> ChatTemplate:
    return ChatTemplate(source(name), name, NAMED)


def finder(name: str, learn: str = "assistant") -> Finder:
    return Finder(template(name), learn, SPECIAL, SPECIAL + PLAIN)


def model_folder(folder: Path, template_name: str | None, pieces: bool = False) -> Path:
    """A tokenizer as byte-level ones are, or (`pieces`) as SentencePiece's."""
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    made = _pieces() if pieces else _bytes()
    made.add_special_tokens([AddedToken(one, special=True, normalized=False) for one in SPECIAL])
    made.add_tokens([AddedToken(one, special=False, normalized=False) for one in PLAIN])
    more = {} if template_name is None else {"chat_template": source(template_name)}
    PreTrainedTokenizerFast(tokenizer_object=made, **NAMED, **more).save_pretrained(folder)
    return folder


def _bytes() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(SENTENCES * 4, trainer)
    return made


def _pieces() -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    fallback = [f"<0x{number:02X}>" for number in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", *fallback], show_progress=False
    )
    made.train_from_iterator([one.replace(" ", "▁") for one in SENTENCES * 4], trainer)
    return made
