"""Makes Triton's interpreter round as a GPU does: fp32 to bf16 and fp8 to nearest even, and a fused multiply-add once.

It cuts the low bits off instead, which is twice the error that the tests allow, and rounds the product of an fma before
it adds (triton 3.6). Nothing happens where kernels run on a GPU. Import it before the first launch.
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


if os.environ.get("TRITON_INTERPRET") == "1":
    _patch()
