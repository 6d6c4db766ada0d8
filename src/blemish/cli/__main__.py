"""Run the command line as `python -m blemish.cli`, for torchrun or if no script is installed."""

import sys

from blemish.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
