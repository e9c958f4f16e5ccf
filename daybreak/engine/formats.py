"""Training with narrower number formats: a frame that gives matmuls Operands in place of plain tensors.

    EngineSpec(cfg, B=4, T=1024, formats={"h.*.ln1": e4m3, "h.*.qkvw": e4m3})

The first pattern that a matrix's name fits chooses its format. Names are those of weights and activations, as `plan`
lists them, and `h.0.d_residual3`, `d_residual2`, `d_fc` and `d_qkv` for gradients. The parts of an Operand lie in the
arena as `NAME.value`, `NAME.scale` and `NAME.transposed`: those of an activation for as long as a call needs them, and
those of a weight for good, because all micro-steps of a step read the same ones.

precision.compute = "fp8" makes such a mapping of the model's `matmuls` and the patterns of precision.fp8. lora.base =
"fp8" holds the frozen matrices of blocks in e4m3 for good (kernels/held.py). Then forward and input gradients read
copies in fp8, `h.0.qkv.x` and `h.0.qkv.d_y`, that are made on the spot, and adapters read the plain tensors.

Evaluation, prefill and decode read plain tensors. So losses compare with those of other runs, and both kinds are in the
plan. A checkpoint holds no Operand: each step begins by making them from the plain weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, TypeVar, cast

from torch import Tensor

from daybreak.engine import scales
from daybreak.engine.arena import Entry, StepFrame, frozen_weight
from daybreak.engine.params import ParamTable
from daybreak.engine.spec import EngineSpec
from daybreak.errors import ConfigError
from daybreak.kernels.fp8 import E4M3, E5M2
from daybreak.kernels.held import Eight
from daybreak.kernels.operand import Format, Matrix, Operand, chosen
from daybreak.models.registry import Model, build_model
from daybreak.models.rows import Row
from daybreak.shapes import Shape

F = TypeVar("F", bound=StepFrame)
X, D_Y = ".x", ".d_y"  # of a linear layer: copies that models/blocks.py asks for
MULTIPLE = 16  # rows and columns of fp8 matrices: the matmuls of GPUs ask for it


class FormatFrame(StepFrame):
    """Mixed into a plan's or an engine's frame (see `in_formats`)."""

    formats: Mapping[str, Format]  # pattern of names -> format
    slots: scales.Slots
    model: Model
    current: bool  # whether kernels choose late scales from the values themselves, before there is a history
    weight_operands: dict[str, Operand]  # made anew in every step
    base: dict[str, Operand]  # frozen, and in fp8 for good
    operands: dict[tuple[str, bool], Operand | None]  # by name, and whether it is of a layer that is computed again

    def convert_weights(self) -> None:
        if self.slots.at:
            scales.begin(self, self.slots, self.model.offset, self.model.weightless)
        for name, operand in self.weight_operands.items():
            self.k.quantise(operand, self.w(name))

    def note_amax(self) -> None:
        if self.slots.at:
            scales.end(self, self.slots, count=not self.current)

    def keep_amax(self) -> None:
        if self.slots.at:
            scales.keep(self, self.slots, guarded=not self.current)

    def matmul_w(self, name: str) -> Matrix:
        full = self.prefix + name
        return self.weight_operands.get(full) or self.base.get(full) or self.w(name)

    def matmul_a(self, name: str, *shape: int, plain: bool = False) -> Matrix:
        return self._operand(name, shape, plain) or self.a(name, *shape, plain=plain)

    def matmul_copy(
        self, name: str, x: Any, *, plain: bool = False, made: bool = False, db: Tensor | None = None
    ) -> Matrix:
        operand = self._operand(name, tuple(x.shape), plain) if isinstance(x, Tensor) else None
        if operand is None or not operand.format.slots:  # other formats have no kernel that also makes sums
            super().matmul_copy(name, x, db=db)
            db = None
        if operand is not None and not made:
            sums = {} if db is None else {"db": db, "accumulate": self.mode.accumulate}
            self.k.quantise(operand, x, **sums)
        return operand or x

    def _operand(self, name: str, shape: tuple[int, ...], plain: bool) -> Operand | None:
        key = self.prefix + name, self.mode.recomputed and not plain
        if key not in self.operands:
            found = chosen(self.formats, key[0].removesuffix(".again"))
            parts = self._read(name, found.parts(*shape)) if found else {}
            # A part that nobody reads is None.
            views: dict[str, Any] = {"value": None} | {
                p: self.a(f"{name}.{p}", *dims, dtype=dtype, plain=plain) for p, (dims, dtype) in parts.items()
            }
            slot = self._slot(key[0].removesuffix(".again")) if found and found.slots else {}
            self.operands[key] = Operand(found, **views, **slot) if found else None
        return self.operands[key]

    def _read(self, name: str, parts: dict[str, Any]) -> dict[str, Any]:
        """The parts that somebody reads, of a matrix in slots. Forward reads values; weight gradients, the transposed
        copy. So forward makes no copy of a matrix that backward makes again. `.again` is one that a backward kernel
        writes on its way, for the weight gradient alone."""
        if not self.slots.at:
            return parts
        if name.endswith(".again"):
            return {"transposed": parts["transposed"]}
        return {"value": parts["value"]} if name in self.model.remade and not self.mode.backward else parts

    def _slot(self, name: str) -> dict[str, Any]:
        i = self.slots.at[name]
        late = i >= self.slots.late and name not in self.slots.norms
        current = name in self.weight_operands or (self.current and late)
        return {"scale": self.state[scales.SCALE][i, 0], "amax": self.state[scales.AMAX][i], "current": current}


def in_formats(f: F, formats: Mapping[str, Format], model: Model, *, current: bool = False) -> F:
    """The frame that training uses: f itself where no formats are chosen. current: kernels choose every late scale from
    the values themselves (engine/scales.py)."""
    if not formats:
        return f
    g: Any = object.__new__(type("FormatFrame", (FormatFrame, type(f)), {}))
    slots = scales.slots_of(formats, f.table.rows, model.weightless)
    weights = dict.fromkeys(entry.removesuffix(".value") for entry in f.state if entry.endswith(".value"))
    g.__dict__ |= {**vars(f), "formats": formats, "slots": slots, "model": model, "current": current}
    g.__dict__ |= {"operands": {}, "weight_operands": weights}
    g.k = f.k.in_formats({format.backend for format in formats.values()})
    for name in weights:  # the matrices of which the plan has parts that stay (see weight_entries)
        format = chosen(formats, name)
        assert format is not None, f"{name} has parts, so a format"
        views: dict[str, Any] = {p: f.state[f"{name}.{p}"] for p in format.parts(0, 0)}
        g.weight_operands[name] = Operand(format, **views, **(g._slot(name) if format.slots else {}))
    backend = next(iter(formats.values())).backend
    stored = {row.name: frozen_weight(f.state, row) for row in f.table.frozen if row.held == "fp8"}
    g.base = {name: held.operand(backend) for name, held in stored.items() if isinstance(held, Eight)}
    return cast(F, g)


def weight_entries(table: ParamTable, formats: Mapping[str, Format]) -> list[Entry]:
    """The memory of the weights for which formats are chosen, part by part, and of all matrices' slots."""
    rows = [(row, chosen(formats, name)) for name, row in table.rows.items() if len(row.shape) == 2]
    parts = [
        Entry(f"{row.name}.{part}", "operands", shape, dtype)
        for row, format in rows if format
        for part, (shape, dtype) in format.parts(*row.shape).items()
    ]  # fmt: skip
    return parts + scales.scale_entries(scales.slots_of(formats, table.rows))


def formats_of(spec: EngineSpec, model: Model) -> Mapping[str, Format]:
    """Names or patterns of matrices -> formats, as an engine of this description trains.

    In fp8 a linear layer is chosen by its weight's name. All three of its matmuls are then in fp8, so its input and the
    gradient of its output are too. Raises ConfigError for layers that cannot be in fp8.
    """
    if not spec.eight or not spec.train:
        return spec.formats
    backend = "fp8 cuda" if spec.device_type == "cuda" else E4M3.backend
    if spec.lora.base == "fp8":
        return _beside_adapters(spec, model, backend)
    if spec.lora.rank:
        raise ConfigError("precision.compute = fp8 does not train adapters (lora.rank); use lora.base = fp8 with bf16.")
    key = f"precision.fp8 = {','.join(spec.fp8)!r}"
    x_format, d_format = (replace(format, backend=backend) for format in (E4M3, E5M2))
    found, patterns = dict[str, Format](), dict.fromkeys(spec.fp8, True)
    for h in (f"h.{l}." for l in range(spec.cfg.L)):
        taken = [w for w in model.matmuls if chosen(patterns, h + w)]
        if together := [pair for pair in model.together if len({*pair} & {*taken}) == 1]:
            one, other = together[0]
            raise ConfigError(
                f"{key} takes only one of {h}{one} and {h}{other}, which share a kernel; take both or none."
            )
        for w in taken:
            x, d = model.matmuls[w]
            found |= {h + w: x_format, h + x: x_format, h + d: d_format}
    if not found:
        known = ", ".join(f"h.0.{w}" for w in model.matmuls)
        raise ConfigError(f"{key} fits no weight of a block (such as {known or 'none: this family has none'}).")
    _check_sizes(spec, [row for row in model.rows() if row.name in found], "bf16")
    return found


def check_patterns(patterns: str, shape: Shape) -> None:
    """Raise ConfigError if a pattern of precision.fp8 fits no weight of a block. Old runs may have such ones."""
    matmuls = build_model(shape).matmuls
    names = [f"h.{l}.{w}" for l in range(shape.L) for w in matmuls]
    for pattern in patterns.split(","):
        if not any(fnmatchcase(name, pattern) for name in names):
            blank = "; remove the blank" if pattern != pattern.strip() else ""
            known = f"{names[0]} to {names[-1]}" if names else "none, since this family has none"
            raise ConfigError(f"precision.fp8: {pattern!r} fits no weight of a block ({known}){blank}.")


def _check_sizes(spec: EngineSpec, matrices: Sequence[Row], fix: str) -> None:
    odd = {r for row in matrices for r in row.shape if r % MULTIPLE}
    if odd or spec.B * spec.T % MULTIPLE:
        of = f"a matrix with {min(odd)} rows or columns" if odd else f"B T = {spec.B * spec.T} tokens a micro-step"
        raise ConfigError(f"{spec.eight_key} = fp8 takes multiples of {MULTIPLE}, and there are {of}; use {fix}.")


def _beside_adapters(spec: EngineSpec, model: Model, backend: str) -> Mapping[str, Format]:
    """Formats of what frozen matrices in fp8 are multiplied with: copies of the inputs of linear layers, and of the
    gradients of their outputs. They have no weight gradients, and adapters read plain tensors. So no copy is
    transposed."""
    if spec.compute != "bf16" and (spec.compute != "fp32" or spec.device_type == "cuda"):
        said = f"lora.base = fp8 is for precision.compute = bf16, not {spec.compute}"
        raise ConfigError(f"{said}; set the first to compute, or the second to bf16.")
    held = [row for row in spec.parameters(model)[0] if row.held == "fp8" and not row.trainable]
    if not held:
        raise ConfigError("lora.base = fp8 fits no matrix of this family; use compute.")
    _check_sizes(spec, held, "compute")
    x_format, d_format = (format.of(backend, slots=True, transposed=False) for format in (E4M3, E5M2))
    layers = [row.name.removesuffix("w") for row in held]
    return {layer + X: x_format for layer in layers} | {layer + D_Y: d_format for layer in layers}
