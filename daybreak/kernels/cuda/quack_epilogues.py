"""The epilogues of quack's matmuls, which change a result before it goes to memory. Imported only where quack is used.

`acc` is one entry of the matmul in fp32. The value that a function returns is rounded once, where it is stored. The
package finds compiled kernels by the source of these functions.
"""

from __future__ import annotations

from cutlass import cute
from quack.epilogue.frontend import gemm_epilogue
from quack.epilogue.ops import RowVecLoad, RowVecReduce

ROOT, CUBIC = 0.7978845608028654, 0.044715  # sqrt(2/pi); Hendrycks and Gimpel 2016, section 2
BIAS = {"bias": RowVecLoad("bias")}


def half_and_half_tanh(x):
    """(1 + tanh u)/2 with u = sqrt(2/pi) (x + 0.044715 x^3), by the instruction tanh.approx.f32."""
    return 0.5 + 0.5 * cute.math.tanh(x * (ROOT + ROOT * CUBIC * x * x), fastmath=True)


@gemm_epilogue()
def plain(acc):
    """D = the matmul."""
    return {"D": acc}


@gemm_epilogue()
def add(acc, c):
    """D = the matmul + C."""
    return {"D": acc + c}


@gemm_epilogue(ops=BIAS)
def add_bias(acc, bias):
    """D = the matmul + a bias for each column."""
    return {"D": acc + bias}


@gemm_epilogue(ops=BIAS)
def add_bias_and(acc, c, bias):
    """D = the matmul + bias + C."""
    return {"D": acc + bias + c}


@gemm_epilogue(outputs=("gelu",), ops=BIAS)
def add_bias_gelu(acc, bias):
    """D = the matmul + bias; gelu = gelu(D), from D before its rounding."""
    x = acc + bias
    return {"D": x, "gelu": x * half_and_half_tanh(x)}


def slope(x, s):
    """gelu'(x), given s = half_and_half_tanh(x): s + x s (1 - s) 2u'."""
    return s + x * s * (1.0 - s) * (2.0 * ROOT + 6.0 * ROOT * CUBIC * x * x)


@gemm_epilogue(reduces={"db": RowVecReduce("db")})
def times_slope(acc, c):
    """D = the matmul times gelu'(C); db = partial sums of D's columns, before its rounding."""
    d = acc * slope(c, half_and_half_tanh(c))
    return {"D": d, "db": d}


@gemm_epilogue(outputs=("gelu",), reduces={"db": RowVecReduce("db")})
def times_slope_gelu(acc, c):
    """The same, and gelu = gelu(C)."""
    s = half_and_half_tanh(c)
    d = acc * slope(c, s)
    return {"D": d, "db": d, "gelu": c * s}
