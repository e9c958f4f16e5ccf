"""Makes Triton's interpreter round as a GPU does: fp32 to bf16 and fp8 to nearest even, and a fused multiply-add once.

It cuts the low bits off instead, which is twice the error that the tests allow, and rounds the product of an fma before
it adds (triton 3.6). Nothing happens where kernels run on a GPU. Import it before the first launch.

Four of its ways take most of the time of such tests, and are replaced: a reduction element by element, remapping the
language at every call of a function, a new table of dtypes for every value, and checks for overflow that it throws away
unless `debug` is set.
"""

from __future__ import annotations

import os

import numpy as np
import torch


def _patch() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter._convert_float
    FP8 = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}

    def convert(values, source, target, rounding):
        bits = np.ascontiguousarray(values)
        if source == tl.float32 and target == tl.bfloat16:
            rounded = torch.from_numpy(bits.view(np.float32).copy()).bfloat16()
            return rounded.view(torch.int16).numpy().view(np.uint16).reshape(values.shape)
        if source == tl.bfloat16 and target == tl.float32:
            return (bits.view(np.uint16).astype(np.uint32) << 16).reshape(values.shape)
        if source == tl.float32 and target in FP8:
            rounded = torch.from_numpy(bits.view(np.float32).copy()).to(FP8[target])
            return rounded.view(torch.uint8).numpy().reshape(values.shape)
        return original(values, source, target, rounding)

    interpreter._convert_float = convert

    def fma(self, x, y, z):
        with np.errstate(invalid="ignore"):  # infinities are some tests' input
            exact = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
        return interpreter.TensorHandle(exact.astype(x.data.dtype), x.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = fma

    def reduce(self, given):
        """Of a kernel's own function: neighbours together, as often as it takes, and all pairs at once."""
        parts, axis = self.unravel(given, self.axis)
        dtypes = [part.dtype for part in parts]
        values = [np.moveaxis(part.handle.data, axis, 0) for part in parts]
        while (n := len(values[0])) > 1:
            assert n % 2 == 0, f"{n} values are reduced; Triton's blocks are powers of two"
            pairs = [self.to_tensor(value[i::2], dtype) for i in (0, 1)
                     for value, dtype in zip(values, dtypes, strict=True)]  # fmt: skip
            found = self.combine_fn.fn(*pairs)
            values = [part.handle.data for part in (found if isinstance(found, tuple) else (found,))]
        values = [value[0] for value in values]
        if self.keep_dims:
            every = tuple(range(given[0].handle.data.ndim))
            values = [np.expand_dims(value, every if self.axis is None else axis) for value in values]
        return [self.to_tensor(value, dtype) for value, dtype in zip(values, dtypes, strict=True)]

    interpreter.ReduceOps.generic_reduce = reduce

    remap, remapped = interpreter._patch_lang, set[int]()

    def remap_once(function):
        """For all functions of a file once a launch: the launch's own call is the first, and puts the names back."""
        if id(function.__globals__) in remapped:
            return None
        remapped.add(id(function.__globals__))
        scope = remap(function)
        restore = scope.restore
        scope.restore = lambda: (remapped.clear(), restore())
        return scope

    interpreter._patch_lang = remap_once

    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    np_dtype, dtypes = interpreter._get_np_dtype, dict[str, np.dtype]()

    def known_dtype(dtype):
        name = "" if isinstance(dtype, (tl.pointer_type, tl.block_type)) else dtype.name
        if not name:
            return np_dtype(dtype)
        if name not in dtypes:
            dtypes[name] = np_dtype(dtype)
        return dtypes[name]

    interpreter._get_np_dtype = known_dtype


if os.environ.get("TRITON_INTERPRET") == "1":
    _patch()
