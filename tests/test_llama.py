"""The decoder family computes what transformers computes, and its gradients are those of autograd in fp64.

Weights are made by transformers itself for each type of model, then made to matter: no norm's scale is one and no bias
is zero. Scalings of the angles begin at 32 tokens, because the texts are that short.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from llama_oracle import Decoder, Model, angles, random_values
from torch import Tensor

from daybreak.engine import Engine, EngineSpec
from daybreak.engine.passes import plan_engine
from daybreak.models.registry import build_model
from daybreak.models.rotary import rotary, window_rotary
from daybreak.shapes import LlamaConfig, parse_shape

transformers = pytest.importorskip("transformers", reason="the test extra installs transformers")
torch.set_num_threads(1)
T = 48

LLAMA3 = {"rope": "llama3", "rope_factor": 8.0, "rope_original": 32}
GEMMA = ["sliding_attention", "sliding_attention", "full_attention"]
GEMMA3: dict[str, Any] = {"eps": 1e-6, "qk_norm": True, "act": "gelu", "post_norms": True, "norm_plus_one": True,
                          "embed_scale": True}  # fmt: skip
LONG = [1.0 + j / 3 for j in range(8)]  # transformers' divisors for texts longer than the original length, as all here
YARN = {"rope": "yarn", "rope_factor": 4.0, "rope_original": 32}
# What transformers calls a type of model, the keys of its configuration beside those of `sizes`, and our shape. The
# heads of most have another size than C / NH.
CASES: dict[str, tuple[str, dict[str, Any], Decoder]] = {
    "llama": ("llama", {}, Decoder()),
    "llama linear": ("llama", {"rope_type": "linear", "factor": 4.0}, Decoder(rope="linear", rope_factor=4.0)),
    "llama3": ("llama", {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 32}, Decoder(NKV=1, theta=5e5, **LLAMA3)),
    "llama with longrope": (
        "llama", {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 32,
                  "short_factor": [9.0] * 8, "long_factor": LONG},
        Decoder(rope="longrope", rope_factor=4.0, rope_original=32, rope_factors=",".join(map(str, LONG)))),
    "llama untied with biases": ("llama", {"attention_bias": True, "mlp_bias": True}, Decoder(
        NKV=4, HS=8, eps=1e-6, tied=False, qkv_bias=True, attproj_bias=True, mlp_bias=True)),
    "mistral": ("mistral", {"sliding_window": 5}, Decoder(HS=24, tied=False, layers="w", window=5)),
    "mistral without a window": ("mistral", {"sliding_window": None}, Decoder(HS=24, tied=False)),
    "qwen2": ("qwen2", {}, Decoder(NH=6, HS=8, F=64, eps=1e-6, qkv_bias=True, theta=1e6)),
    "qwen2 with yarn and windows": (
        "qwen2", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32,
                  "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
        Decoder(L=3, HS=8, eps=1e-6, qkv_bias=True, layers="ffw", window=7, theta=1e6, **YARN)),
    "qwen3": ("qwen3", {}, Decoder(HS=24, eps=1e-6, qk_norm=True, theta=1e6)),
    "qwen3 untied with biases": ("qwen3", {"attention_bias": True}, Decoder(
        tied=False, qk_norm=True, qkv_bias=True, attproj_bias=True)),
    "gemma3": ("gemma3_text", {"sliding_window": 5, "layer_types": GEMMA, "query_pre_attn_scalar": 16}, Decoder(
        L=3, HS=24, layers="wwf", window=5, query_scalar=16, theta=5e3, window_theta=100.0, **GEMMA3)),
    "gemma3 with linear angles, biases and all norms": (
        "gemma3_text", {"sliding_window": 7, "layer_types": GEMMA[1:], "query_pre_attn_scalar": 40,
                        "attention_bias": True, "rope_type": "linear", "factor": 8.0},
        Decoder(NKV=1, layers="wf", window=7, query_scalar=40, theta=1e6, window_theta=1e4, qkv_bias=True,
                attproj_bias=True, rope="linear", rope_factor=8.0, **GEMMA3)),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 1, 0, 1]}, Decoder(L=4, HS=8, layers="ffnf", theta=5e6)),
}  # fmt: skip
NAMES = {
    "ln1w": ("input_layernorm.weight",), "ln2w": ("post_attention_layernorm.weight",),
    "qkvw": tuple(f"self_attn.{x}_proj.weight" for x in "qkv"),
    "qkvb": tuple(f"self_attn.{x}_proj.bias" for x in "qkv"),
    "qnormw": ("self_attn.q_norm.weight",), "knormw": ("self_attn.k_norm.weight",),
    "attprojw": ("self_attn.o_proj.weight",), "attprojb": ("self_attn.o_proj.bias",),
    "gateupw": ("mlp.gate_proj.weight", "mlp.up_proj.weight"), "gateupb": ("mlp.gate_proj.bias", "mlp.up_proj.bias"),
    "fcprojw": ("mlp.down_proj.weight",), "fcprojb": ("mlp.down_proj.bias",),
}  # fmt: skip
POST = {"ln1pw": ("post_attention_layernorm.weight",), "ln2w": ("pre_feedforward_layernorm.weight",),
        "ln2pw": ("post_feedforward_layernorm.weight",)}  # fmt: skip
WHOLE = {"wte": "model.embed_tokens.weight", "lnfw": "model.norm.weight", "headw": "lm_head.weight"}


def shape(of: Decoder) -> LlamaConfig:
    return LlamaConfig(**of._asdict())


def names(s: Decoder, name: str) -> list[str]:
    """The names of the tensors of one of our parameters in transformers."""
    layer, _, leaf = name.removeprefix("h.").partition(".")
    each = (NAMES | POST if s.post_norms else NAMES)[leaf] if leaf else ()
    return [WHOLE[name]] if name in WHOLE else [f"model.layers.{layer}.{x}" for x in each]


def in_our_layout(tensors: Mapping[str, Tensor], s: Decoder) -> dict[str, Tensor]:
    """Tensors by transformers' names -> by ours, the vocabulary padded with zero rows."""
    out = {}
    for name in s.parameters():
        out[name] = torch.cat([tensors[x] for x in names(s, name)])
        if name in ("wte", "headw"):
            out[name] = torch.cat([out[name], torch.zeros(s.Vp - s.V, s.C)])
    return out


def made_by_transformers(kind: str, more: Mapping[str, Any], s: Decoder) -> Any:
    sizes = {
        "hidden_size": s.C, "intermediate_size": s.F, "num_hidden_layers": s.L, "num_attention_heads": s.NH,
        "num_key_value_heads": s.NKV, "head_dim": s.HS, "vocab_size": s.V, "max_position_embeddings": s.max_T,
        "rms_norm_eps": s.eps, "tie_word_embeddings": s.tied, "pad_token_id": None, "bos_token_id": None,
        "eos_token_id": None,
    }  # fmt: skip
    scaling = ("rope_type", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
               "short_factor", "long_factor")  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": s.theta} | {k: v for k, v in more.items() if k in scaling}
    keys = {k: v for k, v in more.items() if k not in scaling}
    if s.window_theta:
        local = {"rope_type": "default", "rope_theta": s.window_theta}
        rope = {"full_attention": rope, "sliding_attention": local}
    config = transformers.AutoConfig.for_model(kind, **sizes, rope_parameters=rope, **keys)
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(0.0, 0.2)
            if "norm" in name:
                p.mul_(1.5).add_(0.0 if s.norm_plus_one else 1.0)
    return model


def tokens_of(s: Decoder, *size: int, seed: int = 0) -> Tensor:
    return torch.randint(s.V, size, generator=torch.Generator().manual_seed(seed))


def engine_of(s: Decoder, values: Mapping[str, Tensor], B: int = 2, **options: Any) -> Engine:
    """An engine with these weights, whose other memory is full of NaN."""
    engine = Engine(EngineSpec(shape(s), B=B, T=T, **options), init=False)
    engine.load_params(dict(values))
    for name in ("activations", "scratch", "kv"):
        engine.frame.buffers[name].fill_(0xFF)
    if options.get("train", True):
        for name in engine.names():
            engine.grad(name).fill_(math.nan)
    return engine


def apart(x: Tensor, y: Tensor) -> float:
    """The size of the difference, relative to that of y."""
    return ((x.double() - y.double()).norm() / y.double().norm()).item()


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case: str) -> None:
    kind, more, s = CASES[case]
    theirs = made_by_transformers(kind, more, s)
    state = theirs.state_dict()
    engine = engine_of(s, in_our_layout(state, s), train=False)
    tokens = tokens_of(s, 2, T)
    with torch.no_grad():
        want = theirs(tokens).logits
    assert engine.logits(tokens).isfinite().all()
    assert apart(engine.logits(tokens), want) <= 1e-6
    wanted = {theirs for name in s.parameters() for theirs in names(s, name)}
    assert {name for name in state if "rotary" not in name} == wanted | ({"lm_head.weight"} if s.tied else set())


@pytest.mark.parametrize("case", CASES)
def test_bf16_errs_less_than_transformers_in_bf16(case: str) -> None:
    """Both against transformers in fp32, with weights that bf16 holds exactly. We round once where it rounds thrice."""
    kind, more, s = CASES[case]
    theirs, tokens = made_by_transformers(kind, more, s), tokens_of(s, 8, T)
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(p.bfloat16())
        engine = engine_of(s, in_our_layout(theirs.state_dict(), s), B=8, train=False, compute="bf16")
        want = theirs(tokens).logits.double()
        rounded = theirs.to(torch.bfloat16)(tokens).logits
    assert apart(engine.logits(tokens), want) <= apart(rounded, want) < 0.03


def batch(s: Decoder) -> tuple[Tensor, Tensor]:
    """Two micro-steps of tokens and targets (2, 2, T), some masked, unevenly."""
    tokens, targets = tokens_of(s, 2, 2, 2, T)
    targets[torch.rand(targets.shape, generator=torch.Generator().manual_seed(1)) < 0.3] = -1
    targets[0, 1] = -1
    return tokens, targets


def oracle_of(s: Decoder, values: dict[str, Tensor]) -> Model:
    """With the engine's angles. They come from exponents rounded to fp32, so they are off by up to 6e-8 ln(theta)."""
    oracle = Model(s, values)
    for name, (freq, factor) in {"freq": rotary(shape(s)), "window_freq": window_rotary(shape(s))}.items():
        assert ((getattr(oracle, name) - freq).abs() <= 1.5e-6 * freq).all()
        assert getattr(oracle, name.replace("freq", "attention")) == pytest.approx(factor, rel=1e-15)
        setattr(oracle, name, freq)
    return oracle


# Flags together that no published model has.
OWN = {"post-norms and all biases": Decoder(
    L=3, tied=False, qkv_bias=True, attproj_bias=True, mlp_bias=True, layers="nwf", window=5, window_theta=50.0,
    post_norms=True, embed_scale=True)}  # fmt: skip


@pytest.mark.parametrize("case", [*CASES, *OWN])
def test_every_gradient_is_the_oracles(case: str) -> None:
    """At each level of recompute, which changes memory and not one bit."""
    s = OWN[case] if case in OWN else CASES[case][2]
    values, (tokens, targets) = random_values(s), batch(s)
    loss, grads = oracle_of(s, values).gradients(tokens, targets)
    found, sizes = [], []
    for level in range(4):
        engine = engine_of(s, values, compute="fp64", recompute=level)
        engine.forward_backward(tokens, targets)
        found.append({name: engine.grad(name).clone() for name in engine.names()})
        sizes.append(engine.arena.sizes()["activations"])
        assert engine.state["loss"].item() == pytest.approx(loss, rel=1e-12)
        assert all(torch.equal(found[0][name], grad) for name, grad in found[-1].items())
    assert found[0].keys() == grads.keys()
    for name, grad in grads.items():
        assert apart(found[0][name], grad) <= 1e-9, name
    assert sizes[0] > sizes[1] > sizes[2] > sizes[3]


@pytest.mark.parametrize("case", ["llama3", "llama untied with biases", "qwen3 untied with biases", "gemma3"])
def test_fp32_and_evaluation(case: str) -> None:
    s = CASES[case][2]
    values, (tokens, targets) = random_values(s), batch(s)
    oracle = oracle_of(s, values)
    loss, grads = oracle.gradients(tokens, targets)
    engine = engine_of(s, values)
    engine.forward_backward(tokens, targets)
    assert engine.state["loss"].item() == pytest.approx(loss, rel=1e-5)
    for name, grad in grads.items():
        assert apart(engine.grad(name), grad) <= 2e-5, name
    losses = oracle.losses(tokens[0], targets[0]).detach()
    assert apart(engine.eval_losses(tokens[0], targets[0]), losses) <= 1e-5
    few = engine.eval_losses(tokens[0, :1, :7], targets[0, :1, :7])  # fewer rows and columns than planned
    assert apart(few, losses[:1, :7]) <= 1e-5


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("compute", ["fp32", "fp64"])
def test_decoding_computes_the_logits_of_the_whole_text(case: str, compute: str) -> None:
    """Rows of unequal length, prefilled together and alone, token by token up to the last place."""
    s, limit = CASES[case][2], {"fp32": 1e-5, "fp64": 2e-7}[compute]  # logits come in fp32
    values = random_values(s)
    oracle, engine = (
        oracle_of(s, values),
        engine_of(s, values, compute=compute, rows=4, train=False),
    )
    assert engine.state["kv"].shape == (s.L, 2, 4, s.NKV, T, s.HS)
    lengths = (1, 31, 31, 40)  # before and beyond windows and the original length
    texts = [tokens_of(s, T, seed=i).tolist() for i in range(4)]
    want = [oracle.logits(torch.tensor([text]))[0].detach() for text in texts]

    def check(got: Tensor, rows: list[int], places: list[int]) -> None:
        for x, row, place in zip(got, rows, places, strict=True):
            assert apart(x, want[row][place]) <= limit, (row, place)

    check(engine.prefill(1, [texts[i][: lengths[i]] for i in (1, 2)]), [1, 2], [30, 30])
    check(engine.prefill(0, [texts[0][:1]]), [0], [0])
    check(engine.prefill(3, [texts[3][:40]]), [3], [39])
    for step in range(T - max(lengths)):
        places = [n + step for n in lengths]
        check(engine.decode([text[p] for text, p in zip(texts, places, strict=True)], places), [0, 1, 2, 3], places)
    check(engine.decode([texts[0][8 + 1]], [8 + 1]), [0], [9])  # one row alone


@pytest.mark.parametrize("case", ["llama untied with biases", "qwen3 untied with biases", "mistral", "gemma3"])
@pytest.mark.parametrize("recompute", [0, 2, 3])
def test_no_two_tensors_share_bytes_while_both_are_needed(case: str, recompute: int) -> None:
    arena = plan_engine(EngineSpec(shape(CASES[case][2]), B=2, T=T, recompute=recompute))[2]
    needed = [e for e in arena.entries if e.buffer == "activations" and e.last > e.first]
    assert len(needed) > 20
    for i, a in enumerate(needed):
        for b in needed[:i]:
            together = a.first <= b.last and b.first <= a.last
            apart_in_memory = a.offset + a.nbytes <= b.offset or b.offset + b.nbytes <= a.offset
            assert apart_in_memory or not together, (a.name, b.name)


SHORT = [1.0 + j / 7 for j in range(32)]
SCALINGS = {
    "default": ({}, {}),
    "linear": ({"factor": 4.0}, {"rope_factor": 4.0}),
    "llama3": ({"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192}, {"rope_factor": 32.0, "rope_original": 8192}),
    "yarn": ({"factor": 4.0, "original_max_position_embeddings": 32768}, {"rope_factor": 4.0, "rope_original": 32768}),
    "yarn steep": ({"factor": 2.5, "beta_fast": 8.0, "beta_slow": 3.0, "attention_factor": 1.25,
                    "original_max_position_embeddings": 64},
                   {"rope_factor": 2.5, "rope_original": 64, "rope_low": 3.0, "rope_high": 8.0,
                    "rope_attention": 1.25}),
    "longrope": ({"factor": 4.0, "short_factor": SHORT, "long_factor": [9.0] * 32,
                  "original_max_position_embeddings": 4096},
                 {"rope_factor": 4.0, "rope_original": 4096, "rope_factors": ",".join(map(str, SHORT))}),
}  # fmt: skip


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("theta", [1e4, 5e5, 1e6])
def test_angles_are_those_of_transformers(scaling: str, theta: float) -> None:
    """Bit for bit: models were trained with angles that were rounded so. The oracle's as near as that rounding is."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theirs, ours = SCALINGS[scaling]
    kind, sizes = scaling.split()[0], {"hidden_size": 512, "num_attention_heads": 8, "max_position_embeddings": 131072}
    config = transformers.LlamaConfig(**sizes, rope_parameters={"rope_type": kind, "rope_theta": theta, **theirs})
    cfg = LlamaConfig(C=512, NH=8, max_T=131072, theta=theta, rope=kind, **ours)
    cfg.check()
    freq, attention = rotary(cfg)
    if kind == "default":
        want, factor = 1.0 / theta ** (torch.arange(0, 64, 2).float() / 64), 1.0
    else:
        want, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    assert torch.equal(freq, want)
    assert attention == factor
    exact, oracles = angles(Decoder(C=512, NH=8, HS=64, max_T=131072, theta=theta, rope=kind, **ours))
    assert oracles == pytest.approx(attention, rel=1e-15)
    assert ((freq - exact).abs() <= 1.5e-6 * exact).all()


@pytest.mark.parametrize("plus_one", [False, True])
def test_initial_weights(plus_one: bool) -> None:
    s = LlamaConfig(L=8, C=64, NH=4, NKV=2, HS=16, F=96, V=200, tied=False, qkv_bias=True, qk_norm=True)
    s = replace(s, post_norms=plus_one, norm_plus_one=plus_one)
    engine = Engine(EngineSpec(s, B=1, T=8), seed=3)
    wanted = {"attprojw": 0.02 / 4, "fcprojw": 0.02 / 4}
    for name in engine.names():
        leaf, x = name.rpartition(".")[2], engine.param(name)
        if leaf.endswith("b"):
            assert not x.any()
        elif x.dim() == 1:
            assert (x == (0 if plus_one else 1)).all()
        else:
            drawn = x[:200] if leaf in ("wte", "headw") else x
            assert drawn.std().item() == pytest.approx(wanted.get(leaf, 0.02), rel=0.06), name
            assert abs(drawn.mean().item()) < 0.02 / math.sqrt(drawn.numel()) * 4
    assert not engine.param("headw")[200:].any()


# Published, in millions, and by hand: without the padding of vocabularies, that no matmul reads twice.
PARAMETERS = {
    "smollm2-135m": 134.5, "smollm2-360m": 361.8, "smollm2-1.7b": 1711.4, "smollm3-3b": 3075.1, "llama2-7b": 6738.4,
    "llama3-8b": 8030.3, "llama3.1-8b": 8030.3, "llama3.2-1b": 1235.8, "llama3.2-3b": 3212.7, "qwen2.5-0.5b": 494.0,
    "qwen2.5-1.5b": 1543.7, "qwen2.5-7b": 7615.6, "qwen3-0.6b": 596.0, "qwen3-1.7b": 1720.6, "qwen3-4b": 4022.5,
    "qwen3-8b": 8190.7, "mistral-7b": 7241.7, "gemma3-270m": 268.1, "gemma3-1b": 999.9,
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_shapes_have_their_published_sizes(name: str) -> None:
    rows = build_model(parse_shape(name)).rows()
    assert sum(row.numel for row in rows) / 1e6 == pytest.approx(PARAMETERS[name], abs=0.06)


def test_floating_point_operations() -> None:
    """6 for each weight of a matmul and token, and 12 for each pair of query and key and each channel of its head."""
    s = Decoder(L=3, tied=False, layers="fwn", window=5)
    model = build_model(shape(s))
    parameters = sum(math.prod(size) for size in s.parameters().values())
    looked_up = s.Vp * s.C
    full = 6 * s.NH * s.HS * 48
    pairs = sum(min(i + 0.5, 5) for i in range(48)) / 48  # a query's own key counts half, so that all are T / 2
    wanted = 6 * (parameters - looked_up) + 2 * full + 12 * s.NH * s.HS * pairs
    assert model.flops_per_token(48, parameters) == pytest.approx(wanted, abs=1)
    tied = s._replace(tied=True)
    assert build_model(shape(tied)).flops_per_token(48, parameters - looked_up) == pytest.approx(wanted, abs=1)
