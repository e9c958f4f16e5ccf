"""cuDNN's fused attention, through its graph API: strided q, k, v read in place, outputs written in place.

A graph is built once for each shape, strides and scale, with the first plan of cuDNN's heuristics (mode A). The choice
of a kernel decides the bits, so it never depends on measured times. The deterministic backward keeps dP (B, NH, T, T)
in bf16 in its workspace. Graphs take long to build, so the Triton kernels serve shapes that only sampling asks for.

The shapes of q and k say which heads share keys. A window is the left bound of the graph's diagonal band.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor

from daybreak.errors import Error
from daybreak.kernels import Scratch, Temps, backend
from daybreak.kernels.cuda import attention as flash

# Forward graphs are built only for multiples of this many tokens, not for every length of a prompt. The rule sees the
# shape alone, because the kernel of a shape may not depend on what the process did before.
GRAPH_LENGTHS = 64
FORWARD_WORKSPACE = 1 << 20  # in tests forward took nothing
SPARE = 1 << 20
MIN_VERSION = 91000
FORWARD_GRAPHS: dict[Any, Graph] = {}
BACKWARD_GRAPHS: dict[Any, Graph] = {}


def usable(capability: tuple[int, int]) -> str | None:
    """Why these operations cannot run on a GPU of this compute capability, or None."""
    if capability[0] not in (9, 10):
        return f"cuDNN's deterministic attention is used on compute capability 9 and 10 only, not {capability[0]}"
    try:
        version = _cudnn().backend_version()
    except Exception as error:  # a broken installation is a reason to fall back, whatever it raises
        return f"the package cudnn does not work ({type(error).__name__}: {error})"
    return None if version >= MIN_VERSION else f"cuDNN {version} is older than {MIN_VERSION}"


def served(q: Tensor) -> bool:
    """Whether cuDNN (and FlashAttention-4) takes this head size: whole 16-byte pieces, at most 128 elements."""
    return q.shape[3] % 8 == 0 and q.shape[3] <= 128


def backward_workspace(B: int, T: int, NH: int, shared: int = 0) -> int:
    """Bytes: dP in bf16 (T rounded up to 64 queries and 128 keys), one fp32 row sum per query, and a little. If heads
    share keys, also dk and dv of every head, in fp32 at most, for `shared` elements of a head."""
    rows = B * NH * (-(-T // 64) * 64)
    return rows * (-(-T // 128) * 128) * 2 + B * NH * T * 4 + 2 * rows * shared * 4 + SPARE


def forward_temps(out: Tensor, lse: Tensor, q: Tensor, *_: object, **__: object) -> Temps:
    """cuDNN's workspace."""
    return [((FORWARD_WORKSPACE,), torch.uint8)] if served(q) else []


def backward_temps(dq: Tensor, dk: Tensor, dv: Tensor, dout: Tensor, q: Tensor, *_: object, **__: object) -> Temps:
    """cuDNN's workspace, or what the Triton kernels need for a head size that it does not take."""
    B, T, NH, HS = q.shape
    if not served(q):
        return flash.backward_temps(dq, dk, dv, dout, q)
    return [((backward_workspace(B, T, NH, HS if dk.shape[2] < NH else 0),), torch.uint8)]


@backend("cudnn", temps=forward_temps, dtypes=(torch.bfloat16,))
def attention_forward(
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int = 0, scratch: Scratch
) -> None:
    """out (B, T, NH, HS) = causal attention of strided q, k, v; lse (B, NH, T) fp32, the natural log-sum-exp."""
    tensors = (q, k, v, out)
    key = (scale, *((x.shape, x.stride()) for x in tensors), window)
    built = FORWARD_GRAPHS.get(key)
    if built is None:
        if q.shape[1] % GRAPH_LENGTHS or not served(q):
            flash.attention_forward(out, lse, q, k, v, scale=scale, window=window)
            return
        built = FORWARD_GRAPHS[key] = Graph(tensors, scale, window, backward=False)
    (workspace,) = scratch(forward_temps(out, lse, q))
    built.run([*tensors, lse], workspace)


@backend("cudnn", temps=backward_temps, dtypes=(torch.bfloat16,))
def attention_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    *, scale: float, window: int = 0, scratch: Scratch,
) -> None:  # fmt: skip
    """dq (B, T, NH, HS), dk, dv (B, T, NKV, HS) from dout and what forward kept; all views strided."""
    if not served(q):
        flash.attention_backward(dq, dk, dv, dout, q, k, v, out, lse, scale=scale, window=window, scratch=scratch)
        return
    tensors = (q, k, v, out, dout, dq, dk, dv)
    key = (scale, *((x.shape, x.stride()) for x in tensors), window)
    built = BACKWARD_GRAPHS.get(key)
    if built is None:
        built = BACKWARD_GRAPHS[key] = Graph(tensors, scale, window, backward=True)
    (workspace,) = scratch(backward_temps(dq, dk, dv, dout, q))
    built.run([*tensors, lse], workspace)


class Graph:
    """cuDNN's graph of one operation on tensors of given shapes and strides, built with its first plan.

    `tensors`: q, k, v, out and, backward, dout, dq, dk, dv, each (B, T, heads, HS). A window of 0 is none.
    """

    def __init__(self, tensors: tuple[Tensor, ...], scale: float, window: int, *, backward: bool) -> None:
        cudnn = _cudnn()
        B, T, NH, _ = tensors[0].shape
        bf16, fp32 = cudnn.data_type.BFLOAT16, cudnn.data_type.FLOAT
        graph = cudnn.pygraph(
            io_data_type=bf16, intermediate_data_type=fp32, compute_data_type=fp32, handle=_handle(tensors[0].device)
        )
        common = {"attn_scale": scale, "diagonal_alignment": cudnn.diagonal_alignment.TOP_LEFT}
        common["diagonal_band_right_bound"] = 0  # causal
        if window:
            common["diagonal_band_left_bound"] = window  # keys a query sees, its own place included
        layouts = [_sizes_and_strides(x) for x in tensors]
        stats = ([B, NH, T, 1], [NH * T, T, 1, 1])

        def given(uid: int, layout: tuple[list[int], list[int]], kind: Any = bf16) -> Any:
            return graph.tensor(dim=layout[0], stride=layout[1], data_type=kind, uid=uid + 1)

        def written(x: Any, uid: int, layout: tuple[list[int], list[int]], kind: Any = bf16) -> None:
            x.set_output(True).set_dim(layout[0]).set_stride(layout[1]).set_data_type(kind).set_uid(uid + 1)

        self.uids = list(range(1, len(tensors) + 2))
        inputs = [given(i, layouts[i]) for i in (range(5) if backward else range(3))]
        if backward:
            lse = given(len(tensors), stats, fp32)
            grads = graph.sdpa_backward(*inputs, lse, use_deterministic_algorithm=True, **common)
            for i, x in enumerate(grads[:3]):
                written(x, 5 + i, layouts[5 + i])
        else:
            out, lse = graph.sdpa(*inputs, generate_stats=True, **common)
            written(out, 3, layouts[3])
            written(lse, len(tensors), stats, fp32)
        self.shape = tuple(tensors[0].shape)
        try:
            self._build(graph)
        except Exception as error:  # the package raises its own kinds
            raise Error(f"cuDNN has no attention plan for {self.shape}: {error}; --kernels.attention triton") from error
        self.graph, self.workspace = graph, int(graph.get_workspace_size())

    @staticmethod
    def _build(graph: Any) -> None:
        """Take cuDNN's own first plan: the package may rank kernels of its own before or among them."""
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([_cudnn().heur_mode.A])
        graph.select_plan(next(i for i, plan in enumerate(graph.plans) if plan.cpp_index is not None))
        graph.check_support()
        graph.build_plans()

    def run(self, tensors: list[Tensor], workspace: Tensor) -> None:
        """Launch on the current stream. The last tensor is lse."""
        if self.workspace > workspace.numel():
            raise Error(
                f"cuDNN wants {self.workspace:,} bytes of workspace for attention on {self.shape}, more than the "
                f"{workspace.numel():,} planned: --kernels.attention triton"
            )
        device = tensors[0].device
        handle = _handle(device)
        _cudnn().set_stream(handle, torch.cuda.current_stream(device).cuda_stream)
        pointers = {uid: x.data_ptr() for uid, x in zip(self.uids, tensors, strict=True)}
        self.graph.execute(pointers, workspace, handle=handle)


def _sizes_and_strides(x: Tensor) -> tuple[list[int], list[int]]:
    """Sizes and strides of a (B, T, NH, HS) view in cuDNN's order, (B, NH, T, HS)."""
    order = (0, 2, 1, 3)
    return [x.shape[i] for i in order], [x.stride(i) for i in order]


@cache
def _cudnn() -> Any:
    return importlib.import_module("cudnn")


@cache
def _handle(device: torch.device) -> Any:
    with torch.cuda.device(device):
        return _cudnn().create_handle()
