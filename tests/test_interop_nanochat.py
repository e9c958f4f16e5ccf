"""nanochat's family in Hugging Face's folders, which have its code: transformers runs it, and we read them back."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from interop_runs import inside
from patience import PATIENCE
from safetensors.torch import load_file, save_file
from test_files_checked import DEEP, TWICE, mutations
from test_training import markov, write_shard
from torch import Tensor

from daybreak.data.tokenizer import get_tokenizer
from daybreak.engine import Engine, EngineSpec
from daybreak.errors import CheckpointError, ConfigError
from daybreak.generate import Sampling, Text, write_all
from daybreak.interop import huggingface, open_source
from daybreak.interop.families import FAMILIES, family_of
from daybreak.interop.source import Export
from daybreak.shapes import parse_shape
from daybreak.state.run import Run

transformers = pytest.importorskip("transformers", reason="the test extra installs transformers")
ROOT = Path(__file__).parents[1]
CODE = ROOT / "daybreak/interop/families/modeling_nanochat.py.txt"
L, C, NH, MAX_T, V, WINDOW = 4, 48, 2, 48, 257, 5
RECIPE = f"""[model]
arch = "nanochat"
L = {L}
C = {C}
NH = {NH}
max_T = {MAX_T}
V = {V}
layers = "wwf"
window = {WINDOW}
softcap = 6.0
[data]
train = "*train*"
val = "*val*"
tokenizer = "bytes"
[batch]
B = 2
total_tokens = 192
[precision]
compute = "fp32"
[optim]
name = "muon"
lr = 8e-3
horizon = 24
[eval]
tokens = 384
sample_tokens = 8
[run]
steps = 24
device = "cpu"
"""
SCALARS = ("resid_lambdas", "x0_lambdas", "smear_lambda", "backout_lambda")


@pytest.fixture(autouse=True, scope="module")
def _own_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """transformers copies a folder's code into its cache before it runs it. Here that is a folder of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        modules = transformers.dynamic_module_utils
        patch.setattr(modules, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr(sys, "path", [*sys.path])
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run runs/nano, which was trained here, and its exports fp32, bf16 and fp16."""
    made = tmp_path_factory.mktemp("nano")
    write_shard(made / "x_train_000000.bin", markov(4800, 1))
    write_shard(made / "x_val_000000.bin", markov(600, 3))
    (made / "nano.toml").write_text(RECIPE)
    inside(made, "train", "nano.toml", "--quiet")
    for dtype in ("fp32", "bf16", "fp16"):
        inside(made, "export", "runs/nano", "--to", "hf", dtype, "--dtype", dtype)
    return made


def theirs(path: Path, **how: Any) -> Any:
    """The model of a folder, in evaluation."""
    return transformers.AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, **how).eval()


def tokens_of(rows: int, T: int) -> Tensor:
    return torch.randint(V, (rows, T), generator=torch.Generator().manual_seed(T))


def logits_of(model: Any, tokens: Tensor, **how: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(tokens, **how).logits
    return found


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def weights(run: Path) -> dict[str, Tensor]:
    export = Export(Run(run).checkpoint())
    return {name: export.read(name) for name in export.shapes}


def test_the_run_is_a_hard_case(folder: Path) -> None:
    """No scalar is 0 or 1, gates and projections count, and logits reach into the soft-cap: a mistake shows."""
    values = weights(folder / "runs/nano")
    assert sum(x.numel() for x in values.values()) < 1_000_000
    for name, x in values.items():
        assert x.numel() == 1 or x.std() > 1e-3, name
        if x.numel() == 1:
            assert min(abs(x.item()), abs(x.item() - 1)) > 1e-3, name
    assert logits_of(theirs(folder / "fp32"), tokens_of(2, MAX_T)).abs().max() > 4


@pytest.mark.parametrize("T", [1, 2, 4, 11, MAX_T - 1, MAX_T])
def test_equal_logits_in_fp32(folder: Path, T: int) -> None:
    """At every position, from one token to lengths beyond the window."""
    model, tokens = theirs(folder / "fp32"), tokens_of(2, T)
    assert (model.dtype, type(model).__name__) == (torch.float32, "NanochatForCausalLM")
    engine = Run(folder / "runs/nano").load_engine(B=2)[0]
    ours, want = engine.logits(tokens).clone(), logits_of(model, tokens)
    assert want.shape == (2, T, V)
    truth = logits_of(model.double(), tokens)
    assert truth.dtype == torch.float64
    assert apart(ours, want) <= 1e-6
    assert max(apart(ours, truth), apart(want, truth)) <= 1e-6


def test_logits_in_bf16(folder: Path) -> None:
    """The scalars stay in fp32. transformers errs no more than the engine does in bf16."""
    model, tokens = theirs(folder / "bf16"), tokens_of(2, MAX_T)
    assert model.dtype == torch.bfloat16
    kinds = {name: p.dtype for name, p in model.named_parameters()}
    assert {name for name, kind in kinds.items() if kind != torch.bfloat16} == set(SCALARS)
    values, truth = weights(folder / "runs/nano"), theirs(folder / "fp32").double()
    engine = Engine(EngineSpec(Run(folder / "runs/nano").config.model, B=2, T=MAX_T, compute="bf16", train=False))
    engine.load_params(values)
    want, ours = logits_of(truth, tokens), engine.logits(tokens).float()
    low = logits_of(model, tokens)
    assert low.dtype == torch.float32
    assert 1e-4 < apart(low, want) < apart(ours, want) < 0.01


def test_scalars_of_a_run_in_bf16_are_exact(folder: Path, tmp_path: Path) -> None:
    """Those that the run's own engine reads: more bits than bf16 has. A bf16 file keeps them."""
    (tmp_path / "nano.toml").write_text(RECIPE.replace('"*', f'"{folder}/*').replace('"fp32"', '"bf16"'))
    inside(tmp_path, "train", "nano.toml", "--quiet", "--steps", "6")
    engine = Run(tmp_path / "runs/nano").load_engine()[0]
    assert engine.spec.compute == "bf16"
    scalars = [torch.cat([engine.frame.wide[f"h.{l}.{name}"] for l in range(L)]) for name in ("resid", "x0")]
    scalars += [engine.frame.wide[name] for name in ("smear", "backout")]
    for dtype in ("fp32", "bf16", "fp16"):
        inside(tmp_path, "export", "runs/nano", "--to", "hf", dtype, "--dtype", dtype)
        got, model = load_file(tmp_path / dtype / "model.safetensors"), theirs(tmp_path / dtype)
        for key, want in zip(SCALARS, scalars, strict=True):
            assert torch.equal(got[key], want), key
            assert torch.equal(model.get_parameter(key), want), key
            assert not torch.equal(want.to(torch.bfloat16).float(), want), key


def test_the_tensors_are_nanochats(folder: Path) -> None:
    """By name and value: rows of tokens alone, one tensor for the scalars of all layers, the other way of turning."""
    ours, got, HS = weights(folder / "runs/nano"), load_file(folder / "fp32/model.safetensors"), C // NH
    blocks = [f"transformer.h.{l}.{x}.weight" for l in range(L) for x in
              ("attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]  # fmt: skip
    valued = [f"value_embeds.{l}.weight" for l in (1, 3)] + [f"transformer.h.{l}.attn.ve_gate.weight" for l in (1, 3)]
    assert set(got) == {*SCALARS, "transformer.wte.weight", "lm_head.weight", "smear_gate.weight", *blocks, *valued}
    for name, key in (("wte", "transformer.wte"), ("headw", "lm_head"), ("h.3.ve", "value_embeds.3")):
        assert torch.equal(got[f"{key}.weight"], ours[name][:V])
    assert torch.equal(got["resid_lambdas"], torch.cat([ours[f"h.{l}.resid"] for l in range(L)]))
    assert torch.equal(got["x0_lambdas"], torch.cat([ours[f"h.{l}.x0"] for l in range(L)]))
    assert torch.equal(got["smear_gate.weight"], ours["smearw"][None])
    signs = torch.tensor([1.0] * (HS // 2) + [-1.0] * (HS // 2)).repeat(NH)[:, None]
    for i, x in enumerate("qkv"):
        rows = ours["h.2.qkvw"][i * C : (i + 1) * C]
        assert torch.equal(got[f"transformer.h.2.attn.c_{x}.weight"], rows if x == "v" else rows * signs)
    for file, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        low = load_file(folder / file / "model.safetensors")
        for name, x in got.items():
            assert torch.equal(low[name], x if name in SCALARS else x.to(dtype)), (file, name)
    assert (folder / "fp32/modeling_nanochat.py").read_bytes() == CODE.read_bytes()


def test_labels_give_the_loss(folder: Path) -> None:
    """The mean over targets, without those of -100; as a tuple too."""
    model, tokens = theirs(folder / "fp32"), tokens_of(2, MAX_T)
    engine = Run(folder / "runs/nano").load_engine(B=2)[0]
    targets = torch.cat([tokens[:, 1:], torch.full((2, 1), -1)], 1)
    targets[0, :20] = -1
    losses = engine.eval_losses(tokens, targets)
    want = losses.sum().item() / (targets >= 0).sum().item()
    labels = tokens.clone()
    labels[0, :21] = -100
    with torch.no_grad():
        assert model(tokens, labels=labels).loss.item() == pytest.approx(want, rel=1e-6)
        loss, logits = model(tokens, labels=labels, return_dict=False)
        assert loss.item() == pytest.approx(want, rel=1e-6)
        assert torch.equal(model(tokens, logits_to_keep=3).logits, logits[:, -3:])


def test_generate_continues_as_we_do(folder: Path) -> None:
    """Greedy, alone and in a batch with padding on the left; a cache that is asked for is not there."""
    model = theirs(folder / "fp32")
    prompts, made = [[256, *b"abc"], [256, *b"a longer prompt"], [256]], []
    engine = Run(folder / "runs/nano").load_engine()[0]
    for prompt in prompts:
        text = Text(prompt, Sampling(24, temperature=0.0))
        write_all(engine, [text])
        made.append(text.ids)
        for how in ({}, {"use_cache": True}):
            alone = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, pad_token_id=0, **how)
            assert alone[0].tolist() == text.ids
    assert len({token for ids in made for token in ids[-24:]}) > 5
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    both = model.generate(padded, attention_mask=mask, max_new_tokens=24, do_sample=False, pad_token_id=0)
    ends = [row[longest - len(prompt) :] for row, prompt in zip(both.tolist(), prompts, strict=True)]
    assert [row[: len(ids)] for row, ids in zip(ends, made, strict=True)] == made


@pytest.mark.parametrize("left", [True, False])
def test_padding_is_seen_by_no_token(folder: Path, left: bool) -> None:
    """The logits are those without it, on either side; padding itself has finite ones."""
    model, tokens, padding = theirs(folder / "fp32"), tokens_of(1, 13), tokens_of(1, 7)
    for count in (1, 7):
        whole = [padding[:, :count], tokens] if left else [tokens, padding[:, :count]]
        mask = torch.cat([torch.full_like(x, int(x is tokens)) for x in whole], 1)
        got = logits_of(model, torch.cat(whole, 1), attention_mask=mask)
        assert torch.isfinite(got).all()
        assert apart(got[:, count:] if left else got[:, :13], logits_of(model, tokens)) <= 2e-6
    unmasked = logits_of(model, torch.cat([padding, tokens], 1))[:, 7:]
    assert apart(unmasked, logits_of(model, tokens)) > 1e-3


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_saved_and_loaded_again(folder: Path, tmp_path: Path, dtype: str) -> None:
    """By transformers: the same bits, and the code goes along."""
    model, tokens = theirs(folder / dtype), tokens_of(1, 20)
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/modeling_nanochat.py").read_bytes() == CODE.read_bytes()
    again = theirs(tmp_path / "again")
    assert again.dtype == model.dtype
    for name, p in model.named_parameters():
        assert again.get_parameter(name).dtype == p.dtype
        assert torch.equal(again.get_parameter(name), p), name
    assert torch.equal(logits_of(again, tokens), logits_of(model, tokens))
    assert open_source(tmp_path / "again", "bytes").model == Run(folder / "runs/nano").config.model


def test_import_gives_the_run_again(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same weights, also from shards, and the same shape and text."""
    huggingface.export(Export(Run(folder / "runs/nano").checkpoint()), tmp_path / "shards", max_shard=20_000)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 5
    assert torch.equal(logits_of(theirs(tmp_path / "shards"), tokens_of(1, 9)),
                       logits_of(theirs(folder / "fp32"), tokens_of(1, 9)))  # fmt: skip
    want = weights(folder / "runs/nano")
    for source in (folder / "fp32", tmp_path / "shards"):
        inside(tmp_path, "import", str(source), "--name", source.name, "--run.device", "cpu")
        back = weights(tmp_path / "runs" / source.name)
        assert all(torch.equal(back[name], x) for name, x in want.items())
        assert Run(tmp_path / "runs" / source.name).config.model == Run(folder / "runs/nano").config.model
    text = ["--prompt", "abc", "--tokens", "12", "--seed", "5"]
    said = [inside(folder, "sample", name, *text).stdout for name in ("runs/nano", "fp32")]
    assert said[0] == said[1] != ""


def test_the_code_needs_torch_and_transformers_alone(folder: Path, tmp_path: Path) -> None:
    """In a process that cannot import daybreak, at another place: the same logits."""
    tree = ast.parse(CODE.read_text())
    named = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    named += [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    assert {str(name).partition(".")[0] for name in named} == {"torch", "transformers"}
    (tmp_path / "elsewhere").mkdir()
    for path in (folder / "fp32").iterdir():
        (tmp_path / "elsewhere" / path.name).write_bytes(path.read_bytes())
    script = """
import sys
sys.modules["daybreak"] = None  # an import of it fails
import torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained("elsewhere", trust_remote_code=True)
tokenizer = transformers.AutoTokenizer.from_pretrained("elsewhere", trust_remote_code=True)
ids = tokenizer("<|endoftext|>some text", return_tensors="pt")["input_ids"]
with torch.no_grad():
    torch.save((ids, model(ids).logits), "logits.pt")
"""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, check=True, timeout=PATIENCE)
    ids, logits = torch.load(tmp_path / "logits.pt")
    assert ids[0].tolist() == [256, *get_tokenizer("bytes").encode("some text")]
    assert torch.equal(logits, logits_of(theirs(folder / "fp32"), ids))


def test_its_code_runs_only_if_it_is_asked_for(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="the eval extra installs the harness")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        transformers.AutoModelForCausalLM.from_pretrained(folder / "fp32", trust_remote_code=False)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    said = inside(folder, "eval", "fp32", "--tasks", "piqa", "--data-files", ".", code=2).stderr
    assert said == (
        "daybreak: fp32 needs code of its own (auto_map in config.json), which eval does not run; "
        "`daybreak import fp32` makes a run that it scores, if daybreak knows the model.\n"
    )


def test_other_formats_and_new_rows_are_refused(folder: Path, tmp_path: Path) -> None:
    shape = Run(folder / "runs/nano").config.model
    for to in ("GGUF", "PEFT's format"):
        with pytest.raises(ConfigError, match=f"^model.arch = 'nanochat' has no form in {to}; those that have one: "):
            family_of(shape, to)
    with pytest.raises(NotImplementedError, match="a row for each token too"):
        theirs(folder / "fp32").resize_token_embeddings(300)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"window_pattern": "SX"}, "window_pattern = 'SX' must be letters S and L."),
    ({"window_pattern": ""}, "window_pattern = '' must be letters"),
    ({"window": 0}, "window = 0 must be a whole number above 0"),
    ({"rope_theta": "x"}, "rope_theta = 'x' must be a number above 0"),
    ({"final_logit_softcapping": None}, "final_logit_softcapping = None must be a number above 0"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings = True is not supported; daybreak computes False."),
    ({"num_attention_heads": 5}, "model.C = 48 must be a multiple of model.NH = 5"),
    ({"num_hidden_layers": 3}, "has no place for 'transformer.h.3.attn.c_q.weight'"),
    ({"model_type": "nanochat"}, "model_type = 'nanochat' is not supported"),
]


@pytest.mark.parametrize(("keys", "reason"), WRONG, ids=[r[:30] for _, r in WRONG])
def test_another_model_is_refused(folder: Path, tmp_path: Path, keys: dict[str, Any], reason: str) -> None:
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes((folder / "fp32" / name).read_bytes())
    config = json.loads((folder / "fp32/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | keys))
    with pytest.raises(CheckpointError) as refused:
        open_source(tmp_path)
    assert reason in str(refused.value)


def test_a_tensor_of_another_shape_is_refused(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((folder / "fp32" / name).read_bytes())
    state = load_file(folder / "fp32/model.safetensors")
    save_file(state | {"resid_lambdas": torch.ones(L + 1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'resid_lambdas' has shape \(5,\), its config.json says \(4,\)"):
        open_source(tmp_path)


def test_published_shapes_and_any_value_of_any_key(tmp_path: Path) -> None:
    """config.json holds every shape by its name; its defaults are those of nanochat:d12."""
    family, path = FAMILIES["daybreak_nanochat"], tmp_path / "config.json"
    for name in ("nanochat:d4", "nanochat:d12", "nanochat:d24"):
        said = family.config(parse_shape(name))
        assert family.shape(path, json.loads(json.dumps(said))) == parse_shape(name)
    assert family.shape(path, {}) == parse_shape("nanochat:d12")
    seen = 0
    for _, value, changed in mutations(family.config(parse_shape("nanochat:d4"))):
        if value is not TWICE and value != DEEP:
            seen += 1
            with suppress(CheckpointError, ConfigError):
                family.shape(path, changed).check()
    assert seen > 100


@pytest.mark.parametrize("how", [("format", "--diff"), ("check", "--no-cache")])
def test_the_code_has_the_house_style(tmp_path: Path, how: tuple[str, str]) -> None:
    """It has no .py here, so `make check` does not see it. Its length is that of a page or three."""
    copy = tmp_path / "modeling_nanochat.py"
    copy.write_bytes(CODE.read_bytes())
    pytest.importorskip("ruff", reason="the dev extra installs ruff")
    command = [sys.executable, "-m", "ruff", *how, "--config", str(ROOT / "pyproject.toml"), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(CODE.read_text().splitlines()) <= 230
