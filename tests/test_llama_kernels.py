"""A decoder of the Llama family by Triton kernels, in Triton's interpreter, beside one in plain torch."""

from __future__ import annotations

import interpreter  # noqa: F401  # before the first launch: it mends the rounding of bf16 stores
import pytest
import torch
from llama_oracle import Decoder, random_values
from torch import Tensor

from daybreak.engine import Engine, EngineSpec
from daybreak.kernels import Kernels, all_ops
from daybreak.shapes import LlamaConfig

T = 12
SHAPES = {
    "shared keys, a window": Decoder(L=1, C=24, NH=4, NKV=2, HS=8, F=40, layers="w", window=5, qkv_bias=True),
    "all of Gemma": Decoder(
        L=2,
        C=24,
        NH=4,
        NKV=1,
        HS=8,
        F=40,
        qk_norm=True,
        layers="wf",
        window=5,
        window_theta=100.0,
        act="gelu",
        query_scalar=12,
        post_norms=True,
        norm_plus_one=True,
        embed_scale=True,
    ),
    "norms of heads, a head of its own": Decoder(L=1, C=24, NH=6, NKV=2, HS=8, F=40, qk_norm=True, tied=False),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py runs it there")
@pytest.mark.parametrize("name", SHAPES)
def test_triton_kernels_make_the_same_model(name: str) -> None:
    """Loss, gradients in the second of two micro-steps, prefill, and decoding of three rows and of one."""
    s, spec = SHAPES[name], {"B": 2, "T": T, "recompute": 2, "rows": 3}
    engines = [Engine(EngineSpec(LlamaConfig(**s._asdict()), **spec), init=False) for _ in range(2)]
    scratch, ops = torch.full((1 << 20,), 0xFF, dtype=torch.uint8), all_ops("cuda")
    engines[1].frame.k = Kernels(
        scratch, {n: "triton" if "triton" in ops[n].impls else "torch" for n in engines[0].arena.choices}
    )
    tokens = torch.randint(s.V, (3, 2, 2, T), generator=torch.Generator().manual_seed(0))
    results: list[dict[str, Tensor]] = []
    for engine in engines:
        engine.load_params(random_values(s))
        engine.forward_backward(tokens[0], tokens[1])
        found = {name: engine.grad(name).clone() for name in engine.names()} | {"loss": engine.state["loss"].clone()}
        found["prefill"] = engine.prefill(0, tokens[2].flatten(0, 1)[:3, :8].tolist()).clone()
        found["decode"] = engine.decode([1, 2, 3], [8, 8, 8]).clone()
        found["decode one"] = engine.decode([4], [9]).clone()
        results.append(found)
    plain, fused = results
    for key, want in plain.items():
        assert ((fused[key] - want).norm() / want.norm()).item() <= 3e-6, key
