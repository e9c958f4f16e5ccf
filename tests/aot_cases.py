"""Which kernels tests/aot.py compiles, and with what: the cases of each file of daybreak/kernels/cuda, as tuples of

    (kernel, {"argument": type}, {"CONSTEXPR": value}, num_warps[, {"option": value}])

with Triton's types ("*bf16", "*fp32", "i32", "i64", "fp32"). Every pointer and integer is taken for a multiple of 16,
as it is in GPT-2's shapes, unless its type ends in "?" ("i32?").
"""

from __future__ import annotations

from typing import Any

import torch
import triton

from daybreak.kernels.cuda import (
    attention,
    bias,
    classifier,
    decode,
    embedding,
    gelu,
    glu,
    guard,
    lora,
    mix,
    muon,
    nf4,
    norm,
    optimizer,
    pick,
    relu,
    rope,
    rounding,
    smear,
    value,
)
from daybreak.kernels.guard import WINDOW

Case = tuple[Any, ...]


def attention_case(kernel: Any, index: int, HS: int, table: dict[int, Any], group: int = 1, window: int = -1) -> Case:
    """Contiguous T in whole blocks. group: heads that share keys. window: documents; and a window, unless it is 0."""
    limited = window >= 0
    rows, step, warps, stages = table[max(64, HS)][index]
    warps = 8 if (limited or group > 1) and index == attention.KEYS else warps
    kind = "*fp32" if table is attention.FP32 else "*bf16"
    constants = {"HS": HS, "D": HS, "ROWS": rows, "STEP": step, "EVEN": True, "PRECISION": "ieee", "UPCAST": False}
    constants |= {"GROUP": group, "LO": limited, "WINDOW": max(window, 0)}
    tensors = ("out", "dq", "dk", "dv", "dout", "q", "k", "v")
    special = {"lse": "*fp32", "delta": "*fp32", "lo": "*i32", "scale": "fp32", "scale2": "fp32"}
    special |= dict.fromkeys(("NH", "NKV"), "i32?")
    names = [name for name in kernel.arg_names if name not in constants]
    return (
        kernel,
        {x: kind if x in tensors else special.get(x, "i32") for x in names},
        constants,
        warps,
        {"num_stages": stages},
    )


def attention_cases() -> list[Case]:
    a = attention
    kernels = (a._forward_kernel, a._backward_queries_kernel, a._backward_keys_kernel)
    # The first of each kernel must fit every card.
    tables = ((64, a.SMALL), (64, a.LARGE), (64, a.FP32), (128, a.LARGE), (128, a.FP32))
    cases = [attention_case(kernel, i, HS, table) for HS, table in tables for i, kernel in enumerate(kernels)]
    limits = [(64, 4, 512), (128, 4, 512), (256, 4, 512), (64, 1, 0), (64, 4, 0), (128, 4, 0)]  # packed rows: no window
    return cases + [attention_case(k, i, HS, a.LARGE, *how) for HS, *how in limits for i, k in enumerate(kernels)]


def bias_cases(dtype: str) -> list[Case]:
    sums = {"out0": dtype, "out1": dtype, "out2": dtype, "part": "*fp32", "P": "i32?", "C": "i32"}
    partial = {"part": "*fp32", "dout": dtype, "n": "i32", "O": "i32"}
    constants = {"ROWS": bias.ROWS, "COLS": bias.COLS}
    return [
        (bias._column_sums_kernel, sums, {"ACCUMULATE": True, "ROWS": bias.SUM_ROWS, "COLS": bias.SUM_COLS}, 4),
        (bias._bias_partial_kernel, partial, constants, bias.WARPS),
    ]


def classifier_cases() -> list[Case]:
    c = classifier
    rest = {"losses": "*fp32", "targets": "*i64", "scale": "*fp64", "n": "i32", "V": "i32?", "Vp": "i32"}
    found: list[Case] = []
    for dtype, vec in (("*bf16", 8), ("*fp32", 4)):
        for backward, cap, z_loss in (
            (True, 0, 0),
            (False, 0, 0),
            (True, 15, 0),
            (False, 15, 0),
            (True, 0, 1e-4),
            (True, 15, 1e-4),
        ):
            warps, registers = (c.CAPPED_WARPS, c.CAPPED_REGISTERS) if cap else (c.WARPS, c.REGISTERS)
            constants = {"BACKWARD": backward, "CAP": float(cap), "Z_LOSS": float(z_loss)}
            constants |= {"TILE": 32 * warps * vec, "VEC": vec}
            found.append((c._classifier_kernel, {"logits": dtype, **rest}, constants, warps, {"maxnreg": registers}))
        types = {"logits": dtype, "size": "i32"}
        found.append((c._cap_logits_kernel, types, {"CAP": 15.0, "BLOCK": c.CAP_BLOCK}, 4))
    types = {"total": "*fp64", "losses": "*fp32", "scale": "*fp64", "n": "i32"}
    return [*found, (c._loss_sum_kernel, types, {"ACCUMULATE": True, "BLOCK": c.SUM_BLOCK}, c.SUM_WARPS)]


def decode_cases(C: int, dtype: str) -> list[Case]:
    names = ("out", "x", "w", "b", "add", "lnw", "lnb")
    types = dict.fromkeys(names, dtype) | {"n": "i32?", "I": "i32", "O": "i32", "eps": "fp32"}
    found, plain = [], {"RMS": False, "OFFSET": 0.0, "GATE": 0, "REST": 0}
    for I, O, fc, overlap in ((C, 4 * C, True, False), (C, 4 * C, True, True), (4 * C, C, False, True)):
        rows, cols, _, warps = decode._tile(I, O, gpt2=True)
        flags = {"NORM": fc, "BIAS": True, "ADD": not fc, "GELU": fc, "OVERLAP": overlap, **plain}
        found.append((decode._decode_matmul_kernel, types, {**flags, "ROWS": rows, "COLS": cols}, warps))
    flags = {"NORM": False, "BIAS": False, "GELU": False, "OVERLAP": True, "OFFSET": 1.0}
    for gate, I in (("", C), ("silu", C), ("gelu", C), ("silu", 1536), ("", 8960)):
        rows, cols, rest, warps = decode._tile(I, 4 * C)
        kind = {
            "ADD": I == 8960,
            "RMS": I != 8960,
            "GATE": decode.GATES[gate],
            "ROWS": rows,
            "COLS": cols,
            "REST": rest,
        }
        found.append((decode._decode_matmul_kernel, types, flags | kind, warps))
    types = dict.fromkeys(("out", "cache", "q", "k", "v"), dtype) | {"positions": "*i64", "scale2": "fp32"}
    types |= dict.fromkeys(("out_b", "q_b", "k_b", "v_b", "cache_v", "cache_b", "cache_h"), "i64")
    types |= {"freq": "*fp32", "half": "i32", "attention": "fp32"}
    for HS, overlap, group, window in (
        (64, False, 1, 0), (64, True, 1, 0), (128, True, 1, 0), (128, True, 6, 0), (64, True, 4, 512),
        (256, True, 4, 0),  # with a window 8 bytes of a thread's stack are in use, whatever STEP is
    ):  # fmt: skip
        keys = decode.WIDE_KEYS if HS == 128 and dtype == "*bf16" else decode.KEYS
        constants = {"HS": HS, "D": HS, "STEP": keys // HS, "OVERLAP": overlap, "GROUP": group, "WINDOW": window}
        constants["ROPE"] = group > 1
        found.append((decode._decode_attention_kernel, types, constants, decode.WARPS))
    return found


def embedding_cases(C: int, dtype: str) -> list[Case]:
    e = embedding
    cols, warps = e._forward_launch(C)
    sizes = {"B": "i32", "T": "i32", "C": "i32"}
    position = {"ACCUMULATE": True, "ROWS": e.POSITION_ROWS, "COLS": e.POSITION_COLS}
    sort = {"SHIFT": 8, "DIGITS": 1 << e.DIGIT_BITS, "BLOCK": e.SORT_BLOCK}
    lists, summed = {"keys": "*i32", "rows": "*i32"}, {"SCALE": 1.0, "CHUNK": e.CHUNK, "COLS": e.RUN_COLS}
    runs = {"dwte": dtype, "part": "*fp32", "keys": "*i32", "n": "i32", "chunks": "i32", "C": "i32"}
    forward = {"out": dtype, "tokens": "*i64", "positions": "*i64", "wte": dtype, "wpe": dtype, "T": "i32", "C": "i32"}
    scatter = {"keys_out": "*i32", "rows_out": "*i32", **lists, "table": "*i32", "n": "i32", "blocks": "i32"}
    return [
        *(
            (e._forward_kernel, forward, {"GIVEN": given, "PLACED": placed, "SCALE": scale, "COLS": cols}, warps)
            for given, placed, scale in (
                (False, True, 1.0),
                (True, True, 1.0),
                (False, False, 1.0),
                (True, False, 33.9),
            )
        ),
        (e._positions_kernel, {"dwpe": dtype, "dout": dtype, **sizes}, position, e.POSITION_COLS // 256),
        (e._digit_counts_kernel, {"table": "*i32", "keys": "*i32", "n": "i32"}, sort, e.SORT_WARPS),
        (e._scatter_kernel, scatter, {"FIRST": False, "TABLE_ROWS": e.PARTS, **sort}, e.SORT_WARPS),
        (e._scatter_kernel, {**scatter, "keys": "*i64"}, {"FIRST": True, "TABLE_ROWS": e.PARTS, **sort}, e.SORT_WARPS),
        (e._runs_kernel, {**runs, "rows": "*i32", "dout": dtype}, summed, 1),
        (e._runs_kernel, {**runs, "rows": "*i32", "dout": dtype}, {**summed, "SCALE": 33.9}, 1),
        (e._long_runs_kernel, runs, {"PARTS": e.PARTS, **summed}, 4),
    ]


def rounding_cases() -> list[Case]:
    """A gradient after GELU with all copies, a weight of its own scale, its measuring, and GELU without columns; the
    transposed copy of a norm's output; a gate's output as forward and backward write it."""
    e4m3, e5m2 = "*fp8e4nv", "*fp8e5"
    types = {"scale": "*fp32", "amax": "*i32", "x": "*bf16", "pre": "*bf16", "again_scale": "*fp32", "part": "*fp32"}
    types |= {"n": "i32", "C": "i32", "mean": "*fp32", "rstd": "*fp32", "w": "*bf16", "b": "*bf16"}
    found: list[Case] = []
    for out, act, again, current, measure, both in (
        (e5m2, "slope", True, False, False, True), (e4m3, "", False, True, False, True),
        (e4m3, "", False, True, True, True), (e4m3, "gelu", False, False, False, False),
        (e4m3, "norm", False, False, False, True), (e4m3, "rms", False, False, False, True),
        (e4m3, "silu", False, False, False, False), (e4m3, "silu", False, False, False, True),
        (e4m3, "gated gelu", False, False, False, True), (e4m3, "relu2", False, False, False, False),
        (e5m2, "sums", False, False, False, True), (e4m3, "mix", False, False, False, True),
        (e4m3, "unit", False, False, False, True),
    ):  # fmt: skip
        rows, cols, warps = rounding.tile(act, both)
        kind = {
            "ACT": act.removeprefix("sums"),
            "SUMS": act in ("slope", "sums"),
            "AGAIN": again,
            "CURRENT": current,
            "MEASURE": measure,
            "TRANSPOSED": both,
        }
        kind |= {
            "OFFSET": 1.0 if act == "rms" else 0.0,
            "VALUE": act not in ("norm", "rms", "mix", "unit"),
            "LARGEST": 448.0,
            "AGAIN_LARGEST": 448.0,
            "ROWS": rows,
            "COLS": cols,
        }
        tensors = {"value": out, "transposed": out, "again": e4m3, **types}
        tensors |= {"w": "*fp32", "b": "*fp32"} if act == "mix" else {}
        found.append((rounding._quantise_kernel, tensors, kind, warps))
    return found


def gelu_cases(dtype: str) -> list[Case]:
    constants = {"BLOCK": gelu.BLOCK}
    return [
        (gelu._gelu_forward_kernel, {"out": dtype, "x": dtype, "size": "i32"}, constants, gelu.WARPS),
        (gelu._gelu_backward_kernel, {"grad": dtype, "x": dtype, "size": "i32"}, constants, gelu.WARPS),
    ]


def glu_cases(dtype: str) -> list[Case]:
    types = {"gateup": dtype, "F": "i32"}
    backward = {**types, "d_gateup": dtype, "rewrite": dtype, "d_out": dtype}
    return [
        case
        for gelu in (False, True)
        for case in (
            (glu._swiglu_forward_kernel, {**types, "out": dtype}, {"GELU": gelu, "BLOCK": glu.BLOCK}, glu.WARPS),
            (glu._swiglu_backward_kernel, backward, {"AGAIN": True, "GELU": gelu, "BLOCK": glu.BLOCK}, glu.WARPS),
        )
    ]


def guard_cases() -> list[Case]:
    types = {"stats": "*fp64", "windows": "*fp64", "counts": "*i64", "loss": "*fp64", "norm": "*fp64"}
    constants = {"CLIP": 1.0, "MAX_LOSS_Z": 5.0, "MAX_NORM_Z": 5.0, "WINDOW": WINDOW}
    return [(guard._step_guard_kernel, types, constants, guard.WARPS)]


def lora_cases(dtype: str) -> list[Case]:
    """The narrowest tile, and the widest."""
    wide, found = dtype == "*bf16", list[Case]()
    for R in (16, 64):
        same, stages = {"R": R, "PRECISION": "ieee", "UPCAST": False}, {"num_stages": lora.STAGES}
        sizes = dict.fromkeys(("n", "K", "N", "r", "x_s", "u_s", "y_s", "run"), "i32") | {"scale": "fp32"}
        tensors = dict.fromkeys("xyum", dtype) | {"part": "*fp32", "out": dtype}
        for kernel, more in (
            (lora._narrow_kernel, {"ROWS": 64, "STEP": lora.STEP if wide else lora.STEP // 4, **same}),
            (lora._widen_kernel, {"ROWS": 64 if wide else 32, "COLS": lora.COLS if wide else lora.COLS // 2, **same}),
            (lora._gather_kernel, {"COLS": lora.COLS, "STEP": 64 if wide else 32, **same}),
            (lora._gather_sum_kernel, {"ACCUMULATE": True, "R": R, "COLS": 32}),
        ):
            known = tensors | sizes | dict.fromkeys(("m_k", "m_r", "m_n", "o_n", "o_r", "runs"), "i32?")
            types = {name: known[name] for name in kernel.arg_names if name not in more}
            found.append((kernel, types, more, lora.WARPS, stages))
    return found


def nf4_cases() -> list[Case]:
    types = {"value": "*u8", "absmax": "*u8", **dict.fromkeys(("nested", "offset", "codes", "dynamic"), "*fp32")}
    constants = {"HALF": nf4.BLOCK // 2, "GROUP": nf4.GROUP, "BLOCKS": nf4.BLOCKS}
    return [
        (nf4._nf4_kernel, {"out": out, **types, "blocks": "i32"}, constants, nf4.WARPS) for out in ("*bf16", "*fp32")
    ]


def norm_cases(C: int, dtype: str, rms: bool = False, heads: int = 0, offset: float = 0.0) -> list[Case]:
    shape = (1 << 14, heads, C) if heads else (1 << 14, C)
    rows = torch.empty(shape, dtype=torch.bfloat16 if dtype == "*bf16" else torch.float32, device="meta")
    names = {"x": dtype, "w": dtype, "b": dtype, "n": "i32", "C": "i32", "mean": "*fp32", "rstd": "*fp32"}
    launch = norm.forward_launch(rows, heads)
    forward = {"out": dtype, **names, "out_s": "i32", "x_s": "i32", "eps": "fp32"}
    kind = {"RMS": rms, "HEADS": heads, "OFFSET": offset}
    forward["add"] = dtype
    constants = {"ROWS": launch.rows, "BLOCK": launch.block, "ADD": bool(offset) and not heads, "LARGEST": 0.0, **kind}
    found: list[Case] = [(norm._layernorm_forward_kernel, forward, constants, launch.warps)]
    if not heads and dtype == "*bf16":
        fp8 = {**forward, "out": "*fp8e4nv", "add": "*fp32"}
        found.append((norm._layernorm_forward_kernel, fp8, {**constants, "ADD": False, "LARGEST": 448.0}, launch.warps))
    backward = {"dx": dtype, "again": dtype, "part": "*fp32", "dout": dtype, **names}
    backward |= dict.fromkeys(("dx_s", "again_s", "dout_s", "x_s"), "i32")
    cases = [(True, True, True), (True, True, False), (False, True, False)]
    for accumulate_dx, dbias, again in [(True, False, True), (False, False, False)] if rms else cases:
        launch = norm.backward_launch(rows, accumulate_dx, heads)
        constants = {"ROWS": launch.rows, "BLOCK": launch.block, "STAGES": launch.stages, **kind}
        constants |= {"ACCUMULATE_DX": accumulate_dx, "DBIAS": dbias, "AGAIN": again}
        found.append((norm._layernorm_backward_kernel, backward, constants, launch.warps))
    return found


def adamw_case(layout: str, weights: str, masters: str, grads: str, moments: str = "*fp32") -> Case:
    scalars = dict.fromkeys(("beta1", "rest1", "beta2", "rest2", "eps", "weight_decay"), "fp32")
    types = {
        "weights": weights, "masters": masters, "m": moments, "v": moments, "grads": grads, "stats": "*fp64",
        "hyper": "*fp64", "n": "i32", "offset": "i32", "key": "i32?", **scalars,
    }  # fmt: skip
    return optimizer._adamw_kernel, types, {"LAYOUT": layout, "BLOCK": optimizer.ADAMW_BLOCK}, optimizer.ADAMW_WARPS


def optimizer_cases() -> list[Case]:
    o = optimizer
    squares = {"partial": "*fp64", "n": "i32", "stride": "i32"}
    root = {"norm": "*fp64", "partial": "*fp64", "programs": "i32"}
    return [
        (o._square_sums_kernel, {**squares, "grads": "*bf16"}, {"BLOCK": o.NORM_BLOCK}, o.NORM_WARPS),
        (o._square_sums_kernel, {**squares, "grads": "*fp32"}, {"BLOCK": o.NORM_BLOCK}, o.NORM_WARPS),
        (o._norm_kernel, root, {"BLOCK": o.NORM_PROGRAMS}, 4),
        adamw_case("plain", "*fp32", "*fp32", "*fp32"),
        adamw_case("masters", "*bf16", "*fp32", "*bf16"),
        adamw_case("split", "*bf16", "*i16", "*bf16"),
        adamw_case("split", "*bf16", "*i16", "*fp32"),
        adamw_case("none", "*bf16", "*bf16", "*bf16"),
        *(
            adamw_case(layout, "*bf16", masters, "*bf16", "*bf16")
            for layout, masters in (("none", "*bf16"), ("split", "*i16"))
        ),
    ]


def muon_cases() -> list[Case]:
    m, stats = muon, {"stats": "*fp64"}
    found: list[Case] = []
    for x, masters, layout in (("*bf16", "*i16", "split"), ("*bf16", "*fp32", "masters"), ("*fp32", "*fp32", "plain")):
        for c in (1536, 6144):
            block = triton.next_power_of_2(c)
            types = {"x": x, "momentum": "*fp32", "grads": x, "hyper": "*fp64", "c": "i32", "shrink": "fp32"}
            constants = {"BLOCK": block}
            found.append((m._momentum_kernel, {**types, **stats, "least": "fp32"}, constants, m._warps(block)))
            found.append((m._row_sums_kernel, {"sums": "*fp32", "x": x, "c": "i32"}, constants, m._warps(block)))
            types = {"second": "*fp32", "sums": "*fp32", "n": "i32"}
            types |= dict.fromkeys(("small", "beta2", "rest2", "least", "least_second"), "fp32")
            found.append((m._factors_kernel, {**types, **stats}, constants, m._warps(block)))
        types = {"sums": "*fp32", "x": x, "r": "i32", "c": "i32"}
        found.append((m._column_sums_kernel, types, {"ROWS": m.ROWS, "COLS": m.COLS}, 4))
        types = {"weights": x, "masters": masters, "factors": "*fp32", "x": x, "hyper": "*fp64", "c": "i32"}
        types |= {"shape": "fp32", "weight_decay": "fp32", "offset": "i32", "key": "i32?"}
        constants = {"BY_ROW": layout != "masters", "LAYOUT": layout, "BLOCK": m.BLOCK}
        found.append((m._update_kernel, {**types, **stats}, constants, 4))
    return found


def rope_cases(dtype: str) -> list[Case]:
    sizes = dict.fromkeys(("x_b", "x_t", "x_h", "half"), "i32") | dict.fromkeys(("T", "heads"), "i32?")
    types = {"x": dtype, "freq": "*fp32", "positions": "*i64", **sizes, "attention": "fp32"}
    found: list[Case] = []
    for heads, half, given in ((40, 64, False), (9, 32, True)):
        tile, pairs, warps = rope.launch(heads, half)
        constants = {"GIVEN": given, "BACK": False, "HEADS": tile, "HALF": pairs, "OVERLAP": given}
        found.append((rope._rope_kernel, types, constants, warps))
    types = {"to": dtype, "x": dtype, "freq": "*fp32", "positions": "*i64", "to_t": "i32", "x_t": "i32", "T": "i32?"}
    types |= {"heads": "i32?", "half": "i32", "eps": "fp32"}
    for heads, given, back in ((12, False, False), (12, False, True), (24, True, False), (24, True, True)):
        tile, pairs, warps = rope.norm_launch(heads, 64)
        constants = {"GIVEN": given, "BACK": back, "HEADS": tile, "HALF": pairs}
        found.append((rope._rope_norm_kernel, types, constants, warps))
    return found


def mix_cases(C: int, dtype: str) -> list[Case]:
    rows = torch.empty(1 << 14, C, dtype=torch.bfloat16 if dtype == "*bf16" else torch.float32, device="meta")
    types = dict.fromkeys(("x", "y", "res", "out"), dtype) | dict.fromkeys(("a", "b", "scale"), "*fp32")
    types |= {"rstd": "*fp32", "n": "i32", "C": "i32", "eps": "fp32", "factor": "fp32"}
    launch, found = norm.forward_launch(rows), list[Case]()
    for res, a, largest in ((False, True, 0.0), (True, True, 0.0), (True, False, 0.0), (False, True, 448.0)):
        constants = {"RES": res, "A": a, "LARGEST": largest, "ROWS": launch.rows, "BLOCK": launch.block}
        if not largest or dtype == "*bf16":
            eight = {"out": "*fp8e4nv"} if largest else {}
            found.append((mix._mix_norm_forward_kernel, types | eight, constants, launch.warps))
    backward = dict.fromkeys(("dx", "dy", "again", "d", "dout", "x", "y"), dtype)
    backward |= {**dict.fromkeys(("part", "rstd", "a", "b", "add"), "*fp32"), "factor": "fp32", "n": "i32", "C": "i32"}
    for adds, again, stored, more in (
        (1, 0, 0, 0),
        (1, 1, 0, 0),
        (0, 0, 0, 0),
        (1, 0, 0, 1),
        (0, 1, 0, 1),
        (0, 0, 1, 0),
    ):
        launch = mix.mix_norm_launch(rows, 4 * more)
        constants = {"ROWS": launch.rows, "BLOCK": launch.block, "STAGES": launch.stages}
        constants |= {"ACCUMULATE_DY": adds, "AGAIN": again, "STORED": stored, "ADD": more}
        wide = {"dy": "*fp32"} if stored else {}
        found.append((mix._mix_norm_backward_kernel, backward | wide, constants, launch.warps))
    types = dict.fromkeys(("x", "y", "out"), dtype) | {"size": "i32"}
    return [*found, (mix._mix_add_kernel, types, {"BLOCK": mix.BLOCK}, mix.WARPS)]


def pick_cases(C: int, dtype: str) -> list[Case]:
    sizes, (_, constants) = {"at": "*i32", "n": "i32", "r": "i32", "C": "i32"}, pick.launch(1, C)
    warps = constants.pop("num_warps")
    forward = {"out": dtype, "x": dtype, "picked": "*i64", "targets": "*i64", **sizes}
    return [
        (pick._pick_forward_kernel, forward, constants, warps),
        (pick._pick_backward_kernel, {"dx": dtype, "d_out": dtype, **sizes}, constants, warps),
    ]


def relu_cases(dtype: str) -> list[Case]:
    types, constants = {"x": dtype, "size": "i32"}, {"BLOCK": relu.BLOCK}
    backward = {**types, "dx": dtype, "rewrite": dtype}
    return [
        (relu._relu2_forward_kernel, {**types, "out": dtype}, constants, relu.WARPS),
        (relu._relu2_backward_kernel, backward, {**constants, "AGAIN": True}, relu.WARPS),
    ]


def smear_cases(C: int, dtype: str) -> list[Case]:
    block, warps = smear.launch(C)
    types = {"e": dtype, "w": dtype, "factor": "*fp32", "positions": "*i64", "C": "i32"}
    constants = {"GATE": smear.GATE, "BLOCK": block}
    forward = {**types, "out": dtype, "T": "i32"}
    backward = {**types, "de": dtype, "part_w": "*fp32", "part_l": "*fp32", "dout": dtype, "n": "i32", "T": "i32"}
    decode = {**types, "out": dtype, "cache": dtype, "c_b": "i32", "c_h": "i32", "c_t": "i32", "HS": "i32"}
    found: list[Case] = [(smear._smear_decode_kernel, decode, constants, warps)]
    for given in (False, True):
        found.append((smear._smear_forward_kernel, forward, {**constants, "GIVEN": given}, warps))
        found.append((smear._smear_backward_kernel, backward, {**constants, "GIVEN": given}, warps))
    return found


def value_cases(NH: int, dtype: str) -> list[Case]:
    heads, w = torch.empty(1, NH, 128, device="meta"), torch.empty(NH, 12, device="meta")
    sizes, warps = value.launch(heads, w)
    types = dict.fromkeys(("table", "x", "x0", "w"), dtype) | {
        "tokens": "*i64",
        **dict.fromkeys(("rstd", "a", "b"), "*fp32"),
        "C": "i32",
        "HS": "i32",
    }
    types["NH"] = "i32?"
    constants = {"CHANNELS": 12, "GATE": value.GATE, **sizes}
    backward = {**types, "du": dtype, "dy": dtype, "part": "*fp32", "dv": dtype, "dv_t": "i32", "n": "i32"}
    return [
        (value._value_forward_kernel, {**types, "v": dtype, "v_t": "i32"}, constants, warps),
        (value._value_backward_kernel, backward, constants, warps),
    ]


CASES: dict[str, list[Case]] = {
    "attention": attention_cases(),
    "bias": [*bias_cases("*bf16"), *bias_cases("*fp32")],
    "classifier": classifier_cases(),
    "decode": [*decode_cases(1600, "*bf16"), *decode_cases(768, "*fp32")],
    "embedding": [*embedding_cases(1600, "*bf16"), *embedding_cases(768, "*fp32")],
    "gelu": [*gelu_cases("*bf16"), *gelu_cases("*fp32")],
    "glu": [*glu_cases("*bf16"), *glu_cases("*fp32")],
    "guard": guard_cases(),
    "lora": [*lora_cases("*bf16"), *lora_cases("*fp32")],
    "mix": [*mix_cases(768, "*bf16"), *mix_cases(1536, "*bf16"), *mix_cases(768, "*fp32")],
    "muon": muon_cases(),
    "nf4": nf4_cases(),
    "norm": [
        *(c for kind in ("*bf16", "*fp32") for C in (1600, 768, 4096) for c in norm_cases(C, kind)),
        *norm_cases(4096, "*bf16", rms=True),
        *norm_cases(1152, "*bf16", rms=True, offset=1.0),
        *(c for kind in ("*bf16", "*fp32") for c in norm_cases(128, kind, rms=True, heads=16)),
        *norm_cases(256, "*bf16", rms=True, heads=4, offset=1.0),
    ],
    "optimizer": optimizer_cases(),
    "pick": [case for C in (768, 576, 2048) for dtype in ("*bf16", "*fp32") for case in pick_cases(C, dtype)],
    "relu": [*relu_cases("*bf16"), *relu_cases("*fp32")],
    "rope": [*rope_cases("*bf16"), *rope_cases("*fp32")],
    "rounding": rounding_cases(),
    "smear": [*smear_cases(1536, "*bf16"), *smear_cases(768, "*fp32")],
    "value": [*value_cases(12, "*bf16"), *value_cases(6, "*fp32")],
}
