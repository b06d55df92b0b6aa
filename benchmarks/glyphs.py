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
"""Make the dataset "glyphs": characters of many fonts under colour, texture, pose and clutter, in any number.

    python benchmarks/glyphs.py --output_dir outputs/glyphs                       # 32 classes x 1 000 images of 64 px
    python benchmarks/glyphs.py --output_dir outputs/glyphs --grid glyphs.png     # and a picture of some
    python benchmarks/glyphs.py --size 32 --grey --bright_ink --output_dir outputs/glyphs     # see recipes/glyphs.yaml

The class is the character, which is the only thing that all images of a class share: more to learn than the 8x8 digits
have, and with an encoder's help easier to learn. The fonts are those that matplotlib's wheel holds (DejaVu, STIX, Computer
Modern; their licences lie beside them and allow it). Splits: `train`; `validation`, other draws of the same fonts; `test`,
with fonts that no training image has. Row i of a split depends on (seed, split, i) alone, so any number of workers makes
the same ones; a shard that is there already is not made again.

The column `view` has the character and the font of `image`, and all else drawn anew: the second view of an encoder that sees no
labels. From augmentations of one image it did not learn the characters, since stripes and discs tell images apart
(k-NN accuracy 0.035 after 750 steps; chance is 0.031).
"""

import argparse
import functools
import io
import json
from multiprocessing import get_context
from pathlib import Path

import matplotlib
import numpy as np
import PIL
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from datasets.utils import disable_progress_bars
from PIL import Image, ImageDraw, ImageFilter, ImageFont, features
from tqdm.auto import tqdm

from erw_hf.data.samples import sample_rng
from erw_hf.trainer.plots import image_grid


# Without those that a turn or a font makes another one: I and 1, O and 0.
CHARACTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ23456789"
FONTS = {
    "train": (
        "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique", "DejaVuSerif", "DejaVuSerif-Bold",
        "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic", "STIXGeneral", "STIXGeneralBol", "STIXGeneralBolIta", "cmr10",
        "cmb10", "cmss10",
    ),
    "test": ("DejaVuSansMono", "DejaVuSansMono-Bold", "STIXGeneralItalic", "cmtt10", "cmti10"),
}  # fmt: skip
FONTS["validation"] = FONTS["train"]
CANVAS = 160  # of a character before it is posed, in pixels
BRIGHTNESS = np.array([0.3, 0.59, 0.11])  # of red, green and blue
MESH = 4  # cells of the grid that bends it


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/glyphs"))
    parser.add_argument("--train", type=int, default=1000, help="images per class")
    parser.add_argument("--validation", type=int, default=50, help="images per class")
    parser.add_argument("--test", type=int, default=50, help="images per class")
    parser.add_argument("--size", type=int, default=64, help="side in pixels")
    parser.add_argument(
        "--grey", action="store_true", help="one channel: a quarter of the tokens is enough, see recipes/glyphs.yaml"
    )
    parser.add_argument(
        "--bright_ink",
        action="store_true",
        help="never dark on bright, since the mean of both looks like nothing: easier to learn to draw",
    )
    parser.add_argument("--characters", default=CHARACTERS, help="one class each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard_rows", type=int, default=4000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--grid", type=Path, help="file for a picture of the first training images")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    settings = {
        name: getattr(args, name) for name in ("size", "grey", "bright_ink", "characters", "seed", "shard_rows")
    }
    settings |= {split: getattr(args, split) for split in ("train", "validation", "test")}
    settings["version"] = 4  # 2: with the column `view`; 3: grey or not; 4: bright ink or any
    check_settings(args.output_dir, settings)
    (args.output_dir / "data").mkdir(exist_ok=True)
    drawing = {name: settings[name] for name in ("characters", "size", "seed", "bright_ink")}
    shards = []
    for split in ("train", "validation", "test"):
        rows = getattr(args, split) * len(args.characters)
        count = -(-rows // args.shard_rows)
        for number, first in enumerate(range(0, rows, args.shard_rows)):
            path = args.output_dir / "data" / f"{split}-{number:05d}-of-{count:05d}.parquet"
            last = min(first + args.shard_rows, rows)
            shards.append((path, split, first, last, drawing, args.grey))
    todo = [shard for shard in shards if not shard[0].exists()]
    if args.workers == 1:
        for shard in tqdm(todo, desc="shards"):
            write_shard(shard)
    else:
        # spawn: a fork of a process that has threads can hang
        with get_context("spawn").Pool(args.workers) as pool:
            for _ in tqdm(pool.imap_unordered(write_shard, todo), total=len(todo), desc="shards"):
                pass
            pool.close()
            pool.join()
    if args.grid is not None:
        columns = len(args.characters)
        mode = "L" if args.grey else "RGB"
        images = [draw("train", i, **drawing).convert(mode) for i in range(6 * columns)]
        image_grid(images, columns=columns).save(args.grid)


def check_settings(folder: Path, settings: dict) -> None:
    """Shards of different settings never lie in one folder; what else the pixels depend on is written down."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "glyphs.json"
    if path.exists() and json.loads(path.read_text())["settings"] != settings:
        raise ValueError(f"{folder} was made with other settings, see {path}: choose another --output_dir")
    versions = {
        "pillow": PIL.__version__,
        "freetype": features.version("freetype2"),
        "matplotlib": matplotlib.__version__,
    }
    path.write_text(json.dumps({"settings": settings, "versions": versions}, indent=2) + "\n")


def write_shard(shard: tuple) -> None:
    disable_progress_bars()
    path, split, first, last, drawing, grey = shard
    characters = drawing["characters"]
    table: dict[str, list] = {"image": [], "label": [], "view": []}
    for index in range(first, last):
        for rendering, column in enumerate(("image", "view")):
            buffer = io.BytesIO()
            image = draw(split, index, rendering=rendering, **drawing)
            (image.convert("L") if grey else image).save(buffer, "PNG", compress_level=4)
            table[column].append({"bytes": buffer.getvalue(), "path": None})
        table["label"].append(index % len(characters))
    columns = Features({"image": ImageFeature(), "label": ClassLabel(names=list(characters)), "view": ImageFeature()})
    work = path.with_suffix(".tmp")
    Dataset.from_dict(table, features=columns).to_parquet(work)
    work.rename(path)  # all or nothing


def draw(
    split: str, index: int, characters: str, size: int, seed: int, bright_ink: bool = False, rendering: int = 0
) -> Image.Image:
    """
    Draws one image. The classes come in turn, so that any part of the data has all of them.

    Args:
        split (`str`): `"train"`, `"validation"` or `"test"`.
        index (`int`): Number of the image in its split.
        characters (`str`): The classes.
        size (`int`): Side in pixels.
        seed (`int`): Seed of the dataset.
        bright_ink (`bool`, defaults to `False`): The ink is brighter than its ground, in place of either.
        rendering (`int`, defaults to 0): Another one has the same character and font, and nothing else in common.

    Returns:
        `PIL.Image.Image`: RGB, `size` x `size`.
    """
    fonts = FONTS[split]
    font = fonts[sample_rng(seed, 0, f"{split} {index} font").integers(len(fonts))]
    rng = sample_rng(seed, 0, f"{split} {index} {rendering}")
    ground, ink = contrasting_colours(rng)
    if bright_ink and (ground @ BRIGHTNESS).sum() > (ink @ BRIGHTNESS).sum():
        ground, ink = ink, ground
    image = texture(rng, size, *ground)
    image = clutter(rng, image)
    for _ in range(rng.integers(0, 3)):  # smaller characters at the edges, which are not the class
        stray = posed(
            rng, characters[rng.integers(len(characters))], fonts[rng.integers(len(fonts))], size, stray=True
        )
        image.paste(texture(rng, size, *rng.random((2, 3))), mask=stray)
    mask = posed(rng, characters[index % len(characters)], font, size)
    if rng.random() < 0.3:  # a shadow
        left, top = (int(v) for v in rng.integers(-size // 20, size // 20 + 1, 2))
        image.paste((0, 0, 0), (left, top), mask.point(lambda value: value // 2))
    image.paste(texture(rng, size, *ink), mask=mask)
    if rng.random() < 0.5:
        image = strokes(rng, image, 1)
    image = lit(rng, image)
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.9))) if rng.random() < 0.25 else image


def contrasting_colours(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two colours of the ground and two of the ink, each (2, 3) in [0, 1], of different brightness."""
    while True:
        ground, ink = rng.random((2, 1, 3))
        ground, ink = (np.clip(c + rng.normal(0, 0.18, (2, 3)), 0, 1) for c in (ground, ink))
        gap = (ground @ BRIGHTNESS)[:, None] - (ink @ BRIGHTNESS)
        if np.abs(gap).min() > 0.22 and abs(np.sign(gap).sum()) == 4:
            return ground, ink


def texture(rng: np.random.Generator, size: int, first: np.ndarray, second: np.ndarray) -> Image.Image:
    """A pattern of two colours: gradient, stripes, checks, blobs or none."""
    y, x = np.mgrid[0:size, 0:size] / size
    angle, phase, waves = rng.uniform(0, 2 * np.pi), rng.uniform(0, 2 * np.pi), rng.uniform(2, 7)
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    kind = rng.integers(5)
    if kind == 0:
        share = np.full((size, size), rng.random())
    elif kind == 1:
        share = (along - along.min()) / np.ptp(along)
    elif kind == 2:
        share = 0.5 + 0.5 * np.clip(3 * np.sin(2 * np.pi * waves * along + phase), -1, 1)
    elif kind == 3:
        checks = np.sin(2 * np.pi * waves * along + phase) * np.sin(2 * np.pi * waves * across + phase)
        share = 0.5 + 0.5 * np.clip(4 * checks, -1, 1)
    else:
        cells = rng.random((6, 6)).astype(np.float32)
        share = np.asarray(Image.fromarray(cells).resize((size, size), Image.Resampling.BICUBIC)).clip(0, 1)
    pixels = first + share[..., None] * (second - first)  # (size, size, 3)
    return Image.fromarray((pixels * 255).round().astype(np.uint8))


def clutter(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    """Discs and boxes of any colour, half transparent, and lines."""
    layer, size = image.copy(), image.width
    pen = ImageDraw.Draw(layer)
    for _ in range(rng.integers(1, 5)):
        left, top = rng.uniform(-0.3, 1.0, 2) * size
        width, height = rng.uniform(0.1, 0.6, 2) * size
        shape = pen.ellipse if rng.random() < 0.5 else pen.rectangle
        shape((left, top, left + width, top + height), fill=colour(rng))
    return strokes(rng, Image.blend(image, layer, rng.uniform(0.15, 0.5)), int(rng.integers(0, 4)))


def strokes(rng: np.random.Generator, image: Image.Image, count: int) -> Image.Image:
    layer = image.copy()
    pen = ImageDraw.Draw(layer)
    for _ in range(count):
        ends = (rng.uniform(-0.2, 1.2, 4) * image.width).tolist()
        pen.line(ends, fill=colour(rng), width=int(rng.integers(1, max(2, image.width // 24) + 1)))
    return Image.blend(image, layer, rng.uniform(0.4, 0.8))


def colour(rng: np.random.Generator) -> tuple[int, int, int]:
    return tuple(int(value) for value in rng.integers(0, 256, 3))


def lit(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    """Light from one side."""
    y, x = np.mgrid[-1 : 1 : image.height * 1j, -1 : 1 : image.width * 1j]
    angle = rng.uniform(0, 2 * np.pi)
    light = rng.uniform(0.85, 1.1) + rng.uniform(0, 0.2) * (x * np.cos(angle) + y * np.sin(angle))
    return Image.fromarray((np.asarray(image) * light[..., None]).clip(0, 255).astype(np.uint8))


def posed(rng: np.random.Generator, character: str, font: str, size: int, stray: bool = False) -> Image.Image:
    """The mask of a character, turned, scaled, sheared, moved and bent; a stray one small and near the edge."""
    scale = rng.uniform(0.25, 0.4, 1) * np.ones(2) if stray else rng.uniform(0.6, 1.0) * rng.uniform(0.85, 1.15, 2)
    angle, shear = np.deg2rad(rng.uniform(-22, 22)), rng.uniform(-0.15, 0.15)
    shift = rng.uniform(-0.08, 0.08, 2)
    if stray:
        direction = rng.uniform(0, 2 * np.pi)
        shift = 0.45 * np.array([np.cos(direction), np.sin(direction)])
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) @ [[1, shear], [0, 1]]
    # Each node of a grid over the image, seen from the character: where its ink comes from
    nodes = np.stack(np.meshgrid(*2 * [np.linspace(-0.5, 0.5, MESH + 1)]), axis=-1)  # (MESH + 1, MESH + 1, 2), x first
    source = (nodes - shift) @ np.linalg.inv(turn).T / scale + rng.normal(0, 0.018, nodes.shape)
    source = (source + 0.5) * CANVAS
    side = 2 * size  # drawn at twice the size, then halved: smooth edges
    edges = np.linspace(0, side, MESH + 1).astype(int)
    mesh = []
    for row in range(MESH):
        for column in range(MESH):
            box = (edges[column], edges[row], edges[column + 1], edges[row + 1])
            corners = ((row, column), (row + 1, column), (row + 1, column + 1), (row, column + 1))
            mesh.append((tuple(map(int, box)), [float(v) for corner in corners for v in source[corner]]))
    large = character_mask(character, font, int(rng.integers(0, 5)))
    return large.transform((side, side), Image.Transform.MESH, mesh, Image.Resampling.BILINEAR).reduce(2)


@functools.cache
def character_mask(character: str, font: str, weight: int) -> Image.Image:
    """The character in the middle of a square, three quarters of its height, in one of several weights."""
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"
    face = ImageFont.truetype(path, CANVAS)
    left, top, right, bottom = face.getbbox(character, stroke_width=weight)
    face = ImageFont.truetype(path, round(CANVAS * 0.75 * CANVAS / max(bottom - top, 0.8 * (right - left))))
    mask = Image.new("L", (CANVAS, CANVAS))
    box = face.getbbox(character, stroke_width=weight)
    place = ((CANVAS - box[0] - box[2]) / 2, (CANVAS - box[1] - box[3]) / 2)
    ImageDraw.Draw(mask).text(place, character, fill=255, font=face, stroke_width=weight)
    return mask


if __name__ == "__main__":
    main()
