"""Column sums in two stages: the Triton kernels behind bias_backward, against sums in fp64."""

from __future__ import annotations

import interpreter  # noqa: F401
import pytest
import torch
from kernel_harness import DEVICE, close, draw, each_backend, each_dtype, either, f64, output, poison, run
from kernel_harness import skip_unless_served as served

from daybreak.kernels.cuda import bias

BF16 = torch.bfloat16


def check(backend, dtype, n, O, accumulate):
    served("bias_backward", backend, dtype)
    dout = draw(n, O, dtype=dtype)
    db, db0 = output(O, dtype=dtype, accumulate=accumulate)
    total = f64(dout).sum(0)
    run("bias_backward", db, dout, backend=backend, accumulate=accumulate)
    # torch rounds the sum before it adds to db; the Triton kernel does not
    close(db, db0 + total, also_rounded=total if accumulate and backend == "torch" else None)


@each_backend
@each_dtype
@either
@pytest.mark.parametrize(("n", "O"), [(1, 1), (33, 255), (200, 256), (67, 1000)])
def test_bias_gradient(backend, dtype, n, O, accumulate):
    check(backend, dtype, n, O, accumulate)


@either
@pytest.mark.parametrize("programs", [1, 3, 8])
def test_row_tiles_in_strides(monkeypatch, programs, accumulate):
    """Slices that take several tiles of rows, and not all as many."""
    monkeypatch.setattr(bias, "PROGRAMS", programs)
    check("triton", BF16, 331, 300, accumulate)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_beyond_2_to_the_31():
    n, O = (1 << 31) // 4800 + 1001, 4800
    dout = torch.zeros(n, O, dtype=BF16, device=DEVICE)
    dout[-3:] = draw(3, O, dtype=BF16)
    dout[0], dout[n // 2] = draw(O, dtype=BF16), draw(O, dtype=BF16, seed=1)
    db = poison(O, dtype=BF16)
    run("bias_backward", db, dout, backend="triton", accumulate=False)
    close(db, f64(dout[-3:]).sum(0) + f64(dout[0]) + f64(dout[n // 2]))
