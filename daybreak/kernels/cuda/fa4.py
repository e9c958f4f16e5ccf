"""FlashAttention-4's deterministic backward (the package flash-attn-4, CuTe DSL kernels), after cuDNN's forward.

Its blocks of keys add to dq in fp32 in a fixed order, each waiting for its turn, so it needs no T x T workspace and
repeats bit for bit. It is compiled on its first call, in some seconds, and kept in a cache folder for the next process.
Its temporaries come from torch's allocator, inside a captured graph from that graph's pool: `workspace_bytes`.
"""

from __future__ import annotations

import importlib
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from daybreak.kernels import Scratch, Temps, backend
from daybreak.kernels.cuda import apart, broken, cache_folder, cudnn

BLOCK = 128  # its largest block of queries, to which it rounds T up
HEAD = 32  # it rounds heads up to this size, and then gives wrong gradients of some: 8, 16, 40, 48, 72, 80, 104, 112


def usable(capability: tuple[int, int]) -> str | None:
    """Why these operations cannot run on a GPU of this compute capability, or None."""
    if reason := cudnn.usable(capability):
        return reason
    return broken("flash_attn.cute", _interface)


def workspace_bytes(B: int, T: int, NH: int, HS: int, NKV: int = 0) -> int:
    """Bytes that one backward takes from torch's allocator: dq in fp32, two fp32 rows of statistics, turn counters; and
    dk, dv in fp32 with counters of their own, where NH heads share those of NKV (0: they do not).

    Each is rounded up to 2 MiB, the allocator's granularity for large blocks. Nothing for heads that it does not take.
    """
    if not served(HS):
        return 0
    width = -(-HS // 64) * 64

    def pieces(heads: int) -> list[int]:
        rows = B * heads * -(-T // BLOCK) * BLOCK
        return [rows * width * 4, rows // 64 * 2 * 4]

    rows = pieces(NH)[0] // width
    found = [*pieces(NH), rows, rows, *(2 * pieces(NKV) if 0 < NKV < NH else ())]
    return sum(-(-size // (2 << 20)) * (2 << 20) for size in found)


backend("fa4", temps=cudnn.forward_temps, dtypes=(torch.bfloat16,))(cudnn.attention_forward)  # forward is cuDNN's


def served(HS: int) -> bool:
    """Whether its backward takes heads of this size: a multiple of 32, at most 128. cuDNN's takes those between."""
    return HS % HEAD == 0 and HS <= 128


def backward_temps(dq: Tensor, dk: Tensor, dv: Tensor, dout: Tensor, q: Tensor, *_: object, **__: object) -> Temps:
    """Nothing, but for a head size that cuDNN or the Triton kernels take."""
    return [] if served(q.shape[3]) else cudnn.backward_temps(dq, dk, dv, dout, q)


@backend("fa4", temps=backward_temps, dtypes=(torch.bfloat16,))
def attention_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    *, scale: float, window: int = 0, scratch: Scratch,
) -> None:  # fmt: skip
    """dq (B, T, NH, HS), dk, dv (B, T, NKV, HS) from dout and what forward kept; all views strided, on 16-byte
    boundaries."""
    if not served(q.shape[3]):
        cudnn.attention_backward(dq, dk, dv, dout, q, k, v, out, lse, scale=scale, window=window, scratch=scratch)
        return
    assert lse.is_contiguous()
    with apart():  # it may compile
        _interface()._flash_attn_bwd(
            q, k, v, out, dout, lse, softmax_scale=scale, causal=True, deterministic=True, dq=dq, dk=dk, dv=dv,
            window_size_left=window - 1 if window else None,  # keys before the query's own
        )  # fmt: skip


@cache
def _interface() -> Any:
    """The package, told to keep what it compiles: it reads these variables when it is imported."""
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", cache_folder("fa4"))
    return importlib.import_module("flash_attn.cute.interface")
