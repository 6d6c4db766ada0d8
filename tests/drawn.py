"""Small parts, data sets and weights, drawn from whole numbers: the same bytes on every machine."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from blemish import images
from blemish.backbones import BACKBONES
from blemish.inference.predictor import Predictor
from blemish.types import AnyArray, BoolArray

KIND = "spot"
TINY: dict[str, Any] = {
    "backbone": "efficientnet_lite0",
    "layers": ("stage1", "stage2"),
    "hidden_channels": 16,
    "head_learning_rate": 1e-2,
    "noise_ratio": 1.0,
    "image_size": (64, 64),
}
"""Settings of a SuperSimpleNet that is trained in a second and finds spots."""
STEPS = 40


def part(number: int, size: tuple[int, int] = (64, 64)) -> AnyArray:
    """Draw a good part, (H, W, 3) uint8: a ramp with a brushed grain that differs from part to part."""
    height, width = size
    rng = np.random.default_rng(number)
    ramp = (
        60 + 60 * np.arange(width)[None, :, None] // width + 40 * np.arange(height)[:, None, None] // height
    )
    grain = rng.integers(-8, 9, (height, 1, 1)) + rng.integers(-5, 6, (height, width, 1))
    return (ramp + grain + np.array([0, 10, 25])).astype(np.uint8)


def spotted(number: int, size: tuple[int, int] = (64, 64)) -> tuple[AnyArray, BoolArray]:
    """Draw a part with a checkered spot a quarter of its sides, and the spot's (H, W) mask."""
    image, mask = part(number, size), np.zeros(size, np.bool_)
    rng = np.random.default_rng([number, 1])
    height, width = size[0] // 4, size[1] // 4
    top, left = rng.integers(size[0] - height), rng.integers(size[1] - width)
    mask[top : top + height, left : left + width] = True
    cells = np.indices(size).sum(0) // 4 % 2
    return np.where(mask[..., None], (255 * cells)[..., None], image).astype(np.uint8), mask


def data_set(
    root: Path,
    *,
    train: int = 12,
    good: int = 4,
    bad: int = 4,
    train_bad: int = 0,
    size: tuple[int, int] = (64, 64),
) -> Path:
    """Draw a data set in the layout `mvtec`, with masks for all defects; no number is drawn twice."""
    for number in range(train):
        images.write_png(root / f"train/good/{number:03}.png", part(number, size))
    for number in range(good):
        images.write_png(root / f"test/good/{number:03}.png", part(1000 + number, size))
    places = [("test", number) for number in range(bad)]
    places += [("train", 100 + number) for number in range(train_bad)]
    for part_of, number in places:
        image, mask = spotted(2000 + number, size)
        images.write_png(root / f"{part_of}/{KIND}/{number:03}.png", image)
        images.write_png(root / f"ground_truth/{KIND}/{number:03}_mask.png", (255 * mask).astype(np.uint8))
    return root


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


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Give every file below a folder with its bytes, and every folder with None."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }
