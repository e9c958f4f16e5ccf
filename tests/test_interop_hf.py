"""Hugging Face, both ways: transformers loads what we write, we load what it writes; the numbers are equal."""

from __future__ import annotations

import http.server
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interop_runs import MAX_T, daybreak, inside, shape_of, values_of, write_run, write_shards
from safetensors.torch import load_file, save_file
from test_data_formats import tokenizer_json

from daybreak.cli.main import main
from daybreak.data.tokenizer import get_tokenizer
from daybreak.engine import Engine, EngineSpec
from daybreak.errors import ConfigError, Error
from daybreak.generate import Sampler, Sampling, Text, write_all
from daybreak.interop import huggingface, open_source
from daybreak.interop.source import Export, make_run
from daybreak.shapes import GPT2Config
from daybreak.state.run import Run

transformers = pytest.importorskip("transformers", reason="the test extra installs transformers")
TEXTS = [
    "Hello world",
    "  two  spaces\n\n\ttabs",
    "naïve 漢字 🙂 don't I'LL 12345",
    "",
    "a" * 50,
    "x\r\n<|endoftext",
    "\x00\xff",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "run"
    write_run(folder)
    return folder


def exported(run: Path, out: Path, dtype: str = "fp32", max_shard: int = huggingface.MAX_SHARD) -> Path:
    huggingface.export(Export(Run(run).checkpoint()), out, dtype, max_shard)
    return out


def engine_of(dtype: str, B: int = 2, values: dict[str, torch.Tensor] | None = None) -> Engine:
    s = shape_of()
    cfg = GPT2Config(L=s.L, C=s.C, NH=s.NH, max_T=s.max_T, V=s.V)
    engine = Engine(EngineSpec(cfg, B=B, T=MAX_T, compute=dtype, train=False))
    engine.load_params(values or values_of(s))
    return engine


# ------------------------------------------------------------------------------------------------------------- out


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_transformers_computes_our_logits_at_every_position(run: Path, tmp_path: Path, dtype: str) -> None:
    """In fp32 to its rounding, with the exported weights whatever their dtype; in bf16 both err as much."""
    out = exported(run, tmp_path / "out", dtype)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval()
    assert type(theirs).__name__ == "GPT2LMHeadModel"
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    assert theirs.dtype == kind
    tokens = torch.randint(shape_of().V, (2, MAX_T), generator=torch.Generator().manual_seed(1))
    rounded = {name: x.to(kind).float() for name, x in values_of(shape_of()).items()}
    ours = engine_of("fp32", values=rounded).logits(tokens)
    with torch.no_grad():
        low = theirs(tokens).logits.float()
        want = theirs.float()(tokens).logits
    assert ours.shape == want.shape == (2, MAX_T, shape_of().V)
    assert (ours - want).abs().max() <= 2e-6 * want.abs().max()
    if dtype == "bf16":
        mine = engine_of("bf16", values=rounded).logits(tokens).float()
        their_error = (low - want).norm()
        assert 0 < their_error < 0.02 * want.norm()
        assert (mine - want).norm() <= 1.5 * their_error
        assert (mine - low).abs().max() <= 0.02 * want.abs().max()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_logits_at_the_width_and_length_of_gpt2(tmp_path: Path, dtype: str) -> None:
    """768 channels, 12 heads, 1,024 positions: a model of transformers, imported; every position."""
    torch.manual_seed(0)
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    sizes = {"vocab_size": 1025, "n_positions": 1024, "n_embd": 768, "n_layer": 2, "n_head": 12}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).to(kind).eval()
    theirs.save_pretrained(tmp_path / "m")
    source = open_source(tmp_path / "m", "gpt2-1024")
    engine = Engine(EngineSpec(source.model, B=1, T=1024, compute=dtype, train=False))
    engine.load_params({name: source.read(name) for name in source.names()})
    tokens = torch.randint(1025, (1, 1024), generator=torch.Generator().manual_seed(1))
    ours = engine.logits(tokens).float()
    with torch.no_grad():
        low = theirs(tokens).logits.float()
        want = theirs.double()(tokens).logits
    wrong, their = ((x - want).norm(dim=-1) / want.norm(dim=-1) for x in (ours, low))  # at each position
    assert wrong.shape == (1, 1024)
    assert wrong.max() <= 2 * their.max()
    assert wrong.max() <= {"fp32": 2e-6, "bf16": 0.03}[dtype]


def test_the_tensors_are_the_weights(run: Path, tmp_path: Path) -> None:
    """By name and value, without transformers in between: Conv1D is (in, out), no padding, one copy of the head."""
    values, V = values_of(shape_of()), shape_of().V
    for dtype in ("fp32", "bf16", "fp16"):
        got = load_file(exported(run, tmp_path / dtype, dtype) / "model.safetensors")
        kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
        assert torch.equal(got["transformer.wte.weight"], values["wte"][:V].to(kind))
        assert torch.equal(got["transformer.h.2.attn.c_attn.weight"], values["h.2.qkvw"].T.to(kind))
        assert torch.equal(got["transformer.h.1.mlp.c_proj.weight"], values["h.1.fcprojw"].T.to(kind))
        assert torch.equal(got["transformer.h.0.mlp.c_fc.bias"], values["h.0.fcb"].to(kind))
        assert len(got) == 4 + 12 * 3
        assert json.loads((tmp_path / dtype / "config.json").read_text())["torch_dtype"] == str(kind)[6:]


def test_generate_and_pipeline_continue_as_we_do(run: Path, tmp_path: Path) -> None:
    out = str(exported(run, tmp_path / "out"))
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    tok = get_tokenizer("gpt2-1024")
    prompt = [tok.eot, *map(int, tok.encode("The meaning of"))]
    ours = Text(prompt, Sampling(30, temperature=0.0))
    write_all(engine_of("fp32", 1), [ours])
    assert len({token.id for token in ours.made}) > 3
    assert tok.eot not in ours.ids[1:]
    theirs = model.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False)
    assert theirs[0].tolist() == ours.ids
    text = "".join(Sampler(run).text("The meaning of", Sampling(12, 0.0)))
    assert text
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    said = pipe("<|endoftext|>The meaning of", max_new_tokens=12, do_sample=False, return_full_text=False)
    assert said[0]["generated_text"] == text


def test_sample_reads_a_hugging_face_folder(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The text of the folder is that of the run it was exported from."""
    out, flags = exported(run, tmp_path / "out"), ["--prompt", "The meaning of", "--tokens", "12", "--seed", "5"]
    texts = []
    for target in (run, out):
        assert main(["sample", str(target), *flags]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert len(texts[0]) > 12


@pytest.mark.parametrize("name", ["gpt2", "gpt2-1024", "gpt2-256", "bytes"])
def test_the_tokenizer_gives_our_ids(name: str, tmp_path: Path) -> None:
    ours = get_tokenizer(name)
    huggingface.write_tokenizer(ours, 128, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == ours.V
    assert theirs.eos_token_id == theirs.bos_token_id == ours.eot
    assert theirs.model_max_length == 128
    for text in TEXTS:
        ids = ours.encode(text).tolist()
        assert theirs(text)["input_ids"] == ids, text
        assert theirs.decode(ids) == text
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    assert list(model["vocab"].values()) == list(range(ours.V))
    assert len(model["merges"]) == {"gpt2": 50000, "gpt2-1024": 768}.get(name, 0)
    if model["merges"]:
        assert model["merges"][:3] == [["Ġ", "t"], ["Ġ", "a"], ["h", "e"]]  # the first of GPT-2's merges
    assert huggingface._tokenizer(tmp_path) is ours


def test_shards_and_a_folder_that_is_taken(run: Path, tmp_path: Path) -> None:
    out = exported(run, tmp_path / "out", max_shard=400_000)
    names = sorted(p.name for p in out.glob("*.safetensors"))
    assert len(names) > 3
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    assert all((out / n).stat().st_size < 420_000 for n in names)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for n in names for x in load_file(out / n).values())
    whole = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(whole.transformer.h[2].mlp.c_proj.weight.T, values_of(shape_of())["h.2.fcprojw"])
    assert torch.equal(open_source(out).read("h.2.fcprojw"), values_of(shape_of())["h.2.fcprojw"])
    with pytest.raises(ConfigError, match=r"out exists already"):
        exported(run, out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_positions_that_were_not_trained_stay_behind(tmp_path: Path) -> None:
    """T below max_T: other programs get a model of length T, which is the length that the run is scored at."""
    write_run(tmp_path / "run", batch__T=32)
    said = inside(tmp_path, "export", "run", "--to", "hf", "out").stdout
    assert said.endswith("its max_T is 32, the run's batch.T: later positions were not trained\n")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.n_positions == 32
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").model_max_length == 32
    assert torch.equal(model.transformer.wpe.weight, values_of(shape_of())["wpe"][:32])
    engine, tokens = Run(tmp_path / "run").load_engine()[0], torch.arange(32)[None]
    assert engine.T == 32
    with torch.no_grad():
        want = model(tokens).logits
    assert (engine.logits(tokens) - want).norm() <= 2e-6 * want.norm()
    assert open_source(tmp_path / "out").model.max_T == 32
    inside(tmp_path, "export", "run", "--to", "llmc", "log")  # which goes on training it
    assert open_source(tmp_path / "log").model.max_T == MAX_T
    gguf = pytest.importorskip("gguf")
    inside(tmp_path, "export", "run", "--to", "gguf", "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert reader.fields["gpt2.context_length"].contents() == 32
    (positions,) = (t.data for t in reader.tensors if t.name == "position_embd.weight")
    np.testing.assert_array_equal(positions, model.transformer.wpe.weight.detach().numpy())


def test_a_tokenizer_json_goes_with_the_weights(tmp_path: Path) -> None:
    """A run with a tokenizer of its own: transformers gets that file; no other format has a place for it."""
    tokenizer_json(tmp_path / "t.json")
    tok = get_tokenizer(str(tmp_path / "t.json"))
    write_run(tmp_path / "run", str(tmp_path / "t.json"))
    (tmp_path / "t.json").rename(tmp_path / "run/tokenizer.json")
    inside(tmp_path, "export", "run", "--to", "hf", "out")
    assert (tmp_path / "out/tokenizer.json").read_text("utf-8") == tok.source
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.model_max_length) == (tok.eot, tok.eot, MAX_T)
    for text in TEXTS[:5]:
        assert theirs(text)["input_ids"] == tok.encode(text).tolist()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.eos_token_id == tok.eot
    assert json.loads((tmp_path / "out/config.json").read_text())[huggingface.FINGERPRINT] == tok.fingerprint
    said = inside(tmp_path, "export", "run", "--to", "llmc", "no", code=2).stderr
    assert f"run has a tokenizer.json of its own ({tok.name}), which llmc cannot hold; use --to hf.\n" in said
    said = inside(tmp_path, "export", "run", "--to", "gguf", "no", code=2).stderr
    assert f"GGUF cannot hold tokenizer {tok.name}: llama.cpp splits no text as it does; use --to hf.\n" in said
    assert not (tmp_path / "no").exists()


# -------------------------------------------------------------------------------------------------------------- in


def their_model(folder: Path, **keys: Any) -> Any:
    """A GPT2LMHeadModel as transformers saves it, biases and scales not at their start values."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=1025, n_positions=MAX_T, n_embd=48, n_layer=2, n_head=3, initializer_range=0.2, **keys
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p += 0.2 * torch.randn_like(p)
    model.save_pretrained(folder, max_shard_size=keys.pop("max_shard_size", "5GB"))
    huggingface.write_tokenizer(get_tokenizer("gpt2-1024"), MAX_T, folder)
    return model


def test_import_then_train_from_the_command_line(tmp_path: Path) -> None:
    """A model of transformers becomes a run with its logits, which then trains on data named only at that point."""
    model = their_model(tmp_path / "theirs")
    said = daybreak(tmp_path, "import", "theirs", "--name", "mine", "--run.device", "cpu").stdout
    assert said.splitlines()[0] == "runs/mine: gpt2 L=2 C=48 NH=3 max_T=64 V=1025, gpt2-1024 tokenizer"
    tokens = torch.randint(1025, (1, MAX_T), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        want = model(tokens).logits
    got = Run(tmp_path / "runs/mine").load_engine()[0].logits(tokens)
    assert (got - want).norm() <= 2e-6 * want.norm()

    write_shards(tmp_path / "shards", 1025)
    small = ["--batch.B", "2", "--eval.tokens", "128", "--eval.sample_tokens", "2", "--steps", "3"]
    out = daybreak(tmp_path, "train", "runs/mine", "--data", "shards", "--optim.lr", "1e-3", *small)
    assert "runs/mine: step 3," in out.stdout
    metrics = Run(tmp_path / "runs/mine").metrics("val")
    assert metrics[0]["step"] == 0
    assert Run(tmp_path / "runs/mine").config.optim.lr == 1e-3
    # It has begun: from here on the usual rules of resuming hold.
    again = inside(tmp_path, "train", "runs/mine", "--optim.lr", "2e-3", code=2)
    assert "optim.lr is 0.001 in the saved run and cannot become 0.002" in again.stderr
    assert "runs/mine exists; continue it with" in inside(tmp_path, "import", "theirs", "--name", "mine", code=2).stderr

    # --init-from starts anew with the same weights, so the first validation loss is the same.
    shape = ["--model.L", "2", "--model.C", "48", "--model.NH", "3", "--model.max_T", "64", "--model.V", "1025"]
    start = ["train", "d12", "--data", "shards", "--data.tokenizer", "gpt2-1024", "--run.device", "cpu", *small]
    inside(tmp_path, *start, *shape, "--name", "init", "--init-from", "theirs")
    first = Run(tmp_path / "runs/init").metrics("val")[0]
    assert (first["step"], first["loss"]) == (0, metrics[0]["loss"])
    wrong = inside(tmp_path, *start, *shape, "--name", "w", "--init-from", "theirs", "--model.max_T", "32", code=5)
    assert "theirs is of another model: model.max_T is 64 there and 32 here" in wrong.stderr


def test_a_round_trip_changes_nothing(run: Path, tmp_path: Path) -> None:
    out = exported(run, tmp_path / "out", max_shard=400_000)
    source = open_source(out)
    config = Run(run).config.override({"run.dir": str(tmp_path), "run.name": "back"})
    back = Run(make_run(source, config)).checkpoint()
    for name, value in values_of(shape_of()).items():
        got = torch.empty_like(value)
        back.read_model(name, got)
        assert torch.equal(got, value), name
    assert back.step == 0
    zero = torch.ones(back.flat_numel)
    back.read_optimizer("v", 0, zero)
    assert not zero.any()


def test_other_names_of_keys_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    their_model(tmp_path / "m")
    path = tmp_path / "m/config.json"
    config, names = json.loads(path.read_text()), transformers.GPT2Config.attribute_map
    assert set(names.values()) == {"n_layer", "n_embd", "n_head", "n_positions"}
    for alias, key in names.items():
        config[alias] = config.pop(key)
    path.write_text(json.dumps(config))
    read = transformers.AutoConfig.from_pretrained(tmp_path / "m")
    cfg = open_source(tmp_path / "m").model
    assert (cfg.L, cfg.C, cfg.NH, cfg.max_T) == (read.n_layer, read.n_embd, read.n_head, read.n_positions)
    assert cfg == GPT2Config(L=2, C=48, NH=3, max_T=MAX_T, V=1025)


def test_old_files_without_prefix_with_masks_and_head(tmp_path: Path) -> None:
    """The published gpt2 has no prefix and stores causal masks; others store a tied head."""
    model = their_model(tmp_path / "m")
    state = {k.removeprefix("transformer."): v.contiguous() for k, v in model.state_dict().items()}
    state |= {"h.0.attn.bias": torch.ones(1, 1, 4, 4), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    state["lm_head.weight"] = state["wte.weight"].clone()
    save_file(state, tmp_path / "m/model.safetensors")
    source = open_source(tmp_path / "m")
    assert torch.equal(source.read("h.1.qkvw"), state["h.1.attn.c_attn.weight"].T)
    assert torch.equal(source.read("wte")[:1025], state["wte.weight"])
    assert not source.read("wte")[1025:].any()
    state["lm_head.weight"][0, 0] += 1
    save_file(state, tmp_path / "m/model.safetensors")
    with pytest.raises(Error, match=r"lm_head\.weight differs from wte; an untied head is not supported"):
        open_source(tmp_path / "m")


# -------------------------------------------------------------------------------------------------------- download


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's protocol as its client needs for a public model without large-file storage."""

    folder: Path
    commit = "0123456789abcdef0123456789abcdef01234567"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path, repo = self.path.split("?")[0], "/openai-community/gpt2"
        headers = {"X-Repo-Commit": self.commit}
        if path.startswith(f"/api/models{repo}/revision/") or path == f"/api/models{repo}":
            files = [{"rfilename": p.name} for p in sorted(self.folder.iterdir())]
            data = json.dumps({"id": repo[1:], "modelId": repo[1:], "sha": self.commit, "siblings": files}).encode()
        elif path.startswith(f"/api/models{repo}/tree/"):
            data = json.dumps(
                [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": "x"} for p in self.folder.iterdir()]
            ).encode()
        elif path.startswith(f"{repo}/resolve/") and (self.folder / path.rpartition("/")[2]).is_file():
            data = (self.folder / path.rpartition("/")[2]).read_bytes()
            headers["ETag"] = f'"{path.rpartition("/")[2]}-1"'
        else:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        for key, value in (headers | {"Content-Length": str(len(data)), "Content-Type": "application/json"}).items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


def test_a_name_is_downloaded(tmp_path: Path) -> None:
    """`daybreak import gpt2` through the real client, from a server of the hub's protocol on this machine."""
    pytest.importorskip("huggingface_hub")
    model = their_model(tmp_path / "served")
    (tmp_path / "served/pytorch_model.bin").write_text("never wanted")
    handler = type("Handler", (Hub,), {"folder": tmp_path / "served"})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    where = f"http://127.0.0.1:{server.server_address[1]}"
    env = {"HF_ENDPOINT": where, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1",
           "HF_HUB_DISABLE_TELEMETRY": "1"}  # fmt: skip
    try:
        daybreak(tmp_path, "import", "gpt2", "--run.device", "cpu", **env)
        missing = daybreak(tmp_path, "import", "nobody/nothing", code=1, **env)
    finally:
        server.shutdown()
        server.server_close()
    assert missing.stderr.startswith("daybreak: nobody/nothing could not be downloaded (")
    assert missing.stderr.endswith("), and no folder has this name; check name and network, or give a folder.\n")
    assert missing.stderr.count("\n") == 1
    got = torch.empty(48)
    Run(tmp_path / "runs/gpt2").checkpoint().read_model("h.1.ln2b", got)
    assert torch.equal(got, model.transformer.h[1].ln_2.bias)
    assert not list((tmp_path / "cache").rglob("pytorch_model.bin"))
