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
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    BitImageProcessorPil,
    ConvNextConfig,
    ConvNextModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ConvNextConfig,
    DINOv3ConvNextModel,
    ResNetConfig,
    ResNetModel,
    Siglip2Config,
    TimmWrapperConfig,
    TimmWrapperModel,
)

from erw_hf import RepresentationEncoder


def test_models_of_timm(tmp_path):
    """What transformers lacks, MoCo v3's ViT for instance, comes through its wrapper of timm."""
    config = TimmWrapperConfig(
        architecture="vit_tiny_patch16_224",
        model_args={"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4, "img_size": 16},
        pretrained_cfg={"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [3, 16, 16]},
    )
    TimmWrapperModel(config).save_pretrained(tmp_path)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    encoder = RepresentationEncoder.from_pretrained(tmp_path, token_grid=4)
    assert (encoder.num_prefix_tokens, encoder.embed_dim, encoder.image_size) == (1, 16, 16)
    normalised = (images - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)
    own = AutoModel.from_pretrained(tmp_path).eval().timm_model
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), own.forward_features(normalised)[:, 1:])
    assert encoder.class_token_dim == 16
    other = RepresentationEncoder.from_pretrained(tmp_path, token_grid=6)  # another grid than the model's own
    assert other(images).shape == (2, 36, 16) and other.image_size == 24


TIMM_MAPS = {
    "resnet10t": ({"channels": [4, 4, 4, 16], "stem_width": 4}, 32),
    "resnet10t with a stride of 8": ({"channels": [4, 4, 4, 16], "stem_width": 4, "output_stride": 8}, 8),
    "convnext_atto": ({"dims": [4, 4, 4, 16], "depths": [1, 1, 1, 1]}, 32),
    "swin_tiny_patch4_window7_224": ({"embed_dim": 2, "depths": [1] * 4, "num_heads": [1] * 4}, 32),  # NHWC
}


@pytest.mark.parametrize("name", TIMM_MAPS)
def test_cells_of_timms_maps_are_tokens(name, tmp_path):
    arguments, stride = TIMM_MAPS[name]
    settings = {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, 64, 64]}
    config = TimmWrapperConfig(architecture=name.split()[0], model_args=arguments, pretrained_cfg=settings)
    TimmWrapperModel(config).save_pretrained(tmp_path)
    encoder = RepresentationEncoder.from_pretrained(tmp_path, token_grid=2)
    assert (encoder.image_size, encoder.embed_dim, encoder.num_prefix_tokens) == (2 * stride, 16, 1)
    images = torch.rand(2, 3, 2 * stride, 2 * stride, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cells = encoder.model.timm_model.forward_features(2 * images - 1)
        pooled = encoder.model.timm_model.forward_head(cells)
    if cells.shape[1] == 16:
        cells = cells.permute(0, 2, 3, 1)
    tokens, class_token = encoder.patch_and_class_tokens(images)
    torch.testing.assert_close(tokens, torch.stack([cells[:, i // 2, i % 2] for i in range(4)], dim=1))
    torch.testing.assert_close(class_token, pooled)


def test_timm_models_of_one_size_say_so(tmp_path):
    arguments = {"img_size": 64}
    settings = {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, 64, 64]}
    config = TimmWrapperConfig(architecture="mixer_s32_224", model_args=arguments, pretrained_cfg=settings)
    TimmWrapperModel(config).save_pretrained(tmp_path)
    assert RepresentationEncoder.from_pretrained(tmp_path, token_grid=2).embed_dim == 512
    with pytest.raises(ValueError, match="does not take images of 96 px, which 3x3 tokens need"):
        RepresentationEncoder.from_pretrained(tmp_path, token_grid=3)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(2, 3, 16, 32), r"must be square, .* got \(2, 3, 16, 32\)"),
        (torch.rand(2, 3, 32, 16), "must be square"),
        (torch.rand(3, 16, 16), "must be square"),
        (torch.rand(2, 4, 16, 16), r"\(B, 3, side, side\) or \(B, 1, side, side\)"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), "floats in .* got torch.uint8: divide"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.int64), "got torch.int64"),
        (255 * torch.rand(2, 3, 16, 16), "must lie in .*divide by 255"),
        (2 * torch.rand(2, 3, 16, 16) - 1, "must lie in .*x / 2"),
        (torch.full((2, 3, 16, 16), torch.nan), "must lie in .*nan"),
        (torch.rand(0, 3, 16, 16), r"got \(0, 3, 16, 16\)"),
    ],
)
def test_images_of_another_form_are_refused(encoder_path, images, message):
    encoder = RepresentationEncoder.from_pretrained(encoder_path, token_grid=4)
    for encode in (encoder, encoder.patch_and_class_tokens):
        with pytest.raises(ValueError, match=message):
            encode(images)
    assert encoder.to("meta")(torch.zeros(2, 3, 16, 16, device="meta")).shape == (2, 16, 16)  # as FLOPs are counted


def test_naflex_variants_are_refused_with_what_to_take(tmp_path):
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = Siglip2Config(vision_config=vision, text_config={**vision, "vocab_size": 50})
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="NaFlex.*siglip2-base-patch16-256"):
        RepresentationEncoder.from_pretrained(tmp_path, token_grid=4)
    with pytest.raises(ValueError, match="NaFlex"):  # so does the dry run
        RepresentationEncoder.from_config(config, token_grid=4)


def test_tokens_are_the_models_own_on_normalised_images(encoder_path):
    encoder = RepresentationEncoder.from_pretrained(encoder_path, token_grid=4)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    normalised = (images - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    model = AutoModel.from_pretrained(encoder_path).eval()
    with torch.no_grad():
        expected = model(normalised).last_hidden_state[:, 1:]  # without the class token
    torch.testing.assert_close(encoder(images), expected)
    assert encoder.num_prefix_tokens == 1 and encoder.embed_dim == 16


def _save(folder, model, size: int = 16):
    model.save_pretrained(folder)
    BitImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size}).save_pretrained(
        folder
    )
    return folder


@pytest.mark.parametrize("name", ["resnet", "convnext", "dinov3_convnext"])
def test_cells_of_a_convolutional_networks_last_map_are_its_tokens(tmp_path, name):
    if name == "resnet":  # a map (B, D, h, w); two strides in its stem, none in its only stage
        model = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[16], depths=[1], layer_type="basic"))
    elif name == "convnext":  # a map at a 32nd of the image's side; the patch size of its config is its stem's
        model = ConvNextModel(ConvNextConfig(hidden_sizes=[4, 8, 8, 16], depths=[1, 1, 1, 1]))
    else:  # a row of cells after a class token
        model = DINOv3ConvNextModel(DINOv3ConvNextConfig(hidden_sizes=[4, 8, 8, 16], depths=[1, 1, 1, 1]))
    stride = 4 if name == "resnet" else 32
    encoder = RepresentationEncoder.from_pretrained(_save(tmp_path, model), token_grid=4)
    assert (encoder.image_size, encoder.embed_dim, encoder.num_prefix_tokens) == (4 * stride, 16, 1)
    images = torch.rand(2, 3, encoder.image_size, encoder.image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = model.eval()((images - encoder.image_mean) / encoder.image_std)
    cells = output.last_hidden_state
    if name == "dinov3_convnext":
        cells = cells[:, 1:]
    else:
        cells = torch.stack([cells[:, :, i // 4, i % 4] for i in range(16)], dim=1)
    torch.testing.assert_close(encoder(images), cells)
    # What the network's own head would read is the class token.
    tokens, class_token = encoder.patch_and_class_tokens(images)
    torch.testing.assert_close(tokens, cells)
    torch.testing.assert_close(class_token, output.pooler_output.reshape(2, 16))


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
ARCHITECTURES = {
    # name: (config, model, prefix tokens), all with 4 px patches and made for 16 px images
    "dinov2": (lambda t: t.Dinov2Config(**SMALL, patch_size=4, image_size=16), "Dinov2Model", 1),
    "dinov2-registers": (
        lambda t: t.Dinov2WithRegistersConfig(**SMALL, patch_size=4, image_size=16, num_register_tokens=4),
        "Dinov2WithRegistersModel", 5,
    ),
    "dinov3": (
        lambda t: t.DINOv3ViTConfig(**SMALL, patch_size=4, image_size=16, num_register_tokens=4), "DINOv3ViTModel", 5
    ),
    "dino-v1": (lambda t: t.ViTConfig(**SMALL, patch_size=4, image_size=16), "ViTModel", 1),
    "mae": (
        lambda t: t.ViTMAEConfig(
            **SMALL, patch_size=4, image_size=16, decoder_hidden_size=16, decoder_num_attention_heads=2,
            decoder_intermediate_size=32, decoder_num_hidden_layers=1,
        ),
        "ViTMAEModel", 1,
    ),
    "ijepa": (lambda t: t.IJepaConfig(**SMALL, patch_size=4, image_size=16), "IJepaModel", 0),
    "clip": (
        lambda t: t.CLIPConfig(vision_config={**SMALL, "patch_size": 4, "image_size": 16}, text_config={**SMALL, "vocab_size": 50}),
        "CLIPModel", 1,
    ),
    "siglip2": (
        lambda t: t.SiglipConfig(vision_config={**SMALL, "patch_size": 4, "image_size": 16}, text_config={**SMALL, "vocab_size": 50}),
        "SiglipModel", 0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("grid", [4, 8])  # the encoder's own grid, and another
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_patch_tokens_of_every_architecture(name, grid, tmp_path):
    import transformers

    make_config, class_name, prefix = ARCHITECTURES[name]
    torch.manual_seed(0)
    _save(tmp_path, getattr(transformers, class_name)(make_config(transformers)))
    encoder = RepresentationEncoder.from_pretrained(tmp_path, token_grid=grid)
    assert encoder.num_prefix_tokens == prefix and encoder.embed_dim == 16
    images = torch.rand(2, 3, 4 * grid, 4 * grid, generator=torch.Generator().manual_seed(1))
    tokens = encoder(images)
    assert tokens.shape == (2, grid**2, 16)
    torch.testing.assert_close(encoder(images), tokens)  # nothing random, no shuffling
    # Tokens are in row-major order: a change in the last patch moves its own token most.
    changed = images.clone()
    changed[:, :, -4:, -4:] = 1 - changed[:, :, -4:, -4:]
    moved = (encoder(changed) - tokens).norm(dim=-1)
    assert (moved.argmax(dim=1) == grid**2 - 1).all()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_class_tokens_are_those_after_the_last_norm(name, tmp_path):
    import transformers

    make_config, class_name, prefix = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = getattr(transformers, class_name)(make_config(transformers))
    _save(tmp_path, model)
    encoder = RepresentationEncoder.from_pretrained(tmp_path, token_grid=4)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    if prefix == 0:
        with pytest.raises(ValueError, match=f"encoder {tmp_path} .* has no class token"):
            encoder.patch_and_class_tokens(images)
        return
    for parameter in encoder.model.parameters():  # norms of a fresh model have weights of 1
        torch.nn.init.normal_(parameter, std=0.3)
    own = {}
    norms = [module for module in encoder.model.modules() if isinstance(module, torch.nn.LayerNorm)]
    norms[-1].register_forward_hook(lambda _, __, output: own.update(last=output))  # in the order of the layers
    tokens, class_token = encoder.patch_and_class_tokens(images)
    torch.testing.assert_close(tokens, encoder(images))
    assert class_token.shape == (2, 16) and encoder.class_token_dim == 16
    encoder.patch_and_class_tokens(images)
    last = own["last"] if own["last"].ndim == 2 else own["last"][:, 0]
    torch.testing.assert_close(class_token, last)


def test_antialiased_positions_are_resampled_once(encoder_path, tmp_path):
    encoder = RepresentationEncoder.from_pretrained(encoder_path, token_grid=2, antialias_positions=True)
    own = AutoModel.from_pretrained(encoder_path).embeddings.position_embeddings
    grid = own[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    expected = F.interpolate(grid, size=(2, 2), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    table = encoder.model.embeddings.position_embeddings
    assert table.shape == (1, 5, 16)
    torch.testing.assert_close(table[:, 1:], expected)
    torch.testing.assert_close(table[:, :1], own[:, :1])
    images = torch.rand(1, 3, 8, 8)
    plain = RepresentationEncoder.from_pretrained(encoder_path, token_grid=2)
    assert not torch.allclose(encoder(images), plain(images))
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    _save(tmp_path, DINOv3ViTModel(DINOv3ViTConfig(**SMALL, patch_size=4, image_size=16)))
    with pytest.raises(ValueError, match="no position table"):
        RepresentationEncoder.from_pretrained(tmp_path, token_grid=4, antialias_positions=True)


def test_images_of_another_size_are_resized_and_grey_ones_are_spread(encoder_path):
    encoder = RepresentationEncoder.from_pretrained(encoder_path, token_grid=8)
    grey = torch.rand(2, 1, 20, 20)
    tokens = encoder(grey)
    assert tokens.shape == (2, 64, 16)
    normalised = (grey.expand(-1, 3, -1, -1) - encoder.image_mean) / encoder.image_std
    resized = F.interpolate(normalised, size=(32, 32), mode="bicubic")
    torch.testing.assert_close(tokens, encoder.model(resized).last_hidden_state[:, 1:])


def test_a_processor_that_does_not_normalise_is_followed(encoder_path, tmp_path):
    folder = tmp_path / "encoder"
    shutil.copytree(encoder_path, folder)
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps({**settings, "do_normalize": False}))
    encoder, images = RepresentationEncoder.from_pretrained(folder, token_grid=4), torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(encoder(images), encoder.model(images).last_hidden_state[:, 1:])


def test_it_is_frozen_and_runs_in_its_own_dtype(encoder_path):
    encoder = RepresentationEncoder.from_pretrained(encoder_path, token_grid=4, dtype=torch.bfloat16)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not encoder.model.training
    assert encoder(torch.rand(1, 3, 16, 16)).dtype == torch.bfloat16


def test_it_stays_as_it_is_in_a_model_that_is_trained():
    """A ResNet's running statistics, for instance."""
    config = ResNetConfig(embedding_size=4, hidden_sizes=[8, 16], depths=[1, 1])
    encoder = RepresentationEncoder(ResNetModel(config), [0.5] * 3, [0.5] * 3, 4)
    images = torch.rand(2, 3, 32, 32)
    before = encoder(images)
    torch.nn.ModuleList([encoder]).train()
    assert torch.equal(encoder(images), before) and not encoder.model.training


@pytest.mark.parametrize("lost", ["encoder.layer.1.", ""])
def test_a_file_that_lacks_weights_is_refused(encoder_path, tmp_path, lost):
    """Other people's checkpoints, under other names; transformers would leave the model random."""
    shutil.copytree(encoder_path, tmp_path / "encoder")
    file = tmp_path / "encoder/model.safetensors"
    tensors = load_file(file)
    names = {name: name if lost and not name.startswith(lost) else f"backbone.net.{name}" for name in tensors}
    assert any(name != other for name, other in names.items())
    save_file({names[name]: tensor for name, tensor in tensors.items()}, file, {"format": "pt"})
    with pytest.raises(ValueError, match="lacks the weights of .* tensors of Dinov2Model, such as"):
        RepresentationEncoder.from_pretrained(tmp_path / "encoder", token_grid=4)
    names = {name: name for name in tensors if "mask_token" not in name}  # masks no token here
    save_file({names[name]: tensors[name] for name in names}, file, {"format": "pt"})
    RepresentationEncoder.from_pretrained(tmp_path / "encoder", token_grid=4)


def test_patches_that_are_named_by_both_sides(encoder_path):
    model = AutoModel.from_pretrained(encoder_path)
    model.config.patch_size = [4, 4]
    assert RepresentationEncoder(model, [0.5] * 3, [0.5] * 3, 4).patch_size == 4
    model.config.patch_size = [4, 8]
    with pytest.raises(ValueError, match="are not square"):
        RepresentationEncoder(model, [0.5] * 3, [0.5] * 3, 4)


def test_register_tokens_are_left_out(tmp_path):
    config = Dinov2WithRegistersConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=4, image_size=16, num_register_tokens=3
    )
    Dinov2WithRegistersModel(config).save_pretrained(tmp_path)
    BitImageProcessorPil().save_pretrained(tmp_path)
    encoder = RepresentationEncoder.from_pretrained(tmp_path, token_grid=4)
    assert encoder.num_prefix_tokens == 4
    assert encoder(torch.rand(1, 3, 16, 16)).shape == (1, 16, 16)


def test_a_grid_that_does_not_match_names_both(encoder_path):
    with pytest.raises(ValueError, match=r"6x6 encoder tokens, the latent has 4x4"):
        RepresentationEncoder.from_pretrained(encoder_path, token_grid=4, image_size=24)

    class Pooled(torch.nn.Module):  # a hierarchical model: fewer tokens than patches
        config = type("Config", (), {"patch_size": 4})()
        weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, pixel_values):
            return type("Output", (), {"last_hidden_state": torch.zeros(len(pixel_values), 4, 8)})()

        def parameters(self, recurse=True):
            return iter([self.weight])

    with pytest.raises(ValueError, match=r"gives 4 tokens \(about 2x2\).*the latent has 4x4"):
        RepresentationEncoder(Pooled(), [0.5] * 3, [0.5] * 3, token_grid=4)
