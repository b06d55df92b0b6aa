# Copyright 2026 The ERW-HF authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""From a row's image to 8-bit pixels: one way for training, caches, evaluation and probes.

An image that cannot be decoded is a [`BadImageError`], whatever PIL raised. System errors are retried, then raised.
"""

import functools
import io
import logging
import zipfile
import zlib
from typing import Any

import numpy as np
import torch
from datasets.utils.file_utils import xopen
from PIL import Image, UnidentifiedImageError

from erw_hf.data.retrying import retried


logger = logging.getLogger(__name__)

# What makes each of EXIF's orientations (CIPA DC-008, tag 0x0112) upright; 1 already is.
ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
THIN = 16  # long side over short side above which an image is cropped before it is enlarged


class BadImageError(ValueError):
    """An image that cannot be decoded; the message names it."""


def read_file(path: str) -> bytes:
    """
    Content of a file, also in an archive or on the Hub, as `datasets` names it.

    Raises:
        BadImageError: if it lies in a damaged archive.
        OSError: naming the file, if the system cannot read it.
    """
    try:
        with xopen(path, "rb") as file:
            return file.read()
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise BadImageError(f"{path} holds no readable image ({type(error).__name__}: {error})") from error
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = path  # opening sets it, reading does not
        raise


def image_name(encoded: dict[str, Any] | None) -> str:
    """The path of an undecoded image, or that it lacks one."""
    return (encoded or {}).get("path") or "an image without a name"


def decode_image(encoded: dict[str, Any] | None, retry_seconds: float = 300) -> tuple[Image.Image, bytes]:
    """
    The first frame, upright by EXIF, scaled to 8 bit, transparency on white, in mode L or RGB; and its file's content.

    Args:
        encoded (`dict`, *optional*): `bytes`, or the `path` to read them from, as an undecoded image column of `datasets` has them.
        retry_seconds (`float`, *optional*, defaults to 300): How long to retry while the system or the Hub cannot read it.

    Raises:
        BadImageError: if there is no image, or none that can be decoded.
        OSError: naming the file, if the system cannot read it.
    """
    if encoded is None or (encoded["bytes"] is None and encoded["path"] is None):
        raise BadImageError(f"{image_name(encoded)} holds no readable image (the row holds none)")
    content = encoded["bytes"]
    if content is None:
        content = retried(retry_seconds, lambda: read_file(encoded["path"]), listed=True)
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
        return _to_8_bit(_upright(image)), content
    except MemoryError:
        raise
    except Exception as error:  # plug-ins raise anything: struct.error, KeyError, RuntimeError, ...
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the system's fault, not the content's, which is in memory
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, UnidentifiedImageError):
            reason = "Pillow does not know its format" if content else "it is empty"
        raise BadImageError(f"{image_name(encoded)} holds no readable image ({reason})") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation: Any = image.getexif().get(ORIENTATION)
        transpose = UPRIGHT.get(orientation)
    except Exception:  # broken metadata, but the pixels are readable
        return image
    return image if transpose is None else image.transpose(transpose)


def _to_8_bit(image: Image.Image) -> Image.Image:
    """To mode L or RGB."""
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return Image.fromarray(_levels(np.asarray(image)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.mode in ("L", "RGB"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


@functools.cache
def _say_dark() -> None:
    """Once."""
    logger.warning(
        "an image of 16 bits has no value above 4095, so it is nearly black: if all are like this, their data has 8 or 12 bits, and "
        "has to be scaled to 16 (times 257 or 16) or stored in 8"
    )


def _levels(values: np.ndarray) -> np.ndarray:
    """Grey values of 16 bit, 32 bit or float, as uint8."""
    low, high = values.min(), values.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("it holds NaN or infinity")
    if values.dtype.kind == "f":
        if low >= 0 and high <= 1:
            return np.round(values * 255).astype(np.uint8)
        if low >= 0 and 2 <= high <= 255:  # below 2: probably [0, 1] with overshoot from resampling
            return np.round(values).astype(np.uint8)
    elif values.itemsize > 2 and low >= 0 and high <= 255:  # 8 bit in 32
        return values.astype(np.uint8)
    elif low >= 0 and high <= 65535:
        if values.itemsize == 2 and high < 4096:
            _say_dark()
        return (values >> 8).astype(np.uint8)  # as PIL reads 16-bit RGB
    low, high = float(low), float(high)
    return np.round((values.astype(np.float64) - low) * (255 / ((high - low) or 1))).astype(np.uint8)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's preprocessing (arXiv 2105.05233): the largest centred square, resized to `size` pixels."""
    # Box-halving down to less than twice the size, then bicubic: what the reference statistics of FID were made with.
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    left, top = (width - size) // 2, (height - size) // 2
    if scale > 1 and max(image.size) > THIN * min(image.size):
        # The same square, without the whole image enlarged: 5 GB for 20000 x 1 pixels.
        across, down = image.width / width, image.height / height
        box = (left * across, top * down, (left + size) * across, (top + size) * down)
        return image.resize((size, size), resample=Image.Resampling.BICUBIC, box=box)
    image = image.resize((width, height), resample=Image.Resampling.BICUBIC)
    return image.crop((left, top, left + size, top + size))


def crop_at(image: Image.Image, size: float, left: float, top: float) -> Image.Image:
    """
    A square of 0.8 to 1 of the shorter side, the range of ADM's random crop.

    Args:
        image (`PIL.Image.Image`): Any image.
        size (`float`): In [0, 1): 0 for the smallest square.
        left (`float`): In [0, 1): where it lies, from the left.
        top (`float`): In [0, 1): the same, from the top.

    Returns:
        `PIL.Image.Image`: That part of the image.
    """
    side = max(1, round(min(image.size) * (0.8 + 0.2 * size)))
    x, y = int(left * (image.width - side + 1)), int(top * (image.height - side + 1))
    return image.crop((x, y, x + side, y + side))


def prepare_image(image: Image.Image, size: int, channels: int) -> Image.Image:
    """The [`center_crop`] of what [`decode_image`] gave, in RGB (3 channels) or grey (1)."""
    return center_crop(image.convert({1: "L", 3: "RGB"}[channels]), size)


def to_pixels(image: Image.Image) -> torch.Tensor:
    """(C, H, W) uint8 pixels of what [`prepare_image`] gave."""
    pixels = np.asarray(image).reshape(image.height, image.width, -1)
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())
