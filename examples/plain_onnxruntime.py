#!/usr/bin/env python3
"""Run a model file without Blemish: examples/plain_onnxruntime.py F.blemish IMAGE...

Needs numpy, onnxruntime and pillow, and works the same in any language: the graph takes an RGB image of its
own size with values from 0 to 1, brought to the light of training if the model was trained so, and returns
the map and the numbers that the score is made of. For 8-bit images. The light p-value is left out.
"""

import json
import sys
import zipfile

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

path, *images = sys.argv[1:]
with zipfile.ZipFile(path) as archive:
    manifest = json.loads(archive.read("manifest.json"))
    session = onnxruntime.InferenceSession(archive.read("model.onnx"), providers=["CPUExecutionProvider"])
height, width = manifest["preprocessing"]["image_size"]
light = manifest["preprocessing"].get("light")
calibration = manifest["calibration"]
for name in images:
    with Image.open(name) as opened:
        upright = ImageOps.exif_transpose(opened).convert("RGB")
    resized = np.asarray(upright.resize((width, height), Image.Resampling.BILINEAR))  # with antialias
    inputs = resized.transpose(2, 0, 1) / np.float32(255)
    if light:  # the mean and deviation of each channel over small blocks, but for the extreme hundredths
        side = max(1, min(height, width) // 64)
        down, across = height // side, width // side
        blocks = inputs[:, : down * side, : across * side].reshape(3, down, side, across, side).mean((2, 4))
        cut = down * across // 100
        middle = np.sort(blocks.reshape(3, -1))[:, cut : down * across - cut]
        gain = np.maximum(light["deviation"], 1e-4) / np.maximum(middle.std(1), 1e-4)
        gain = np.clip(gain, *light["gain_limits"])
        offset = np.clip(light["mean"] - gain * middle.mean(1), -light["offset_limit"], light["offset_limit"])
        inputs = np.clip(inputs * gain[:, None, None] + offset[:, None, None], 0, 1).astype(np.float32)
    found = dict(zip(manifest["outputs"], session.run(None, {"images": inputs[None]}), strict=True))
    z_scores = (found["statistics"][0] - np.array(calibration["centers"])) / np.array(calibration["scales"])
    score = float(z_scores.max())
    label = "ok"
    if score > calibration["review_threshold"]:
        label = "defect" if score > calibration["defect_threshold"] else "review"
    odd = int((found["map"][0] > calibration["pixel_threshold"]).sum())
    print(label, f"{score:.6g}", name, f"{odd} pixels of the map over its threshold", sep="\t")
