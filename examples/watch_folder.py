#!/usr/bin/env python3
"""Judge the images in a folder as they arrive: examples/watch_folder.py F.blemish FOLDER [--once].

Needs no more than `pip install blemish`: no PyTorch, no GPU.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import blemish
from blemish import images


def arriving(folder: Path, once: bool) -> Iterator[Path]:
    """Yield each image of a folder, then wait for more, unless `once`.

    Write an image under another ending and rename it when it is complete, or half of it may be read.
    """
    seen: set[Path] = set()
    while True:
        new = [path for path in images.list_images(folder) if path not in seen]
        yield from new
        seen.update(new)
        if once:
            return
        time.sleep(0.05)


# A camera can take the place of `arriving`: any iterator of (H, W) or (H, W, 3) RGB arrays. With OpenCV:
#     camera = cv2.VideoCapture(0)
#     frames = (frame[..., ::-1] for taken, frame in iter(camera.read, None) if taken)  # BGR to RGB


def main() -> None:
    """Print a line for each image."""
    parser = argparse.ArgumentParser(description="Judge the images in a folder as they arrive.")
    parser.add_argument("model", type=Path, metavar="F.blemish")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--once", action="store_true", help="stop after the images that are there already")
    options = parser.parse_args()
    with blemish.load(options.model) as model:
        for outcome in model.stream(arriving(options.folder, options.once)):
            verdict = outcome.verdict
            if verdict is None:
                print("unreadable", outcome.error, sep="\t", flush=True)
            else:
                boxes = [region.box for region in verdict.regions]
                print(verdict.label, f"{verdict.score:.6g}", verdict.path, boxes, sep="\t", flush=True)


if __name__ == "__main__":
    main()
