"""Weights with adapters (LoRA) as those of an ordinary model: W + scale B A, in fp32 or wider, rounded once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from daybreak.config_keys import LoraConfig
from daybreak.kernels import acc_dtype
from daybreak.models.adapters import adapters_of, is_adapter
from daybreak.models.registry import build_model
from daybreak.shapes import Shape
from daybreak.state.restore import Weights

NONE = LoraConfig()


class Merged:
    """Weights whose adapters are part of their matrices. Without adapters they are as they were."""

    def __init__(self, weights: Weights) -> None:
        self.weights, self.lora, model = weights, NONE, build_model(weights.model)
        self.adapters, self.rank = adapters_of(model.rows(), model.parts, weights.lora), weights.lora.rank
        self.widths = {row.name[:-1]: row.shape[1] for row in model.rows() if len(row.shape) == 2}

    @property
    def path(self) -> Path:
        """Where they are."""
        return self.weights.path

    @property
    def model(self) -> Shape:
        """The shape of the model."""
        return self.weights.model

    @property
    def manifest(self) -> Mapping[str, Any]:
        """See Weights.manifest."""
        return self.weights.manifest

    @property
    def kept(self) -> Mapping[str, str]:
        """See manifest.KEPT."""
        return self.weights.kept

    def names(self) -> list[str]:
        """Names of the model's tensors, without adapters."""
        return [name for name in self.weights.names() if not is_adapter(name)]

    def adapter(self, name: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """A (r parts, I) and B (all parts' outputs, r) of a linear layer that has an adapter, such as "h.0.qkv"."""
        columns = self.adapters[name].columns
        down = torch.empty(self.rank * len(columns), self.widths[name], dtype=dtype)
        up = torch.empty(sum(stop - first for first, stop in columns), self.rank, dtype=dtype)
        self.weights.read_model(name + "_A", down)
        self.weights.read_model(name + "_B", up)
        return down, up

    def change(self, name: str, out: Tensor) -> Tensor:
        """out (O, I), of a linear layer's weight in fp32 or wider, += scale B A for each part that has an adapter."""
        adapter, (down, up), at, r = self.adapters[name], self.adapter(name, out.dtype), 0, self.rank
        for i, (first, stop) in enumerate(adapter.columns):
            out[first:stop].addmm_(up[at : at + stop - first], down[i * r : i * r + r], alpha=adapter.scale)
            at += stop - first
        return out

    def said(self, dtype: torch.dtype) -> str:
        """How much adapters change the matrices that they are merged into, and how much of that `dtype` can hold."""
        rows, sums = {row.name: row.shape for row in build_model(self.model).rows()}, [0.0, 0.0, 0.0, 0.0]
        for name in self.adapters:
            weight = torch.empty(rows[name + "w"])
            self.weights.read_model(name + "w", weight)
            merged = self.change(name, weight.clone())
            equal = float((merged.to(dtype) == weight.to(dtype)).sum())
            new = (float(weight.square().sum()), float((merged - weight).square().sum()), equal, weight.numel())
            sums = [a + b for a, b in zip(sums, new, strict=True)]
        share = 100 * math.sqrt(sums[1] / sums[0])
        percent = f"{share:.2g}" if share < 99.5 else f"{share:,.0f}"
        much = f"{len(self.adapters)} matrices change by {percent} % of their norm"
        held = {"nf4": "NF4", "fp8": "fp8"}.get(self.weights.lora.base)
        into = f" into the base as it was trained, in {held}" if held else ""
        return f"adapters are merged{into}: {much}, and {100 * sums[2] / sums[3]:.1f} % of their values stay equal"

    def read_model(self, name: str, out: Tensor) -> None:
        """Copy a merged tensor into contiguous `out` of the same shape, any float dtype, any device."""
        if out.dim() != 2 or name[:-1] not in self.adapters:
            self.weights.read_model(name, out)
            return
        weight = torch.empty(out.shape, dtype=acc_dtype(out.dtype))
        self.weights.read_model(name, weight)
        out.copy_(self.change(name[:-1], weight))
