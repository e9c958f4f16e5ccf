"""GGUF: read back by transformers' own GGUF loader and by the `gguf` package, value by value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interop_runs import MAX_T, inside, shape_of, values_of, write_run
from oracle import GPT2

from daybreak.data.tokenizer import get_tokenizer
from daybreak.errors import ConfigError
from daybreak.interop import gguf as ours
from daybreak.interop.source import Export
from daybreak.state.run import Run

gguf = pytest.importorskip("gguf", reason="the test extra installs gguf")
TEXT = "  Hello world, don't\n\n\tnaïve 漢字 12345"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf") / "run"
    write_run(folder)
    return folder


def test_transformers_reads_it_with_equal_logits_and_ids(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    shape = write_run(tmp_path / "run", max_T=1024)  # transformers takes no other length from a GGUF file
    inside(tmp_path, "export", "run", "--to", "gguf", "m.gguf")
    kind = {"gguf_file": "m.gguf", "dtype": torch.float32}
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **kind).eval()
    tokens = torch.randint(shape.V, (1, 256), generator=torch.Generator().manual_seed(1))
    truth = GPT2(shape).load({k: v.double() for k, v in values_of(shape).items()}).logits(tokens).detach()
    with torch.no_grad():
        got = model(tokens).logits
    assert got.shape == truth.shape
    assert (got - truth).norm() <= 2e-6 * truth.norm()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    tok = get_tokenizer("gpt2-1024")
    assert tokenizer(TEXT)["input_ids"] == tok.encode(TEXT).tolist()
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (tok.eot, tok.eot)


def q8_0(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Q8_0 by its definition: 32 values share a float16 scale d = max|x| / 127; each is round(x / d), in int8."""
    blocks = x.reshape(-1, 32)
    d = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    with np.errstate(divide="ignore"):
        inverse = np.where(d == 0, np.float32(0), 1 / d)
    q = blocks * inverse
    q = np.sign(q) * np.floor(np.abs(q) + np.float32(0.5))  # halves away from zero
    return (q * d.astype(np.float16).astype(np.float32)).reshape(x.shape)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0"])
def test_every_tensor_by_value(run: Path, tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "m.gguf"
    ours.export(Export(Run(run).checkpoint()), path, dtype)
    reader = gguf.GGUFReader(path)
    tensors = {t.name: t for t in reader.tensors}
    shape, values = shape_of(), values_of(shape_of())
    assert len(tensors) == 5 + 12 * shape.L
    cast = {
        "f32": lambda x: x, "f16": lambda x: x.astype(np.float16).astype(np.float32), "q8_0": q8_0,
        "bf16": lambda x: torch.from_numpy(x).bfloat16().float().numpy(),
    }[dtype]  # fmt: skip
    for theirs, name, rounded in [
        ("token_embd.weight", "wte", True), ("output.weight", "wte", True), ("position_embd.weight", "wpe", False),
        ("blk.2.attn_qkv.weight", "h.2.qkvw", True), ("blk.0.attn_output.weight", "h.0.attprojw", True),
        ("blk.1.ffn_up.weight", "h.1.fcw", True), ("blk.1.ffn_down.weight", "h.1.fcprojw", True),
        ("blk.1.ffn_up.bias", "h.1.fcb", False), ("blk.2.ffn_norm.weight", "h.2.ln2w", False),
        ("blk.0.attn_norm.bias", "h.0.ln1b", False), ("output_norm.bias", "lnfb", False),
    ]:  # fmt: skip
        tensor = tensors[theirs]
        want = values[name].numpy()[: shape.V] if name == "wte" else values[name].numpy()
        got = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(want.shape)
        kind = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}[dtype] if rounded else "F32"
        assert tensor.tensor_type.name == kind, theirs
        np.testing.assert_array_equal(got, cast(want) if rounded else want, err_msg=theirs)


def test_the_description(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    ours.export(Export(Run(run).checkpoint()), path)
    fields = {name: f.contents() for name, f in gguf.GGUFReader(path).fields.items()}
    want = {
        "general.architecture": "gpt2", "general.file_type": 0, "gpt2.context_length": MAX_T, "gpt2.block_count": 3,
        "gpt2.embedding_length": 96, "gpt2.feed_forward_length": 384, "gpt2.attention.head_count": 4,
        "gpt2.attention.layer_norm_epsilon": pytest.approx(1e-5), "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.bos_token_id": 1024, "tokenizer.ggml.eos_token_id": 1024,
    }  # fmt: skip
    assert {key: fields[key] for key in want} == want
    assert len(fields["tokenizer.ggml.tokens"]) == len(fields["tokenizer.ggml.token_type"]) == 1025
    assert fields["tokenizer.ggml.tokens"][-1] == "<|endoftext|>"
    assert fields["tokenizer.ggml.token_type"][-2:] == [1, 3]  # normal, control
    assert fields["tokenizer.ggml.merges"][:2] == ["Ġ t", "Ġ a"]
    assert len(fields["tokenizer.ggml.merges"]) == 1024 - 256


def test_refusals(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_text("mine")
    with pytest.raises(ConfigError, match=r"m\.gguf exists already"):
        ours.export(Export(Run(run).checkpoint()), path)
    assert path.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [path]
