"""Matmuls of many matrices of one shape by cuBLASLt, in one launch, as Muon needs them (optimizers/muon.py).

The library's first offer is used for each key. Where it has none, torch computes the matmul.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from daybreak.kernels import Scratch, backend, matmul
from daybreak.kernels.cuda.cublaslt import _SET, _TEMPS, STATUS, Blas, PreparedMatmul, blas_of, check, workspace
from daybreak.kernels.cuda.products import Key, dense

BATCH_COUNT, BATCH_STRIDE = 5, 6  # cublasLtMatrixLayoutAttribute_t


class BatchedMatmul(PreparedMatmul):
    """A matmul of `count` matrices that follow each other: D = alpha A B + beta C. `algo` is None if there is none."""

    def __init__(self, blas: Blas, key: Key, count: int, alpha: float, beta: float) -> None:
        blas.lib.cublasLtMatrixLayoutSetAttribute.argtypes = _SET
        self.count = count
        super().__init__(blas, key)
        self.factors = ctypes.c_float(alpha), ctypes.c_float(beta)
        self.alpha, self.beta = map(ctypes.addressof, self.factors)
        self.algo = next((offer.algo for offer in self.offered(8)), None)

    def _layout(self, dtype: int, rows: int, columns: int, ld: int) -> Any:
        made = super()._layout(dtype, rows, columns, ld)
        settings = ((BATCH_COUNT, ctypes.c_int32(self.count)), (BATCH_STRIDE, ctypes.c_int64(rows * columns)))
        for attribute, value in settings:
            at, size = ctypes.addressof(value), ctypes.sizeof(value)
            status = self.lib.cublasLtMatrixLayoutSetAttribute(made, attribute, at, size)
            check(status, "cublasLtMatrixLayoutSetAttribute")
        return made


_prepared: dict[tuple[int, Key, int, float, float], BatchedMatmul] = {}


def _side(x: Tensor) -> str:
    """How the library sees x, whose matrices are contiguous or transposed views of such."""
    assert x.is_contiguous() or x.mT.is_contiguous(), "a batch of whole matrices"
    return "n" if x.is_contiguous() else "t"


@backend("cublaslt", temps=workspace)
def matmul_batched(
    out: Tensor, a: Tensor, b: Tensor, add: Tensor | None = None, *, alpha: float = 1.0, beta: float = 1.0,
    scratch: Scratch,
) -> None:  # fmt: skip
    """out (N, p, q) = alpha a (N, p, k) @ b (N, k, q) + beta add (N, p, q). The library's A is b (see cublaslt.py)."""
    tensors = (b, a, out if add is None else add, out)
    low = 16
    for x in tensors:  # the lowest bit that is set in any address, of the first matrix and the second
        low |= x.data_ptr() | x.stride(0) * x.element_size()
    tf32 = torch.backends.cuda.matmul.allow_tf32
    dtype = "bf16" if out.dtype == torch.bfloat16 else "tf32" if tf32 else "fp32"
    (n, p, q), k = out.shape, a.shape[2]
    key = dense(dtype, _side(b) + _side(a), q, p, k, mode="beta0" if add is None else "add")._replace(align=low & -low)
    device, blas = out.get_device(), blas_of(out.get_device())
    index = device, key, n, alpha, 0.0 if add is None else beta
    if blas is not None and index not in _prepared:
        _prepared[index] = BatchedMatmul(blas, *index[1:])
    prepared = _prepared.get(index)
    if prepared is None or prepared.algo is None:
        matmul.matmul_batched(out, a, b, add, alpha=alpha, beta=beta)
        return
    (space,) = scratch(_TEMPS)
    stream = torch.cuda.current_stream(device).cuda_stream
    at = [x.data_ptr() for x in tensors]
    status = prepared.launch(prepared.algo, *at, 0, 0, space.data_ptr(), stream)
    if status:
        raise RuntimeError(f"cuBLASLt: {key} of {n} matrices answered {STATUS.get(status, status)}")
