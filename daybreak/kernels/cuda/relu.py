"""The squared ReLU, element-wise; formulas in kernels/relu.py.

Both go from the last element to the first: the end of what the producer wrote is still in the L2 cache.
"""

from __future__ import annotations

from torch import Tensor

from daybreak.kernels import backend
from daybreak.kernels.cuda import tl, triton

BLOCK, WARPS = 2048, 4  # 16 values a thread: two loads of 16 bytes in bf16 from each input


@triton.jit
def _relu2_forward_kernel(out, x, size, BLOCK: tl.constexpr):
    at = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    y = tl.maximum(tl.load(x + at, mask=at < size, other=0.0).to(tl.float32), 0.0)
    tl.store(out + at, (y * y).to(out.dtype.element_ty), mask=at < size)


@triton.jit
def _relu2_backward_kernel(dx, rewrite, x, size, AGAIN: tl.constexpr, BLOCK: tl.constexpr):
    at = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    y = tl.maximum(tl.load(x + at, mask=at < size, other=0.0).to(tl.float32), 0.0)
    d = tl.load(dx + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(dx + at, (d * y * 2.0).to(dx.dtype.element_ty), mask=at < size)
    if AGAIN:
        tl.store(rewrite + at, (y * y).to(rewrite.dtype.element_ty), mask=at < size)


@backend("triton")
def relu2_forward(out: Tensor, x: Tensor) -> None:
    """out (n, F) = max(x (n, F), 0)^2, both contiguous; in fp32, rounded once."""
    size = x.numel()
    _relu2_forward_kernel[(triton.cdiv(size, BLOCK),)](out, x, size, BLOCK=BLOCK, num_warps=WARPS)


@backend("triton")
def relu2_backward(dx: Tensor, rewrite: Tensor | None, x: Tensor) -> None:
    """dx (n, F) *= 2 max(x, 0), all contiguous; rewrite = the output once more, if wanted."""
    size = x.numel()
    _relu2_backward_kernel[(triton.cdiv(size, BLOCK),)](
        dx, dx if rewrite is None else rewrite, x, size, AGAIN=rewrite is not None, BLOCK=BLOCK, num_warps=WARPS
    )
