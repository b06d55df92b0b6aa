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
"""A device without float64, played by the CPU: what an Apple laptop's "mps" and some XPUs refuse is refused here, and so are
sums of tensors on two devices, which any GPU refuses."""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map


DEVICE = torch.device("meta")  # which torch lets be named without a driver
MOVES = ("copy_", "_to_copy", "index", "index_put_")  # take tensors of two devices


class _OnDevice(torch.Tensor):
    """Says that it lies on the device; its values are those of a tensor on the CPU."""

    @staticmethod
    def __new__(cls, values: torch.Tensor):
        if values.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"a tensor of {values.dtype} on {DEVICE}, which has none")
        return torch.Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), dtype=values.dtype, device=DEVICE, requires_grad=False
        )

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values

    def __repr__(self) -> str:
        return f"_OnDevice({self.values})"

    def tolist(self):
        return self.values.tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


def _run(function, args, kwargs):
    inputs = tree_flatten((args, kwargs))[0]
    device, name = kwargs.get("device"), function._schema.name.removeprefix("aten::")
    plain = [v for v in inputs if isinstance(v, torch.Tensor) and not isinstance(v, _OnDevice) and v.ndim > 0]
    on_device = any(isinstance(value, _OnDevice) for value in inputs)
    if on_device and plain and name not in MOVES:
        raise RuntimeError(f"{name} of tensors on {DEVICE} and on the CPU")
    if device is not None:
        on_device = torch.device(device).type == DEVICE.type
        kwargs = {**kwargs, "device": torch.device("cpu")}
    results = function(*tree_map(_values, args), **tree_map(_values, kwargs))
    if name.endswith("_"):  # in place: what was given comes back
        return args[0]
    return tree_map(
        lambda value: _OnDevice(value) if on_device and isinstance(value, torch.Tensor) else value, results
    )


def _values(value):
    return value.values if isinstance(value, _OnDevice) else value


class _TensorOfData(TorchFunctionMode):
    """torch gives a tensor of the meta device no data, so it is made on the CPU and moved."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = kwargs["device"]
            return function(*args, **{**kwargs, "device": "cpu"}).to(device)
        return function(*args, **kwargs)


class DeviceWithoutFloat64(TorchDispatchMode):
    """Within it, tensors and modules can be made on and moved to `DEVICE`, and float64 there raises TypeError."""

    def __enter__(self):
        self.of_data = _TensorOfData()
        self.of_data.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.of_data.__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})
