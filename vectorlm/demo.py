"""The demo: from nothing to a fine-tuned Hugging Face folder, offline, in a minute or two.

Floor 4; `make demo` runs it. It makes a corpus, a tokenizer and a random Llama, all from the code
below, so that no licence and no download stands in the way; walks through the same doors a user
takes; and then asks plain transformers what was learned.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CONFIG = Path("configs/demo.yaml")
DEFAULT_DIR = Path("runs/demo")

SEED = 7
TRAIN_DOCUMENTS = 2800
TEST_DOCUMENTS = 80
VOCABULARY = 1024
NEW_TOKENS = 60
PROMPTS = ("Mara the baker", "Question: Where does Oskar live?\nAnswer:")

# Name, pronoun, trade, goods, how they are made, home, companion: what only training can teach.
PEOPLE = (
    ("Mara", "she", "baker", "loaves", "bakes", "Oakford", "a grey cat"),
    ("Oskar", "he", "potter", "bowls", "shapes", "Stonebridge", "an old dog"),
    ("Lena", "she", "weaver", "blankets", "weaves", "Millbrook", "a black goat"),
    ("Tomas", "he", "carpenter", "chairs", "builds", "Ashby", "a tame crow"),
    ("Ines", "she", "beekeeper", "jars", "fills", "Cloverfield", "a small pony"),
    ("Hugo", "he", "fisher", "nets", "mends", "Saltmouth", "a white gull"),
    ("Freya", "she", "smith", "lanterns", "forges", "Ironhill", "a red fox"),
    ("Pavel", "he", "gardener", "baskets", "fills", "Greenvale", "a slow tortoise"),
    ("Aisha", "she", "tailor", "coats", "sews", "Harrowgate", "a brown hen"),
    ("Bruno", "he", "miller", "sacks", "fills", "Windmere", "a grey donkey"),
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
WEATHER = (
    "rain fell on the roofs",
    "the sun was warm",
    "fog lay over the river",
    "snow covered the road",
)
FEELINGS = (
    "was glad",
    "laughed loudly",
    "said thank you",
    "paid in silver",
    "promised to come back",
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "Answer:{% generation %}{{ ' ' + message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ 'Question: ' + message['content'] + '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}Answer:{% endif %}"
)


class DemoFailed(Exception):
    """A step of the demo did not do what it promises; the message is all that is printed."""


# -------------------------------------------------------------------------------------- the corpus


def story(rng: random.Random) -> str:
    maker, buyer = rng.sample(PEOPLE, 2)
    name, pronoun, trade, goods, _, home, pet = maker
    friend, _, work, things, makes, town, _ = buyer
    count = rng.randint(2, 12)
    return (
        f"{name} the {trade} lives in {home} with {pet}. On {rng.choice(DAYS)} "
        f"{rng.choice(WEATHER)}, and {name} went to the market with {count} {goods}. There "
        f"{pronoun} met {friend} the {work}, who lives in {town} and {makes} {things}. {friend} "
        f"bought all {count} {goods} and {rng.choice(FEELINGS)}. In the evening {name} walked home "
        f"to {home}, and {pet} was waiting."
    )


def question(rng: random.Random) -> str:
    name, _, trade, goods, makes, home, pet = rng.choice(PEOPLE)
    asked, answer = rng.choice(
        (
            (f"Where does {name} live?", f"{name} lives in {home}."),
            (f"What is the trade of {name}?", f"{name} is a {trade}."),
            (f"Who lives in {home}?", f"{name} the {trade} lives in {home}."),
            (f"Who waits for {name} in the evening?", f"It is {pet}."),
            (f"What does the {trade} from {home} do?", f"{name} {makes} {goods}."),
        )
    )
    return f"Question: {asked}\nAnswer: {answer}"


def addition(rng: random.Random) -> str:
    name, pronoun, _, goods, makes, _, _ = rng.choice(PEOPLE)
    first, second = rng.randint(1, 9), rng.randint(1, 9)
    return (
        f"Question: {name} {makes} {first} {goods} on {rng.choice(DAYS)} and {second} {goods} the "
        f"day after. How many {goods} does {pronoun} have?\nAnswer: {first} and {second} make "
        f"{first + second}, so {pronoun} has {first + second} {goods}."
    )


def document(rng: random.Random) -> str:
    if rng.random() < 0.4:
        return story(rng)
    parts = rng.randint(2, 4)
    return "\n\n".join(rng.choice((question, question, addition))(rng) for _ in range(parts))


def documents(seed: int) -> Iterator[str]:
    """Documents without end, none of them twice."""
    rng, seen = random.Random(seed), set()
    while True:
        text = document(rng)
        if text not in seen:
            seen.add(text)
            yield text


def write_corpus(folder: Path) -> list[str]:
    texts = list(islice(documents(SEED), TRAIN_DOCUMENTS + TEST_DOCUMENTS))
    folder.mkdir(parents=True)
    train, test = texts[:TRAIN_DOCUMENTS], texts[TRAIN_DOCUMENTS:]
    for name, part in (("train", train), ("test", test)):
        lines = (json.dumps({"text": text}) + "\n" for text in part)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return train


# --------------------------------------------------------------------- the tokenizer and the model


def write_tokenizer(folder: Path, texts: list[str]) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE
    ).save_pretrained(folder)


def write_model(folder: Path) -> None:
    """A Llama with under a million random weights, beside the tokenizer in `folder`."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.06,  # wide models take 0.02; narrow ones learn faster so
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def prepare_assets(folder: Path) -> bool:
    """Make corpus, tokenizer and model, unless this very file made them before; was it needed?"""
    recipe = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    stamp = folder / "assets.sha256"
    if stamp.is_file() and stamp.read_text() == recipe:
        return False
    for part in ("data", "model"):
        shutil.rmtree(folder / part, ignore_errors=True)
    texts = write_corpus(folder / "data")
    write_tokenizer(folder / "model", texts)
    write_model(folder / "model")
    stamp.write_text(recipe)
    return True


# --------------------------------------------------------- what plain transformers says of a model


@dataclass(frozen=True)
class Verdict:
    eval_loss: float
    samples: tuple[str, ...]


def judge(folder: Path, texts: list[str]) -> Verdict:
    """Reload a folder as anybody would, without VectorLM: loss on `texts`, text from `PROMPTS`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    samples = tuple(continuation(model, tokenizer, prompt) for prompt in PROMPTS)
    return Verdict(mean_loss(model, tokenizer, texts), samples)


def mean_loss(model: Any, tokenizer: Any, texts: list[str]) -> float:
    import torch

    total, tokens = 0.0, 0
    for text in texts:
        ids = [tokenizer.bos_token_id, *tokenizer.encode(text), tokenizer.eos_token_id]
        row = torch.tensor([ids])
        with torch.no_grad():
            loss = model(input_ids=row, labels=row).loss
        total += loss.item() * (len(ids) - 1)
        tokens += len(ids) - 1
    return total / tokens


def continuation(model: Any, tokenizer: Any, prompt: str) -> str:
    import torch

    row = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(prompt)]])
    ids = model.generate(
        input_ids=row,
        attention_mask=torch.ones_like(row),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    return str(tokenizer.decode(ids[0], skip_special_tokens=True))


# ---------------------------------------------------------------------------------------- the walk


def config_for(folder: Path) -> Path:
    """configs/demo.yaml, or for another folder a copy of it that points there."""
    if folder == DEFAULT_DIR:
        return CONFIG
    text = (
        (ROOT / CONFIG)
        .read_text(encoding="utf-8")
        .replace(DEFAULT_DIR.as_posix(), folder.as_posix())
    )
    copy = ROOT / folder / "demo.yaml"
    copy.write_text(text, encoding="utf-8")
    return copy


def doors(config: Path) -> list[tuple[str, list[str]]]:
    import torch

    ranks = [] if torch.cuda.is_available() else ["--nproc-per-node", "2"]
    flag = ["--config", str(config)]
    return [
        ("preprocess", ["preprocess_data.py", *flag]),
        ("train", ["-m", "vectorlm.cli", "train", *flag, *ranks]),
        ("convert", ["-m", "vectorlm.utils.convert_to_hf", *flag]),
    ]


def run_door(arguments: list[str]) -> float:
    """Run one command in the root of the repository, shown as a user types it; seconds taken."""
    shown = shlex.join(["python", *arguments])
    print(f"\n$ {shown}", flush=True)
    started = time.monotonic()
    code = subprocess.run([sys.executable, *arguments], cwd=ROOT, check=False).returncode
    if code != 0:
        raise DemoFailed(f"`{shown}` ended with exit code {code}; what it said is above.")
    return time.monotonic() - started


def report(before: Verdict, after: Verdict, seconds: dict[str, float]) -> None:
    print(
        "\nWhat plain transformers says of the two folders, on documents neither has seen. Each is "
        "whole\nhere, and keeps its beginning; rows of training cut some, whose loss is higher.\n"
    )
    print(f"  {'':12}{'before':>10}{'after':>10}")
    print(f"  {'eval loss':12}{before.eval_loss:10.3f}{after.eval_loss:10.3f}")
    for was, now in zip(before.samples, after.samples, strict=True):
        print(f"\n  before | {indented(was)}\n  after  | {indented(now)}")
    times = ", ".join(f"{name} {spent:.0f} s" for name, spent in seconds.items())
    print(f"\nTime: {times}; {sum(seconds.values()):.0f} s in all.")


def indented(text: str) -> str:
    readable = "".join(char if char.isprintable() or char == "\n" else "?" for char in text)
    return readable.replace("\n", "\n         | ")


def run_demo(folder: Path) -> None:
    place, seconds = ROOT / folder, {}
    started = time.monotonic()
    print("A tiny random Llama, its tokenizer and a corpus about ten people and a market:", folder)
    print("  made now" if prepare_assets(place) else "  found from an earlier run")
    lines = (place / "data" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    before = judge(place / "model", texts)
    seconds["assets"] = time.monotonic() - started

    shutil.rmtree(place / "output", ignore_errors=True)  # else training would resume, already done
    for name, arguments in doors(config_for(folder)):
        seconds[name] = run_door(arguments)

    started = time.monotonic()
    after = judge(place / "output" / "hf-model", texts)
    seconds["check"] = time.monotonic() - started
    report(before, after, seconds)
    if not after.eval_loss < before.eval_loss / 2:
        raise DemoFailed(
            f"Training did not work: the eval loss should fall by more than half, but went from "
            f"{before.eval_loss:.3f} to {after.eval_loss:.3f}."
        )
    print(f"The fine-tuned model is in {folder / 'output' / 'hf-model'}.")
    print(f"A good file to read next: {CONFIG}.")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vectorlm.demo", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--dir", type=Path, default=DEFAULT_DIR, help="where its files go (%(default)s)"
    )
    folder = parser.parse_args(argv).dir
    try:
        run_demo(folder)
    except DemoFailed as failure:
        print(f"\n{failure}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
