#!/usr/bin/env python3
"""Time `blemish --help`, and list what it imports: python benchmarks/startup.py [--runs 20].

The command line imports heavy packages inside each command, so that help appears at once and wrong arguments
are refused at once. The list leaves out the modules that a bare interpreter loads.
"""

import argparse
import statistics
import subprocess
import sys
import time

HELP = ("-m", "blemish.cli", "--help")
LOADED = """
import sys
before = set(sys.modules)
from blemish.cli.main import main
try:
    main(["--help"])
except SystemExit:
    print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}), file=sys.stderr)
"""


def main() -> None:
    """Print the times and the modules."""
    parser = argparse.ArgumentParser(description="Time `blemish --help`, and list what it imports.")
    parser.add_argument("--runs", type=int, default=20, metavar="N", help="of each program (20)")
    runs = parser.parse_args().runs
    for name, arguments in (("bare interpreter", ("-c", "")), ("blemish --help", HELP)):
        times = [1000 * seconds(arguments) for _ in range(runs)]
        middle, worst = statistics.median(times), max(times)
        print(f"{name:18}{middle:5.0f} ms, median of {runs} runs ({min(times):.0f} to {worst:.0f} ms)")
    found = modules()
    ours = [name for name in found if name not in sys.stdlib_module_names]
    standard = [name for name in found if name in sys.stdlib_module_names and not name.startswith("_")]
    print(f"modules           {', '.join(ours)}; from the standard library {', '.join(standard)}")


def seconds(arguments: tuple[str, ...]) -> float:
    """Return the seconds that one run of the interpreter takes."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def modules() -> list[str]:
    """Return the names of the top-level modules that help loads."""
    found = subprocess.run(
        [sys.executable, "-c", LOADED],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    return found.stderr.split()


if __name__ == "__main__":
    main()
