"""The door of export: `python -m vectorlm.utils.convert_to_hf --config configs/config.yaml`. "
"Floor 4."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from vectorlm.cli import Parser, add_config_arguments, run_door
from vectorlm.config.load import load_config
from vectorlm.libraries import loading


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument(
        "--from",
        dest="checkpoint",
        metavar="CHECKPOINT",
        help="such as OUTPUT_DIR/checkpoints/step_00000500; by default OUTPUT_DIR/final-model",
    )
    parser.add_argument(
        "--merge", action="store_true", help="merge LoRA adapters into the base model"
    )
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; by default the base model's")
    parser.add_argument("--out", metavar="DIR", help="by default OUTPUT_DIR/hf-model")
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="of a weight file (5GB)"
    )
    parser.add_argument(
        "--no-verify", action="store_true", help="do not reload and compare (saves memory and time)"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="vectorlm convert", description="Write the trained model as a Hugging Face folder."
    )
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    return run_door(lambda: _convert(arguments))


def _convert(arguments: argparse.Namespace) -> None:
    # Imported here, so that --help and a wrong config answer at once.
    config = load_config(arguments.config, arguments.overrides)
    with loading():
        from transformers.utils import logging

        from vectorlm.export import convert

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    exported = convert(
        config,
        checkpoint=arguments.checkpoint,
        merge=arguments.merge,
        dtype=arguments.dtype,
        out=arguments.out,
        verify=not arguments.no_verify,
        max_shard_size=arguments.max_shard_size,
    )
    print(exported)


if __name__ == "__main__":
    sys.exit(main())
