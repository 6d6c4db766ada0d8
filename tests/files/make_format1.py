"""Write format1.blemish and its verdicts on rendered parts: run once, when a format is released.

    PYTHONPATH=tests python tests/files/make_format1.py

The model file stays in the repository as it is: every later version of Blemish must read it and reach the
same verdicts. A new format number gets a file of its own.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import blemish
import drawn

FILES = Path(__file__).parent
GOOD, BAD = range(5000, 5004), range(6000, 6004)
"""Numbers of the rendered parts."""


def make(name: str, **options: Any) -> None:
    """Train a model with these options, and write it and its verdicts under this name."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = blemish.train(
            drawn.data_set(folder / "drawn", train=16),
            model="supersimplenet",
            out=FILES / f"{name}.blemish",
            weights=drawn.tiny_weights(folder / "weights.safetensors"),
            settings=drawn.TINY,
            steps=200,
            precision="fp32",
            **options,
        )
    verdicts = [model.predict(drawn.part(number)) for number in GOOD]
    verdicts += [model.predict(drawn.spotted(number)[0]) for number in BAD]
    found: list[dict[str, Any]] = [
        {"score": v.score, "label": v.label, "p_value": v.p_value, "peak": float(v.map.max())}
        | ({} if v.light_p is None else {"light_p": v.light_p})
        for v in verdicts
    ]
    (FILES / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    make("format1")
