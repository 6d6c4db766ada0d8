"""Reading, preprocessing, resizing and writing of images, and overlays.

The only package that uses Pillow; what other packages need of it is exported here.
"""

from blemish.images.light import Light
from blemish.images.preprocessing import Preprocessing
from blemish.images.reading import (
    LOSSY_MASK_LEVEL,
    ImageInfo,
    as_image,
    describe,
    list_images,
    mask_is_empty,
    read,
    read_digested,
    read_mask,
)
from blemish.images.resizing import (
    FULL_SCALE,
    resize,
    resize_map,
    to_input,
    white_level,
)
from blemish.images.writing import jpeg_bytes, png_bytes, write_png, write_tiff

__all__ = [
    "FULL_SCALE",
    "LOSSY_MASK_LEVEL",
    "ImageInfo",
    "Light",
    "Preprocessing",
    "as_image",
    "describe",
    "jpeg_bytes",
    "list_images",
    "mask_is_empty",
    "png_bytes",
    "read",
    "read_digested",
    "read_mask",
    "resize",
    "resize_map",
    "to_input",
    "white_level",
    "write_png",
    "write_tiff",
]
