"""The epilogues of quack's matmuls, which change a result before it goes to memory. Imported only where quack is used.

`acc` is one entry of the matmul in fp32. The value that a function returns is rounded once, where it is stored. The
package finds compiled kernels by the source of these functions.
"""

from __future__ import annotations

from cutlass import BFloat16, Float32, cute
from quack.activation import relu
from quack.epilogue.frontend import gemm_epilogue, unpack
from quack.epilogue.ops import RowVecLoad, RowVecReduce

ROOT, CUBIC = 0.7978845608028654, 0.044715  # sqrt(2/pi); Hendrycks and Gimpel 2016, section 2
LOG2E = 1.4426950408889634
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


@gemm_epilogue(outputs=("relu2",))
def and_relu2(acc):
    """D = the matmul; relu2 = max(D, 0)^2, from D as it is stored."""
    y = relu(acc.to(BFloat16).to(Float32))
    return {"D": acc, "relu2": y * y}


@gemm_epilogue()
def times_relu2(acc, c):
    """D = the matmul times the slope of the squared ReLU of C."""
    return {"D": acc * (2.0 * relu(c))}


@gemm_epilogue(outputs=("relu2",))
def times_relu2_again(acc, c):
    """The same, and relu2 = max(C, 0)^2."""
    y = relu(c)
    return {"D": acc * (2.0 * y), "relu2": y * y}


def sigmoid(x):
    """1 / (1 + exp(-x)). The instruction for tanh would err by 2e-4 at every x, and a wide gate magnifies that."""
    return cute.arch.rcp_approx(1.0 + cute.math.exp2(-LOG2E * x, fastmath=True))


def stored(pair):
    """Both numbers as they are stored, so that a gate computed again in backward has the same bits."""
    return [x.to(BFloat16).to(Float32) for x in unpack(pair)]


@gemm_epilogue(outputs=("gate", "up", "out"), mode="acc_pair")
def swiglu(acc):
    """Neighbours in a row are the gate and up: both are stored, and out = silu(gate) * up from them."""
    gate, up = stored(acc)
    return {"gate": gate, "up": up, "out": gate * sigmoid(gate) * up}


@gemm_epilogue(outputs=("gate", "up", "out"), mode="acc_pair")
def geglu(acc):
    """The same with gelu."""
    gate, up = stored(acc)
    return {"gate": gate, "up": up, "out": gate * half_and_half_tanh(gate) * up}


@gemm_epilogue(outputs=("d_up",))
def times_swiglu(acc, c, up):
    """D and d_up: the gradients of the gate C and of up, from the matmul, that of silu(gate) * up."""
    s = sigmoid(c)
    f = c * s
    return {"D": acc * up * (s + f * (1.0 - s)), "d_up": acc * f}


@gemm_epilogue(outputs=("d_up", "out"))
def times_swiglu_again(acc, c, up):
    """The same, and out = silu(gate) * up."""
    s = sigmoid(c)
    f = c * s
    return {"D": acc * up * (s + f * (1.0 - s)), "d_up": acc * f, "out": f * up}


@gemm_epilogue(outputs=("d_up",))
def times_geglu(acc, c, up):
    """times_swiglu with gelu."""
    s = half_and_half_tanh(c)
    return {"D": acc * up * slope(c, s), "d_up": acc * (c * s)}


@gemm_epilogue(outputs=("d_up", "out"))
def times_geglu_again(acc, c, up):
    """times_swiglu_again with gelu."""
    s = half_and_half_tanh(c)
    f = c * s
    return {"D": acc * up * slope(c, s), "d_up": acc * f, "out": f * up}
