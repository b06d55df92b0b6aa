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
import os
from pathlib import Path


# No test may reach for a network: what is not local has to fail at once. The client reads this when it is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from helpers import REPRESENTATION_ARCHITECTURES, TINY_MODEL, randomize

from erw_hf.provenance import device_name


# Tests compare computations of equal maths to the last bit, as two batches of two with one of four, or loaded weights with those that
# were saved. MKL promises that where its kernels for AVX-512 run. With others the order in which it adds up depends on the number of
# rows and on addresses (mapped files lie anywhere), so there it is told, before its first product, to take the one that does not.
# Processes that tests start inherit it, and agree with this one.
if not (device_name("cpu").startswith("Intel") and torch.backends.cpu.get_cpu_capability() == "AVX512"):
    os.environ.setdefault("MKL_CBWR", "COMPATIBLE")

if "PYTEST_XDIST_WORKER" in os.environ:  # a worker for each core, so one thread for each, and for what it starts
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

# The files that take longest, by name: they begin first, so that at the end no worker waits for another.
LONGEST = (
    "test_training.py", "test_push.py", "test_evaluation.py", "test_speed.py", "test_digits.py", "test_engines.py",
    "test_hub_streaming.py", "test_space.py", "test_convergence.py", "test_benchmarks.py", "test_quality.py",
)  # fmt: skip


def pytest_configure(config):
    config.option.loadscopereorder = False  # xdist's own order is by the number of tests


def pytest_collection_modifyitems(items):
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture
def transformer():
    from erw_hf import ERWTransformer2DModel

    return randomize(ERWTransformer2DModel(**TINY_MODEL)).eval()


@pytest.fixture(scope="session")
def encoder_path(tmp_path_factory) -> Path:
    """A DINOv2 of two layers in the Hub's folder layout, patches of 4 px."""
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=4, image_size=16)
    Dinov2Model(config).save_pretrained(folder)
    BitImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vae_path(tmp_path_factory) -> Path:
    """An AutoencoderKL of two levels and 4 latent channels: a cell for 2x2 pixels."""
    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def tiny_flags(encoder_path) -> list[str]:
    """Flags that make a run of the digits preset take seconds, with a rate and times that do not move with it."""
    values = {
        "warmup_noised": "false",
        "timestep_distribution": "uniform",
        "timestep_shift": 1.5,
        "learning_rate": 1e-3,
        "encoder": encoder_path,
        "sample_size": 8,
        "patch_size": 2,
        "num_layers": 3,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "projector_dim": 16,
        "warmup_depth": 2,
        "projector_depth": 2,
        "warmup_steps": 3,
        "max_train_steps": 7,
        "train_batch_size": 4,
        "lr_warmup_steps": 1,
        "validation_steps": 0,
        "num_validation_images": 4,
        "num_inference_steps": 2,
        "checkpointing_steps": 2,
        "report_to": "none",
        "mixed_precision": "no",
    }
    return [f"--{name}={value}" for name, value in values.items()]


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    """Random, and scaled so that the features do not collapse."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        patch.setattr(module, "load_state_dict_from_url", lambda *args, **kwargs: None)
        torch.manual_seed(0)
        model = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    for parameter in model.parameters():
        if parameter.ndim == 4:
            torch.nn.init.kaiming_normal_(parameter)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def small(encoder_path, vae_path):
    """Flags that replace what a preset takes from the Hub, and shrink it."""
    values = {
        "dataset_name": "digits", "encoder": encoder_path, "sample_size": 8, "patch_size": 2, "num_layers": 3,
        "num_attention_heads": 2, "attention_head_dim": 8, "warmup_depth": 2, "projector_depth": 2, "projector_dim": 16,
        "num_classes": 10, "train_batch_size": 2, "lr_warmup_steps": 0, "validation_steps": 0, "num_validation_images": 2,
        "num_inference_steps": 2, "checkpointing_steps": 100, "dataloader_num_workers": 0, "report_to": "none",
        "mixed_precision": "no",
    }  # fmt: skip
    flags = [f"--{name}={value}" for name, value in values.items()]
    latents = [*flags, f"--vae={vae_path}", "--in_channels=4"]
    of = dict.fromkeys(("digits", "emoji", "pixels", "imagenet256-pixel"), flags)
    of["imagenet256-encoder-start"] = [*latents, "--start_from_encoder=2"]  # the tiny encoder has two
    return lambda preset: of.get(preset, latents)


@pytest.fixture(scope="session")
def representation_paths(tmp_path_factory) -> dict[str, Path]:
    """A tiny random model of each architecture of FDr6, in the Hub's layout of timm."""
    from transformers import TimmWrapperConfig, TimmWrapperModel

    paths = {}
    for name, (architecture, arguments) in REPRESENTATION_ARCHITECTURES.items():
        paths[name] = tmp_path_factory.mktemp(name)
        settings = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [3, 64, 64]}
        torch.manual_seed(0)
        config = TimmWrapperConfig(architecture=architecture, model_args=arguments, pretrained_cfg=settings)
        TimmWrapperModel(config).save_pretrained(paths[name])
    return paths
