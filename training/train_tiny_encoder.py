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
"""Train a tiny vision encoder, the teacher that ERW aligns with, on data anyone has.

    python training/train_tiny_encoder.py --output_dir pipelines/dinov2-tiny-digits
    python training/train_tiny_encoder.py --dataset_name outputs/emoji --pairs --resnet --output_dir outputs/emoji-resnet
    python training/train_tiny_encoder.py --dataset_name outputs/emoji --teacher outputs/emoji-resnet --output_dir outputs/emoji-vit

Without labels by default: two augmented views of each image must find each other in the batch (SimCLR's NT-Xent, arXiv
2002.05709, Eq. 1), once by their class token and once by the mean of their patch tokens. DINOv2's self-distillation takes far longer to
leave its uniform start on 1 438 digits. `--pairs` takes as views the pictures of one concept by different artists, whose file
names agree up to the last hyphen. `--names` adds what no picture says: the words of the concepts' names, from the `concepts.json` that
make_emoji.py writes. `--teacher` distils another encoder instead: patch tokens and their mean, by cosine. `--resnet` trains a
convolutional network.

The held-out images give the printed and recorded accuracy, and nothing else: 10 nearest neighbours, or with
`--pairs` how often the other artist's picture is the nearest one. The result is a transformers folder, which
`AutoModel.from_pretrained` and `RepresentationEncoder.from_pretrained` load, and `training.json` with what it took.
"""

import argparse
import json
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model, ResNetConfig, ResNetModel

from erw_hf import RepresentationEncoder
from erw_hf.data.source import load_source, read_images
from erw_hf.files import check_folder, write_record
from erw_hf.names import resolve_flags
from erw_hf.provenance import device_name
from erw_hf.trainer.device import cpu_has_bf16


# `normalise` and the processor are copied in train_classifier.py: no script imports another, and the
# library has no use for them.
# About those of the digits, and near enough elsewhere, so that the encoder sees unit-scale inputs.
MEAN, STD = 0.3, 0.35
KNN_IMAGES = 4000  # of each split, at most


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", default="outputs/dinov2-tiny-digits")
    parser.add_argument("--dataset_name", default="digits", help="or a folder that make_emoji.py made")
    parser.add_argument("--pairs", action="store_true", help="views are pictures of one concept by different artists")
    parser.add_argument("--names", action="store_true", help="predict the words of a concept's name too")
    parser.add_argument("--teacher", help="folder of an encoder to distil, in place of the two views")
    parser.add_argument(
        "--resnet",
        action="store_true",
        help="a ResNet with a map at a --patch_size-th of the side (4, 8, 16 ...), --num_layers blocks in each of its stages",
    )
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--patch_size", type=int, default=8)
    parser.add_argument("--hidden_size", type=int, default=64)
    parser.add_argument("--num_layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--temperature", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    resolve_flags(parser, args, ["output_dir"], ["dataset_name", "teacher"])
    return args


def main() -> None:
    args = parse_arguments()
    check_folder(args.output_dir)
    torch.manual_seed(args.seed)
    digits = args.dataset_name == "digits"
    sources = [load_source(args.dataset_name, split) for split in ("train", "test" if digits else "validation")]
    images = [read_images(source, args.image_size, 1 if digits else 3) for source in sources]
    (train, train_labels, train_paths), (test, test_labels, test_paths) = images
    groups = views_of(train_paths) if args.pairs else torch.arange(len(train))[:, None]
    if args.pairs and (len(groups) < 2 or groups.shape[1] < 2):
        raise ValueError(
            f"--pairs needs pictures of one concept by several artists, whose file names agree up to the last hyphen, as "
            f"cat-noto.png and cat-twemoji.png: {args.dataset_name} has none"
        )
    has_concepts = (Path(args.dataset_name) / "concepts.json").is_file()

    backbone = build_backbone(args).to(memory_format=torch.channels_last)  # convolutions take 0.6 of the time
    targets = Targets(args, train_paths)
    with torch.no_grad():
        targets.build_heads(backbone, train[:1] / 255)
    parameters = [*backbone.parameters(), *targets.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.04)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.learning_rate, total_steps=args.steps, pct_start=0.1
    )
    backbone.train()

    bar, accuracy, flops = tqdm(range(args.steps), mininterval=5), {}, 0
    for step in bar:
        chosen = groups[torch.randperm(len(groups))[: args.batch_size]]  # (B, artists)
        rows = [chosen[:, 0], chosen[:, 0]]
        if args.pairs:
            order = torch.rand(chosen.shape).argsort(dim=1)
            rows = [chosen.gather(1, order[:, i : i + 1]).squeeze(1) for i in (0, 1)]
        views = torch.cat([augment(train[r].float() / 255, recoloured=not args.pairs) for r in rows])
        optimizer.zero_grad()
        with FlopCounterMode(display=False) if step == 0 else nullcontext() as counter:
            with torch.autocast("cpu", torch.bfloat16, enabled=cpu_has_bf16()):
                loss = targets.loss(backbone, views, torch.cat(rows))
            loss.backward()
        if counter is not None:
            flops = counter.get_total_flops() * args.steps
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 249 or step == args.steps - 1:
            if has_concepts:
                accuracy = retrieval_accuracy(backbone, test, test_paths)
            elif train_labels is not None and test_labels is not None:
                accuracy = knn_accuracy(backbone, train, train_labels, test, test_labels)
            tqdm.write(f"step {step + 1}: loss {loss.item():.3f}, accuracy on the held-out images {accuracy}")

    backbone.save_pretrained(args.output_dir)
    size = args.image_size
    BitImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=[MEAN] * 3,
        image_std=[STD] * 3,
    ).save_pretrained(args.output_dir)
    record = {
        "arguments": vars(args),
        "held_out_accuracy": accuracy,
        "images_seen": 2 * args.steps * min(args.batch_size, len(groups)),
        "flops": flops,  # a teacher's forward passes included
        "device": device_name("cpu"),
    }
    write_record(Path(args.output_dir) / "training.json", record)


class Targets(nn.Module):
    """What the encoder learns from, and the heads that are dropped afterwards."""

    def __init__(self, args: argparse.Namespace, paths: list[str]) -> None:
        super().__init__()
        self.temperature = args.temperature
        self.heads = nn.ModuleDict()
        self.teacher = None
        if args.teacher is not None:
            self.teacher = RepresentationEncoder.from_pretrained(args.teacher, args.image_size // args.patch_size)
        self.words = word_targets(Path(args.dataset_name), paths) if args.names else None

    def build_heads(self, backbone: nn.Module, images: torch.Tensor) -> None:
        features = pooled(backbone, images)
        if self.teacher is None:
            self.heads.update({name: head(x.shape[1]) for name, x in features.items()})
        else:
            width = next(iter(features.values())).shape[1]
            self.heads["tokens"] = nn.Linear(width, self.teacher.embed_dim)
            self.heads["mean"] = nn.Linear(width, self.teacher.embed_dim)
        if self.words is not None:
            self.heads.update(
                {f"{name}_words": nn.Linear(x.shape[1], self.words.shape[1]) for name, x in features.items()}
            )

    def loss(self, backbone: nn.Module, views: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        hidden = backbone(normalise(views)).last_hidden_state.float()
        features = pool(hidden)
        if self.teacher is not None:
            with torch.no_grad():
                wanted = self.teacher(views.expand(-1, 3, -1, -1))  # (B, N, D)
            tokens = hidden.flatten(2).mT if hidden.ndim == 4 else hidden[:, 1:]
            loss = 1 - F.cosine_similarity(self.heads["tokens"](tokens), wanted, dim=-1).mean()
            for x in features.values():
                loss = loss + 1 - F.cosine_similarity(self.heads["mean"](x), wanted.mean(1), dim=-1).mean()
        else:
            loss = sum(nt_xent(self.heads[name](x), self.temperature) for name, x in features.items())
        if self.words is not None:
            for name, x in features.items():
                loss = loss + 20 * F.binary_cross_entropy_with_logits(self.heads[f"{name}_words"](x), self.words[rows])
        return loss


def word_targets(folder: Path, paths: list[str]) -> torch.Tensor:
    """(N, words) of zeros and ones: words of a concept's name, category and subcategory that at least three concepts share."""
    concepts = json.loads((folder / "concepts.json").read_text())
    words = {}
    for key, concept in concepts.items():
        text = " ".join(concept.values()).lower()
        words[key] = {word for word in "".join(c if c.isalnum() else " " for c in text).split() if len(word) > 1}
    counts = Counter(word for found in words.values() for word in found)
    vocabulary = sorted(word for word, count in counts.items() if count >= 3)
    return torch.tensor([[word in words[concept_of(path)] for word in vocabulary] for path in paths]).float()


def concept_of(path: str) -> str:
    """`1f424` of `1f424-noto.png`: what all artists call it."""
    return Path(path).stem.rsplit("-", 1)[0]


def views_of(paths: list[str]) -> torch.Tensor:
    """Rows (concepts, artists) of the pictures of each concept."""
    rows: dict[str, list[int]] = {}
    for row, path in enumerate(paths):
        rows.setdefault(concept_of(path), []).append(row)
    artists = max(map(len, rows.values()))  # a picture that is missing or broken takes its concept along
    return torch.tensor([pictures for pictures in rows.values() if len(pictures) == artists])


def build_backbone(args: argparse.Namespace) -> nn.Module:
    if args.resnet:
        stages = args.patch_size.bit_length() - 2  # the stem's stride is 4, and each stage after the first halves
        if stages < 1 or args.patch_size != 4 << (stages - 1):
            raise ValueError(f"--resnet takes a --patch_size of 4, 8, 16 ..., got {args.patch_size}")
        widths = [args.hidden_size >> (stages - 1 - i) for i in range(stages)]
        return ResNetModel(
            ResNetConfig(
                embedding_size=widths[0] // 2,
                hidden_sizes=widths,
                depths=[args.num_layers] * stages,
                layer_type="basic",
            )
        )
    return Dinov2Model(
        Dinov2Config(
            hidden_size=args.hidden_size,
            num_hidden_layers=args.num_layers,
            num_attention_heads=args.hidden_size // 32,
            patch_size=args.patch_size,
            image_size=args.image_size,
            attn_implementation="eager",  # in bf16 the backward pass of torch's CPU kernel is slow at so few tokens
        )
    )


def pooled(backbone: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Features (B, D) of images in [0, 1]."""
    return pool(backbone(normalise(images)).last_hidden_state)


def pool(hidden: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a ViT the class token and the mean patch token, of a ResNet its mean cell."""
    if hidden.ndim == 4:  # (B, D, h, w)
        return {"cells": hidden.mean(dim=(2, 3))}
    return {"class": hidden[:, 0], "patches": hidden[:, 1:].mean(1)}


def head(dim: int) -> nn.Module:
    return nn.Sequential(nn.Linear(dim, 256), nn.GELU(), nn.Linear(256, 64))


def nt_xent(features: torch.Tensor, temperature: float) -> torch.Tensor:
    """Each view's only positive among all others is the other view of its image, B rows away."""
    features = F.normalize(features, dim=-1)
    similarity = features @ features.T / temperature  # (2 B, 2 B)
    similarity.fill_diagonal_(float("-inf"))
    return F.cross_entropy(similarity, torch.arange(len(features)).roll(len(features) // 2))


def normalise(images: torch.Tensor) -> torch.Tensor:
    return ((images - MEAN) / STD).expand(-1, 3, -1, -1)


def augment(images: torch.Tensor, recoloured: bool = True) -> torch.Tensor:
    """Random rotation, scale, shear and shift; contrast; noise; of colour images the colours. No flip: a mirrored 2 is
    another sign."""
    n = len(images)
    angle = (torch.rand(n) - 0.5) * 0.5
    scale = 0.8 + 0.45 * torch.rand(n, 2)
    shear = (torch.rand(n) - 0.5) * 0.3
    shift = (torch.rand(n, 2) - 0.5) * 0.3
    theta = torch.stack(
        [
            torch.stack([scale[:, 0] * angle.cos(), shear - angle.sin(), shift[:, 0]], dim=1),
            torch.stack([angle.sin(), scale[:, 1] * angle.cos(), shift[:, 1]], dim=1),
        ],
        dim=1,
    )  # (B, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    if images.shape[1] == 1:
        images = F.grid_sample(images, grid, align_corners=False)
    else:
        images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
        images = recolour(images) if recoloured else images
    images = images.clamp(0, 1) ** (0.6 + 0.9 * torch.rand(n, 1, 1, 1))
    return (images + 0.05 * torch.randn_like(images)).clamp(0, 1)


def recolour(images: torch.Tensor) -> torch.Tensor:
    """Channels mixed at random, and half of the images inverted: else their colours alone would tell images apart."""
    n = len(images)
    mixing = torch.rand(n, 3, 3) + torch.eye(3)[torch.stack([torch.randperm(3) for _ in range(n)])]
    images = torch.einsum("nij,njhw->nihw", mixing / mixing.sum(dim=2, keepdim=True), images)
    return torch.where(torch.rand(n, 1, 1, 1) < 0.5, images, 1 - images)


@torch.no_grad()
def retrieval_accuracy(backbone: nn.Module, images: torch.Tensor, paths: list[str]) -> dict[str, float]:
    """How often the nearest picture of the other artist is of the same concept, both ways."""
    backbone.eval()
    batches = [pooled(backbone, batch.float() / 255) for batch in images.split(500)]
    backbone.train()
    first, second = views_of(paths).T  # (concepts,) each
    accuracy = {}
    for name in batches[0]:
        features = torch.cat([batch[name] for batch in batches])
        features = F.normalize(features - features.mean(0), dim=-1)
        similarity = features[first] @ features[second].T
        right = [similarity.argmax(dim) == torch.arange(len(first)) for dim in (0, 1)]
        accuracy[name] = round(torch.cat(right).float().mean().item(), 4)
    return accuracy


@torch.no_grad()
def knn_accuracy(backbone, train, train_labels, test, test_labels, k: int = 10) -> dict[str, float]:
    """Vote of the k nearest training images by cosine similarity of their features."""
    rows = [torch.linspace(0, len(x) - 1, min(len(x), KNN_IMAGES)).round().long() for x in (train, test)]
    train_labels, test_labels = train_labels[rows[0]], test_labels[rows[1]]
    backbone.eval()
    features = []
    for x, r in zip((train, test), rows, strict=True):
        batches = [pooled(backbone, b.float() / 255) for b in x[r].split(500)]
        features.append({name: F.normalize(torch.cat([b[name] for b in batches]), dim=-1) for name in batches[0]})
    backbone.train()
    accuracy = {}
    for name, a in features[0].items():
        votes = F.one_hot(train_labels[(features[1][name] @ a.T).topk(min(k, len(train_labels))).indices]).sum(1)
        accuracy[name] = round((votes.argmax(1) == test_labels).float().mean().item(), 4)
    return accuracy


if __name__ == "__main__":
    main()
