"""Numbers on a device under their tags, brought to the CPU at once."""

from collections.abc import Sequence

import torch
from torch import Tensor


class DeviceReading:
    """Collects numbers; `read` is where the device is waited for, once."""

    def __init__(self) -> None:
        self._tags: list[str] = []
        self._values: list[Tensor] = []

    def add(self, tags: Sequence[str], values: Tensor) -> None:
        """Note as many numbers, of any shape and dtype, as there are tags."""
        assert len(tags) == values.numel(), f"{len(tags)} tags for {values.numel()} values"
        self._tags.extend(tags)
        self._values.append(values.detach().flatten().float())

    def read(self) -> dict[str, float]:
        """Return all numbers by tag, from float32."""
        if not self._values:
            return {}
        device = max((v.device for v in self._values), key=lambda device: device.type != "cpu")
        numbers = torch.cat([values.to(device) for values in self._values]).tolist()
        return dict(zip(self._tags, numbers, strict=True))
