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
"""Published checkpoints with their numbers, and the protocol behind each number: what `evaluate.py --verify` goes by.

A number is here if its source can be named; what could not be checked against a paper or the code is under `unverified`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from huggingface_hub import hf_hub_download

from erw_hf.conversion import convert_checkpoint
from erw_hf.pipeline_erw import ERWPipeline
from erw_hf.scheduling_erw import FlowMatchEulerMaruyamaScheduler, FlowMatchHeunScheduler


SCHEDULERS = {
    "sde": FlowMatchEulerMaruyamaScheduler,  # Euler-Maruyama, last step 0.04
    "heun": FlowMatchHeunScheduler,
    "euler": FlowMatchEulerDiscreteScheduler,
}
ADM_FILE = "VIRTUAL_imagenet256_labeled.npz"
_PROTOCOL = {
    "num_samples": 50_000, "labels": "random", "num_inference_steps": 250, "guidance_scale": 1.0, "guidance_interval": (0.0, 1.0),
    "mixed_precision": "no", "reference": ADM_FILE, "extractor": "inception", "sampler": "pipeline",
}  # fmt: skip


@dataclass(frozen=True)
class Published:
    """A published number.

    Args:
        repo (`str`): Hub repo of the file; empty where it is not on the Hub.
        file (`str`): The file, or where to download it by hand.
        numbers (`Mapping[str, float]`): Metric -> published value.
        source (`str`): Where the numbers stand.
        protocol (`Mapping`): Flags of `evaluate.py` that it was measured with.
        scheduler (`str`): A key of `SCHEDULERS`.
        scheduler_config (`Mapping`): Of the scheduler.
        vae (`str`): Hub id of the autoencoder.
        latent_statistics (`tuple[str, str]`, *optional*): Hub repo and file of mean and deviation of each latent channel.
        architecture (`Mapping`): What the converter cannot tell from the tensors.
        remeasured (`tuple[str, ...]`): What users found, with the protocol where it is another one, and where they say so.
        differs (`tuple[str, ...]`): Where this library's protocol is another one whatever the flags.
        unverified (`tuple[str, ...]`): What was not checked against paper or code.
        refused (`str`): Why it cannot be measured here; empty if it can.
    """

    repo: str
    file: str
    numbers: Mapping[str, float]
    source: str
    protocol: Mapping[str, Any] = field(default_factory=dict)
    scheduler: str = "sde"
    scheduler_config: Mapping[str, Any] = field(default_factory=dict)
    vae: str = "stabilityai/sd-vae-ft-ema"
    latent_statistics: tuple[str, str] | None = None
    architecture: Mapping[str, Any] = field(default_factory=dict)
    remeasured: tuple[str, ...] = ()
    differs: tuple[str, ...] = ()
    unverified: tuple[str, ...] = ()
    refused: str = ""

    @property
    def settings(self) -> dict[str, Any]:
        """Flags of `evaluate.py` -> values of the published protocol."""
        return {**_PROTOCOL, **self.protocol}

    @property
    def notes(self) -> list[str]:
        """What to know beside the number, a line each."""
        titles = {"remeasured": self.remeasured, "differs": self.differs, "unverified": self.unverified}
        return [f"{title}: {text}" for title, texts in titles.items() for text in texts]


_SIT_FILE = "https://www.dl.dropboxusercontent.com/scl/fi/as9oeomcbub47de5g4be0/SiT-XL-2-256.pt?rlkey=uxzxmpicu46coq3msb17b9ofa&dl=1"
_SIT: dict[str, Any] = {
    "repo": "", "file": _SIT_FILE,
    "unverified": ("that the published samples were multiplied in float32 (willisma/SiT#14), and not in TF32 as sample_ddp.py does unasked",),
}  # fmt: skip
_SIT_CODE = "labels at random, sd-vae-ft-ema and rounding as in its sample_ddp.py"
_SIT_CHANNELS = "SiT guides 3 of 4 latent channels, as DiT's code; here guidance moves all"
_REPA: dict[str, Any] = {
    "repo": "",
    "file": "https://www.dl.dropboxusercontent.com/scl/fi/cxedbs4da5ugjq5wg3zrg/last.pt?rlkey=8otgrdkno0nd89po3dpwngwcc&dl=1",
    "differs": ("REPA's generate.py cuts 255 x to 8 bits, half a level darker, and multiplies in TF32; here it is rounded, in float32",),
}  # fmt: skip
_VAVAE: dict[str, Any] = {
    "vae": "REPA-E/vavae-hf",
    "latent_statistics": ("hustvl/vavae-imagenet256-f16d32-dinov2", "latents_stats.pt"),
    "scheduler": "euler",
    "scheduler_config": {"shift": 1 / 0.3},  # t = 1 is data there: hustvl/LightningDiT#37
    "differs": ("guided rows (1.35 and 2.11) are left out: LightningDiT guides 3 of 32 channels, at 6.7 and 10 (hustvl/LightningDiT#21, #49)",),
    "unverified": (
        "that the unguided rows were drawn as the guided configs say (Euler, 250 steps, time shift 0.3), and in float32",
        "that REPA-E/vavae-hf holds the weights of hustvl/vavae-imagenet256-f16d32-dinov2",
    ),
}  # fmt: skip
_VAVAE_CODE = "sampler, statistics and ADM's reference as in its configs/reproductions"

PUBLISHED: dict[str, Published] = {
    "sit-xl-2": Published(
        **_SIT, numbers={"fid": 2.06, "sfid": 4.50, "inception_score": 270.3, "precision": 0.82, "recall": 0.59},
        source=f"SiT, arXiv 2401.08740, abstract; all five in ERW, arXiv 2504.10188; {_SIT_CODE}", protocol={"guidance_scale": 1.5},
        remeasured=("2.45, 2.53 by users' samplers, 2.34 after mending the resize (willisma/SiT#14)",), differs=(_SIT_CHANNELS,),
    ),
    "sit-xl-2-unguided": Published(
        **_SIT, numbers={"fid": 8.3, "sfid": 6.32, "inception_score": 131.7, "precision": 0.68, "recall": 0.67},
        source=f"SiT, arXiv 2401.08740; all five in ERW, arXiv 2504.10188; the author on the sampler, willisma/SiT#31; {_SIT_CODE}",
        remeasured=("9.5 and never below 9.3 with the ODE of the README (willisma/SiT#31)",),
    ),
    "sit-xl-2-ode": Published(
        **_SIT, numbers={"fid": 2.15}, source=f"SiT, arXiv 2401.08740; Heun with 125 steps by the author, willisma/SiT#18; {_SIT_CODE}",
        protocol={"guidance_scale": 1.5, "num_inference_steps": 125}, scheduler="heun",
        remeasured=("2.08 with the README's ODE (willisma/SiT#31)", "2.149 (willisma/SiT#14)"), differs=(_SIT_CHANNELS,),
    ),
    "repa-xl-2": Published(
        **_REPA, numbers={"fid": 1.42, "sfid": 4.70, "inception_score": 305.7, "precision": 0.80, "recall": 0.65},
        source="REPA, arXiv 2410.06940; command in its README, labels at random and sd-vae-ft-ema as in its generate.py",
        protocol={"guidance_scale": 1.8, "guidance_interval": (0.0, 0.7)},
        remeasured=("7.8 of the official XL/2 at guidance 2.0, cause unknown, perhaps no interval (End2End-Diffusion/iREPA#10)",),
    ),
    "repa-xl-2-unguided": Published(**_REPA, numbers={"fid": 5.9}, source="REPA, arXiv 2410.06940, 4M steps; sampler of its generate.py"),
    "lightningdit-xl-1": Published(
        **_VAVAE, repo="hustvl/lightningdit-xl-imagenet256-800ep", file="lightningdit-xl-imagenet256-800ep.pt",
        numbers={"fid": 2.17}, source=f"LightningDiT, README (800 epochs); {_VAVAE_CODE}",
        remeasured=("1.45 for the guided 1.35 (hustvl/LightningDiT#88)",),
    ),
    "lightningdit-xl-1-64ep": Published(
        **_VAVAE, repo="hustvl/lightningdit-xl-imagenet256-64ep", file="lightningdit-xl-imagenet256-64ep.pt",
        numbers={"fid": 5.14}, source=f"LightningDiT, README (64 epochs); {_VAVAE_CODE}",
    ),
    "dit-xl-2": Published(
        repo="facebook/DiT-XL-2-256", file="", numbers={"fid": 2.27, "inception_score": 278.24},
        source="DiT, arXiv 2212.09748, and its README; labels at random by the author, facebookresearch/DiT#16", protocol={"guidance_scale": 1.5},
        remeasured=("2.21 by its authors in float32 with PyTorch (README)", "2.27 guided and 9.5 for 9.6 unguided (willisma/SiT#31)"),
        refused="it predicts the noise and the variance of DDPM, which this library does not draw with: diffusers' DiTPipeline draws it, "
        "and --images measures what it drew",
    ),
}  # fmt: skip


def list_published() -> str:
    """The table, an entry in a few lines."""
    lines = []
    for name, entry in PUBLISHED.items():
        numbers = ", ".join(f"{metric} {value}" for metric, value in entry.numbers.items())
        lines.append(f"{name}: {numbers} ({entry.source})")
        if entry.refused:
            lines.append(f"    not measured here: {entry.refused}")
        else:
            where = f"{entry.repo}/{entry.file}" if entry.repo else f"{entry.file}, by hand, with --checkpoint"
            lines.append(f"    from {where}, decoded by {entry.vae}")
            settings = {key: value for key, value in entry.settings.items() if key != "sampler"}
            lines.append(f"    {entry.scheduler}, " + ", ".join(f"{key} {value}" for key, value in settings.items()))
        lines += [f"    {note}" for note in entry.notes]
    return "\n".join(lines)


def build_published(name: str, checkpoint: str | None = None) -> ERWPipeline:
    """Fetches and converts a published checkpoint, or its file in `checkpoint`. The pipeline draws as its authors did,
    as far as `differs` and `unverified` say. Raises ValueError for one that cannot be drawn with here, or whose
    file is not on the Hub."""
    entry = PUBLISHED[name]
    if entry.refused:
        raise ValueError(f"{name} is not measured here: {entry.refused}")
    if checkpoint is None and not entry.repo:
        raise ValueError(f"{name} is not on the Hub: download {entry.file} and name the file with --checkpoint")
    path = checkpoint or hf_hub_download(entry.repo, entry.file)
    transformer = convert_checkpoint(path, entry.architecture)
    vae = AutoencoderKL.from_pretrained(entry.vae)
    if entry.latent_statistics is not None:
        statistics = torch.load(hf_hub_download(*entry.latent_statistics), weights_only=True, map_location="cpu")
        mean, std = (statistics[key].flatten().tolist() for key in ("mean", "std"))
        vae.register_to_config(latents_mean=mean, latents_std=std, scaling_factor=1.0, shift_factor=None)
    return ERWPipeline(transformer, vae, SCHEDULERS[entry.scheduler](**entry.scheduler_config))


def verification(name: str, record: Mapping[str, Any]) -> str:
    """Published numbers beside those of the record of its evaluation, and what is different in the protocol."""
    entry = PUBLISHED[name]
    lines = [f"{'metric':22}{'published':>12}{'measured':>12}{'error':>12}{'bias':>12}  {name}, {entry.source}"]
    for metric, value in entry.numbers.items():
        if (measured := record["metrics"].get(metric)) is None:
            lines.append(f"{metric:22}{value:12.6g}{'not measured':>24}")
            continue
        error, bias = record["errors"].get(metric), record["bias"].get(metric)
        shown = "".join(f"{number:12.3g}" if number is not None else f"{'-':>12}" for number in (error, bias))
        far = error is not None and abs(measured - value) > 2 * error
        verdict = "more than 2 errors apart" if far else "within 2 errors" if error is not None else "no error"
        lines.append(f"{metric:22}{value:12.6g}{measured:12.6g}{shown}  {verdict}")
    used = record["settings"]
    for key, value in entry.settings.items():
        found = tuple(used[key]) if isinstance(used.get(key), list) else used.get(key)
        if key == "reference":
            found = Path(str(found)).name
        if found != value:
            lines.append(f"protocol: {key} was {value}, here it is {found}")
    return "\n".join([*lines, *entry.notes])
