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
"""What each block of a trained model knows of an image: CKNNA with an encoder, and a linear probe of the classes.

    python training/probe.py --model pipelines/erw-digits --dataset_name digits --test_split test \\
        --encoder pipelines/dinov2-tiny-digits --times 0 0.5 --output_dir outputs/probe

Mean tokens of each block, on clean latents (t = 0) and on noised ones. The model is given no class. Writes `probe.json`
and `probe.png`. ERW and REPA report CKNNA on 10 000 validation images with k = 10.
"""

import argparse
import time
from pathlib import Path

from accelerate import Accelerator

from erw_hf import ERWPipeline, RepresentationEncoder
from erw_hf.data.latents import image_channels
from erw_hf.data.source import load_source
from erw_hf.evaluation.probes import load_probe_pair, probe_blocks
from erw_hf.files import check_folder, write_record
from erw_hf.names import resolve_flags
from erw_hf.provenance import hardware, versions, weights_hash
from erw_hf.trainer.config import AT_LEAST_1, check_flags
from erw_hf.trainer.engines import close_accelerator, open_accelerator
from erw_hf.trainer.plots import plot_probes


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--output_dir", default="outputs/probe", help="default: outputs/probe")
    parser.add_argument("--model", required=True, help="Hub id or folder of a pipeline, or the folder of a run")
    parser.add_argument("--dataset_name", required=True, help="Hub id, local folder, or digits")
    parser.add_argument("--image_column", help="column of images; detected by default")
    parser.add_argument("--label_column", help="column of labels; detected by default")
    parser.add_argument("--num_classes", type=int, help="from the dataset by default; 0 reads it without labels")
    parser.add_argument(
        "--train_split", default="train", help="split that the linear probe is fitted on; default: train"
    )
    parser.add_argument(
        "--test_split", default="validation", help="split for the accuracy and for CKNNA; default: validation"
    )
    parser.add_argument("--num_images", type=int, default=10_000, help="most images of a split; default: 10000")
    parser.add_argument("--encoder", help="Hub id or folder of the encoder that CKNNA compares with")
    parser.add_argument("--encoder_image_size", type=int, help="as in training")
    parser.add_argument("--encoder_antialias", action="store_true", help="as in training")
    parser.add_argument(
        "--times", type=float, nargs="+", default=[0.0], help="flow times, 0 is data and 1 is noise; default: 0"
    )
    parser.add_argument("--neighbours", type=int, default=10, help="k of CKNNA; default: 10")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the choice of images and of the noise; default: 0"
    )
    args = parser.parse_args()
    resolve_flags(parser, args, ["output_dir"], ["dataset_name", "encoder"], ["model"])
    check_flags(parser, args, num_images="[2, inf)", neighbours=AT_LEAST_1, times="[0, 1]")
    try:
        check_folder(args.output_dir)
    except ValueError as error:
        parser.error(str(error))
    return args


def main() -> None:
    args = parse_arguments()
    accelerator = open_accelerator()
    probe(args, accelerator)
    close_accelerator(accelerator)


def probe(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """All ranks compute the same; the main one writes."""
    started = time.perf_counter()
    pipe = ERWPipeline.from_pretrained(args.model).to(accelerator.device)
    config = pipe.transformer.config
    side = config.sample_size * pipe.vae_scale_factor
    channels = config.in_channels if pipe.vae is None else image_channels(pipe.vae)
    columns = {name: getattr(args, name) for name in ("image_column", "label_column", "num_classes")}
    same = args.train_split == args.test_split
    fit_images, test_images = load_probe_pair(
        load_source(args.dataset_name, args.train_split, **columns),
        None if same else load_source(args.dataset_name, args.test_split, **columns),
        args.num_images, side, channels, args.seed,
    )  # fmt: skip
    if args.encoder is not None and len(test_images.pixels) <= args.neighbours:
        raise ValueError(
            f"--neighbours {args.neighbours} needs more images than that, {args.test_split} has {len(test_images.pixels)}"
        )
    encoder = None
    if args.encoder is not None:
        encoder = RepresentationEncoder.from_pretrained(
            args.encoder,
            config.sample_size // config.patch_size,
            image_size=args.encoder_image_size,
            antialias_positions=args.encoder_antialias,
        )
        encoder = encoder.to(accelerator.device)
    results = probe_blocks(
        pipe.transformer, fit_images, test_images, args.times, pipe.vae, encoder,
        pipe.scheduler.config.get("path_type", "linear"), args.neighbours,
    )  # fmt: skip
    if not accelerator.is_main_process:
        return
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "probes": results,
        "settings": vars(args),
        "images": {"fit": len(fit_images.pixels), "test": len(test_images.pixels)},
        "model": {"name": args.model, "sha256": weights_hash(pipe.transformer)},
        "encoder": {"name": args.encoder, "sha256": weights_hash(encoder)} if encoder is not None else None,
        "versions": versions(),
        "hardware": hardware(accelerator),
        "seconds": {"total": round(time.perf_counter() - started, 2)},
    }
    write_record(folder / "probe.json", record)
    plot_probes([(args.model, result) for result in results], folder / "probe.png")
    for result in results:
        for measure in ("cknna", "accuracy"):
            if measure in result:
                print(f"t = {result['t']:g}  {measure:9}" + "".join(f"{value:8.4f}" for value in result[measure]))
    print(f"{folder / 'probe.json'}, {folder / 'probe.png'}")


if __name__ == "__main__":
    main()
