"""The console command `vectorlm VERB`, and what every door shares. Floor 4.

Each verb imports its door only when called, so that `check` answers without torch or transformers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from vectorlm import __version__
from vectorlm.config.load import load_config, required_section
from vectorlm.config.schema import Config
from vectorlm.errors import EXIT_OK, EXIT_USER, VectorLMError

DEFAULT_CONFIG = "configs/config.yaml"
EXIT_INTERRUPTED = 130


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """`--config` under all its names, and `--set`; found as `.config` and `.overrides`."""
    parser.add_argument(
        "--config",
        "--config_path",
        "--yaml_path",
        default=DEFAULT_CONFIG,
        metavar="FILE",
        help=f"the YAML file (default: {DEFAULT_CONFIG})",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY=VALUE",
        help="override a key, such as train_parameters.epochs=3; may be repeated",
    )


def run_door(door: Callable[[], int | None]) -> int:
    """Run a door; what the user can cure is printed without a traceback."""
    try:
        return door() or EXIT_OK
    except VectorLMError as error:
        if not error.said:
            print(error, file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["convert"]:  # has options of its own, and its own parser
        from vectorlm.utils.convert_to_hf import main as convert_main

        return run_door(lambda: convert_main(words[1:]))
    arguments = _parser().parse_args(words)
    verb: Callable[[argparse.Namespace], int] = arguments.run
    return run_door(lambda: verb(arguments))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_help(sys.stderr)
        self.exit(EXIT_USER, f"\n{self.prog}: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="vectorlm",
        description="One YAML file in, one model out.",
    )
    parser.add_argument("--version", action="version", version=f"vectorlm {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for name, (run, summary) in VERBS.items():
        verb = verbs.add_parser(name, help=summary, description=summary.capitalize() + ".")
        add_config_arguments(verb)
        verb.set_defaults(run=run)
        if name == "train":
            verb.add_argument(
                "--nproc-per-node",
                "--nproc_per_node",
                type=_count,
                metavar="N",
                help="processes on this node (default: one for each GPU, or one)",
            )
    # Only for the list of verbs: `main` hands these words on before they are parsed here.
    verbs.add_parser("convert", help="write the trained model as a Hugging Face folder")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, at least 1")
    return int(text)


def _check(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, arguments.overrides)
    print(f"{arguments.config}: sound ({_summary(config)})")
    return EXIT_OK


def _summary(config: Config) -> str:
    train = config.train_parameters
    facts = [
        f"model {config.model}",
        "LoRA" if train.lora_peft_config is not None else "full fine-tuning",
        f"{train.max_seq_len} tokens a row",
        train.effective_precision,
        train.sharding_strategy,
        f"{train.epochs} epoch{'s' if train.epochs > 1 else ''}",
    ]
    absent = [
        f"no {name}: only for {purpose}"
        for name, purpose, section in (
            ("dataset", "preprocessing", config.dataset),
            ("dataset_preprocess", "training", config.dataset_preprocess),
        )
        if section is None
    ]
    return ", ".join(facts + absent)


def _preprocess(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, arguments.overrides)
    required_section(config, "dataset_preprocess", arguments.config)
    from vectorlm.preprocess import prepare_config

    prepare_config(config)
    return EXIT_OK


def _train(arguments: argparse.Namespace) -> int:
    # Here too, so that a mistake is told once and before any process is started.
    config = load_config(arguments.config, arguments.overrides)
    required_section(config, "dataset", arguments.config)
    from vectorlm.launch import launch

    return launch(arguments.config, arguments.overrides, arguments.nproc_per_node)


VERBS: dict[str, tuple[Callable[[argparse.Namespace], int], str]] = {
    "check": (_check, "tell whether a configuration is sound"),
    "preprocess": (_preprocess, "turn text into rows of tokens"),
    "train": (_train, "train on the GPUs of this node"),
}


if __name__ == "__main__":
    sys.exit(main())
