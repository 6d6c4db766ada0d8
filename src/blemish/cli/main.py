"""The command line: one function per command, and what is heavy imported inside it.

Results go to standard output, progress and messages to standard error. Exit status: 0 done; 1 the command ran
and the answer is no; 2 something the user can fix, in one line; 70 an internal error, with its traceback; 130
interrupted.
"""

from __future__ import annotations

import argparse
import os
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
"""The extra that installs each package that some commands need."""
CRASHED = 70
"""Exit status of an internal error: 1 always means that the answer is no."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status."""
    options = parser().parse_args(arguments)
    share_cores()
    from blemish.cli.terminal import shown_warnings

    command: Command = options.command
    try:
        with shown_warnings():
            return command(options)
    except BlemishError as error:
        print("blemish:", " ".join(str(error).splitlines()), file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            return crashed()
        needed = f"this needs blemish[{EXTRAS[error.name]}]"
        print(f"blemish: {error.name} is not installed; {needed}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("blemish: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output has seen enough; nothing is to be flushed at exit.
        sys.stderr.close()
        return 0
    except Exception:
        return crashed()


def crashed() -> int:
    """Print the traceback of an internal error; return its exit status."""
    traceback.print_exc()
    print(
        "blemish: this is an error in Blemish itself; please report it with the lines above", file=sys.stderr
    )
    return CRASHED


def share_cores() -> None:
    """Let threads that wait for each other sleep, before torch is loaded, unless the user has chosen.

    Threads that spin take the core from whatever else runs on it, and then wait for it themselves.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def parser() -> Parser:
    """Return the parser of all commands."""
    top = Parser(prog="blemish", description="Find defects on manufactured parts, from good images only.")
    top.add_argument("--version", action="version", version=f"blemish {__version__}")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, command, add, text in COMMANDS:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        add(sub)
        sub.set_defaults(command=command)
    return top


COMMANDS: tuple[tuple[str, Command, Callable[[argparse.ArgumentParser], None], str], ...] = (
    ("check", run_check, check_arguments, "say what is in a folder of images, and what is wrong with it"),
    ("train", run_train, train_arguments, "train a model on good images, calibrate it, write a model file"),
    ("evaluate", run_evaluate, evaluate_arguments, "measure a model on labelled images, with a report"),
    (
        "predict",
        run_predict,
        predict_arguments,
        "judge images: score, label, p-value, regions, maps, overlays",
    ),
    ("calibrate", run_calibrate, calibrate_arguments, "set a model's thresholds anew from good images"),
    ("export", run_export, export_arguments, "write a model in another format or precision, if it agrees"),
    ("benchmark", run_benchmark, benchmark_arguments, "measure how long models take, side by side"),
    ("weights", run_weights, weights_arguments, "list, add or fetch pretrained weights"),
    (
        "distill",
        run_distill,
        distill_arguments,
        "distil a teacher network from a backbone",
    ),
    ("demo", run_demo, demo_arguments, "draw parts, train, evaluate, report: no download, no images needed"),
)
