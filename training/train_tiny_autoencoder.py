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
"""Train a small AutoencoderKL for studies in latents, on a folder of images.

    python training/train_tiny_autoencoder.py --dataset_name outputs/emoji --output_dir outputs/emoji-vae

Four channels on a grid of half the side, from the mean absolute error and a weak Kullback-Leibler term. `scaling_factor` gives the
latents unit variance. Prints the error on the held-out images. Autocast to bf16 on CPUs that have it, with
which it takes ten minutes of a core.
"""

import argparse

import torch
from diffusers import AutoencoderKL
from tqdm.auto import tqdm

from erw_hf.data.source import load_source, read_images
from erw_hf.files import check_folder
from erw_hf.names import resolve_flags
from erw_hf.trainer.device import cpu_has_bf16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", required=True)
    parser.add_argument(
        "--dataset_name", required=True, help="a folder of images with the splits train and validation"
    )
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument(
        "--width", type=int, default=32, help="channels of the first level; the second has twice as many"
    )
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--kl_weight", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    resolve_flags(parser, args, ["output_dir"], ["dataset_name"])
    check_folder(args.output_dir)
    torch.manual_seed(args.seed)
    train, held_out = (
        read_images(load_source(args.dataset_name, split), args.image_size, 3)[0] for split in ("train", "validation")
    )
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(args.width, 2 * args.width),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=args.image_size,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=args.steps)
    progress = tqdm(range(args.steps), mininterval=5)
    for _ in progress:
        images = scale(train[torch.randperm(len(train))[: args.batch_size]])
        with torch.autocast("cpu", torch.bfloat16, enabled=cpu_has_bf16()):
            posterior = model.encode(images).latent_dist
            error = (model.decode(posterior.sample()).sample - images).abs().mean()
        loss = error + args.kl_weight * posterior.kl().float().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.set_postfix(error=f"{error.item():.3f}")
    model.eval()
    with torch.no_grad():
        latents = torch.cat([model.encode(scale(batch)).latent_dist.mode() for batch in train.split(256)])
        errors = [
            (model(scale(batch)).sample - scale(batch)).abs().flatten(1).mean(1) for batch in held_out.split(256)
        ]
    model.register_to_config(scaling_factor=1 / latents.std().item())
    model.save_pretrained(args.output_dir)
    print(f"mean absolute error on held-out images in [-1, 1]: {torch.cat(errors).mean():.4f}")


def scale(images: torch.Tensor) -> torch.Tensor:
    return images / 127.5 - 1


if __name__ == "__main__":
    main()
