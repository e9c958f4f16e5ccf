"""GGUF of the decoder family, out and in: read by transformers' own reader and by the `gguf` package; files by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoders import CASES, LLAMA3, MAX_T, SIZES, YARN, V, edit, their_decoder, tokens_of
from interop_runs import inside, write_run
from safetensors.torch import load_file
from tokenizer_kinds import LLAMA3 as LLAMA3_SPLIT
from tokenizer_kinds import TEXTS, added, split_by
from tokenizer_kinds import their_model as gpt2_with

from daybreak.data.tokenizer import get_tokenizer
from daybreak.errors import ConfigError, Error
from daybreak.interop import gguf as ours
from daybreak.interop import open_source
from daybreak.interop.families import FAMILIES
from daybreak.interop.gguf_vocabulary import BYTE_LEVEL
from daybreak.interop.source import Export
from daybreak.shapes import LlamaConfig
from daybreak.state.run import Run

gguf = pytest.importorskip("gguf", reason="the test extra installs gguf")
transformers = pytest.importorskip("transformers", reason="the test extra installs transformers")
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def ran(folder: Path, source: str = "theirs", name: str = "run") -> Path:
    """The run of an import."""
    inside(folder, "import", source, "--name", name, "--run.device", "cpu")
    return folder / "runs" / name


def weights(run: Path) -> bytes:
    return (Run(run).checkpoints[0] / "model.safetensors").read_bytes()


def contents(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keys and the tensors of a file, as the package reads them."""
    reader = gguf.GGUFReader(path)
    return {k: f.contents() for k, f in reader.fields.items()}, {t.name: t for t in reader.tensors}


# What transformers' reader knows: it ignores rope_freqs and yarn, and takes 128 for the heads of Qwen 3, and 256 for
# Gemma's scores.
READ = {
    "llama": {},
    "qwen2": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e3}},
    "qwen3": {"head_dim": 128},
    "gemma-3": {"head_dim": 256, "query_pre_attn_scalar": 256, "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 5e3}, "sliding_attention": {"rope_type": "default"}}},
}  # fmt: skip


@pytest.mark.parametrize("case", READ)
def test_transformers_reads_it_with_equal_logits(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, keys = CASES[case]
    monkeypatch.setitem(CASES, case, (name, keys | READ[case]))
    model = their_decoder(case, tmp_path / "theirs")
    ran(tmp_path)
    inside(tmp_path, "export", "runs/run", "--to", "gguf", "m.gguf")
    kind = {"gguf_file": "m.gguf", "dtype": torch.float32, "attn_implementation": "eager"}
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **kind).eval()
    with torch.no_grad():
        assert torch.equal(read(tokens_of()).logits, model(tokens_of()).logits)


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("mistral", "qwen2-window", "gemma-3-own")])
def test_out_and_in_again(case: str, tmp_path: Path) -> None:
    """The same shape and the same bytes, in the same precision as the file's."""
    their_decoder(case, tmp_path / "theirs")
    first = ran(tmp_path)
    inside(tmp_path, "export", "runs/run", "--to", "gguf", "m.gguf")
    source = open_source(tmp_path / "m.gguf")
    if case == "llama3":  # not of the length that all published ones have, so each angle has its own divisor
        assert "rope=longrope rope_original=64 rope_attention=1.0 rope_factors=1.0," in source.model.text()
        assert all(torch.equal(source.read(n), open_source(tmp_path / "theirs").read(n)) for n in source.names())
    elif case == "gemma-3":  # 1 + w is rounded
        assert source.model == Run(first).config.model
        for name in source.names():
            torch.testing.assert_close(
                source.read(name), open_source(tmp_path / "theirs").read(name), rtol=0, atol=1.3e-7
            )
    else:
        assert source.model == Run(first).config.model
        assert weights(ran(tmp_path, "m.gguf", "again")) == weights(first)


def test_rows_and_keys_by_the_specification(tmp_path: Path) -> None:
    """Queries and keys turn neighbours there. rope_freqs has the divisors of Llama 3's scaling; nothing is tied."""
    their_decoder("llama3", tmp_path / "theirs")
    theirs = load_file(tmp_path / "theirs/model.safetensors")
    ran(tmp_path)
    inside(tmp_path, "export", "runs/run", "--to", "gguf", "m.gguf")
    keys, tensors = contents(tmp_path / "m.gguf")
    want = {
        "general.architecture": "llama", "llama.block_count": 4, "llama.context_length": MAX_T,
        "llama.embedding_length": 64, "llama.feed_forward_length": 128, "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2, "llama.attention.key_length": 24, "llama.attention.value_length": 24,
        "llama.rope.dimension_count": 24, "llama.rope.freq_base": 5000.0,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-6), "tokenizer.ggml.model": "gpt2",
    }  # fmt: skip
    assert {key: keys[key] for key in want} == want
    for kind, heads in (("q", 4), ("k", 2)):
        for end in ("weight", "bias"):
            x = theirs[f"model.layers.1.self_attn.{kind}_proj.{end}"]
            twisted = x.reshape(heads, 2, 12, -1).swapaxes(1, 2).reshape(x.shape)
            np.testing.assert_array_equal(tensors[f"blk.1.attn_{kind}.{end}"].data, twisted)
    for name, key in (("attn_v.weight", "self_attn.v_proj.weight"), ("ffn_gate.weight", "mlp.gate_proj.weight"),
                      ("ffn_up.bias", "mlp.up_proj.bias"), ("ffn_norm.weight", "post_attention_layernorm.weight"),
                      ("attn_output.bias", "self_attn.o_proj.bias")):  # fmt: skip
        np.testing.assert_array_equal(tensors[f"blk.1.{name}"].data, theirs[f"model.layers.1.{key}"])
    np.testing.assert_array_equal(tensors["output.weight"].data, theirs["lm_head.weight"])
    assert tensors["output.weight"].data.shape == (V, 64)
    divisors = []
    for j in range(12):  # the published formula, in fp64
        f = 5e3 ** (-2 * j / 24)
        wave, s = 2 * math.pi / f, (32 / (2 * math.pi / f) - 1) / (4 - 1)
        divisors.append(1 if wave < 32 / 4 else 8 if wave > 32 / 1 else 1 / ((1 - s) / 8 + s))
    np.testing.assert_allclose(tensors["rope_freqs.weight"].data, divisors, rtol=1e-6)
    assert 1 < divisors[1] < 8


def test_tied_models_have_no_output_and_others_scaling_is_a_key(tmp_path: Path) -> None:
    their_decoder("qwen2", tmp_path / "theirs")
    ran(tmp_path)
    inside(tmp_path, "export", "runs/run", "--to", "gguf", "m.gguf")
    keys, tensors = contents(tmp_path / "m.gguf")
    assert "output.weight" not in tensors
    x = load_file(tmp_path / "theirs/model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    np.testing.assert_array_equal(tensors["blk.0.attn_q.weight"].data, x)  # Qwen turns halves there too
    assert keys["qwen2.rope.scaling.type"] == "yarn"
    assert keys["qwen2.rope.scaling.factor"] == YARN["factor"]
    assert keys["qwen2.rope.scaling.original_context_length"] == YARN["original_max_position_embeddings"]


def bytes_vocabulary(writer: Any) -> int:
    """Byte-level merges, with ends and a chat template. Returns how many ids there are."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    tok = json.loads(get_tokenizer("bytes").to_json())
    writer.add_token_list(list(tok["model"]["vocab"]))
    writer.add_token_types([1] * 256 + [3])
    writer.add_token_merges([])
    writer.add_eos_token_id(10)
    writer.add_eot_token_id(13)
    writer.add_chat_template(TEMPLATE)
    return 257


def by_hand(
    path: Path, kinds: dict[str, str], drop: str = "", vocabulary: Callable[[Any], int] = bytes_vocabulary, **keys: Any
) -> dict[str, np.ndarray[Any, Any]]:
    """A Llama as llama.cpp's tools leave it: quantized, interleaved, the oldest keys only. Returns the values that its
    tensors stand for, with the rows of q and k in halves."""
    rng, wide = np.random.default_rng(0), 64
    writer = gguf.GGUFWriter(path, keys.pop("architecture", "llama"))
    shapes = {"token_embd": (vocabulary(writer), wide), "output_norm": (wide,)}
    for i in range(2):
        each = {"attn_norm": (wide,), "ffn_norm": (wide,), "attn_q": (wide, wide), "attn_k": (32, wide),
                "attn_v": (32, wide), "attn_output": (wide, wide), "ffn_gate": (96, wide), "ffn_up": (96, wide),
                "ffn_down": (wide, 96)}  # fmt: skip
        shapes |= {f"blk.{i}.{name}": shape for name, shape in each.items()}
    known = {
        "context_length": 32,
        "embedding_length": wide,
        "block_count": 2,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-5,
    } | keys
    for key, value in known.items():
        if value is not ...:
            add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
            add(key if "." in key and key.split(".")[0] == "split" else f"llama.{key}", value)
    values = {}
    for name, shape in shapes.items():
        x = rng.standard_normal(shape, dtype=np.float32)
        kind = gguf.GGMLQuantizationType[kinds.get(name.rpartition(".")[2], "F32")]
        data = gguf.quants.quantize(x, kind)
        values[name] = gguf.quants.dequantize(data, kind).reshape(shape)
        if name.endswith(("attn_q", "attn_k")):  # to halves: llama.cpp's own permutation the other way round
            values[name] = values[name].reshape(-1, 8, 2, wide).swapaxes(1, 2).reshape(shape)
        if name != drop:
            writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return values


def test_a_quantized_file_of_others(tmp_path: Path) -> None:
    """Its values are those that the package's dequantization gives; ends and chat template come with it."""
    kinds = {"token_embd": "Q8_0", "attn_q": "Q4_0", "attn_k": "Q5_1", "attn_v": "F16", "ffn_gate": "Q4_1",
             "ffn_up": "BF16"}  # fmt: skip
    values = by_hand(tmp_path / "m.gguf", kinds)
    run = Run(ran(tmp_path, "m.gguf"))
    model = run.config.model
    assert model == LlamaConfig(L=2, C=64, NH=4, NKV=2, HS=16, F=96, V=257, max_T=32, tied=True, eps=1e-5)
    got = {name: torch.empty(shape) for name, shape in Export(run.checkpoint()).shapes.items()}
    for name, x in got.items():
        run.checkpoint().read_model(name, x)
    for i in range(2):
        q, k, v, gate, up = (values[f"blk.{i}.{x}"] for x in ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up"))
        np.testing.assert_array_equal(got[f"h.{i}.qkvw"], np.concatenate([q, k, v]))
        np.testing.assert_array_equal(got[f"h.{i}.gateupw"], np.concatenate([gate, up]))
        np.testing.assert_array_equal(got[f"h.{i}.fcprojw"], values[f"blk.{i}.ffn_down"])
    np.testing.assert_array_equal(got["wte"][:257], values["token_embd"])
    assert run.load_engine()[1].ends == (10, 13, 256)
    assert (run.path / "chat_template.jinja").read_text() == TEMPLATE
    inside(tmp_path, "export", "runs/run", "--to", "gguf", "back.gguf")
    assert contents(tmp_path / "back.gguf")[0]["tokenizer.chat_template"] == TEMPLATE


def test_scaling_of_published_llamas_is_recognized() -> None:
    """Their divisors become `llama3` again, with its three numbers; all others stay divisors."""
    llama = FAMILIES["llama"]
    config = {
        **SIZES,
        "rope_parameters": {**LLAMA3, "rope_theta": 5e5, "factor": 32.0},
        "max_position_embeddings": 131072,
    }
    config["rope_parameters"]["original_max_position_embeddings"] = 8192
    shape = llama.shape(Path("c"), config)
    tensors = {"rope_freqs.weight": llama.gguf_tensors(shape)["rope_freqs.weight"], "output.weight": torch.empty(0)}
    back = llama.from_gguf(Path("m"), llama.gguf_config(shape), tensors)
    assert llama.shape(Path("m"), {**back, "vocab_size": V}) == shape
    tensors["rope_freqs.weight"] = tensors["rope_freqs.weight"] * 1.01
    other = llama.shape(Path("m"), {**llama.from_gguf(Path("m"), llama.gguf_config(shape), tensors), "vocab_size": V})
    assert isinstance(other, LlamaConfig)
    assert other.rope == "longrope"
    torch.testing.assert_close(torch.tensor(other.divisors), tensors["rope_freqs.weight"])


def gpt4_split(digits: str) -> str:
    return LLAMA3_SPLIT.replace(r"\p{N}{1,3}", digits)


SPLITS = {
    "gpt-2": added,
    "llama-bpe": lambda: split_by(LLAMA3_SPLIT, ignore_merges=True),
    "dbrx": lambda: split_by(LLAMA3_SPLIT),
    "qwen2": lambda: split_by(gpt4_split(r"\p{N}")),
}


@pytest.mark.parametrize("pre", SPLITS)
def test_a_vocabulary_comes_back_with_the_same_ids(pre: str, tmp_path: Path) -> None:
    """Each way of splitting before byte-level merges, with the tokens around a text."""
    library = SPLITS[pre]()
    gpt2_with(tmp_path / "theirs", library)
    ran(tmp_path)
    inside(tmp_path, "export", "runs/run", "--to", "gguf", "m.gguf")
    assert contents(tmp_path / "m.gguf")[0]["tokenizer.ggml.pre"] == pre
    back, first = open_source(tmp_path / "m.gguf").tokenizer, open_source(tmp_path / "theirs").tokenizer
    assert (back.V, back.eot, back.around) == (first.V, first.eot, first.around)
    for text in TEXTS:
        assert back.encode(text).tolist() == first.encode(text).tolist(), text
    assert {*SPLITS, "smollm"} == set(BYTE_LEVEL)


def test_gpt2_comes_back_too(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    inside(tmp_path, "export", "run", "--to", "gguf", "m.gguf")
    source, checkpoint = open_source(tmp_path / "m.gguf"), Run(tmp_path / "run").checkpoint()
    assert (source.model, source.tokenizer.name) == (checkpoint.model, "gpt2-1024")
    for name, shape in Export(checkpoint).shapes.items():
        out = torch.empty(shape)
        checkpoint.read_model(name, out)
        assert torch.equal(source.read(name), out), name


BAD: list[tuple[dict[str, Any], str]] = [
    ({"architecture": "falcon"}, "general.architecture = 'falcon' is not supported; daybreak computes gemma3, gpt2, "),
    ({"block_count": ...}, "lacks the key llama.block_count; convert the model again"),
    ({"block_count": 1}, "is no plain llama: daybreak has no place for 'blk.1."),
    ({"block_count": 3}, "lacks the tensor 'blk.2."),
    ({"feed_forward_length": 64}, "'blk.0.ffn_gate.weight' has shape (96, 64), its metadata says (64, 64)"),
    ({"expert_count": 8}, "mixes 8 experts, which daybreak does not compute"),
    ({"split.count": 2}, "is one of 2 files; merge them"),
    ({"drop": "token_embd"}, "vocab_size = 0 must be a whole number above 0"),
    ({"attention.head_count": 3}, "model.NH = 3 must be a multiple of model.NKV = 2"),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "reason"), BAD, ids=[r[:30] for _, r in BAD])
def test_what_is_refused_and_why(keys: dict[str, Any], reason: str, tmp_path: Path) -> None:
    by_hand(tmp_path / "m.gguf", {}, **keys)
    with pytest.raises(Error) as refused:
        open_source(tmp_path / "m.gguf")
    assert reason in str(refused.value)
    assert refused.value.exit_code == 5


def test_a_damaged_file_and_another_tokenizer(tmp_path: Path) -> None:
    by_hand(tmp_path / "m.gguf", {})
    whole = (tmp_path / "m.gguf").read_bytes()
    for n in (0, 3, 100, len(whole) // 2, len(whole) - 1000):
        (tmp_path / "cut.gguf").write_bytes(whole[:n])
        with pytest.raises(Error, match=r"cut\.gguf is not a readable GGUF file"):
            open_source(tmp_path / "cut.gguf").read("h.1.fcprojw")
    (tmp_path / "odd.gguf").write_bytes(whole.replace(b"gpt-2", b"gpt-9"))
    refused = r"kind 'gpt2' that splits as 'gpt-9' is not read; name it: .*/odd\.gguf --data\.tokenizer FILE"
    with pytest.raises(Error, match=refused):
        open_source(tmp_path / "odd.gguf")
    assert open_source(tmp_path / "odd.gguf", "bytes").tokenizer.name == "bytes"


@pytest.mark.parametrize(("case", "keys", "reason"), [
    ("mistral", {}, "llama has no window (model.window = 5)"),
    ("qwen2-window", {}, "qwen2 has no window"),
    ("qwen2", {"rope_parameters": LLAMA3}, 'qwen2 has no such rotary positions (model.rope = "llama3")'),
    ("smollm2", {"rope_parameters": {**YARN, "beta_fast": 16.0}}, 'no such rotary positions (model.rope = "yarn")'),
    ("smollm3", {"no_rope_layers": [1, 0, 1, 1]}, "no other layers without positions than every fourth"),
    ("gemma-3", {"layer_types": ["sliding_attention"] * 7}, "gemma3 has no windows other than those of"),
    ("gemma-3", {"rope_parameters": {"sliding_attention": {"rope_theta": 1e5}}}, "window_theta = 10000; use --to hf"),
    ("gemma-3", {"query_pre_attn_scalar": 20}, "gemma3 has no such scores (model.query_scalar = 20)"),
    ("gemma-3-own", {"layer_types": ["sliding_attention"] * 4, "query_pre_attn_scalar": 24, "rope_parameters": {}},
     "gemma3 has no such biases"),
], ids=str)  # fmt: skip
def test_what_llama_cpp_computes_in_another_way(case: str, keys: dict[str, Any], reason: str, tmp_path: Path) -> None:
    their_decoder(case, tmp_path / "theirs")
    edit(tmp_path / "theirs/config.json", rope_scaling=..., **keys)
    run = ran(tmp_path)
    with pytest.raises(ConfigError) as refused:
        ours.export(Export(Run(run).checkpoint()), tmp_path / "m.gguf")
    assert reason in str(refused.value)
    assert not (tmp_path / "m.gguf").exists()
