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
"""Draws docs/images/phases.png from a run of the digits recipe.

make quickstart
python docs/images/phases.py outputs/quickstart docs/images/phases.png
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from erw_hf.trainer.run_record import read_metrics


def smooth(values: list[float], width: int = 20) -> np.ndarray:
    """Means of the last `width` steps: a batch's loss is noisy."""
    sums = np.cumsum([0.0, *values])
    first = np.maximum(np.arange(1, len(values) + 1) - width, 0)
    return (sums[1:] - sums[first]) / (np.arange(1, len(values) + 1) - first)


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("run_dir", type=Path)
parser.add_argument("image", type=Path)
args = parser.parse_args()

records = read_metrics(args.run_dir / "metrics.jsonl")
full = [record for record in records if record["phase"] == "full"]
warmup = [record for record in records if record["phase"] == "warmup"]
steps = [record["step"] for record in records]

figure, (losses, cost) = plt.subplots(2, 1, figsize=(8, 5.4), sharex=True, height_ratios=(2, 1), layout="constrained")
for axes in (losses, cost):
    axes.axvspan(0, len(warmup), color="tab:orange", alpha=0.12, lw=0)
    axes.axvline(len(warmup), color="tab:orange", lw=1)
    axes.spines[["top", "right"]].set_visible(False)
for part in (warmup, full):  # each phase by itself: the tokens are noised in the second
    (line,) = losses.plot([r["step"] for r in part], smooth([r["alignment"] for r in part]), color="tab:orange")
line.set_label("alignment: 1 − cosine with the encoder's tokens")
losses.plot(
    [r["step"] for r in full], smooth([r["velocity"] for r in full]), color="tab:blue", label="velocity matching"
)
losses.plot([r["step"] for r in full], [r["lambda"] for r in full], color="grey", ls="--", lw=1, label="λ")
losses.set_ylim(0, 1.8)
losses.set_ylabel("loss, mean of 20 steps")
losses.legend(frameon=False, loc="upper right")
for name, middle in (("warmup", len(warmup) / 2), ("full training", len(warmup) + len(full) / 2)):
    losses.text(middle, 1.84, name, ha="center")

share = warmup[-1]["flops"] / records[-1]["flops"]
cost.plot(steps, [record["flops"] / 1e12 for record in records], color="black", lw=1.2)
cost.set_ylabel("TFLOPs so far")
cost.set_xlabel("step")
cost.set_xlim(0, len(records))
cost.set_ylim(0)
cost.text(
    len(warmup),
    records[-1]["flops"] / 1e12 * 0.6,
    f"  the warmup: {len(warmup) / len(records):.0%} of the steps,\n  {share:.0%} of the FLOPs",
)
figure.savefig(args.image, dpi=130)

step_flops = {name: part[1]["flops"] - part[0]["flops"] for name, part in (("warmup", warmup), ("full", full))}
print(f"a warmup step costs {step_flops['warmup'] / step_flops['full']:.3f} of a full one")
for part in (warmup, full):
    first, last = (smooth([r["alignment"] for r in part])[i] for i in (0, -1))
    print(f"{part[0]['phase']}: alignment {first:.3f} -> {last:.3f}")
print(f"velocity {full[0]['velocity']:.3f} -> {smooth([r['velocity'] for r in full])[-1]:.3f}")
