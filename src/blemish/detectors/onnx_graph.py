"""Export of a network as an ONNX graph."""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
from collections.abc import Iterator, Sequence

import torch
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, DeduplicateInitializersPass
from torch import nn

from blemish.detectors.base import Detector
from blemish.detectors.fusing import Lowered
from blemish.errors import ExportError

OPSET = 20


def export_detector(detector: Detector) -> bytes:
    """Export a detector's fused network at its image size, for any batch size; the input is `images`."""
    return export_network(detector.fused(), detector.config.image_size, detector.outputs)


def export_network(
    network: nn.Module, image_size: tuple[int, int], outputs: Sequence[str], *, half: bool = False
) -> bytes:
    """Export a network in evaluation mode; half: compute in float16, with inputs and outputs in float32."""
    height, width = image_size
    example = torch.rand(2, 3, height, width)
    if half:
        network = Lowered(network, torch.float16)
    with suppress_messages():
        program = torch.onnx.export(
            network,
            (example,),
            input_names=["images"],
            output_names=list(outputs),
            dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1, max=4096)}},
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    if program is None:
        raise ExportError("torch's exporter returned no graph")
    # Joined methods may contain the same backbone, which then is computed once.
    DeduplicateInitializersPass(size_limit=1 << 30)(program.model)
    CommonSubexpressionEliminationPass()(program.model)
    model = program.model_proto
    # The exporter records paths of this machine's source files on every node, and continues the numbering of
    # nodes from one export to the next. Without both, equal networks give equal bytes.
    for part in (model, model.graph, *model.graph.node, *model.graph.value_info, *model.graph.initializer):
        part.ClearField("metadata_props")
    for number, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{number}"
    written: bytes = model.SerializeToString()
    return written


SUPPRESSING = threading.RLock()
"""Held while messages are suppressed: both switches are those of the whole process."""


@contextlib.contextmanager
def suppress_messages() -> Iterator[None]:
    """Suppress the exporter's and the quantiser's messages; a wrong graph fails its comparison.

    One thread at a time, so that each restores what it found.
    """
    with SUPPRESSING:
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            logging.disable(before)
