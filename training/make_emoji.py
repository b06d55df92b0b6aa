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
"""Emoji by two artists as folders of pictures: a small dataset of real drawings that anyone can make.

    python training/make_emoji.py --output_dir outputs/emoji

Noto Emoji (Google, Apache-2.0) and Twemoji (Twitter, CC BY 4.0) each drew the same 1 911 concepts: transparent PNGs of 64 px
in 10 categories and 99 subcategories. The pictures come from the npm packages `emoji-datasource-google` and
`emoji-datasource-twitter`, which npm downloads once (134 MB). Concepts, not pictures, are held out for `validation`: no artist's version
of a held-out concept is in `train`, nor is any of its skin tones.

    outputs/emoji/train/animal-bird/1f424-noto.png
    outputs/emoji/validation/food-fruit/1f34e-twemoji.png
    outputs/emoji/concepts.json                        names and categories of the code points
"""

import argparse
import json
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from erw_hf.names import resolve_flags


VERSION = "16.0.0"
ARTISTS = {"noto": "google", "twemoji": "twitter"}
CLASSES = {
    "category": lambda emoji, artist: emoji["category"],
    "subcategory": lambda emoji, artist: emoji["subcategory"],
    "style": lambda emoji, artist: f"{emoji['category']}, {artist}",
}
ATTRIBUTION = """The pictures are from Noto Emoji (copyright Google LLC, Apache-2.0) and Twemoji (copyright Twitter, Inc and other
contributors, CC BY 4.0, https://creativecommons.org/licenses/by/4.0/), as the npm packages emoji-datasource-google and
emoji-datasource-twitter {version} (Cal Henderson, MIT) carry them.
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/emoji"))
    parser.add_argument(
        "--packages", type=Path, help="folder of the two .tgz; npm fetches them into output_dir by default"
    )
    parser.add_argument("--classes", choices=CLASSES, default="subcategory", help="what class folders are named after")
    parser.add_argument(
        "--skin_tones", action="store_true", help="add skin tones of people and hands: twice as many pictures"
    )
    parser.add_argument("--held_out", type=float, default=1 / 6, help="share of the concepts in the split validation")
    parser.add_argument("--seed", type=int, default=0, help="seed for choosing these concepts")
    args = parser.parse_args()
    resolve_flags(parser, args, ["output_dir", "packages"])
    return args


def main() -> None:
    args = parse_arguments()
    if not 0 <= args.held_out < 1:
        raise SystemExit(f"--held_out must be in [0, 1), got {args.held_out}")
    for split in ("train", "validation"):
        if (args.output_dir / split).exists():
            raise SystemExit(f"{args.output_dir / split} exists: delete it, or choose another --output_dir")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    packages = {artist: open_package(args, company) for artist, company in ARTISTS.items()}
    concepts = read_concepts(packages["noto"])
    order = np.random.default_rng(args.seed).permutation(len(concepts))
    held_out = set(order[: round(args.held_out * len(concepts))])
    images = {artist: read_images(package) for artist, package in packages.items()}
    counts = {"train": 0, "validation": 0}

    def variants_of(emoji: dict[str, Any]) -> list[dict[str, Any]]:
        return [emoji, *emoji.get("skin_variations", {}).values()] if args.skin_tones else [emoji]

    for index, emoji in enumerate(tqdm(concepts, desc="concepts")):
        split = "validation" if index in held_out else "train"
        for artist in ARTISTS:
            folder = args.output_dir / split / CLASSES[args.classes](emoji, artist)
            folder.mkdir(parents=True, exist_ok=True)
            for variant in variants_of(emoji):
                if (content := images[artist].get(variant["image"])) is not None:
                    (folder / f"{Path(variant['image']).stem}-{artist}.png").write_bytes(content)
                    counts[split] += 1
    words = {
        Path(variant["image"]).stem: {key: emoji[key] for key in ("name", "category", "subcategory")}
        for emoji in concepts
        for variant in variants_of(emoji)
    }
    (args.output_dir / "concepts.json").write_text(json.dumps(words, indent=1))
    (args.output_dir / "ATTRIBUTION.txt").write_text(ATTRIBUTION.format(version=VERSION))
    classes = len({path.name for path in args.output_dir.glob("*/*/")})
    print(
        f"{args.output_dir}: {counts['train']} pictures to train on, {counts['validation']} held out, {classes} classes"
    )


def open_package(args: argparse.Namespace, company: str) -> tarfile.TarFile:
    """An artist's npm package, downloaded if it is not there."""
    name = f"emoji-datasource-{company}"
    folder = args.packages or args.output_dir / "packages"
    path = folder / f"{name}-{VERSION}.tgz"
    if not path.is_file():
        if shutil.which("npm") is None:
            raise SystemExit(
                f"{path} is missing and npm is not installed: install Node.js, or download {name}@{VERSION} there"
            )
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", "--silent", f"{name}@{VERSION}"], cwd=folder, check=True)
    return tarfile.open(path)


def read_concepts(package: tarfile.TarFile) -> list[dict]:
    """What both artists drew, in the order of Unicode's code points."""
    emojis = json.load(package.extractfile("package/emoji.json"))
    drawn = [emoji for emoji in emojis if all(emoji[f"has_img_{company}"] for company in ARTISTS.values())]
    return sorted(drawn, key=lambda emoji: emoji["unified"])


def read_images(package: tarfile.TarFile) -> dict[str, bytes]:
    """File name -> PNG of 64 px."""
    return {
        Path(member.name).name: package.extractfile(member).read()
        for member in package
        if "/64/" in member.name and member.name.endswith(".png")
    }


if __name__ == "__main__":
    main()
