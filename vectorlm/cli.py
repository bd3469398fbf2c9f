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
    arguments, unknown = _parser().parse_known_args(words)
    if unknown:  # told by the verb's own parser, which knows what it takes
        arguments.refuse(f"unrecognized arguments: {' '.join(unknown)}")
    verb: Callable[[argparse.Namespace], int] = arguments.run
    return run_door(lambda: verb(arguments))


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the words and where to read on, not the whole help."""

    def error(self, message: str) -> NoReturn:
        usage = " ".join(self.format_usage().split())
        self.exit(EXIT_USER, f"{self.prog}: {message}\n{usage}\n{self.prog} --help tells more\n")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="vectorlm",
        description="One YAML file in, one model out.",
    )
    parser.add_argument("--version", action="version", version=f"vectorlm {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for name, (run, summary) in VERBS.items():
        verb = verbs.add_parser(name, help=summary, description=summary.capitalize() + ".")
        if name == "status":
            _add_status_arguments(verb)
        else:
            add_config_arguments(verb)
        verb.set_defaults(run=run, refuse=verb.error)
        if name == "train":
            verb.add_argument(
                "--nproc-per-node",
                "--nproc_per_node",
                type=_count,
                metavar="N",
                help="processes on this node (default: one for each GPU, or one)",
            )
        if name == "check":
            verb.add_argument("--json", action="store_true", help="for programs")
        if name == "data":
            _add_data_arguments(verb)
        if name == "plan":
            _add_plan_arguments(verb)
        if name == "submit":
            _add_submit_arguments(verb)
        if name == "why":
            verb.add_argument(
                "of",
                nargs="?",
                metavar="JOB|DIR",
                help="a job's number, or the output_dir of a run (default: that of --config)",
            )
    # Only for the list of verbs: `main` hands these words on before they are parsed here.
    verbs.add_parser("convert", help="write the trained model as a Hugging Face folder")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, at least 1")
    return int(text)


def _add_status_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "of",
        nargs="?",
        metavar="JOB|DIR",
        help="a job's number, or the output_dir of a run or a sweep (default: that of --config, "
        "else your newest runs)",
    )
    add_config_arguments(parser)
    parser.set_defaults(config=None)  # asked for the newest runs, it needs no file
    parser.add_argument("--watch", action="store_true", help="go on until the run has ended")
    parser.add_argument("--json", action="store_true", help="for programs")


def _add_data_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=["inspect"], help="show rows as they will be learned")
    parser.add_argument(
        "--rows", type=_count, default=3, metavar="N", help="how many rows to show (default: 3)"
    )
    parser.add_argument(
        "--folder", metavar="DIR", help="the prepared folder (default: dataset.train_ds)"
    )


def _add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gpu",
        metavar="NAME[:COUNT]",
        help="the GPU, such as a100-80:4; COUNT is that of a node (default: slurm.gpu_type and "
        "slurm.gpus_per_node)",
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--find-batch", action="store_true", help="the largest micro-batch that fits")
    what.add_argument("--compare", action="store_true", help="every sharding strategy")
    what.add_argument(
        "--apply", type=_count, metavar="N", help="write change N of the list into the file"
    )
    what.add_argument(
        "--simulate",
        action="store_true",
        help="run the real model on fake tensors; takes seconds to minutes, and torch",
    )
    what.add_argument(
        "--calibrate",
        metavar="RUN",
        help="learn from the memory that a run measured; RUN is its output_dir",
    )


def _add_submit_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dry-run", action="store_true", help="print the job script instead of submitting it"
    )
    parser.add_argument(
        "--with-preprocess",
        action="store_true",
        help="first a job without GPUs that prepares the data, unless it is prepared already",
    )
    parser.add_argument(
        "--force", action="store_true", help="submit although `vectorlm check` finds errors"
    )


def _check(arguments: argparse.Namespace) -> int:
    from vectorlm.check_door import check

    return check(arguments.config, arguments.overrides, arguments.json)


def _prefetch(arguments: argparse.Namespace) -> int:
    from vectorlm.prefetch_door import prefetch

    return prefetch(arguments.config, arguments.overrides)


def _plan(arguments: argparse.Namespace) -> int:
    from vectorlm.plan_door import plan

    return plan(arguments)


def _preprocess(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, arguments.overrides)
    required_section(config, "dataset_preprocess", arguments.config)
    from vectorlm.preprocess import prepare_config

    prepare_config(config)
    return EXIT_OK


def _data(arguments: argparse.Namespace) -> int:
    from vectorlm.inspect_door import inspect

    return inspect(arguments.config, arguments.overrides, arguments.rows, arguments.folder)


def _train(arguments: argparse.Namespace) -> int:
    # Here too, so that a mistake is told once and before any process is started.
    config = load_config(arguments.config, arguments.overrides)
    required_section(config, "dataset", arguments.config)
    from vectorlm.launch import launch

    return launch(arguments.config, arguments.overrides, arguments.nproc_per_node)


def _preflight(arguments: argparse.Namespace) -> int:
    from vectorlm.preflight_door import start

    return start(arguments.config, arguments.overrides)


def _submit(arguments: argparse.Namespace) -> int:
    from vectorlm.check_door import before_submitting
    from vectorlm.cluster.submit import make_plan, show, submit, submit_sbatch

    plan = make_plan(arguments.config, arguments.overrides, arguments.with_preprocess)
    before_submitting(
        plan.config,
        arguments.config,
        arguments.overrides,
        prepares=arguments.with_preprocess,
        stops=not (arguments.force or arguments.dry_run),
    )
    launch = submit_sbatch
    if plan.section.launcher == "submitit":
        from vectorlm.submitit_door import submit_through_submitit, with_submitit

        plan, launch = with_submitit(plan), submit_through_submitit
    if arguments.dry_run:
        show(plan)
    else:
        submit(plan, launch)
    return EXIT_OK


def _status(arguments: argparse.Namespace) -> int:
    from vectorlm.status_view import show

    given = arguments.of
    if given is None and arguments.config:
        given = load_config(arguments.config, arguments.overrides).train_parameters.output_dir
    show(given, arguments.watch, arguments.json)
    return EXIT_OK


def _why(arguments: argparse.Namespace) -> int:
    from vectorlm.cluster.why import explain

    given = arguments.of
    if given is None:
        given = load_config(arguments.config, arguments.overrides).train_parameters.output_dir
    print(explain(given))
    return EXIT_OK


VERBS: dict[str, tuple[Callable[[argparse.Namespace], int], str]] = {
    "check": (_check, "tell all that would make a job fail, and how to cure it"),
    "prefetch": (_prefetch, "fetch what a job, which has no network, would download"),
    "plan": (_plan, "tell whether a run fits, how long it takes, and what to change"),
    "preprocess": (_preprocess, "turn text into rows of tokens"),
    "data": (_data, "show prepared rows as a person would read them"),
    "train": (_train, "train on the GPUs of this node"),
    "preflight": (_preflight, "look at machines and links before training on them"),
    "submit": (_submit, "hand the training to Slurm as a job, or as a job array for a sweep"),
    "status": (_status, "tell how far runs are, and what Slurm says of them"),
    "why": (_why, "tell what ended a run, and what to change"),
}


if __name__ == "__main__":
    sys.exit(main())
