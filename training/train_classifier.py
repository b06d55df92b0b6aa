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
"""Train a small classifier, the network behind FID and its relatives for small images: an Inception of their size.

    python training/train_classifier.py --output_dir pipelines/digits-classifier
    python training/train_classifier.py --dataset_name outputs/emoji --steps 4000 --width 32 --output_dir outputs/emoji-classifier

A small ResNet, trained with labels on the training images only, with shifts, rotations and noise; the held-out images give the
printed accuracy. It is independent of the encoder that ERW aligns with, since a metric computed with a model's own teacher
would flatter it. About a minute on 2 CPU cores for the digits.
"""

import argparse
import math

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import BitImageProcessorPil, ResNetConfig, ResNetForImageClassification

from erw_hf.data.source import load_source, read_images
from erw_hf.files import check_folder
from erw_hf.names import resolve_flags


# `normalise` and the processor are copied in train_tiny_encoder.py: no script imports another, and the
# library has no use for them.
MEAN, STD = 0.3, 0.35  # about those of the digits, and close enough elsewhere


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", default="outputs/digits-classifier")
    parser.add_argument(
        "--dataset_name", default="digits", help="or a folder of images with the splits train and validation"
    )
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument(
        "--width", type=int, default=16, help="channels of the first stage; the features have four times as many"
    )
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    resolve_flags(parser, args, ["output_dir"], ["dataset_name"])
    check_folder(args.output_dir)
    torch.manual_seed(args.seed)
    digits = args.dataset_name == "digits"
    sources = [load_source(args.dataset_name, split) for split in ("train", "test" if digits else "validation")]
    images = [read_images(source, args.image_size, 1 if digits else 3) for source in sources]
    (train, train_labels, _), (test, test_labels, _) = images
    if train_labels is None or test_labels is None:
        parser.error(f"{args.dataset_name} has no classes to learn")
    config = ResNetConfig(
        embedding_size=args.width,
        hidden_sizes=[args.width, 2 * args.width, 4 * args.width],
        depths=[1, 1, 1],
        layer_type="basic",
        num_labels=sources[0].num_classes,
        id2label=sources[0].id2label,
    )
    model = ResNetForImageClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=args.steps)
    for _ in tqdm(range(args.steps), mininterval=5):
        rows = torch.randperm(len(train))[: args.batch_size]
        logits = model(pixel_values=normalise(augment(train[rows].float() / 255))).logits
        loss = F.cross_entropy(logits, train_labels[rows], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        found = [model(pixel_values=normalise(batch.float() / 255)).logits.argmax(dim=1) for batch in test.split(500)]
    right = torch.cat(found) == test_labels
    accuracy = right.float().mean().item()
    print(f"accuracy on the held-out images {accuracy:.4f}, loss {loss.item():.4f}")
    model.save_pretrained(args.output_dir)
    BitImageProcessorPil(
        size={"shortest_edge": args.image_size},
        crop_size={"height": args.image_size, "width": args.image_size},
        image_mean=[MEAN] * 3,
        image_std=[STD] * 3,
    ).save_pretrained(args.output_dir)


def normalise(images: torch.Tensor) -> torch.Tensor:
    return ((images - MEAN) / STD).expand(-1, 3, -1, -1)


def augment(images: torch.Tensor) -> torch.Tensor:
    """Rotates by up to 12 degrees, scales by up to 12 %, shifts by up to a source pixel, and adds noise."""
    n = len(images)
    angle = (torch.rand(n) * 2 - 1) * math.radians(12)
    scale = 1 + 0.12 * (torch.rand(n) * 2 - 1)
    shift = (torch.rand(n, 2) * 2 - 1) / 8
    theta = torch.stack(
        [
            torch.stack([scale * angle.cos(), -scale * angle.sin(), shift[:, 0]], dim=1),
            torch.stack([scale * angle.sin(), scale * angle.cos(), shift[:, 1]], dim=1),
        ],
        dim=1,
    )  # (B, 2, 3)
    padding = (
        "zeros" if images.shape[1] == 1 else "border"
    )  # digits are white on black; pictures keep their background
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, padding_mode=padding, align_corners=False)
    return (images + 0.05 * torch.rand(n, 1, 1, 1) * torch.randn_like(images)).clamp(0, 1)


if __name__ == "__main__":
    main()
