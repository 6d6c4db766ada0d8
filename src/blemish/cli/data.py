"""The commands check and demo."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from blemish.cli.options import DEFECT_HELP, add_layout, share_cores


def check_arguments(sub: argparse.ArgumentParser) -> None:
    """Declare the arguments of `check`."""
    sub.add_argument("data", type=Path, metavar="DATA", help="folder or manifest of a data set")
    sub.add_argument("--defect-size", metavar="N", help=f"{DEFECT_HELP}, to advise a size for each method")
    add_layout(sub)


def run_check(options: argparse.Namespace) -> int:
    """Print the contents and problems of a data set; return 1 if there are problems."""
    from blemish.data.check import format_report
    from blemish.training.advice import check

    report = check(options.data, options.layout, defect_size=options.defect_size)
    print(format_report(report))
    return int(not report.passed)


def demo_arguments(sub: argparse.ArgumentParser) -> None:
    """Declare the arguments of `demo`."""
    sub.add_argument(
        "--out", type=Path, default=Path("demo"), metavar="DIR", help="folder to write to (demo)"
    )
    sub.add_argument(
        "--seed", type=int, default=0, metavar="N", help="random seed of the images and the training (0)"
    )


def run_demo(options: argparse.Namespace) -> int:
    """Render parts, train, evaluate, write a report, and print where the results are."""
    share_cores()
    from blemish import demo
    from blemish.cli.terminal import Terminal, stop_requests
    from blemish.evaluation import report
    from blemish.evaluation.run import evaluate, table
    from blemish.training.run import train

    parts, file, page = options.out / "parts", options.out / "demo.blemish", options.out / "report.html"
    print(f"rendering parts to {parts}", file=sys.stderr)
    demo.draw(parts, options.seed)
    terminal = Terminal()
    with stop_requests() as stop:
        model = train(parts, out=file, seed=options.seed, report=terminal, stop=stop)
        found = evaluate(model, parts, report=terminal, stop=stop)
    report.write_html(found, page)
    print(table(found))
    print(
        f"\nparts   {parts}\nmodel   {file}\nreport  {page}\n\n"
        "To use your own images, start with a folder of good ones:\n"
        "  blemish check MY_IMAGES\n"
        "  blemish train MY_IMAGES --out mine.blemish\n"
        "  blemish predict mine.blemish NEW_IMAGES --overlays overlays"
    )
    return 0
