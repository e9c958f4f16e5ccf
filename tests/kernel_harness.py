"""The common part of the kernel tests: poisoned calls, seeded draws, and the comparison with fp64.

Every operation is tested in each of its backends: the plain-torch reference everywhere, the Triton kernels on a GPU
if there is one and else under Triton's interpreter (see conftest), the vendors' libraries on a GPU only.
"""

from __future__ import annotations

import math

import interpreter  # noqa: F401  # before the first launch: it mends the rounding of bf16 stores
import pytest
import torch
from torch import Tensor

from daybreak.kernels import Kernels, all_ops, temps_bytes

torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # as the engine sets it
F64 = torch.float64
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp64"])
either = pytest.mark.parametrize("accumulate", [False, True], ids=["write", "accumulate"])
each_backend = pytest.mark.parametrize("backend", ["torch", "triton"])


def skip_unless_served(name: str, backend: str, dtype: torch.dtype) -> None:
    """Skip a combination of backend and dtype that does not exist (fp64 has only the reference)."""
    impl = all_ops("cuda")[name].impls[backend]
    if impl.dtypes is not None and dtype not in impl.dtypes:
        pytest.skip(f"{backend} does not serve {dtype}")


def run(name: str, *args, backend: str = "torch", **kwargs) -> None:
    """Call an operation with poisoned scratch of its announced size; check that it changes nothing but its outputs."""
    operation = all_ops("cuda")[name]
    impl = operation.impls[backend]
    size = temps_bytes(impl.temps(*args, **kwargs)) if impl.temps else 0
    given = dict(zip(operation.parameters, args, strict=False)) | kwargs
    outputs = [given[w] for w in operation.writes if given.get(w) is not None]
    scratch = torch.full((size,), 0xFF, dtype=torch.uint8, device=outputs[0].device)  # NaN in every floating dtype
    shared = {x.untyped_storage().data_ptr() for x in outputs}
    inputs = [x for x in given.values() if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in shared]
    before = [x.clone() for x in inputs]
    assert getattr(Kernels(scratch, {name: backend}), name)(*args, **kwargs) is None
    for x, copy in zip(inputs, before, strict=True):
        torch.testing.assert_close(x, copy, rtol=0, atol=0, equal_nan=True)


def draw(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> Tensor:
    g = torch.Generator().manual_seed(seed + sum(shape))
    return (scale * torch.randn(shape, generator=g, dtype=F64)).to(DEVICE, dtype)


def poison(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, math.nan, dtype=dtype, device=DEVICE)


def f64(x: Tensor) -> Tensor:
    """A copy in fp64: never the tensor itself, which a call may overwrite."""
    return x.detach().to(F64, copy=True)


def close(got: Tensor, want: Tensor, also_rounded: Tensor | None = None, terms: Tensor | None = None) -> None:
    """`got` is the fp64 `want` but for the summation error of its arithmetic and one rounding to its dtype.

    `also_rounded`: an addend that was itself rounded to that dtype before it was added. `terms`: the addends, where
    they cancel to nothing. The error of a sum is relative to them.
    """
    assert got.shape == want.shape
    assert torch.isfinite(got).all()
    arithmetic = {F64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-5}[got.dtype]
    half_ulp = 2.0**-8 if got.dtype == torch.bfloat16 else 0.0
    rounded = want.abs() if also_rounded is None else want.abs() + also_rounded.abs()
    size = want.abs().amax() if terms is None else terms.abs().amax()
    limit = arithmetic * size.clamp(min=1e-30) + half_ulp * rounded
    excess = ((f64(got) - want).abs() / limit).amax().item()
    assert excess <= 1, f"{excess:.2f} times the tolerance"


def output(*shape: int, dtype: torch.dtype, accumulate: bool) -> tuple[Tensor, Tensor]:
    """An output that must be overwritten (NaN), or one to add to; and the fp64 value it contributes."""
    out = draw(*shape, dtype=dtype, seed=99) if accumulate else poison(*shape, dtype=dtype)
    return out, f64(out) if accumulate else torch.zeros(shape, dtype=F64, device=DEVICE)
