"""The decoder family in Hugging Face's folders: what transformers writes, we read, and the other way round."""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import CASES, LINEAR, LLAMA3, MAX_T, SIZES, YARN, V, edit, their_decoder, tokens_of
from interop_runs import inside
from safetensors.torch import load_file, save_file
from test_files_checked import DEEP, TWICE, mutations

from daybreak.engine import Engine, EngineSpec
from daybreak.errors import ConfigError, Error
from daybreak.interop import huggingface, load_model, open_source
from daybreak.interop.families import FAMILIES, family_named, family_of
from daybreak.interop.source import Export
from daybreak.shapes import LlamaConfig
from daybreak.state.run import Run

transformers = pytest.importorskip("transformers", reason="the test extra installs transformers")


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens_of()).logits


def weights(run: Path) -> bytes:
    return (Run(run).checkpoints[0] / "model.safetensors").read_bytes()


@pytest.mark.parametrize("case", CASES)
def test_in_and_out_and_in_again(case: str, tmp_path: Path) -> None:
    """Import: transformers' logits at every position. Export: it loads the folder, and its logits are the same bits.
    Import again: the same bytes."""
    model = their_decoder(case, tmp_path / "theirs", max_shard_size="150KB" if case == "llama" else "5GB")
    assert sum(p.numel() for p in model.parameters()) <= 1_000_000
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) == (5 if case == "llama" else 1)
    inside(tmp_path, "import", "theirs", "--name", "a", "--run.device", "cpu")
    want, truth = logits_of(model), logits_of(model.double())
    got = Run(tmp_path / "runs/a").load_engine()[0].logits(tokens_of())
    assert got.shape == want.shape == (1, MAX_T, V)
    assert (got - truth).norm() <= min(2 * (want - truth).norm(), 3e-6 * truth.norm())

    inside(tmp_path, "export", "runs/a", "--to", "hf", "out")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    assert torch.equal(logits_of(back), want)
    assert back.config.model_type == model.config.model_type
    inside(tmp_path, "import", "out", "--name", "b", "--run.device", "cpu")
    assert weights(tmp_path / "runs/b") == weights(tmp_path / "runs/a")
    assert Run(tmp_path / "runs/b").config.model == Run(tmp_path / "runs/a").config.model


def test_the_rows_of_our_parameters(tmp_path: Path) -> None:
    """By name and value, without the engine: [q; k; v], [gate; up], and which norm is which."""
    their_decoder("llama3", tmp_path / "m")
    theirs, source = load_file(tmp_path / "m/model.safetensors"), open_source(tmp_path / "m")
    c, layer = source.model, "model.layers.3."
    assert isinstance(c, LlamaConfig)
    assert (c.NH, c.NKV, c.HS, c.C, c.F, c.L, c.V) == (4, 2, 24, 64, 128, 4, V)
    for kind in ("weight", "bias"):
        q, k, v = (theirs[f"{layer}self_attn.{x}_proj.{kind}"] for x in "qkv")
        assert torch.equal(source.read(f"h.3.qkv{kind[0]}"), torch.cat([q, k, v]))
        gate, up = (theirs[f"{layer}mlp.{x}_proj.{kind}"] for x in ("gate", "up"))
        assert torch.equal(source.read(f"h.3.gateup{kind[0]}"), torch.cat([gate, up]))
        assert torch.equal(source.read(f"h.3.fcproj{kind[0]}"), theirs[f"{layer}mlp.down_proj.{kind}"])
        assert torch.equal(source.read(f"h.3.attproj{kind[0]}"), theirs[f"{layer}self_attn.o_proj.{kind}"])
    assert torch.equal(source.read("h.3.ln1w"), theirs[f"{layer}input_layernorm.weight"])
    assert torch.equal(source.read("h.3.ln2w"), theirs[f"{layer}post_attention_layernorm.weight"])
    assert torch.equal(source.read("lnfw"), theirs["model.norm.weight"])
    for name, key in (("wte", "model.embed_tokens.weight"), ("headw", "lm_head.weight")):
        assert torch.equal(source.read(name)[:V], theirs[key])
        assert not source.read(name)[V:].any()


OLD: list[tuple[dict[str, Any], dict[str, Any]]] = [  # (the old spelling, the new one)
    ({"rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 5e5}),
    ({"rope_theta": 5e5, "rope_scaling": None}, {"rope_type": "default", "rope_theta": 5e5}),
    ({}, {"rope_type": "default", "rope_theta": 1e4}),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, LINEAR),
    ({"rope_theta": 5e3, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}}, LLAMA3),
    ({"rope_theta": 1e4, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
     YARN),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 16, "attention_factor": 1.5},
      "original_max_position_embeddings": 32},
     {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "beta_fast": 16.0, "attention_factor": 1.5,
      "original_max_position_embeddings": 32}),
    ({"rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5] * 4, "long_factor": [1.0, 1.5] * 4,
                       "original_max_position_embeddings": 32}},
     {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.5] * 4, "long_factor": [1.0, 1.5] * 4,
      "original_max_position_embeddings": 32}),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new"), OLD, ids=[str(list(o))[:40] for o, _ in OLD])
def test_both_spellings_of_rotary_positions(old: dict[str, Any], new: dict[str, Any], tmp_path: Path) -> None:
    """The same shape from either, and its angles are those that transformers computes from the old one."""
    path = tmp_path / "config.json"
    base = {"model_type": "llama", **SIZES}
    path.write_text(json.dumps(base | old))
    shape = FAMILIES["llama"].shape(path, base | old)
    assert shape == FAMILIES["llama"].shape(path, base | {"rope_parameters": new})
    shape.check()
    theirs = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(
        transformers.AutoConfig.from_pretrained(tmp_path)
    )
    from daybreak.models.rotary import rotary

    freq, attention = rotary(shape)
    torch.testing.assert_close(freq, theirs.inv_freq, rtol=3e-7, atol=0)
    assert attention == pytest.approx(theirs.attention_scaling, rel=1e-12)
    said = family_of(shape, "Hugging Face's format").config(shape)  # both spellings are written
    for half in ({"rope_parameters": ...}, {"rope_theta": ..., "rope_scaling": ...}):
        kept = {key: value for key, value in said.items() if key not in half}
        assert FAMILIES["llama"].shape(path, kept) == shape


# model_type, keys of config.json (... where SIZES' is absent), what the shape then has.
RULES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", {"num_key_value_heads": None}, {"NKV": 4}),
    ("llama", {"num_key_value_heads": ...}, {"NKV": 4}),
    ("llama", {"head_dim": None}, {"HS": 16}),
    ("llama", {"head_dim": 8}, {"HS": 8}),
    ("llama", {}, {"tied": False, "eps": 1e-6, "theta": 1e4, "qkv_bias": False, "attproj_bias": False, "layers": "f"}),
    ("llama", {"attention_bias": True}, {"qkv_bias": True, "attproj_bias": True, "mlp_bias": False}),
    ("llama", {"sliding_window": 7}, {"layers": "f", "window": 0}),
    ("llama", {"hidden_act": "swish"}, {}),
    ("mistral", {"num_key_value_heads": ..., "num_attention_heads": 8, "hidden_size": 64}, {"NKV": 8, "HS": 8}),
    ("mistral", {}, {"layers": "w", "window": 4096}),
    ("mistral", {"sliding_window": None}, {"layers": "f", "window": 0}),
    ("mistral", {"head_dim": 24}, {"HS": 24}),
    ("qwen2", {}, {"qkv_bias": True, "attproj_bias": False, "layers": "f", "window": 0, "HS": 16, "tied": False}),
    ("qwen2", {"attention_bias": True}, {"qkv_bias": True, "attproj_bias": False}),
    ("qwen2", {"sliding_window": 8, "max_window_layers": 2}, {"layers": "f", "window": 0}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
     {"layers": "ffww", "window": 8}),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 0}, {"layers": "w", "window": 4096}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, {"layers": "f"}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8,
               "layer_types": ["sliding_attention", "full_attention"] * 2}, {"layers": "wf", "window": 8}),
    ("qwen3", {}, {"HS": 128, "qk_norm": True, "qkv_bias": False, "layers": "f"}),
    ("qwen3", {"attention_bias": True}, {"qkv_bias": True, "attproj_bias": True}),
    ("smollm3", {}, {"tied": True, "theta": 2e6, "layers": "fffn", "HS": 16}),
    ("smollm3", {"no_rope_layers": [1, 0, 1, 1]}, {"layers": "fnf"}),
    ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}, {"layers": "f"}),
    ("smollm3", {"no_rope_layer_interval": 2}, {"layers": "fn"}),
    ("smollm3", {"no_rope_layers": [1, 0, 1, 1], "use_sliding_window": True, "sliding_window": 8,
                 "layer_types": ["sliding_attention", "full_attention"] * 2}, {"layers": "wnwf", "window": 8}),
    ("gemma3_text", {}, {"layers": "w", "window": 4096, "theta": 1e6, "window_theta": 1e4, "HS": 256, "tied": True,
                         "query_scalar": 0, "post_norms": True, "norm_plus_one": True, "embed_scale": True,
                         "qk_norm": True, "act": "gelu", "qkv_bias": False}),
    ("gemma3_text", {"num_hidden_layers": 8, "sliding_window": 16, "head_dim": 16}, {
        "layers": "wwwwwf", "window": 16, "query_scalar": 256}),
    ("gemma3_text", {"sliding_window_pattern": 2, "rope_local_base_freq": 5000.0, "rope_theta": 2e6},
     {"layers": "wf", "theta": 2e6, "window_theta": 5e3}),
    ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "attention_bias": True},
     {"rope": "linear", "rope_factor": 8.0, "window_theta": 1e4, "qkv_bias": True, "attproj_bias": True}),
    ("gemma3_text", {"layer_types": ["full_attention"] * 4, "sliding_window": None},
     {"layers": "f", "window": 0, "window_theta": 0}),
    ("gemma3_text", {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0},
                                         "sliding_attention": {"rope_type": "default", "rope_theta": 50.0}}},
     {"rope": "linear", "rope_factor": 2.0, "theta": 1e6, "window_theta": 50.0}),
]  # fmt: skip


@pytest.mark.parametrize(("model_type", "keys", "want"), RULES, ids=[f"{m} {k}"[:60] for m, k, _ in RULES])
def test_absent_keys_and_nulls(model_type: str, keys: dict[str, Any], want: dict[str, Any], tmp_path: Path) -> None:
    """As transformers has them: where its configuration says the same thing, it is asked too."""
    said = {key: value for key, value in ({"model_type": model_type} | SIZES | keys).items() if value is not ...}
    (tmp_path / "config.json").write_text(json.dumps(said | {"pad_token_id": None}))
    shape = FAMILIES[model_type].shape(tmp_path / "config.json", said)
    assert isinstance(shape, LlamaConfig)
    assert {key: getattr(shape, key) for key in want} == want
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    head = getattr(theirs, "head_dim", theirs.hidden_size // theirs.num_attention_heads)
    assert (theirs.num_key_value_heads, head) == (shape.NKV, shape.HS)
    assert (shape.tied, shape.eps) == (theirs.tie_word_embeddings, theirs.rms_norm_eps)
    if model_type == "gemma3_text":
        far, near = (theirs.rope_parameters[f"{kind}_attention"] for kind in ("full", "sliding"))
        assert (shape.rope, shape.rope_factor) == (far["rope_type"], far.get("factor", 1.0))
        assert (shape.theta, near["rope_type"]) == (far["rope_theta"], "default")
        assert shape.window_theta == (near["rope_theta"] if shape.window else 0)
        assert (shape.query_scalar or shape.HS) == theirs.query_pre_attn_scalar
    else:
        assert shape.theta == theirs.rope_parameters["rope_theta"]
    kinds = [shape.kind(l) for l in range(shape.L)]
    if kinds_said := getattr(theirs, "layer_types", None):
        assert kinds_said == ["sliding_attention" if kind == "w" else "full_attention" for kind in kinds]
        assert not shape.window or shape.window == theirs.sliding_window
    if model_type == "smollm3":
        assert theirs.no_rope_layers == [int(kind != "n") for kind in kinds]
    assert family_of(shape, "x").shape(Path("c"), family_of(shape, "x").config(shape)) == shape


DEFAULTS = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "smollm3": "SmolLM3",
            "gemma3_text": "Gemma3Text"}  # fmt: skip


@pytest.mark.parametrize("model_type", DEFAULTS)
def test_a_config_with_nothing_but_its_model_type(model_type: str) -> None:
    theirs = getattr(transformers, f"{DEFAULTS[model_type]}Config")().to_dict()
    said = FAMILIES[model_type].config(FAMILIES[model_type].shape(Path("c"), {"model_type": model_type}))
    # Some name no head_dim, transformers drops rope_theta, and only Gemma's layers have a window.
    known = {key: theirs[key] for key in said if key in theirs and key not in ("architectures", "max_window_layers")}
    assert {key: said[key] for key in known} == known | {"pad_token_id": None}
    assert len(known) >= 15


BAD: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "qwen3_moe", "num_experts": 8}, "'qwen3_moe' is not supported; daybreak computes 'gpt2', 'llama', "
     "'mistral', 'qwen2', 'qwen3', 'smollm3', 'gemma3_text', 'daybreak_nanochat', and this one mixes experts."),
    ({"model_type": "gemma3", "text_config": {}}, "and this one also has parts that read images or sound."),
    ({"model_type": "gemma4_text", "num_experts": None, "enable_moe_block": False, "hidden_size_per_layer_input": 8},
     "'daybreak_nanochat', and this one embeds its tokens anew in each layer."),
    ({"model_type": "helium", "num_experts": 0, "vision_config": None}, "'gemma3_text', 'daybreak_nanochat'."),
    ({"model_type": "qwen3_next", "layer_types": ["linear_attention"]}, "layers of kind 'linear_attention'."),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type = 'dynamic' is not supported; daybreak"),
    ({"rope_scaling": {"type": "su"}}, "rope_type = 'su' is not supported"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "must be one object for all layers"),
    ({"rope_parameters": {"rope_type": "linear"}}, "factor = None must be a number above 0"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}, "truncate = False is not supported"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported; daybreak computes 1."),
    ({"rope_parameters": {**LINEAR, "rope_theta": "x"}}, "rope_theta = 'x' must be a number above 0"),
    ({"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
                       "original_max_position_embeddings": 32}}, "must be equal lists"),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported; daybreak computes 'silu' or 'swish'"),
    ({"quantization_config": {"quant_method": "awq"}}, "quantization_config is not supported"),
    ({"rms_norm_eps": 0}, "rms_norm_eps = 0 must be a number above 0"),
    ({"num_key_value_heads": 3}, "model.NH = 4 must be a multiple of model.NKV = 3"),
    ({"num_key_value_heads": "2"}, "num_key_value_heads = '2' must be a whole number above 0"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings = 'yes' must be true or false"),
    ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "must name the kind of each of 4 layers"),
    ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 4}, "with use_sliding_window and sliding_window"),
    ({"model_type": "gemma3_text", "rope_parameters": LINEAR}, "must have an object for full_attention and one for"),
    ({"model_type": "gemma3_text", "rope_scaling": 8}, "and rope_scaling be one"),
    ({"model_type": "gemma3_text", "rope_parameters": {"sliding_attention": LINEAR}},
     "sliding_attention has angles of type linear; daybreak computes default."),
    ({"model_type": "gemma3_text", "final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0 is not supported"),
    ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0 is not supported"),
    ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "attention = True is not supported; daybreak"),
    ({"model_type": "gemma3_text", "hidden_activation": "gelu"}, "computes 'gelu_pytorch_tanh'."),
    ({"model_type": "gemma3_text", "sliding_window": None}, "layer_types = ['sliding_attention', 'sliding_attention'"),
    ({"model_type": "smollm3", "no_rope_layers": [1]}, "must have a 0 or 1 for each layer of 4"),
    ({"model_type": "smollm3", "use_sliding_window": True, "sliding_window": 8}, "a window and without positions"),
    ({"intermediate_size": 120}, "'model.layers.0.mlp.gate_proj.weight' has shape (128, 64), its config.json says"),
    ({"tie_word_embeddings": False}, "lacks the tensor 'lm_head.weight'"),
    ({"model_type": "qwen3"}, "lacks the tensor 'model.layers.0.self_attn.q_norm.weight'"),
]  # fmt: skip


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tied") / "m"
    their_decoder("smollm2", folder)
    edit(folder / "config.json", head_dim=16)
    return folder


@pytest.mark.parametrize(("keys", "reason"), BAD, ids=[r[:40] for _, r in BAD])
def test_what_is_refused_and_why(keys: dict[str, Any], reason: str, tied: Path, tmp_path: Path) -> None:
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        (tmp_path / name).write_bytes((tied / name).read_bytes())
    edit(tmp_path / "config.json", **keys)
    with pytest.raises(Error) as refused:
        open_source(tmp_path)
    assert reason in str(refused.value)
    assert refused.value.exit_code == 5
    assert "\n" not in str(refused.value)


def test_any_value_of_any_key_is_read_or_refused_in_one_sentence(tmp_path: Path) -> None:
    """Keys that one model type has and others have not are in all of them here."""
    config = FAMILIES["qwen2"].config(LlamaConfig(L=4, C=64, NH=4, NKV=2, HS=16, F=64, V=257, max_T=64))
    config |= {"no_rope_layers": [1, 1, 1, 0], "no_rope_layer_interval": 4, "use_sliding_window": True,
               "sliding_window": 8, "sliding_window_pattern": 6, "query_pre_attn_scalar": 16,
               "rope_local_base_freq": 1e4}  # fmt: skip
    seen = 0
    for model_type in DEFAULTS:
        for rope in (LLAMA3, YARN, OLD[-1][1]):
            if model_type == "gemma3_text":
                rope = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
            whole = config | {"model_type": model_type, "rope_parameters": rope, "rope_scaling": None}
            for _, value, changed in mutations(whole):
                if value is not TWICE and value != DEEP:
                    seen += 1
                    with suppress(Error):
                        family_named(tmp_path, changed).shape(tmp_path, changed).check()
    assert seen > 5000


def test_dropout_is_left_out_with_a_warning(tied: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "daybreak"):
        config = json.loads((tied / "config.json").read_text()) | {"attention_dropout": 0.1}
        FAMILIES["llama"].shape(tied / "config.json", config)
    assert caplog.messages == [f"{tied}/config.json: attention_dropout = 0.1 is left out: daybreak has no dropout."]


def test_two_embeddings_although_the_config_ties_them(tied: Path, tmp_path: Path) -> None:
    """Equal: tied. Different: two parameters, as transformers then computes."""
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_bytes((tied / name).read_bytes())
    state = load_file(tied / "model.safetensors")
    head = state["model.embed_tokens.weight"].clone()
    save_file(state | {"lm_head.weight": head}, tmp_path / "model.safetensors", {"format": "pt"})
    assert open_source(tmp_path).model == open_source(tied).model
    save_file(state | {"lm_head.weight": head + 1}, tmp_path / "model.safetensors", {"format": "pt"})
    source = open_source(tmp_path)
    assert "tied=False" in source.model.text()
    assert torch.equal(source.read("headw")[:V], head + 1)
    engine = Engine(EngineSpec(source.model, B=1, T=MAX_T, compute="fp32", train=False))
    engine.load_params({name: source.read(name) for name in source.names()})
    want = logits_of(transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval())
    assert (engine.logits(tokens_of()) - want).norm() <= 3e-6 * want.norm()


def test_a_shape_that_no_model_type_has(tmp_path: Path) -> None:
    odd = LlamaConfig(L=2, C=64, NH=4, NKV=2, HS=16, F=64, V=257, max_T=16, qk_norm=True, layers="fn")
    with pytest.raises(ConfigError, match=r"^X cannot hold this shape: none of llama, mistral, .*layers=fn"):
        family_of(odd, "X")


def test_a_shorter_run_keeps_its_length(tmp_path: Path) -> None:
    """Positions are no parameters here, so those beyond batch.T stay."""
    their_decoder("smollm2", tmp_path / "m")
    inside(tmp_path, "import", "m", "--name", "r", "--run.device", "cpu", "--batch.T", "16")
    source = Export(Run(tmp_path / "runs/r").checkpoint())
    huggingface.export(source, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["max_position_embeddings"] == MAX_T


def test_a_model_for_very_long_texts_is_opened_for_shorter_ones(tmp_path: Path) -> None:
    """Llama 3.2 says 131,072: memory for that is not to be had by accident."""
    their_decoder("llama", tmp_path / "m")
    edit(tmp_path / "m/config.json", max_position_embeddings=131072)
    assert load_model(tmp_path / "m", device="cpu")[0].T == 8192
    for flags, T in (([], 8192), (["--batch.T", "16384"], 16384)):
        inside(tmp_path, "import", "m", "--name", f"r{T}", "--run.device", "cpu", *flags)
        config = Run(tmp_path / f"runs/r{T}").config
        assert (config.T, config.model.max_T) == (T, 131072)
