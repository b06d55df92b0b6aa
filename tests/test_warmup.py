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
import pytest
import torch
from helpers import TINY_MODEL, randomize

from erw_hf import ERWTransformer2DModel
from erw_hf.alignment import ConvProjector, MLPProjector, TransformerProjector
from erw_hf.objective import AlignedTransformer, Batch, Objective
from erw_hf.warmup import build_warmup_transformer, hand_over


WIDTH, ENCODER_WIDTH = 16, 12


def warmup_model(depth: int = 2) -> AlignedTransformer:
    transformer = randomize(build_warmup_transformer(TINY_MODEL, depth), seed=1)
    return AlignedTransformer(
        transformer, [randomize(MLPProjector(WIDTH, ENCODER_WIDTH, 16), seed=2)], depth, warmup=True
    )


def full_model() -> AlignedTransformer:
    torch.manual_seed(3)
    return AlignedTransformer(ERWTransformer2DModel(**TINY_MODEL), [MLPProjector(WIDTH, ENCODER_WIDTH, 16)], depth=3)


def batch(size: int = 4) -> dict[str, torch.Tensor]:
    """Fields of a batch of clean latents."""
    generator = torch.Generator().manual_seed(5)
    return {
        "noise": torch.randn(size, 1, 8, 8),
        "t": torch.zeros(size),
        "x0": torch.randn(size, 1, 8, 8, generator=generator),
        "class_labels": torch.arange(size) % 10,
        "drop": torch.zeros(size),
        "targets": [torch.randn(size, 16, ENCODER_WIDTH, generator=generator)],
    }


def test_hand_over_makes_the_warmup_the_early_layers():
    warmup, full = warmup_model(), full_model()
    fresh = {name: tensor.clone() for name, tensor in full.state_dict().items()}
    names = hand_over(warmup.state_dict(), full)

    own = full.state_dict()
    for name, tensor in warmup.state_dict().items():
        if name.startswith(("transformer.norm_out", "transformer.proj_out")):
            assert name not in names
            torch.testing.assert_close(own[name], fresh[name])  # the final layer starts fresh
        else:
            assert name in names
            assert torch.equal(own[name], tensor), name
    later = [name for name in own if name.startswith("transformer.transformer_blocks.2.")]
    assert later and all(torch.equal(own[name], fresh[name]) for name in later)


def test_hand_over_can_leave_the_projector_fresh():
    warmup, full = warmup_model(), full_model()
    fresh = full.projectors[0].layers[0].weight.clone()
    names = hand_over(warmup.state_dict(), full, with_projectors=False)
    assert torch.equal(full.projectors[0].layers[0].weight, fresh)
    assert not any(name.startswith("projectors.") for name in names)


def test_hand_over_refuses_what_does_not_fit():
    narrow = {**TINY_MODEL, "num_attention_heads": 1}
    other = AlignedTransformer(
        build_warmup_transformer(narrow, 2), [MLPProjector(8, ENCODER_WIDTH, 16)], 2, warmup=True
    )
    with pytest.raises(ValueError, match="in the warmup and"):
        hand_over(other.state_dict(), full_model())
    with pytest.raises(ValueError, match="has no tensor transformer.transformer_blocks.3"):
        deeper = AlignedTransformer(ERWTransformer2DModel(**{**TINY_MODEL, "num_layers": 4}), [], 4)
        hand_over(deeper.state_dict(), full_model())
    with pytest.raises(ValueError, match="the warmup lacks"):
        hand_over({}, full_model())
    without_projector = {k: v for k, v in warmup_model().state_dict().items() if not k.startswith("projectors.")}
    with pytest.raises(ValueError, match="lacks projectors.0.*set hand_over_projector to false"):
        hand_over(without_projector, full_model())
    hand_over(without_projector, full_model(), with_projectors=False)
    without_labels = {k: v for k, v in warmup_model().state_dict().items() if "time_class_embed.class" not in k}
    with pytest.raises(ValueError, match="the warmup lacks 1 tensors, such as transformer.time_class_embed.class"):
        hand_over(without_labels, full_model())
    with_holes = {k: v for k, v in warmup_model().state_dict().items() if "blocks.1.attn.to_q" not in k}
    with pytest.raises(
        ValueError, match="the warmup lacks 2 tensors, such as transformer.transformer_blocks.1.attn.to_q"
    ):
        hand_over(with_holes, full_model())
    two = full_model()
    two.projectors.append(MLPProjector(WIDTH, ENCODER_WIDTH, 16))
    with pytest.raises(ValueError, match="the warmup lacks projectors.1"):
        hand_over(warmup_model().state_dict(), two)


def test_hand_over_notices_a_load_that_does_not_load():
    full = full_model()
    full.load_state_dict = lambda *args, **kwargs: None  # what swallowed errors amount to
    with pytest.raises(RuntimeError, match="differ afterwards"):
        hand_over(warmup_model().state_dict(), full)


def test_warmup_runs_no_later_block_and_trains_no_final_layer():
    full = full_model()
    full.warmup, full.depth = True, 2
    calls = []
    for i, block in enumerate(full.transformer.transformer_blocks):
        block.register_forward_hook(lambda *_, i=i: calls.append(i))
    full.transformer.norm_out.register_forward_hook(lambda *_: calls.append("final"))
    Objective().warmup_loss(full, Batch(**batch()))
    assert calls == [0, 1]

    truncated = warmup_model()
    assert len(truncated.transformer.transformer_blocks) == 2
    trained = {name for name, parameter in truncated.named_parameters() if parameter.requires_grad}
    assert not any("norm_out" in name or "proj_out" in name for name in trained)
    Objective().warmup_loss(truncated, Batch(**batch())).loss.backward()
    assert all(parameter.grad is not None for parameter in truncated.parameters() if parameter.requires_grad)


def test_warmup_sees_the_clean_latent_at_time_zero_with_its_label():
    model, seen = warmup_model(), {}
    model.transformer.register_forward_pre_hook(lambda _, args: seen.update(x=args[0], t=args[1], labels=args[2]))
    data = batch()
    Objective().warmup_loss(model, Batch(**data))
    assert torch.equal(seen["x"], data["x0"])
    assert torch.equal(seen["t"], torch.zeros(4))
    assert torch.equal(seen["labels"], data["class_labels"])


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
def test_warmup_with_noise_sees_the_point_of_the_path(path_type):
    model, data, seen = warmup_model(), batch(), {}
    model.transformer.register_forward_pre_hook(lambda _, args: seen.update(x=args[0], t=args[1]))
    noise, t = torch.randn(4, 1, 8, 8), torch.tensor([0.1, 0.4, 0.6, 0.95])
    Objective(path_type=path_type).warmup_loss(model, Batch(**{**data, "noise": noise, "t": t}))
    s = t.view(4, 1, 1, 1)
    alpha, sigma = (1 - s, s) if path_type == "linear" else (torch.cos(s * torch.pi / 2), torch.sin(s * torch.pi / 2))
    torch.testing.assert_close(seen["x"], alpha * data["x0"] + sigma * noise)
    assert torch.equal(seen["t"], t)


def test_a_dropped_label_is_the_null_class_and_others_stay():
    model, data = randomize(full_model(), seed=7), batch()
    t, kept, labels = torch.rand(4), torch.zeros(4), data["class_labels"]
    with_labels, *_ = model(data["x0"], t, labels, kept)
    without_any, *_ = model(data["x0"], t, torch.full_like(labels, TINY_MODEL["num_classes"]), kept)
    dropped, *_ = model(data["x0"], t, labels, torch.tensor([0, 1, 0, 1]))
    torch.testing.assert_close(dropped[[0, 2]], with_labels[[0, 2]])
    torch.testing.assert_close(dropped[[1, 3]], without_any[[1, 3]])
    assert (with_labels - without_any).abs().amax(dim=(1, 2, 3)).min() > 1e-3


def test_warmup_loss_does_not_depend_on_the_order_and_every_sample_trains():
    model, data = warmup_model(), batch()
    loss = Objective().warmup_loss(model, Batch(**data)).loss
    order = torch.tensor([2, 0, 3, 1])
    shuffled = {name: tensor[order] for name, tensor in data.items() if name != "targets"}
    shuffled["targets"] = [data["targets"][0][order]]
    torch.testing.assert_close(Objective().warmup_loss(model, Batch(**shuffled)).loss, loss)
    data["x0"].requires_grad_()
    Objective().warmup_loss(model, Batch(**data)).loss.backward()
    assert (data["x0"].grad.flatten(1).norm(dim=1) > 1e-6).all()


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
def test_objective_against_its_statement(path_type):
    model, data = full_model(), batch()
    randomize(model, seed=7)
    noise, t = torch.randn(4, 1, 8, 8), torch.tensor([0.1, 0.4, 0.6, 0.95])
    losses = Objective(path_type=path_type).full_loss(model, Batch(**{**data, "noise": noise, "t": t}), 0.3).values

    velocity, alignment = [], []
    for i in range(4):  # one sample after the other, straight from the equations
        x0, e, s = data["x0"][i], noise[i], t[i]
        if path_type == "linear":
            x_t, v = (1 - s) * x0 + s * e, e - x0
        else:
            angle = s * torch.pi / 2
            x_t = torch.cos(angle) * x0 + torch.sin(angle) * e
            v = torch.pi / 2 * (torch.cos(angle) * e - torch.sin(angle) * x0)
        predicted, projected, _ = model(x_t[None], s[None], data["class_labels"][i : i + 1], torch.zeros(1))
        velocity.append((predicted[0] - v).square().mean())
        a, b = projected[0][0], data["targets"][0][i]
        alignment.append(1 - ((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean())
    velocity, alignment = torch.stack(velocity).mean(), torch.stack(alignment).mean()
    torch.testing.assert_close(losses["velocity"], velocity)
    torch.testing.assert_close(losses["alignment"], alignment)
    torch.testing.assert_close(losses["loss"], velocity + 0.3 * alignment)


def test_several_encoders_have_a_projector_each_and_count_alike():
    torch.manual_seed(3)
    widths = (ENCODER_WIDTH, 20)
    model = AlignedTransformer(
        ERWTransformer2DModel(**TINY_MODEL), [MLPProjector(WIDTH, width, 16) for width in widths], depth=3
    )
    data = batch()
    data["targets"] = [torch.randn(4, 16, width) for width in widths]
    noise, t = torch.randn(4, 1, 8, 8), torch.rand(4)
    losses = Objective().full_loss(model, Batch(**{**data, "noise": noise, "t": t}), 0.3).values
    x_t = (1 - t.view(-1, 1, 1, 1)) * data["x0"] + t.view(-1, 1, 1, 1) * noise
    _, projected, _ = model(x_t, t, data["class_labels"], data["drop"])
    each = [
        (1 - torch.cosine_similarity(a, b, dim=-1)).mean() for a, b in zip(projected, data["targets"], strict=True)
    ]
    torch.testing.assert_close(losses["alignment"], (each[0] + each[1]) / 2)
    with pytest.raises(ValueError, match="zip"):
        Objective().full_loss(model, Batch(**{**data, "targets": data["targets"][:1]}), 0.3)


@pytest.mark.parametrize("kind", ["mlp", "conv", "transformer"])
def test_masked_alignment_against_its_statement(kind):
    """PixelREPA (arXiv 2603.14366): the projector does not see some tokens; a transformer predicts them, others leave them."""
    torch.manual_seed(3)
    projector = {
        "mlp": lambda: MLPProjector(WIDTH, ENCODER_WIDTH, 16),
        "conv": lambda: ConvProjector(WIDTH, ENCODER_WIDTH),
        "transformer": lambda: TransformerProjector(WIDTH, ENCODER_WIDTH, heads=2, num_tokens=16),
    }[kind]()
    model, data = AlignedTransformer(randomize(ERWTransformer2DModel(**TINY_MODEL)), [projector], depth=2), batch()
    hidden = torch.zeros(4, 16, dtype=torch.bool)
    for i in range(4):
        hidden[i, torch.randperm(16)[:4]] = True
    taps = []
    model.transformer.transformer_blocks[1].register_forward_hook(
        lambda _, __, tokens: tokens.retain_grad() or taps.append(tokens)
    )
    objective = Objective(projector=kind, alignment_mask_ratio=0.25)
    loss = objective.full_loss(model, Batch(**data, hidden=hidden), 0.3).terms["alignment"].value
    loss.backward()

    projected = projector(taps[0].detach() * ~hidden.unsqueeze(-1))
    similarity = torch.cosine_similarity(projected, data["targets"][0], dim=-1)  # (B, N)
    expected = 1 - (similarity if kind == "transformer" else similarity[~hidden]).mean()
    torch.testing.assert_close(loss, expected)
    gradients = taps[0].grad.norm(dim=-1)
    assert (gradients[hidden] == 0).all() and (gradients[~hidden] > 0).all()
    warmup = objective.warmup_loss(model, Batch(**data, hidden=hidden)).loss
    assert warmup != objective.warmup_loss(model, Batch(**data, hidden=hidden.roll(1, dims=1))).loss


def test_contrastive_flow_matching_against_its_statement():
    model, data = randomize(full_model(), seed=7), batch()
    noise, t = torch.randn(4, 1, 8, 8), torch.tensor([0.1, 0.4, 0.6, 0.95])
    noised = Batch(**{**data, "noise": noise, "t": t})
    plain = Objective().full_loss(model, noised, 0.3).values
    losses = Objective(contrastive_weight=0.05).full_loss(model, noised, 0.3).values
    distances = []
    for i in range(4):  # the velocity of sample i - 1 is what sample i must not predict
        x0, e, s = data["x0"][i], noise[i], t[i]
        predicted, *_ = model(((1 - s) * x0 + s * e)[None], s[None], data["class_labels"][i : i + 1], torch.zeros(1))
        distances.append((predicted[0] - (noise[i - 1] - data["x0"][i - 1])).square().mean())
    torch.testing.assert_close(losses["contrastive"], torch.stack(distances).mean())
    torch.testing.assert_close(losses["loss"], plain["loss"] - 0.05 * losses["contrastive"])


def test_without_a_target_the_projector_rests_but_stays_in_the_graph():
    model, data = randomize(full_model()), batch()
    data["targets"] = None
    losses = Objective().full_loss(model, Batch(**{**data, "t": torch.rand(4)}), 0.0).values
    assert set(losses) == {"loss", "velocity"}
    losses["loss"].backward()
    assert all(parameter.grad.abs().max() == 0 for parameter in model.projectors.parameters())


def test_warmup_depth_must_lie_in_the_model():
    with pytest.raises(ValueError, match="warmup_depth=4"):
        build_warmup_transformer(TINY_MODEL, 4)
