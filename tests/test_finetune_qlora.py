"""QLoRA: adapters on a base in NF4. The same bits as adapters on the matrices that NF4 stands for, PEFT's and
bitsandbytes' losses, and whole runs from the command line. tests/test_kernel_nf4.py has the bytes."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import their_decoder
from interop_runs import inside
from safetensors.torch import load_file
from test_finetune_peft import THEIRS, batches, ours
from test_finetune_runs import SHORT
from torch import Tensor

from daybreak.config_keys import LoraConfig, OptimConfig
from daybreak.engine import Engine, EngineSpec
from daybreak.engine.passes import plan_engine
from daybreak.interop import open_source
from daybreak.kernels.nf4 import SUFFIXES, Packed, pack, packed_parts
from daybreak.models.adapters import is_adapter
from daybreak.shapes import Shape, model_config, parse_shape
from daybreak.state.checkpoint import load_checkpoint
from daybreak.state.run import Run

torch.set_num_threads(1)
LLAMA = {"arch": "llama", "L": 2, "C": 64, "NH": 4, "NKV": 2, "HS": 16, "F": 96, "max_T": 32, "V": 257}
SHAPES = {"llama": LLAMA, "gpt2": {"arch": "gpt2", "L": 2, "C": 64, "NH": 2, "max_T": 32, "V": 257}}


def build(shape: Shape, base: str, targets: str, **how: Any) -> Engine:
    """Weights from a seed, and adapters whose B is not 0."""
    optim = OptimConfig(beta2=0.999, weight_decay=0.0)
    lora = LoraConfig(4, targets=targets, base=base)
    engine = Engine(EngineSpec(shape, **{"B": 3, "T": 24, "optim": optim, "lora": lora, **how}))
    for i, name in enumerate(engine.names()):
        if name.endswith("_B"):
            engine.param(name).normal_(0, 0.05, generator=torch.Generator().manual_seed(i))
    return engine


@pytest.mark.parametrize("recompute", [0, 2, 3])
@pytest.mark.parametrize(("shape", "targets"), [("llama", "*"), ("llama", "q,v,gate"), ("llama", "v"), ("gpt2", "*")])
def test_the_same_bits_as_adapters_on_what_nf4_stands_for(shape: str, targets: str, recompute: int) -> None:
    cfg = model_config(SHAPES[shape])
    packed, plain = (build(cfg, base, targets, recompute=recompute) for base in ("nf4", "compute"))
    start = {name: packed.param(name).clone() for name in packed.names()}
    assert all(torch.equal(plain.param(name), x) for name, x in start.items() if "." not in name or is_adapter(name))
    matrices = [name for name, x in start.items() if "." in name and x.dim() == 2 and not is_adapter(name)]
    assert len(matrices) == 8
    for name in matrices:
        error = (start[name] - plain.param(name)).norm() / plain.param(name).norm()
        assert 0.08 < error < 0.11, name  # normal numbers
        plain.set_exact(name, start[name])
    assert ours(packed) == ours(plain)
    for name in packed.table.offsets:
        assert torch.equal(packed.grad(name), plain.grad(name)), name
    for name, x in start.items():
        assert torch.equal(packed.param(name), x) != is_adapter(name), name
    tokens = torch.randint(257, (1, 9), generator=torch.Generator().manual_seed(3))
    assert torch.equal(packed.logits(tokens), plain.logits(tokens))
    assert torch.equal(packed.prefill(0, tokens.tolist()), plain.prefill(0, tokens.tolist()))
    assert torch.equal(packed.decode([5], [9]), plain.decode([5], [9]))


def their_qlora(folder: Path, config: Any) -> Any:
    """transformers' model with its linear layers in bitsandbytes' NF4, and PEFT's adapters, all in fp32 else."""
    import bitsandbytes
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.get_input_embeddings().padding_idx = None
    for layer in model.model.layers:
        for path in THEIRS.values():
            parent, _, leaf = path.rpartition(".")
            old = getattr(layer.get_submodule(parent), leaf)
            new = bitsandbytes.nn.Linear4bit(
                old.in_features, old.out_features, old.bias is not None, torch.float32, True, "nf4"
            )
            new.weight = bitsandbytes.nn.Params4bit(old.weight.data.clone(), False, quant_type="nf4")
            new.bias = old.bias
            setattr(layer.get_submodule(parent), leaf, new.to("cpu"))
    model.is_loaded_in_4bit = True
    return peft.get_peft_model(model, config, autocast_adapter_dtype=False)


def copy_adapters(engine: Engine, wrapped: Any) -> None:
    """Ours into PEFT's model."""
    given = dict(wrapped.named_parameters())
    with torch.no_grad():
        for name, adapter in engine.table.adapters.items():
            downs = engine.param(name + "_A").chunk(len(adapter.parts))
            ups = engine.param(name + "_B").split([stop - first for first, stop in adapter.columns])
            for part, *pair in zip(adapter.parts, downs, ups, strict=True):
                _, layer, leaf = part.split(".")
                for letter, value in zip("AB", pair, strict=True):
                    key = f"base_model.model.model.layers.{layer}.{THEIRS[leaf]}.lora_{letter}.default.weight"
                    given[key].copy_(value)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes: make test-real")
def test_losses_are_those_of_peft_and_bitsandbytes(tmp_path: Path) -> None:
    """In fp32, ten steps of two micro-steps, with half of the targets learned."""
    import peft

    their_decoder("llama", tmp_path)
    source = open_source(tmp_path)
    engine = build(source.model, "nf4", "*")
    for name in source.names():
        engine.set_exact(name, source.read(name))
    names = [name.rpartition(".")[2] for name in THEIRS.values()]
    wrapped = their_qlora(tmp_path, peft.LoraConfig(r=4, lora_alpha=8, target_modules=names, task_type="CAUSAL_LM"))
    copy_adapters(engine, wrapped)
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == sum(engine.table.rows[name].numel for name in engine.table.offsets)
    adamw, got = torch.optim.AdamW(trained, lr=5e-3, betas=(0.9, 0.999), weight_decay=0.0), ours(engine)
    for (tokens, targets), (loss, norm) in zip(batches(), got, strict=True):
        adamw.zero_grad()
        logits = wrapped(tokens.flatten(0, 1), use_cache=False).logits
        theirs = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        theirs.backward()
        assert loss == pytest.approx(theirs.item(), rel=1e-5)
        assert norm == pytest.approx(float(torch.nn.utils.clip_grad_norm_(trained, 1.0)), rel=5e-5)
        adamw.step()


# ------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("qlora")
    their_decoder("llama", home / "base")
    (home / "text.txt").write_text("".join(f"{i} men went to mow, went to mow a meadow.\n" for i in range(900)))
    inside(home, "prepare", "text.txt", "--tokenizer", "bytes")
    inside(home, "finetune", "base", "--data", "text", *SHORT, "--method", "qlora", "--checkpoint.every", "3")
    return home


def tensors(run: Path, step: int) -> dict[str, Tensor]:
    folder = run / f"checkpoints/step-{step:08d}"
    return load_file(folder / "model.safetensors") | load_file(folder / "base.safetensors")


def test_a_run_saves_the_bytes_of_its_base_and_resumes_with_the_same_bits(home: Path) -> None:
    run, source = home / "runs/base-qlora", open_source(home / "base")
    saved, end = tensors(run, 0), tensors(run, 6)
    assert Run(run).config.lora == LoraConfig(16, base="nf4")
    value = source.read("h.1.qkvw")
    rows = (64, 32, 32)
    parts = [torch.zeros(shape, dtype=dtype) for shape, dtype in packed_parts("h.1.qkvw", tuple(value.shape), rows)]
    pack(Packed(tuple(value.shape), rows, *parts), value)
    for suffix, part in zip(SUFFIXES, parts, strict=True):
        assert torch.equal(saved["h.1.qkvw" + suffix], part)
    assert "h.1.qkvw" not in saved
    assert torch.equal(saved["wte"], source.read("wte").view_as(saved["wte"]))
    assert {name for name in saved if not torch.equal(saved[name], end[name])} == set(filter(is_adapter, saved))
    losses = [record["loss"] for record in Run(run).metrics("step")]
    assert losses[-1] < losses[0] - 0.1
    args = ["base", "--data", "text", *SHORT, "--method", "qlora", "--name", "b", "--steps", "3"]
    inside(home, "finetune", *args, "--optim.horizon", "6", "--schedule.warmup", "0")
    inside(home, "train", "runs/b", "--steps", "6", "--quiet")
    resumed = tensors(home / "runs/b", 6)
    assert all(torch.equal(x, resumed[name]) for name, x in end.items())
    said = inside(home, "train", "runs/b", "--lora.base", "compute", "--steps", "9", code=2).stderr
    assert 'lora.base is "nf4" in the saved run and cannot become "compute"' in said


def test_exports_merge_into_what_was_trained(home: Path) -> None:
    """transformers' logits of the export are the run's own; so is the first loss of a run that builds upon it."""
    import transformers

    run = home / "runs/base-qlora"
    said = inside(home, "export", "runs/base-qlora", "--to", "hf", "merged").stdout
    assert "adapters are merged into the base as it was trained, in NF4" in said
    engine, _ = Run(run).load_engine()
    checkpoint = Run(run).checkpoint()
    assert sorted(checkpoint.names()) == sorted(engine.names())
    weight = torch.empty(engine.param("h.0.fcprojw").shape, dtype=torch.bfloat16)
    checkpoint.read_model("h.0.fcprojw", weight)
    assert torch.equal(weight, engine.param("h.0.fcprojw").bfloat16())
    tokens = torch.randint(257, (1, 32), generator=torch.Generator().manual_seed(3))
    mine = engine.logits(tokens)
    with torch.no_grad():
        merged = transformers.AutoModelForCausalLM.from_pretrained(home / "merged")(tokens).logits
    assert (merged - mine).norm() <= 3e-6 * mine.norm()
    inside(home, "finetune", "runs/base-qlora", "--data", "text", *SHORT, "--name", "again")
    first = Run(home / "runs/again").metrics("val")[0]["loss"]
    assert first == pytest.approx(Run(run).metrics("val")[-1]["loss"], rel=1e-6)
    inside(home, "export", "runs/base-qlora", "--to", "peft", "adapter")
    assert (home / "adapter/adapter_model.safetensors").is_file()
    assert inside(home, "sample", "runs/base-qlora", "--tokens", "4", "--temperature", "0").stdout


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--method", "full", "--lora.base", "nf4"], "lora.base = nf4 is for adapters, and lora.rank = 0 gives none"),
        (["--method", "qlora", "--lora.rank", "0"], "lora.rank = 0 gives no adapters"),
        (["--method", "qlora", "--lora.base", "nf5"], 'lora.base = "nf5" must be compute or nf4 or fp8'),
    ],
)
def test_refusals(home: Path, args: list[str], said: str) -> None:
    assert said in inside(home, "finetune", "base", "--data", "text", *args, *SHORT, "--name", "no", code=2).stderr
    assert not (home / "runs/no").exists()


def test_memory_of_llama3_8b() -> None:
    """4.127 bits for each weight of a block; and an epoch of rows of 2048 tokens fits a card of 24 GiB."""
    how: dict[str, Any] = {"compute": "bf16", "lora": LoraConfig(16, base="nf4"), "device_type": "cuda"}
    _, table, arena = plan_engine(EngineSpec(parse_shape("llama3-8b"), B=2, T=2048, recompute=2, **how))
    block = 4096 * (4096 + 2 * 1024 + 4096 + 3 * 14336)
    whole = sum(row.numel for row in table.frozen) - 32 * block
    held = sum(e.nbytes for e in arena.entries if e.buffer == "frozen")
    assert held == 2 * whole + 32 * (block // 2 + block // 64 + block // 64 // 256 * 4 + 7 * 4)
    assert 8 * (held - 2 * whole) / (32 * block) == pytest.approx(4.127, abs=0.001)
    assert arena.nbytes < 20 << 30
    room = {e.name: e.nbytes for e in arena.entries if e.name.endswith("w.forward")}
    assert max(room.values()) == 2 * 2 * 14336 * 4096
    assert sum(room.values()) == 2 * 32 * block  # as many names, but they share bytes:
    kept = sum(e.nbytes for e in arena.entries if e.buffer == "activations" and e.name.startswith("h."))
    assert arena.sizes()["activations"] < kept - sum(room.values())
    assert math.isclose(held / (1 << 30), 5.3, abs_tol=0.1)


def test_a_checkpoint_is_as_small_as_its_base(home: Path) -> None:
    checkpoint = load_checkpoint(home / "runs/base-qlora/checkpoints/step-00000006")
    assert checkpoint.held("h.0.qkvw") == "nf4"
    assert not checkpoint.held("wte")
