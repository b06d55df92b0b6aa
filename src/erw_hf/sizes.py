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
"""The published model sizes by name: what `SiT-XL/2` stands for in configs, converter and benchmarks."""

SIZES = {  # blocks, heads, channels of a head (DiT, arXiv 2212.09748, table 1; heads of its code)
    "SiT-S": (12, 6, 64),
    "SiT-B": (12, 12, 64),
    "SiT-L": (24, 16, 64),
    "SiT-XL": (28, 16, 72),
}
PATCH_SIZES = (1, 2, 4, 8, 16, 32)  # the last two of JiT (arXiv 2511.13720), whose B and L have these numbers too


def size_config(name: str) -> dict[str, int]:
    """
    `num_layers`, `num_attention_heads`, `attention_head_dim` and `patch_size` of a name such as `"SiT-XL/2"`. Raises
    ValueError for another name.
    """
    size, _, patch_size = name.partition("/")
    if size not in SIZES or patch_size not in map(str, PATCH_SIZES):
        raise ValueError(
            f"{name!r} is not a published size: {', '.join(SIZES)}, then /1, /2, /4, /8, /16 or /32, as SiT-XL/2"
        )
    num_layers, heads, head_dim = SIZES[size]
    return {
        "num_layers": num_layers,
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "patch_size": int(patch_size),
    }


def size_name(num_layers: int, num_attention_heads: int, attention_head_dim: int, patch_size: int) -> str | None:
    """The name for these values, such as `"SiT-XL/2"`; `None` if they are not a published size."""
    numbers = (num_layers, num_attention_heads, attention_head_dim)
    if patch_size not in PATCH_SIZES:
        return None
    return next((f"{name}/{patch_size}" for name, size in SIZES.items() if size == numbers), None)


def mlp_ratio(inner: int, width: int) -> float:
    """The ratio from which the model, which rounds `width * ratio` down, computes `inner`."""
    ratio = inner / width
    return ratio if int(width * ratio) == inner else (inner + 0.5) / width


def published_heads(width: int) -> int | None:
    """Attention heads of the published size with that width (channels); `None` for another width."""
    return next((heads for _, heads, head_dim in SIZES.values() if heads * head_dim == width), None)
