"""The weights of a run with adapters (LoRA) as those of an ordinary model: W + scale B A, in fp32, rounded once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from daybreak.config import saved_config
from daybreak.kernels import acc_dtype
from daybreak.models.adapters import Adapter, adapters_of, is_adapter
from daybreak.models.registry import build_model
from daybreak.state.checkpoint import Checkpoint


def change(adapter: Adapter, down: Tensor, up: Tensor, out: Tensor) -> Tensor:
    """out (O, I) += scale B A for each part of a linear layer. down is A (r parts, I), up is B (all parts' rows, r)."""
    at, r = 0, up.shape[1]
    for i, (first, stop) in enumerate(adapter.columns):
        out[first:stop].addmm_(up[at : at + stop - first], down[i * r : i * r + r], alpha=adapter.scale)
        at += stop - first
    return out


class Merged:
    """A checkpoint whose adapters are part of its weights. Without adapters it is the checkpoint itself."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.path, self.model = checkpoint, checkpoint.path, checkpoint.model
        lora, model = saved_config(checkpoint.path, checkpoint.manifest).lora, build_model(self.model)
        self.adapters, self.rank = adapters_of(model.rows(), model.parts, lora), lora.rank

    @property
    def manifest(self) -> Mapping[str, Any]:
        """The checkpoint's."""
        return self.checkpoint.manifest

    @property
    def kept(self) -> Mapping[str, str]:
        """See Checkpoint.kept."""
        return self.checkpoint.kept

    def names(self) -> list[str]:
        """Names of the model's tensors, without adapters."""
        return [name for name in self.checkpoint.names() if not is_adapter(name)]

    def adapter(
        self, name: str, width: int, dtype: torch.dtype = torch.float32
    ) -> tuple[Adapter, Tensor, Tensor] | None:
        """Of the linear layer `name` with `width` inputs, if it has one: the adapter, A and B."""
        if (found := self.adapters.get(name)) is None:
            return None
        down = torch.empty(self.rank * len(found.columns), width, dtype=dtype)
        up = torch.empty(sum(stop - first for first, stop in found.columns), self.rank, dtype=dtype)
        self.checkpoint.read_model(name + "_A", down)
        self.checkpoint.read_model(name + "_B", up)
        return found, down, up

    def read_model(self, name: str, out: Tensor) -> None:
        """Copy a merged tensor into contiguous `out` of the same shape, any float dtype, any device."""
        wide = acc_dtype(out.dtype)
        if out.dim() != 2 or (found := self.adapter(name[:-1], out.shape[1], wide)) is None:
            self.checkpoint.read_model(name, out)
            return
        weight = torch.empty(out.shape, dtype=wide)
        self.checkpoint.read_model(name, weight)
        out.copy_(change(*found, weight))
