"""Small parts, data sets and weights, drawn from whole numbers: the same bytes on every machine."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from blemish.backbones import BACKBONES
from blemish.detectors.supersimplenet.config import FROM_GOOD, SuperSimpleNetConfig
from blemish.inference.predictor import Predictor
from blemish.progress import Event, Report, silent
from blemish.testing.parts import KIND, data_set, part, spotted

__all__ = [
    "KIND",
    "PLAIN",
    "STEPS",
    "TINY",
    "Tiny",
    "data_set",
    "need_half_in_openvino",
    "part",
    "snapshot",
    "spotted",
    "tiny_weights",
    "weights",
]

PLAIN: dict[str, Any] = {name: getattr(SuperSimpleNetConfig(), name) for name in FROM_GOOD}
"""Settings that make the default for good images alone what it is with labels: the paper's form."""
TINY: dict[str, Any] = PLAIN | {
    "backbone": "efficientnet_lite0",
    "layers": ("stage1", "stage2"),
    "hidden_channels": 16,
    "head_learning_rate": 1e-2,
    "noise_ratio": 1.0,
    "image_size": (64, 64),
}
"""Settings of a SuperSimpleNet that is trained in a second and finds spots."""
STEPS = 40


def weights(path: Path, network: nn.Module, seed: int = 0) -> Path:
    """Draw a network's weights as He et al. would start it, and write them as safetensors."""
    rng, state = np.random.default_rng(seed), network.state_dict()
    for key, value in state.items():
        if value.ndim > 1:
            scale = (2 / value[0].numel()) ** 0.5
            state[key] = torch.from_numpy((scale * rng.standard_normal(value.shape)).astype(np.float32))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path)
    return path


def tiny_weights(path: Path, seed: int = 0, layers: tuple[str, ...] = TINY["layers"]) -> Path:
    """Draw the weights that TINY needs, or those of other layers."""
    return weights(path, BACKBONES[TINY["backbone"]].build(layers), seed)


@dataclass(frozen=True)
class Tiny:
    """A small trained model with what it was trained on."""

    data: Path
    weights: Path
    file: Path
    model: Predictor


def need_half_in_openvino() -> None:
    """Skip a test where oneDNN is told to do without AVX-512: OpenVINO asks the processor, and fails."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    if limit in ("SSE41", "AVX") or limit.startswith("AVX2"):
        pytest.skip(f"OpenVINO has no bfloat16 or float16 with ONEDNN_MAX_CPU_ISA={limit}")


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Give every file below a folder with its bytes, and every folder with None."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def stop_after(steps: int, also: Report = silent) -> dict[str, Any]:
    """Return the arguments `report` and `stop` by which a run stops after some training steps.

    also: receives the events as well.
    """
    done = 0

    def report(event: Event) -> None:
        nonlocal done
        if event.phase == "training":
            done = event.step
        also(event)

    return {"report": report, "stop": lambda: done >= steps}
