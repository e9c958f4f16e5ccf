"""Hugging Face folders that daybreak refuses: each by its file and the reason, and no run is made of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from interop_runs import inside
from safetensors.torch import load_file, save_file
from test_interop_hf import their_model

from daybreak.errors import ConfigError, Error
from daybreak.interop import open_source


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_cannot_compute_makes_no_run(tmp_path: Path, value: float) -> None:
    their_model(tmp_path / "m")
    _tensor(lambda x: _put(x, value))(tmp_path / "m")
    said = inside(tmp_path, "import", "m", "--name", "r", code=5).stderr
    assert said == (
        "daybreak: m: 'transformer.h.1.ln_2.bias' has values that are NaN or infinite; give a model that computes.\n"
    )
    assert not (tmp_path / "runs/r").exists()
    assert "NaN or infinite" in inside(tmp_path, "sample", "m", code=5).stderr


def _edit(**keys: Any) -> Any:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))

    return change


def _tensor(change: Callable[[torch.Tensor], torch.Tensor], key: str = "transformer.h.1.ln_2.bias") -> Any:
    def changed(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        state[key] = change(state[key])
        save_file(state, folder / "model.safetensors")

    return changed


def _index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    table = dict.fromkeys(load_file(folder / "model-1.safetensors"), "model-1.safetensors")
    table["transformer.ln_f.bias"] = "model-2.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))


def _put(x: torch.Tensor, value: float) -> torch.Tensor:
    x[3] = value
    return x


def _drop(key: str) -> Any:
    def change(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        del state[key]
        save_file(state, folder / "model.safetensors")

    return change


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _other_words(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"Ġthe": 262', '"Ġxyz": 262'))


BAD = [
    (_edit(model_type="mpt"), "config.json: model_type = 'mpt' is not supported; daybreak computes 'gpt2', 'llama', "),
    (_edit(activation_function="relu"), "activation_function = 'relu' is not supported"),
    (_edit(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx = True is not supported"),
    (_edit(layer_norm_epsilon=1e-6), "layer_norm_epsilon = 1e-06"),
    (_edit(n_inner=100), "n_inner = 100 is not supported; use 4 * n_embd"),
    (_edit(num_hidden_layers=3), "num_hidden_layers = 3 and n_layer = 2 are two names of one value; remove the wrong"),
    (_edit(max_position_embeddings=32), "max_position_embeddings = 32 and n_positions = 64 are two names"),
    (_edit(quantization_config={"quant_method": "gptq"}), "config.json: quantization_config is not supported; give"),
    (_edit(tie_word_embeddings=False), "tie_word_embeddings = False is not supported"),
    (_edit(scale_attn_weights=False), "scale_attn_weights = False is not supported"),
    (_edit(add_cross_attention=True), "add_cross_attention = True is not supported"),
    (_edit(model_type=None), "config.json: model_type = "),
    (_tensor(lambda x: x.to(torch.int8)), "'transformer.h.1.ln_2.bias' is torch.int8; give weights in fp32"),
    (_tensor(lambda x: x.to(torch.uint8)), "'transformer.h.1.ln_2.bias' is torch.uint8; give weights in fp32"),
    (_tensor(lambda x: x.to(torch.float8_e4m3fn)), "h.1.ln_2.bias' has the dtype 'F8_E4M3', which daybreak does not"),
    (_tensor(lambda x: x.repeat(2)), "'transformer.h.1.ln_2.bias' has shape (96,), its config.json says (48,)"),
    (_index, "model-2.safetensors cannot be read (No such file or directory)"),
    (_edit(n_layer="2"), "n_layer = '2' must be a whole number"),
    (_edit(n_head=5), "model.C = 48 must be a multiple of model.NH = 5"),
    (_edit(n_layer=3), "lacks the tensor 'transformer.h.2.ln_1.weight'"),
    (_edit(n_layer=1), "daybreak has no place for 'transformer.h.1."),
    (_edit(vocab_size=1024), "'transformer.wte.weight' has shape (1025, 48), its config.json says (1024, 48)"),
    (_drop("transformer.ln_f.bias"), "lacks the tensor 'transformer.ln_f.bias'"),
    (_cut, "model.safetensors is not a readable safetensors file"),
    (_pickled, "pytorch_model.bin is not read, since loading it can run code"),
    (lambda f: (f / "config.json").write_text("{"), "config.json is not JSON"),
    (lambda f: (f / "config.json").write_text("[]"), "config.json: all of it = [] must be an object"),
    (_edit(daybreak_tokenizer_fingerprint="0"), "was exported with another tokenizer than 'gpt2-1024'"),
    (_other_words, "tokenizer.json is not a Hugging Face tokenizer (Token `Ġthe` out of vocabulary"),
    (lambda f: (f / "tokenizer.json").rename(f / "vocab.json"), "has vocab.json and no tokenizer.json; save the"),
    (
        lambda f: (f / "tokenizer.json").unlink(),
        "m does not say which tokenizer its 1025 ids are of; name it: daybreak import ",
    ),
]


@pytest.mark.parametrize(("spoil", "reason"), BAD, ids=[r[:40] for _, r in BAD])
def test_a_bad_model_is_refused_by_file_and_reason(spoil: Any, reason: str, tmp_path: Path) -> None:
    their_model(tmp_path / "m")
    spoil(tmp_path / "m")
    with pytest.raises(Error) as refused:
        open_source(tmp_path / "m")
    assert reason in str(refused.value)
    assert refused.value.exit_code in (2, 5)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("own", ["wordlevel.json", "gpt2-1024"])
def test_the_advice_on_an_unknown_tokenizer_leads_on(own: str, tmp_path: Path) -> None:
    """Of the verbs that take a folder only `import` has a flag for the tokenizer. Its run then serves them all."""
    their_model(tmp_path / "m")
    (tmp_path / "m/tokenizer.json").unlink()
    (tmp_path / "a.txt").write_text("one two three four\n" * 2000)
    words = {"<|endoftext|>": 0, "one": 1, "two": 2, "three": 3, "four": 4, "?": 5}
    spec = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"},
            "model": {"type": "WordLevel", "vocab": words, "unk_token": "?"}}  # fmt: skip
    (tmp_path / "wordlevel.json").write_text(json.dumps(spec))
    inside(tmp_path, "prepare", "a.txt", "--tokenizer", own, "--name", "a")
    name = json.loads((tmp_path / "data/a/manifest.json").read_text())["tokenizer"]
    shape = ["--model.L", "2", "--model.C", "48", "--model.NH", "3", "--model.max_T", "64", "--model.V", "1025"]
    verbs = (
        ["sample", "m"], ["finetune", "m", "--data", "a"], ["finetune", "m", "--data", "a", "--data.tokenizer", own],
        ["train", "d6", *shape, "--data", "a", "--init-from", "m", "--steps", "1", "--batch.B", "1"],
    )  # fmt: skip
    for verb in verbs:
        said = inside(tmp_path, *verb, code=2).stderr
        assert said.endswith(f"{1025} ids are of; name it: daybreak import m --data.tokenizer FILE.\n"), verb
    if name != own:  # called by its name, a file is looked for beside the weights
        said = inside(tmp_path, "import", "m", "--data.tokenizer", name, code=2).stderr
        assert said.startswith(f"daybreak: tokenizer '{name}': there is no m/tokenizer.json; copy the file there, ")
    inside(tmp_path, "import", "m", "--data.tokenizer", own)
    few = ["--steps", "1", "--batch.B", "1", "--batch.T", "16", "--batch.total_tokens", "16", "--eval.tokens", "16"]
    tuned = inside(tmp_path, "finetune", "runs/m", "--data", "a", "--name", "t", *few)
    assert "\nruns/t: step 1, 16 tokens. Next:\n" in tuned.stdout


def test_what_is_neither_path_nor_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    for name, reason in [
        ("gpt2-larg", "did you mean 'gpt2-large'?"),
        (f"{Path(__file__).parent.name}/typo", "tests/typo does not exist; give gpt2, "),
        ("log1", "log1 does not exist; give gpt2, "),  # like no name on the hub
        (str(tmp_path), "has neither config.json nor DONE_* files"),
    ]:
        with pytest.raises(ConfigError) as refused:
            open_source(name)
        assert reason in str(refused.value)
