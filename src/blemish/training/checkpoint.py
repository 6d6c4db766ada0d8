"""Checkpoints of a training run: all that the next step depends on, written atomically, without pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from blemish.errors import ModelFileError
from blemish.files import atomic_file


def save(path: Path, network: nn.Module, optimizer: torch.optim.Optimizer, header: dict[str, Any]) -> None:
    """Write parameters, buffers, the optimiser's state and a JSON header to a checkpoint."""
    tensors = {f"network.{key}": value for key, value in network.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in state.items()}
    with atomic_file(path) as temporary:
        # not save_file: it reports a full disk as an error of its own, without a number
        plain = {key: value.detach().contiguous().cpu() for key, value in tensors.items()}
        temporary.write_bytes(save_tensors(plain, {"blemish": json.dumps(header)}))


def header(path: Path) -> dict[str, Any]:
    """Return a checkpoint's header; raise ModelFileError if the file is not a checkpoint."""
    try:
        with safe_open(path, "pt") as file:
            found: dict[str, Any] = json.loads((file.metadata() or {})["blemish"])
    except (SafetensorError, RuntimeError, OSError, KeyError, ValueError) as error:
        raise ModelFileError(f"{path} is not a checkpoint of a training run") from error
    return found


def load(path: Path, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restore what `save` wrote into a network and an optimiser of the same structure."""
    parameters: dict[str, Tensor] = {}
    state: dict[int, dict[str, Tensor]] = {}
    with safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118 - not a dict, and not iterable
            room, _, rest = key.partition(".")
            if room == "network":
                parameters[rest] = file.get_tensor(key)
            else:
                index, _, name = rest.partition(".")
                state.setdefault(int(index), {})[name] = file.get_tensor(key)
    network.load_state_dict(parameters)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            lay_out_like(parameter, optimizer.state[parameter])


def lay_out_like(parameter: Tensor, state: dict[str, Tensor]) -> None:
    """Convert state tensors to their parameter's memory layout: fused optimisers walk both as raw memory."""
    for name, value in state.items():
        if value.shape == parameter.shape:
            state[name] = torch.empty_like(parameter, memory_format=torch.preserve_format).copy_(value)
