"""The entry point of the command line. Each command is one function, which imports heavy packages itself.

Results go to standard output, progress and messages to standard error. Exit status: 0 success; 1 the command
completed with a negative result; 2 an error that the user can fix, reported in one line; 70 an internal
error, with its traceback; 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence

from blemish import __version__
from blemish.cli.data import check_arguments, demo_arguments, run_check, run_demo
from blemish.cli.inference import benchmark_arguments, export_arguments, run_benchmark, run_export
from blemish.cli.judging import (
    calibrate_arguments,
    evaluate_arguments,
    predict_arguments,
    run_calibrate,
    run_evaluate,
    run_predict,
)
from blemish.cli.options import (
    Command,
    Parser,
)
from blemish.cli.training import (
    distill_arguments,
    run_distill,
    run_train,
    run_weights,
    train_arguments,
    weights_arguments,
)
from blemish.errors import BlemishError

EXTRAS = dict.fromkeys(("torch", "onnx", "onnxscript", "safetensors", "scipy"), "train") | {
    "openvino": "openvino"
}
"""Name of the extra that installs each optional package."""
CRASHED = 70
"""Exit status of an internal error; not 1, which always means a negative result."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    options = parser().parse_args(arguments)
    from blemish.cli.terminal import cleared, shown_warnings

    command: Command = options.command
    try:
        with shown_warnings():
            return command(options)
    except BlemishError as error:
        print(f"{cleared()}blemish:", " ".join(str(error).splitlines()), file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            return crashed()
        needed = f"this needs blemish[{EXTRAS[error.name]}]"
        print(f"blemish: {error.name} is not installed; {needed}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{cleared()}blemish: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of the output has closed it; avoid a second error when streams are flushed at exit.
        sys.stderr.close()
        return 0
    except Exception:
        return crashed()


def crashed() -> int:
    """Print the traceback of an internal error and return its exit status."""
    traceback.print_exc()
    print(
        "blemish: this is an error in Blemish itself; please report it with the lines above", file=sys.stderr
    )
    return CRASHED


def parser() -> Parser:
    """Return the argument parser of all commands."""
    top = Parser(prog="blemish", description="Find defects on manufactured parts, from good images only.")
    top.add_argument("--version", action="version", version=f"blemish {__version__}")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, command, add, text in COMMANDS:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        add(sub)
        sub.set_defaults(command=command)
    return top


COMMANDS: tuple[tuple[str, Command, Callable[[argparse.ArgumentParser], None], str], ...] = (
    ("check", run_check, check_arguments, "summarise a data set and report its problems"),
    ("train", run_train, train_arguments, "train a model on good images and calibrate its thresholds"),
    ("evaluate", run_evaluate, evaluate_arguments, "evaluate a model on labelled images and write reports"),
    (
        "predict",
        run_predict,
        predict_arguments,
        "judge images: score, label, p-value, regions, maps, overlays",
    ),
    ("calibrate", run_calibrate, calibrate_arguments, "set a model's thresholds anew from good images"),
    ("export", run_export, export_arguments, "export a model to another format or precision, and check it"),
    ("benchmark", run_benchmark, benchmark_arguments, "measure the inference time of one or several models"),
    ("weights", run_weights, weights_arguments, "list, add or fetch pretrained weights"),
    (
        "distill",
        run_distill,
        distill_arguments,
        "distil a teacher network from a backbone",
    ),
    ("demo", run_demo, demo_arguments, "render parts, train and evaluate: no images or download needed"),
)
