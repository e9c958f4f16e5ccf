"""The GPUs that `plan` knows by name, and the speeds that were measured on them. state/throughput.py has their data."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from daybreak.errors import ConfigError
from daybreak.formatting import meant
from daybreak.shapes import SHAPES, Shape
from daybreak.state.throughput import GPU, GPUS, fp8_gain, peak_flops, size_of


def find_gpu(name: str) -> GPU:
    """The GPU of a short name. Raises ConfigError, with the nearest, for an unknown one."""
    key = re.sub("^(nvidia-)?(geforce-)?(rtx-?)?", "", name.lower().replace(" ", "-"))
    if key not in GPUS:
        said = f"{meant(key, GPUS, 'none has this name.', '{}')} Known: {', '.join(GPUS)}."
        raise ConfigError(f"--gpu {name} is not known; {said}")
    return GPUS[key]


@dataclass(frozen=True)
class Measured:
    """A row of `source`: tokens a second and utilisation on one `gpu`, in bf16, `tokens` in a step.

    AdamW updated split masters with fp32 moments, and each kernel was the one that is chosen by itself.
    """

    shape: str
    B: int
    recompute: int
    tokens: int
    tok_s: float
    mfu: float
    gpu: str = "NVIDIA H100 80GB HBM3"
    source: str = "bench/results/gpu_step.csv, 26 Nov 2026"
    T: int = 1024


H200, DECODER = "NVIDIA H200", "bench/results/decoder_step.csv"
MEASURED = (
    Measured("d12", 64, 0, 524_288, 616334, 0.5008),
    Measured("d48", 16, 1, 131_072, 56367, 0.5597),
    Measured("d48", 16, 2, 131_072, 56680, 0.5628),
    Measured("d48", 28, 2, 114_688, 57129, 0.5672),
    Measured("d48", 34, 2, 139_264, 55324, 0.5493),
    Measured("llama3.2-1b", 8, 0, 131_072, 68640, 0.5423, H200, f"{DECODER}, 1 Dec 2026", T=2048),
    Measured("llama3.2-1b", 1, 0, 65_536, 56414, 0.5146, H200, f"{DECODER}, 29 Nov 2026", T=8192),
    Measured("qwen2.5-1.5b", 16, 0, 131_072, 60268, 0.5803, H200, f"{DECODER}, 1 Dec 2026"),
    Measured("qwen2.5-1.5b", 8, 0, 131_072, 59984, 0.5776, H200, f"{DECODER}, 30 Nov 2026"),
    Measured("smollm2-135m", 16, 0, 131_072, 385833, 0.3975, H200, f"{DECODER}, 29 Nov 2026", T=2048),
)
# A GPU's speed among 4 H200 of one host over its own alone: d48, 1,048,576 tokens a step
# (bench/results/multi_gpu.csv).
SEVERAL_GPUS = 0.98


def token_rate(
    model: Shape, T: int, B: int, recompute: int, flops_per_token: int, gpu: str, gpus: int, tokens: int, fp8: float
) -> tuple[float, str] | None:
    """Tokens a second of `gpus` GPUs, and on what that rests; None if no shape of the family was measured, if heads
    have more than 128 channels, or if the GPU's peak is not known. tokens: those of a step, or 0 if something else is
    not as it was measured. fp8: the part of the steps that are in fp8."""
    scale, more = (1.0, "") if gpus == 1 else (gpus * SEVERAL_GPUS, f"; times {gpus} x {SEVERAL_GPUS}, measured on 4")
    if fp8:
        gain = 1 / (fp8 / fp8_gain(model) + 1 - fp8)
        basis = "measured on one H200 for d12 to d48"
        if size_of(model) < size_of(SHAPES["d12"]):
            basis = "assumed: d12 is the smallest that was measured"
        scale, more = scale * gain, f"{more}; times {gain:.2f} for fp8, {basis}"

    def distance(m: Measured) -> tuple[float, ...]:
        size = size_of(SHAPES[m.shape]) - size_of(model)
        return abs(size), abs(math.log(m.T / T)), abs(m.recompute - recompute), abs(math.log(m.B / B))

    family = [m for m in MEASURED if SHAPES[m.shape].arch == model.arch]
    if not family or model.HS > 128:  # other kernels compute attention with wider heads
        return None
    near = min(family, key=distance)
    rows = f"B {near.B}" if near.T == 1024 else f"B {near.B} x T {near.T}"
    where = f"{near.shape} {rows}, recompute {near.recompute} on one {near.gpu} ({near.source})"
    if (SHAPES[near.shape], near.T, gpu) == (model, T, near.gpu):
        exact = (near.B, near.recompute, near.tokens, gpus, 0) == (B, recompute, tokens, 1, fp8)
        return near.tok_s * scale, f"{'measured' if exact else 'modelled, from'} {where}{more}"
    if (peak := peak_flops(gpu)) is None:
        return None
    less = ", but so small a model reaches less" if min(SHAPES[m.shape].C for m in family) > model.C else ""
    return near.mfu * peak / flops_per_token * scale, f"modelled: {near.mfu:.1%} of its peak, as {where}{less}{more}"
