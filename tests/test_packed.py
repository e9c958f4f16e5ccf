"""Rows that hold several documents: each document has the losses and gradients that it has alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import llama_oracle
import oracle
import pytest
import torch
from torch import Tensor

from daybreak.config_keys import LoraConfig
from daybreak.engine import Engine, EngineSpec
from daybreak.shapes import GPT2Config, LlamaConfig

torch.set_num_threads(1)
T, V = 48, 97
GEMMA: dict[str, Any] = {"qk_norm": True, "act": "gelu", "post_norms": True, "norm_plus_one": True, "embed_scale": True}
DECODERS = {
    "llama": llama_oracle.Decoder(V=V, L=2, C=32, NH=4, NKV=2, HS=8, F=48, max_T=T),
    "windows and QK-norm": llama_oracle.Decoder(
        V=V, L=3, C=32, NH=4, NKV=1, HS=8, F=48, max_T=T, layers="wnf", window=5, window_theta=100.0, **GEMMA
    ),
}
GPT2 = oracle.Shape(L=2, C=32, NH=4, max_T=T, V=V)
MODELS = ["gpt2", *DECODERS]
# Lengths of the documents of two rows; what is left of a row is padding, a document that is not learned.
ROWS = [[17, 1, 23, 7], [30, 11]]


def packed() -> tuple[Tensor, Tensor, Tensor, list[tuple[int, int, int]]]:
    """Tokens, targets and positions (2, T); and (row, start, length) of every document. Every third target of a
    document and its last are not learned."""
    torch.manual_seed(3)
    tokens, targets, positions = torch.randint(V, (2, T)), torch.full((2, T), -1), torch.zeros(2, T, dtype=torch.int64)
    places = []
    for row, lengths in enumerate(ROWS):
        start = 0
        for n in [*lengths, T - sum(lengths)]:
            positions[row, start : start + n] = torch.arange(n)
            if start < sum(lengths):
                places.append((row, start, n))
                targets[row, start : start + n - 1] = tokens[row, start + 1 : start + n]
                targets[row, start : start + n : 3] = -1
            start += n
    return tokens, targets, positions, places


def alone(places: list[tuple[int, int, int]], tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Each document in a row of its own."""
    x, y = torch.zeros(len(places), T, dtype=torch.int64), torch.full((len(places), T), -1)
    for i, (row, start, n) in enumerate(places):
        x[i, :n], y[i, :n] = tokens[row, start : start + n], targets[row, start : start + n]
    return x, y


def engine(name: str, compute: str, **how: Any) -> Engine:
    if name == "gpt2":
        made = Engine(EngineSpec(GPT2Config(**GPT2._asdict()), T=T, compute=compute, **how), init=False)
        made.load_params(oracle.random_values(GPT2, 1))
    else:
        shape = DECODERS[name]
        made = Engine(EngineSpec(LlamaConfig(**shape._asdict()), T=T, compute=compute, **how), init=False)
        made.load_params(llama_oracle.random_values(shape, 1))
    for buffer in ("activations", "scratch"):
        made.frame.buffers[buffer].fill_(0xFF)  # NaN, where something reads what nothing wrote
    return made


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("compute", "of_tokens", "of_documents"), [("fp32", 5e-7, 2.5e-7), ("fp64", 1e-14, 1e-15)])
def test_losses_equal_those_of_the_documents_alone(
    name: str, compute: str, of_tokens: float, of_documents: float
) -> None:
    """The mean loss of each document, and every token's relative to the largest."""
    tokens, targets, positions, places = packed()
    losses = engine(name, compute, B=2, documents=True).eval_losses(tokens, targets, positions).clone()
    x, y = alone(places, tokens, targets)
    want = engine(name, compute, B=len(places)).eval_losses(x, y)
    assert torch.equal(losses == 0, targets < 0)
    for i, (row, start, n) in enumerate(places):
        mine, theirs = losses[row, start : start + n].double(), want[i, :n].double()
        assert (mine - theirs).abs().max() <= of_tokens * want.max(), (name, i)
        assert abs(mine.sum() - theirs.sum()) <= of_documents * theirs.sum(), (name, i)
    # A fault must be seen: without documents, later documents see earlier ones.
    mixed = engine(name, compute, B=2, documents=True).eval_losses(tokens, targets)
    first = ROWS[0][0]
    torch.testing.assert_close(mixed[0, :first], losses[0, :first], rtol=0, atol=of_tokens * float(want.max()))
    assert (mixed[0, first + 1 :] - losses[0, first + 1 :]).abs().max() > 1e-3


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recompute", [0, 2, 3])
def test_gradients_equal_those_of_the_documents_alone(name: str, recompute: int) -> None:
    """In fp64, of two micro-steps of a row each, to 1e-11 of the largest element; and the step's loss."""
    tokens, targets, positions, places = packed()
    made = engine(name, "fp64", B=1, documents=True, recompute=recompute)
    made.train_step(tokens[:, None], targets[:, None], positions[:, None], lr=0.0, step=0)
    other = engine(name, "fp64", B=len(places), recompute=recompute)
    x, y = alone(places, tokens, targets)
    other.train_step(x[None], y[None], lr=0.0, step=0)
    assert made.stats()["loss"] == pytest.approx(other.stats()["loss"], rel=1e-13)
    for parameter in made.names():
        want = other.grad(parameter)
        assert (made.grad(parameter) - want).abs().max() <= 1e-11 * want.abs().max(), parameter


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu_finetune.py runs it there")
@pytest.mark.parametrize("name", MODELS)
def test_triton_kernels_make_the_same_model(name: str) -> None:
    """In Triton's interpreter, beside plain torch: losses, and gradients of the second of two micro-steps."""
    pytest.importorskip("triton")
    import interpreter  # noqa: F401

    from daybreak.kernels import Kernels, all_ops

    tokens, targets, positions, _ = packed()
    results: list[dict[str, Tensor]] = []
    for backend in ("torch", "triton"):
        made, ops = engine(name, "fp32", B=1, documents=True, recompute=2), all_ops("cuda")
        if backend == "triton":
            scratch = torch.full((1 << 22,), 0xFF, dtype=torch.uint8)
            picks = {n: "triton" if "triton" in ops[n].impls else "torch" for n in made.arena.choices}
            made.frame.k = Kernels(scratch, picks)
        made.forward_backward(tokens[:, None], targets[:, None], positions[:, None])
        found = {n: made.grad(n).clone() for n in made.names()}
        results.append(found | {"losses": made.eval_losses(tokens[:1], targets[:1], positions[:1]).clone()})
    plain, fused = results
    for key, want in plain.items():
        assert ((fused[key] - want).norm() / want.norm()).item() <= 3e-6, key


@pytest.mark.parametrize("name", MODELS)
def test_adapters_have_the_gradients_of_the_documents_alone(name: str) -> None:
    """LoRA on all linear layers, in fp64, with weights of which every one matters."""
    tokens, targets, positions, places = packed()
    x, y = alone(places, tokens, targets)
    cfg: Any = GPT2Config(**GPT2._asdict()) if name == "gpt2" else LlamaConfig(**DECODERS[name]._asdict())
    engines = [
        Engine(EngineSpec(cfg, B=B, T=T, compute="fp64", lora=LoraConfig(4), documents=documents))
        for B, documents in ((2, True), (len(places), False))
    ]
    for made in engines:
        for i, parameter in enumerate(made.names()):
            value = torch.randn(made.param(parameter).shape, generator=torch.Generator().manual_seed(i))
            made.set_exact(parameter, 0.2 * value.double())
    engines[0].train_step(tokens[None], targets[None], positions[None], lr=0.0, step=0)
    engines[1].train_step(x[None], y[None], lr=0.0, step=0)
    assert engines[0].stats()["loss"] == pytest.approx(engines[1].stats()["loss"], rel=1e-13)
    adapters = list(engines[0].table.offsets)
    assert len(adapters) >= 8 * cfg.L
    for adapter in adapters:
        want = engines[1].grad(adapter)
        assert (engines[0].grad(adapter) - want).abs().max() <= 1e-11 * want.abs().max(), adapter


def test_frozen_embeddings_need_no_places_gradient() -> None:
    """Only the blocks train: the same gradients as with everything trainable."""
    tokens, targets, positions, _ = packed()
    whole, part = (
        engine("gpt2", "fp64", B=2, documents=True, trainable=trainable) for trainable in (("*",), ("h.*", "wte"))
    )
    for made in (whole, part):
        made.train_step(tokens[None], targets[None], positions[None], lr=0.0, step=0)
    assert all(torch.equal(part.grad(name), whole.grad(name)) for name in part.table.offsets)


def test_an_engine_says_which_rows_it_takes() -> None:
    tokens, targets, positions, _ = packed()
    made = engine("gpt2", "fp32", B=2, documents=True)
    with pytest.raises(AssertionError, match="packed rows come with positions"):
        made.train_step(tokens[None], targets[None], lr=0.0, step=0)
    plain = Engine(replace(made.spec, documents=False))
    with pytest.raises(AssertionError, match="packed rows come with positions"):
        plain.train_step(tokens[None], targets[None], positions[None], lr=0.0, step=0)


def test_on_cuda_attention_has_a_backend_that_stays_in_documents() -> None:
    """Of the backends that an H100 has, only Triton's attention takes `lo`. All else stays as it is."""
    pytest.importorskip("triton")
    from daybreak.engine.passes import plan_engine

    cfg = LlamaConfig(**DECODERS["llama"]._asdict())
    spec = EngineSpec(cfg, B=2, T=T, compute="bf16", device_type="cuda")
    plain, packed = (plan_engine(replace(spec, documents=d))[2].choices for d in (False, True))
    assert {name: (plain[name], packed[name]) for name in plain if plain[name] != packed[name]} == {
        "attention_forward": ("fa4", "triton"), "attention_backward": ("fa4", "triton"),
    }  # fmt: skip
