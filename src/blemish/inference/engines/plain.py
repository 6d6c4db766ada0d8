"""A detector's network as its authors run it, in PyTorch without further optimisation, for comparison."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from blemish.devices import choose_device
from blemish.inference.choice import Choice
from blemish.inference.engines.pytorch import DTYPES
from blemish.types import FloatArray


class PlainTorch:
    """A network in eager PyTorch, in the channels-first layout by default."""

    def __init__(
        self,
        network: nn.Module,
        outputs: tuple[str, ...],
        choice: Choice,
        threads: int = 0,
        *,
        channels_last: bool = False,
    ) -> None:
        if threads:
            torch.set_num_threads(threads)
        self.outputs = outputs
        self.device = choose_device(choice.device)
        self.dtype = DTYPES[choice.precision]
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.network = network.eval().to(self.device).to(memory_format=self.layout)  # type: ignore[call-overload]

    def run(self, inputs: FloatArray) -> dict[str, FloatArray]:
        """Run (B, 3, H, W) images."""
        images = torch.from_numpy(inputs).to(self.device).contiguous(memory_format=self.layout)
        with (
            torch.inference_mode(),
            torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32),
        ):
            found = self.network(images)
        return {
            name: np.asarray(tensor.float().cpu()) for name, tensor in zip(self.outputs, found, strict=True)
        }
