"""The other yardstick: the same nn.Module under torch.compile with flash attention and the fused AdamW, on one GPU.

    python bench/compile_gpt2.py d48 --B 8 --tokens 131072 --seconds 30

bf16 autocast over fp32 weights, gradients accumulated over micro-steps, the padded vocabulary, clip at 1.0: what a
careful PyTorch user writes. Prints the median step after the first five.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from eager_gpt2 import BETAS, CLIP, EPS, GPT2, LR, WEIGHT_DECAY, Shape

SHAPES = {"d12": Shape(12, 768, 12, 1024, 50304), "d48": Shape(48, 1600, 25, 1024, 50304)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", choices=SHAPES)
    parser.add_argument("--B", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--seconds", type=float, default=30.0)
    a = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    began = time.perf_counter()
    shape = SHAPES[a.model]
    with torch.device("cuda"):
        module = GPT2(shape)
    ids = ((shape.V - 46) ** torch.rand(8, a.B, shape.max_T + 1, device="cuda") - 1).long()
    compiled = torch.compile(module)
    groups = [
        {"params": [p for p in module.parameters() if p.dim() == 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in module.parameters() if p.dim() != 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS, fused=True)
    micro, times = a.tokens // (a.B * shape.max_T), []
    while len(times) < 8 or sum(times[5:]) < a.seconds:
        start = time.perf_counter()
        for i in range(micro):
            x = ids[i % 8]
            with torch.autocast("cuda", torch.bfloat16):
                loss = compiled(x[:, :-1].contiguous(), x[:, 1:].contiguous()) / micro
            loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        if len(times) == 1:
            print(f"first step done after {time.perf_counter() - began:.1f} s")
    step, peak = statistics.median(times[5:]), torch.cuda.max_memory_allocated() >> 20
    print(
        f"torch.compile {a.model} B={a.B}: {1e3 * step:.1f} ms, {a.tokens / step:,.0f} tok/s, peak {peak} MiB, "
        f"torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
