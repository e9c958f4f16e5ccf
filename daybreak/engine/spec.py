"""The description that an engine is planned and built from. `engine.device.engine_spec` makes it of a configuration."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace

import torch

from daybreak.config_keys import GuardConfig, LoraConfig, OptimConfig, ScheduleConfig
from daybreak.errors import ConfigError
from daybreak.kernels.operand import Format, chosen
from daybreak.models.adapters import Adapter, adapter_rows, adapters_of
from daybreak.models.registry import Model
from daybreak.models.rows import Row
from daybreak.optimizers import ParamGroup
from daybreak.shapes import Shape

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64, "fp8": torch.bfloat16}


@dataclass(frozen=True)
class EngineSpec:
    """B sequences of T tokens are one micro-step of the model `cfg`.

    compute: fp32, bf16, fp64 or fp8. In fp8 everything is as in bf16, but for matmuls of training. Those whose weights
    fit a pattern of `fp8` are in fp8, in the first `fp8_steps` steps (None: in all).
    recompute: see models. train: False allocates only memory for evaluation and sampling.
    masters: how master weights of bf16 are kept (precision.masters). moments: those of AdamW (precision.moments).
    rows: sequences that can be generated at a time.
    zero, bucket_bytes: see collectives. kernels: group of operations -> backend, if not the best (kernels.choose).
    formats: patterns of names -> number formats of the matrices that training's matmuls read (engine/formats.py).
    optim, groups: AdamW's options, and groups of parameters that have other optimizers (optimizers).
    schedule: of the learning rate, which Muon's momentum follows.
    trainable: patterns of names. A parameter that fits none is frozen: no gradient, optimizer state or master weights.
    lora: adapters of linear layers. With a rank above 0 they are all that is trainable.
    frozen: patterns of names -> the dtype that frozen parameters are held in, if not as lora.base says.
    documents: rows are packed. Each holds several documents, and comes with the place of every token in its document.
    device_type, missing: cpu or cuda, and backends that are absent. An engine fills in both for its own device.
    """

    cfg: Shape
    _: KW_ONLY
    B: int
    T: int
    compute: str = "fp32"
    recompute: int = 0
    train: bool = True
    masters: str = "auto"
    moments: str = "fp32"
    rows: int = 1
    zero: int = 0
    bucket_bytes: int = 1 << 25
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    groups: tuple[ParamGroup, ...] = ()
    trainable: tuple[str, ...] = ("*",)
    lora: LoraConfig = field(default_factory=LoraConfig)
    frozen: Mapping[str, str] = field(default_factory=dict)
    documents: bool = False
    guard: GuardConfig = field(default_factory=GuardConfig)
    kernels: Mapping[str, str] = field(default_factory=dict)
    formats: Mapping[str, Format] = field(default_factory=dict)
    fp8: tuple[str, ...] = ("h.*",)
    fp8_steps: int | None = None
    device_type: str = "cpu"
    missing: Collection[str] = ()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and activations."""
        return DTYPES[self.compute]

    @property
    def eight(self) -> bool:
        """Whether training has matmuls in fp8."""
        return self.compute == "fp8" or self.lora.base == "fp8"

    @property
    def eight_key(self) -> str:
        """The key that says so."""
        return "precision.compute" if self.compute == "fp8" else "lora.base"

    def in_fp8(self, step: int) -> bool:
        """Whether the update that follows `step` others has its matmuls in fp8."""
        return self.eight and (self.fp8_steps is None or step < self.fp8_steps)

    def parameters(self, model: Model) -> tuple[list[Row], dict[str, Adapter]]:
        """A model's parameters, as this engine trains and holds them, and the adapters among them. ConfigError."""

        def frozen(row: Row) -> Row:
            base, leaf = self.lora.base, row.name.rpartition(".")[2]
            of_block = "." in row.name and len(row.shape) == 2 and (base == "nf4" or leaf in model.matmuls)
            compute = "fp32" if row.wide and self.dtype == torch.bfloat16 else self.compute
            held = chosen(self.frozen, row.name) or (base if of_block and base != "compute" else compute)
            return replace(row, trainable=False, held=held)

        if self.lora.base != "compute" and not self.lora.rank:
            raise ConfigError(
                f"lora.base = {self.lora.base} is for adapters, and lora.rank = 0 gives none; give a rank, or leave it "
                "out."
            )

        trains = dict.fromkeys(self.trainable if not self.lora.rank else ("*_A", "*_B"), True)
        layers = [r for r in model.rows() if not model.matmuls or r.name.rpartition(".")[2] in model.matmuls]
        adapters = adapters_of(layers, model.parts, self.lora)
        rows = adapter_rows(model.rows(), adapters, self.lora.rank)
        return [row if chosen(trains, row.name) else frozen(row) for row in rows], adapters

    @property
    def kept(self) -> str:
        """How master weights are kept: fp32, split or none. Only bf16 weights need them."""
        if self.dtype != torch.bfloat16:
            return "none"
        return self.masters if self.masters != "auto" else "split" if self.device_type == "cuda" else "fp32"
