"""The command line as `python -m blemish.cli`, for torchrun and where no script is installed."""

import sys

from blemish.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
