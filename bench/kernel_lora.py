"""Cases of LoRA: adapters of rank 16 on qkv (three parts) and on gate and up, of an MLP of four times the width."""

from __future__ import annotations

from collections.abc import Callable

from timing import Case, launch, rand

RANK = 16
EXEMPT = "the reference: cuBLAS's matmuls with few columns"


def _cases(backend: str, n: int, I: int, O: int, parts: int) -> list[Case]:
    """The four operations of one linear layer."""
    width, exempt, each = RANK * parts, EXEMPT if backend == "torch" else "", O // parts
    how = {"scale": 2.0, "columns": tuple((i * each, i * each + each) for i in range(parts))}

    def forward() -> Callable[[], None]:
        y, x, a, b = rand(n, O), rand(n, I), rand(width, I), rand(O, RANK)
        return launch("lora_forward", backend, y, rand(n, width), x, a, b, **how)

    def backward() -> Callable[[], None]:
        given = rand(n, width), rand(O, RANK), rand(n, O), rand(n, width), rand(O, RANK)
        return launch("lora_backward", backend, *given, **how, accumulate=False)

    def inputs() -> Callable[[], None]:
        return launch("lora_backward_input", backend, rand(n, I), rand(n, width), rand(width, I))

    def weight() -> Callable[[], None]:
        return launch("lora_backward_weight", backend, rand(width, I), rand(n, width), rand(n, I), accumulate=False)

    note, flops = f"{O} x {I}, {parts} parts", 2 * n * O * RANK
    small = 2 * (n * width + O * RANK + width * I)
    made = (
        ("lora_forward", 2 * n * (2 * O + I) + small, flops + 2 * n * I * width, forward),
        ("lora_backward", 2 * n * O + small, 2 * flops, backward),
        ("lora_backward_input", 4 * n * I + small, 2 * n * I * width, inputs),
        ("lora_backward_weight", 2 * n * I + small, 2 * n * I * width, weight),
    )
    return [Case(name, backend, nbytes, count, make, exempt, note) for name, nbytes, count, make in made]


def cases(B: int, T: int, C: int, NH: int, Vp: int) -> list[Case]:
    """Both backends in turns. A tile of `flops` is never the limit: 16 columns need few."""
    sizes = ((C, 3 * C, 3), (C, 8 * C, 2))
    return [case for I, O, parts in sizes for b in ("triton", "torch") for case in _cases(b, B * T, I, O, parts)]
