#!/usr/bin/env python3
"""Judge the images in a folder, and those that come: examples/watch_folder.py F.blemish FOLDER [--once].

Needs no more than `pip install blemish`: no PyTorch, no GPU.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import blemish
from blemish import images


def arriving(folder: Path, once: bool) -> Iterator[Path]:
    """Give each image of a folder; wait for more unless only those there are wanted.

    Whatever writes them should do so under another ending and rename them, or half of one may be read.
    """
    seen: set[Path] = set()
    while True:
        new = [path for path in images.list_images(folder) if path not in seen]
        yield from new
        seen.update(new)
        if once:
            return
        time.sleep(0.05)


# A camera takes the place of `arriving`: any iterator of (H, W) or (H, W, 3) RGB arrays does. With OpenCV:
#     camera = cv2.VideoCapture(0)
#     frames = (frame[..., ::-1] for taken, frame in iter(camera.read, None) if taken)  # BGR to RGB


def main() -> None:
    """Print a line for each image."""
    parser = argparse.ArgumentParser(description="Judge the images in a folder, and those that come.")
    parser.add_argument("model", type=Path, metavar="F.blemish")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--once", action="store_true", help="stop after the images that are there")
    options = parser.parse_args()
    model = blemish.load(options.model)
    for outcome in model.predict_stream(arriving(options.folder, options.once)):
        if isinstance(outcome, blemish.BlemishError):
            print("unreadable", outcome, sep="\t", flush=True)
        else:
            boxes = [region.box for region in outcome.regions]
            print(outcome.label, f"{outcome.score:.6g}", outcome.path, boxes, sep="\t", flush=True)


if __name__ == "__main__":
    main()
