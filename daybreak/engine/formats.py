"""Training with narrower number formats: a frame that gives matmuls Operands in place of plain tensors.

    EngineSpec(cfg, B=4, T=1024, formats={"h.*.ln1": e4m3, "h.*.qkvw": e4m3})

The first pattern that a matrix's name fits chooses its format. Names are those of weights and activations, as `plan`
lists them, and `h.0.d_residual3`, `d_residual2`, `d_fc` and `d_qkv` for gradients. The parts of an Operand lie in the
arena as `NAME.value`, `NAME.scale` and `NAME.transposed`: those of an activation for as long as a call needs them, and
those of a weight for good, because all micro-steps of a step read the same ones.

Evaluation, prefill and decode read plain tensors. So losses compare with those of other runs, and both kinds are in the
plan. A checkpoint holds no Operand: each step begins by making them from the plain weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, cast

from torch import Tensor

from daybreak.engine.arena import Entry, StepFrame
from daybreak.engine.params import ParamTable
from daybreak.kernels.operand import Format, Matrix, Operand, chosen

F = TypeVar("F", bound=StepFrame)


class FormatFrame(StepFrame):
    """Mixed into a plan's or an engine's frame (see `in_formats`)."""

    formats: Mapping[str, Format]
    weight_operands: dict[str, Operand]
    operands: dict[tuple[str, bool], Operand | None]  # by name, and whether it is of a layer that is computed again

    def convert_weights(self) -> None:
        for name, operand in self.weight_operands.items():
            self.k.quantise(operand, self.w(name))

    def matmul_w(self, name: str) -> Matrix:
        return self.weight_operands.get(self.prefix + name) or self.w(name)

    def matmul_a(self, name: str, *shape: int, plain: bool = False) -> Matrix:
        return self._operand(name, shape, plain) or self.a(name, *shape, plain=plain)

    def matmul_copy(self, name: str, x: Tensor, *, plain: bool = False, made: bool = False) -> Matrix:
        operand = self._operand(name, tuple(x.shape), plain)
        if operand is not None and not made:
            self.k.quantise(operand, x)
        return operand or x

    def _operand(self, name: str, shape: tuple[int, ...], plain: bool) -> Operand | None:
        key = self.prefix + name, self.mode.recomputed and not plain
        if key not in self.operands:
            found = chosen(self.formats, key[0].removesuffix(".again"))
            parts = found.parts(*shape) if found else {}
            views = {p: self.a(f"{name}.{p}", *dims, dtype=dtype, plain=plain) for p, (dims, dtype) in parts.items()}
            self.operands[key] = Operand(found, **views) if found else None
        return self.operands[key]


def in_formats(f: F, formats: Mapping[str, Format]) -> F:
    """The frame that training uses: f itself where no formats are chosen."""
    if not formats:
        return f
    g: Any = object.__new__(type("FormatFrame", (FormatFrame, type(f)), {}))
    g.__dict__ |= {**vars(f), "formats": formats, "operands": {}, "weight_operands": {}}
    g.k = f.k.in_formats({format.backend for format in formats.values()})
    for name in (entry.removesuffix(".value") for entry in f.state if entry.endswith(".value")):
        if format := chosen(formats, name):
            g.weight_operands[name] = Operand(format, **{p: f.state[f"{name}.{p}"] for p in format.parts(0, 0)})
    return cast(F, g)


def weight_entries(table: ParamTable, formats: Mapping[str, Format]) -> list[Entry]:
    """The parts of the weights for which formats are chosen."""
    rows = [(row, chosen(formats, name)) for name, row in table.rows.items() if len(row.shape) == 2]
    return [
        Entry(f"{row.name}.{part}", "operands", shape, dtype)
        for row, format in rows if format
        for part, (shape, dtype) in format.parts(*row.shape).items()
    ]  # fmt: skip
