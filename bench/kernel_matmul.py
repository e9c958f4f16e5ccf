"""Cases of the matmuls, quack, cuBLASLt and torch side by side."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from timing import DECODE, PRODUCT, Case, launch, rand

BACKENDS = ("quack", "cublaslt", "torch")
HEAD_ROWS = 8192  # rows of one chunk of bf16 logits: the power of two under 1 GiB, for Vp = 50304


def _cases(
    op: str, note: str, shapes: list[tuple[int, ...]], product: tuple[int, int, int], **kwargs: bool
) -> list[Case]:
    """The operation on bf16 tensors of these shapes, its outputs first; product: rows, inputs and outputs."""
    nbytes = 2 * sum(prod(shape) for shape in shapes)
    nbytes += 2 * prod(shapes[0]) if kwargs.get("accumulate") else 0

    def case(backend: str) -> Case:
        def make() -> Callable[[], None]:
            tensors = [rand(*shape, scale=shape[-1] ** -0.5 if i else 1.0) for i, shape in enumerate(shapes)]
            return launch(op, backend, *tensors, **kwargs)

        return Case(op, backend, nbytes, 2 * prod(product), make, PRODUCT, note)

    return [case(backend) for backend in BACKENDS]


def _decode(backend: str, name: str, I: int, O: int) -> Case:
    """A matmul for one sequence that decodes a token: reading w is all there is to it."""

    def make() -> Callable[[], None]:
        norm = [rand(I), rand(I)] if name in ("qkv", "fc", "head") else [None, None]
        add = rand(1, O) if name in ("attproj", "fcproj") else None
        b = None if name == "head" else rand(O)
        w = rand(O, I, scale=I**-0.5)
        return launch("matmul_decode", backend, rand(1, O), rand(1, I), w, b, add, *norm, gelu=name == "fc")

    exempt = "" if name == "head" else DECODE
    return Case("matmul_decode", backend, 2 * I * O, 2 * I * O, make, exempt, f"{name}, one row")


def cases(B: int, T: int, C: int, NH: int, Vp: int) -> list[Case]:
    """Every matmul that a step of this shape makes."""
    n, out = B * T, []
    for name, I, O in (("qkv", C, 3 * C), ("attproj", C, C), ("fc", C, 4 * C), ("fcproj", 4 * C, C)):
        size, x, w, y = (n, I, O), (n, I), (O, I), (n, O)
        if name == "fc":
            out += _cases("matmul_gelu_forward", name, [y, y, x, w, (O,)], size)
        else:
            added = [y] if name in ("attproj", "fcproj") else []
            out += _cases("matmul_forward", name, [y, x, w, (O,), *added], size)
        if name == "fcproj":
            flags = {"accumulate": True}
            out += _cases("matmul_gelu_backward", f"{name}, gelu again", [x, x, (I,), y, w, x], size, **flags)
        else:
            out += _cases("matmul_backward_input", name, [x, y, w], size)
        for accumulate in (False, True):
            note = f"{name}, {'add' if accumulate else 'write'}"
            out += _cases("matmul_backward_weight", note, [w, y, x], size, accumulate=accumulate)
    for name, I, O in (("qkv", C, 3 * C), ("attproj", C, C), ("fc", C, 4 * C), ("fcproj", 4 * C, C), ("head", C, Vp)):
        out += [_decode(backend, name, I, O) for backend in ("triton", "torch")]
    rows = min(n, HEAD_ROWS)
    size, x, w, y = (rows, C, Vp), (rows, C), (Vp, C), (rows, Vp)
    out += _cases("matmul_forward", "head", [y, x, w], size)
    out += _cases("matmul_backward_input", "head", [x, y, w], size)
    return out + _cases("matmul_backward_weight", "head, add", [w, y, x], size, accumulate=True)
