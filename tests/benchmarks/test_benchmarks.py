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
"""The benchmarks run, compare what is equal, and write what they promise. No timing is asserted."""

import gc
import json
import sys

import pytest
import torch
from accelerate.state import AcceleratorState
from helpers import REPOSITORY
from torch._subclasses.fake_tensor import FakeTensorMode

from erw_hf.trainer.config import TrainingConfig
from erw_hf.trainer.memory import activation_bytes, kept_by_block
from erw_hf.trainer.setup import add_lora, build_full_model
from erw_hf.transformer_erw import ERWAttnProcessor


MODULES = ("block_cost", "common", "data", "plain_sit", "train_step", "sampling", "gpu_suite")


@pytest.fixture
def script(monkeypatch):
    """Imports a script of benchmarks/, in this process, and forgets it afterwards: its modules have common names."""
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    before = {name: sys.modules.pop(name) for name in MODULES if name in sys.modules}
    threads = torch.get_num_threads()
    yield __import__
    torch.set_num_threads(threads)
    for name in MODULES:
        sys.modules.pop(name, None)
    sys.modules.update(before)


def written(path) -> dict:
    """The JSON; with it come a table and a plot."""
    assert path.with_suffix(".md").read_text().startswith("| ")
    assert path.with_suffix(".png").stat().st_size > 1000
    return json.loads(path.read_text())


def test_the_plain_sit_is_our_model(script):
    """Otherwise nothing that is measured against it means anything."""
    plain_sit, train_step = script("plain_sit"), script("train_step")
    config = train_step.model_config("tiny")
    ours = train_step.build_ours(config)
    plain = train_step.build_plain(ours, config)
    batch = train_step.draw_batch(config, 3, "cpu")
    inputs = (batch["x0"], batch["t"], batch["label"])
    output = ours(*inputs, force_drop_ids=batch["drop"], hidden_states_depths=(2,))
    velocity, tokens = plain(*inputs, batch["drop"], depth=2)
    torch.testing.assert_close(velocity, output.sample, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tokens, output.hidden_states[0], rtol=1e-5, atol=1e-5)
    fresh = train_step.ERWTransformer2DModel(**config).state_dict()
    initial = plain_sit.PlainSiT(**config).state_dict()
    for name, tensor in plain_sit.plain_state_dict(fresh).items():
        assert float(initial[name].std()) == pytest.approx(float(tensor.std()), rel=0.2), name


def test_train_step(script, tmp_path):
    path = tmp_path / "train_step.json"
    script("train_step").main(["--quick", "--threads", "1", "--output", str(path)])
    result = written(path)
    key = "tiny float32"
    assert set(result["forward"][key]["seconds"]) == {"PlainSiT", "ours", "ours, compiled", "diffusers DiT"}
    assert result["forward"][key]["ratio_to_plain"]["PlainSiT"] == {"median": 1, "min": 1, "max": 1}
    losses = result["step"][key]["first_loss"]
    assert losses["ours"] == pytest.approx(losses["as published"], rel=1e-4)
    assert losses["ours"] == pytest.approx(losses["written well"], rel=1e-4)
    assert 0 < result["warmup"][key]["flops_ratio"] < 1
    scaling = result["scaling"][key]
    assert scaling["flops"]["batch 4"] == 2 * scaling["flops"]["batch 2"]
    memory = scaling["memory_bytes"]
    assert memory["with checkpointing"]["peak"] < memory["without checkpointing"]["peak"]
    assert "everything on CUDA" in [missing["what"] for missing in result["not_measured"]]


def test_a_step_that_computes_something_else_is_not_timed(script, monkeypatch):
    train_step = script("train_step")
    setting = train_step.Setting("cpu", torch.float32, 2, 1, quick=True)
    losses = train_step.WrittenWell.losses
    monkeypatch.setattr(train_step.WrittenWell, "losses", lambda self: losses(self) * 1.01)
    with pytest.raises(AssertionError, match="do not compute the same"):
        train_step.measure_step("tiny", setting)


def test_sampling(script, tmp_path):
    path = tmp_path / "sampling.json"
    script("sampling").main(["--quick", "--threads", "1", "--output", str(path)])
    result = written(path)
    speed = result["speed"]["tiny float32"]
    assert speed["guided_steps"] == 5 and speed["expected_ratio"] == pytest.approx(13 / 16)
    caching = result["caching"]
    assert caching["quality"]["no cache"]["mean_squared_difference"] == 0
    assert caching["quality"]["TaylorSeer 3"]["mean_squared_difference"] > 0
    assert caching["share_that_runs"]["no cache"] == dict.fromkeys(caching["share_that_runs"]["no cache"], 1)
    assert caching["share_that_runs"]["TaylorSeer 3"]["attention, guided"] < 1


def test_data(script, tmp_path):
    path = tmp_path / "data.json"
    flags = ["--rows", "2000", "--repeats", "1", "--count", "20", "--memory_rows", "40", "--output", str(path)]
    script("data").main(flags)
    result = written(path)
    assert len(result["images_per_second_and_core"]) == 4
    assert result["environment"]["versions"]["torch"] == torch.__version__.split("+")[0]


def test_gpu_suite_in_tiny_sizes_on_a_cpu(script, tmp_path, monkeypatch, capsys):
    suite = script("gpu_suite")
    AcceleratorState._reset_state(reset_partial_state=True)  # another test of this process may have left float32's
    monkeypatch.setitem(suite.STAGES, "evaluate", (lambda suite: 1 / 0, 60))  # a stage that fails
    monkeypatch.setitem(suite.STAGES, "step", (lambda suite: {"line": "tested above"}, 60))
    monkeypatch.setattr("erw_hf.trainer.step_log.peak_flops", lambda device: 1e12)  # of the card, wherever it runs
    output = tmp_path / "results" / "out.json"
    flags = ["--device", "cpu", "--quick", "--output", str(output), "--work", str(tmp_path / "work")]
    suite.main([*flags, "--call", "1", "--minutes", "0"])  # no time: nothing is begun
    assert "attention: not begun" in capsys.readouterr().out and not output.exists()
    with pytest.raises(SystemExit, match="something failed"):
        suite.main(flags)
    stages = json.loads(output.read_text())["stages"]
    assert list(stages) == list(suite.STAGES)  # in the order of the calls
    assert "ZeroDivisionError" in stages.pop("evaluate")["failed"]
    assert not [name for name, found in stages.items() if "failed" in found]
    assert all(found["line"] and found["device"] for found in stages.values())
    assert stages["resume"]["steps"] == 10 and stages["resume"]["largest_relative_difference_of_losses"] == 0
    assert 0 < stages["train_b"]["mfu"]["median"] < 1 and len(stages["train_b"]["losses"]) == 3
    shares = stages["train_xl"]["shares_of_a_step"]
    assert shares["products"] > 0 and sum(shares.values()) == pytest.approx(1, abs=0.01)
    assert all(
        kernel["difference"] < 0.05
        for kernel in stages["attention"]["cases"][0]["kernels"].values()
        if "error" not in kernel
    )

    # What is there is not done again; what failed is, and each line has its verdict.
    monkeypatch.setattr(suite, "STAGES", dict.fromkeys(suite.STAGES, (lambda suite: 1 / 0, 60)))
    suite.STAGES["evaluate"] = (lambda suite: {"line": "it runs: keep"}, 60)
    suite.main([*flags, "--call", "2"])
    text = output.with_suffix(".md").read_text()
    assert "| 2 | evaluate | it runs: keep |" in text and "bf16 autoencoder: " in text and "not measured" not in text
    with pytest.raises(SystemExit):  # tiny sizes are no result
        suite.main(["--device", "cpu", "--quick"])


def test_gpu_suite_ends_a_stage_that_hangs_and_says_so(script, tmp_path, monkeypatch):
    suite = script("gpu_suite")
    monkeypatch.setattr(suite.sys, "executable", "/bin/sh")
    monkeypatch.setattr(suite, "__file__", str(tmp_path / "stage.sh"))
    (tmp_path / "stage.sh").write_text("echo begun; sleep 60")
    found = suite.run_apart(suite.Suite(tmp_path, "cpu", False), "vae", 0.3)
    assert found["failed"].startswith("begun") and suite.told(found).endswith("ended after 0 s")


def test_the_memory_of_a_second_model_is_its_own(script, monkeypatch):
    """What a GPU would report, imitated by the tensors that are alive: the first model must be gone by then."""
    train_step = script("train_step")

    def alive() -> int:
        storages = {}
        for found in gc.get_objects():
            if type(found) in (torch.Tensor, torch.nn.Parameter):
                storages[found.untyped_storage().data_ptr()] = found.untyped_storage().nbytes()
        return sum(storages.values())

    on_cpu = train_step.Setting("cpu", torch.float32, 2, 1, quick=True)
    plain_step = train_step.plain_step
    monkeypatch.setattr(
        train_step,
        "plain_step",
        lambda config, batch, _, checkpointing: plain_step(config, batch, on_cpu, checkpointing),
    )
    monkeypatch.setattr(train_step, "seconds_of", lambda step, device: step() or 0.0)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, alive)
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    first, second = train_step.measure_memory(
        "tiny", train_step.Setting("cuda", torch.float32, 2, 1, quick=True)
    ).values()
    assert second["state"] == pytest.approx(first["state"], rel=0.05) and first["state"] > 10**5


def test_a_blocks_cost_is_counted_without_a_gpu_and_one_product_pays(script):
    block_cost = script("block_cost")
    one, three = (block_cost.count("sit", 8, size="SiT-S/2", one_product=one) for one in (True, False))
    products = [found["forward"]["products"] + found["backward"]["products"] for found in (one, three)]
    assert products == [15, 21]
    assert [found[part]["attention"] for found in (one, three) for part in ("forward", "backward")] == [1] * 4
    generated = [found["forward"]["generated"] + found["backward"]["generated"] for found in (one, three)]
    assert generated[0] < generated[1]
    # A fusion that is lost, or a tensor in float32, would show here.
    assert one["forward"]["bytes"] / one["numbers"] < 60 and one["backward"]["bytes"] / one["numbers"] < 125
    # An eager block moves about twice as many, and more with three casts of the tokens for three products.
    eager = [sum(found["bytes_eager"].values()) for found in (one, three)]
    assert 1.8 * (one["forward"]["bytes"] + one["backward"]["bytes"]) < eager[0] < eager[1]
    assert not torch.cuda.is_available()  # nothing that was made believe stays
    text = block_cost.report({"environment": script("common").environment(), "blocks": [one, three]})
    assert "| sit | 8 | 15 |" in text and "nothing is measured" in text


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"qk_norm": "rms_norm"},
        {"norm_type": "rms_norm", "activation_fn": "swiglu"},
        {"gradient_checkpointing": True},
        {"init_from": "x", "lora_rank": 16},
        {"init_from": "x", "lora_rank": 16, "gradient_checkpointing": True},
    ],
)
def test_activations_of_a_whole_forward_are_within_a_tenth_of_the_count(script, keys, monkeypatch):
    """All that autograd keeps of an eager model on fake tensors, but its weights and their copies."""
    block_cost = script("block_cost")
    config = TrainingConfig(vae="v", model="SiT-S/2", num_layers=8, train_batch_size=16, torch_compile="no", **keys)
    # One product, as on a GPU, unless layers are adapted.
    monkeypatch.setattr(ERWAttnProcessor, "_projects_once", staticmethod(lambda *_: config.lora_rank == 0))
    kept = {}
    if config.lora_rank > 0:
        pytest.importorskip("peft")
    model = build_full_model(config, 1000, [])
    if config.lora_rank > 0:
        add_lora(model, config)
    model.transformer.train()
    if config.gradient_checkpointing:
        model.transformer.enable_gradient_checkpointing()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.ndim > 0 and tensor.shape[0] in (16, 16 * 256):
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True), block_cost.CudaAutocast():
        x, t, labels = torch.empty(16, 4, 32, 32), torch.empty(16), torch.zeros(16, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model.transformer(x, t, labels, force_drop_ids=torch.zeros(16)).sample
        counted = sum(storage.nbytes() for storage in kept.values())
    assert output.shape == x.shape
    going_back = kept_by_block(config) * 16 * 256 * 384  # of one block
    assert activation_bytes(config) == pytest.approx(counted + going_back, rel=0.1)
