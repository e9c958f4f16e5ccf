"""The yardstick: GPT-2 as one would write it in plain eager PyTorch, with autograd and the fused AdamW.

    python bench/eager_gpt2.py --model 124M --dtype fp32 --threads 2

Builds the model and one fixed batch from a seed, then serves its standard input: every line asks for one training
step, and is answered by one JSON line {"seconds": ..., "loss": ...}. Between requests it sleeps on the pipe, so another
process can be measured in turn. The vocabulary is the padded 50304, all of it trained, as nanoGPT does.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Shape(NamedTuple):
    L: int
    C: int
    NH: int
    max_T: int
    V: int


SHAPES = {"124M": Shape(12, 768, 12, 1024, 50304), "tiny": Shape(2, 64, 4, 128, 512)}
LR, BETAS, EPS, WEIGHT_DECAY, CLIP = 3e-4, (0.9, 0.95), 1e-8, 0.1, 1.0


class Block(nn.Module):
    """Pre-LayerNorm attention and MLP on the residual stream, (B, T, C) -> (B, T, C)."""

    def __init__(self, C: int, NH: int) -> None:
        super().__init__()
        self.NH = NH
        self.ln1, self.ln2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.qkv, self.attproj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.fc, self.fcproj = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (y.view(B, T, self.NH, -1).transpose(1, 2) for y in self.qkv(self.ln1(x)).split(C, dim=2))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attproj(a.transpose(1, 2).reshape(B, T, C))
        return x + self.fcproj(F.gelu(self.fc(self.ln2(x)), approximate="tanh"))


class GPT2(nn.Module):
    """GPT-2 with a tied head; forward returns the mean cross-entropy of (B, T) targets."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(shape.V, shape.C), nn.Embedding(shape.max_T, shape.C)
        self.h = nn.ModuleList(Block(shape.C, shape.NH) for _ in range(shape.L))
        self.lnf = nn.LayerNorm(shape.C)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02 / (2 * shape.L) ** 0.5 if "proj" in name else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        for block in self.h:
            x = block(x)
        logits = F.linear(self.lnf(x), self.wte.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def problem(model: str, B: int, T: int, seed: int = 42) -> tuple[GPT2, Tensor, Tensor]:
    """The seeded module and the (B, T) tokens and targets that every contender of a benchmark starts from."""
    torch.manual_seed(seed)
    module = GPT2(SHAPES[model])
    ids = torch.randint(SHAPES[model].V, (B, T + 1))
    return module, ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def training_step(module: GPT2, tokens: Tensor, targets: Tensor, dtype: str) -> Callable[[], float]:
    """A function that does one step and returns its loss.

    dtype: fp32; bf16-autocast (fp32 weights); bf16-cast (everything bf16: fewer bytes, but no exact weights).
    """
    if dtype == "bf16-cast":
        module.to(torch.bfloat16)
    autocast = torch.autocast("cpu", torch.bfloat16) if dtype == "bf16-autocast" else nullcontext()
    groups = [
        {"params": [p for p in module.parameters() if p.dim() == 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in module.parameters() if p.dim() != 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS, fused=True)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with autocast:
            loss = module(tokens, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), CLIP)
        optimizer.step()
        return loss.item()

    return step


def serve(step: Callable[[], float]) -> None:
    """Answer every line of standard input with one timed step, until it closes."""
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        loss = step()
        print(json.dumps({"seconds": time.perf_counter() - start, "loss": loss}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="124M")
    parser.add_argument("--B", type=int, default=4)
    parser.add_argument("--T", type=int, default=64)
    parser.add_argument("--dtype", choices=("fp32", "bf16-autocast", "bf16-cast"), default="fp32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    serve(training_step(*problem(args.model, args.B, args.T), args.dtype))


if __name__ == "__main__":
    main()
