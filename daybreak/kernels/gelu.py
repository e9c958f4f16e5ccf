"""GELU in its tanh form (Hendrycks & Gimpel 2016, section 2; the form GPT-2 uses).

gelu(x) = x/2 (1 + tanh u),  u = sqrt(2/pi) (x + 0.044715 x^3)
gelu'(x) = (1 + tanh u)/2 + x/2 (1 - tanh^2 u) sqrt(2/pi) (1 + 3 * 0.044715 x^2)

torch's own element-wise kernel computes it in one pass, in fp32 for bf16 inputs. The derivative is attached to a matrix
product (kernels.matmul); only recomputation asks for gelu alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from daybreak.kernels import op


@op("out")
def gelu_forward(out: Tensor, x: Tensor) -> None:
    """out = gelu(x), any shape."""
    torch.ops.aten.gelu.out(x, approximate="tanh", out=out)
