"""`daybreak finetune`: whole runs with adapters, from the command line to a merged export. Real files and models."""

from __future__ import annotations

import os
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from decoders import their_decoder
from interop_runs import inside
from safetensors.torch import load_file
from snapshots import facts
from torch import Tensor

from daybreak.config import Config
from daybreak.config_keys import LoraConfig
from daybreak.engine import Engine, EngineSpec
from daybreak.engine.passes import plan_engine
from daybreak.errors import ConfigError
from daybreak.interop import open_source
from daybreak.interop.source import came_from
from daybreak.models.adapters import is_adapter
from daybreak.parallel import ALONE, Group, connect
from daybreak.shapes import parse_shape
from daybreak.state.checkpoint import load_checkpoint, save_checkpoint
from daybreak.state.restore import checkpoint_bytes, restore, snapshot
from daybreak.state.run import Run

torch.set_num_threads(1)
SHORT = ["--run.device", "cpu", "--batch.B", "2", "--batch.T", "32", "--batch.total_tokens", "128", "--steps", "6",
         "--eval.tokens", "256", "--eval.sample_tokens", "8", "--optim.lr", "1e-2", "--quiet"]  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as transformers saves it, a text with its tokenizer, and a run with adapters in q, v and the MLP."""
    home = tmp_path_factory.mktemp("finetune")
    their_decoder("llama", home / "base")
    (home / "text.txt").write_text("".join(f"{i} men went to mow, went to mow a meadow.\n" for i in range(900)))
    inside(home, "prepare", "text.txt", "--tokenizer", "bytes")
    inside(home, "finetune", "base", "--data", "text", *SHORT, "--name", "a", "--lora.rank", "4", "--lora.targets",
           "q,v,gate,up,fcproj", "--checkpoint.every", "3", "--log.norms_every", "3")  # fmt: skip
    return home


def tensors(run: Path, step: int) -> dict[str, Tensor]:
    folder = run / f"checkpoints/step-{step:08d}"
    return load_file(folder / "model.safetensors") | load_file(folder / "base.safetensors")


def test_only_adapters_learn(home: Path) -> None:
    start, end = tensors(home / "runs/a", 0), tensors(home / "runs/a", 6)
    source = open_source(home / "base")
    assert start.keys() == end.keys()
    for name, value in start.items():
        if is_adapter(name):
            assert not torch.equal(value, end[name]), name
        else:
            assert torch.equal(value, source.read(name).view_as(value)), name
            assert torch.equal(value, end[name]), name
    assert start["h.1.qkv_A"].shape == (8, 64)  # of q and of v
    assert start["h.1.qkv_B"].shape == (64 + 32, 4)
    assert "h.1.attproj_A" not in start
    losses = [record["loss"] for record in Run(home / "runs/a").metrics("step")]
    assert losses[-1] < losses[0] - 0.1
    vals = Run(home / "runs/a").metrics("val")
    assert vals[-1]["loss"] < vals[0]["loss"]


def test_a_resumed_run_has_the_same_bits(home: Path) -> None:
    """Stopped after three of six steps. `--print-config` and config.toml say the same."""
    args = ["base", "--data", "text", *SHORT, "--name", "b", "--lora.rank", "4", "--lora.targets", "q,v,gate,up,fcproj"]
    printed = tomllib.loads(inside(home, "finetune", *args, "--print-config").stdout)
    inside(home, "finetune", *args, "--steps", "3", "--optim.horizon", "6", "--schedule.warmup", "0")
    inside(home, "train", "runs/b", "--steps", "6", "--quiet")
    straight, resumed = tensors(home / "runs/a", 6), tensors(home / "runs/b", 6)
    assert all(torch.equal(value, resumed[name]) for name, value in straight.items())
    saved = tomllib.loads((home / "runs/b/config.toml").read_text())
    assert saved["lora"] == printed["lora"] == {
        "rank": 4, "alpha": 0.0, "targets": "q,v,gate,up,fcproj", "rslora": False, "base": "compute"
    }  # fmt: skip
    assert printed["optim"]["beta2"] == saved["optim"]["beta2"] == 0.999
    said = inside(home, "train", "runs/b", "--lora.rank", "8", "--steps", "9", "--optim.horizon", "9", code=2).stderr
    assert "lora.rank is 4 in the saved run and cannot become 8" in said


def test_what_is_exported_and_built_upon_is_merged(home: Path) -> None:
    """transformers' logits of the export are the run's own, and so is the first loss of a run that starts from it."""
    import transformers

    inside(home, "export", "runs/a", "--to", "hf", "merged")
    engine, _ = Run(home / "runs/a").load_engine()
    tokens = torch.randint(257, (1, 32), generator=torch.Generator().manual_seed(3))
    ours, base = engine.logits(tokens), open_source(home / "base")
    with torch.no_grad():
        merged = transformers.AutoModelForCausalLM.from_pretrained(home / "merged")(tokens).logits
        before = transformers.AutoModelForCausalLM.from_pretrained(home / "base")(tokens).logits
    assert (merged - ours).norm() <= 2e-6 * ours.norm()
    assert (before - ours).norm() > 0.05 * ours.norm()
    assert base.names() == open_source(home / "merged").names()
    for name, method in (("again", "lora"), ("full", "full")):
        inside(home, "finetune", "runs/a", "--data", "text", *SHORT, "--name", name, "--method", method)
        first = Run(home / "runs" / name).metrics("val")[0]["loss"]
        assert first == pytest.approx(Run(home / "runs/a").metrics("val")[-1]["loss"], rel=1e-6)
    full = home / "runs/full/checkpoints/step-00000006"
    assert not any(map(is_adapter, load_file(full / "model.safetensors")))
    assert not (full / "base.safetensors").exists()
    assert inside(home, "sample", "runs/a", "--tokens", "4", "--temperature", "0").stdout


def test_killed_before_it_saved_its_weights(home: Path) -> None:
    """Resumed as an ordinary run, it would go on from random weights."""
    inside(home, "finetune", "base", "--data", "text", *SHORT, "--name", "killed")
    shutil.rmtree(home / "runs/killed/checkpoints")
    said = inside(home, "train", "runs/killed", "--quiet", code=2).stderr
    assert "runs/killed has not saved the weights that it was to begin with" in said
    assert "remove runs/killed and start it again" in said


def test_a_fork_s_adapters_are_of_the_same_model(home: Path) -> None:
    inside(home, "train", "runs/a", "--fork", "forked", "--steps", "7", "--optim.horizon", "7", "--quiet")
    assert came_from(home / "runs/forked") == came_from(home / "runs/a") != ""


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "finetune needs --data NAME"),
        (["--data", "text", "--model.L", "3"], "--model.L cannot be given to finetune"),
        (["--data", "text", "--lora.targets", "x_proj"], "lora.targets = 'x_proj' fits no linear layer of the model; "
         "use * for all, or some of q, k, v, attproj, gate, up, fcproj."),
        (["--data", "text", "--lora.rank", "0"], "lora.rank = 0 gives no adapters"),
        (["--data", "text", "--lora.rank", "-1"], "lora.rank = -1 must be from 0 to 4096"),
        (["--data", "text", "--method", "full", "--lora.rank", "4"], "--lora.rank gives adapters"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_refusals(home: Path, args: list[str], said: str) -> None:
    assert said in inside(home, "finetune", "base", *args, *SHORT, "--name", "refused", code=2).stderr
    assert not (home / "runs/refused").exists()


def test_patterns_choose_layers_and_parts() -> None:
    spec = EngineSpec(parse_shape("llama3.2-1b"), B=1, T=64, lora=LoraConfig(8, targets="h.0.*,h.1?.[kv],attproj"))
    adapters = plan_engine(spec)[1].adapters
    assert adapters["h.0.qkv"].parts == ("h.0.q", "h.0.k", "h.0.v")
    assert adapters["h.10.qkv"].columns == ((2048, 2560), (2560, 3072))
    assert "h.2.qkv" not in adapters
    assert "h.2.attproj" in adapters
    assert LoraConfig(16).scale == 2
    assert LoraConfig(16, alpha=8.0, rslora=True).scale == 2
    with pytest.raises(ConfigError, match="fits no linear layer"):
        plan_engine(EngineSpec(parse_shape("d12"), B=1, T=64, lora=LoraConfig(8, targets="gate")))


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_memory_of_the_base_is_its_weights_alone(device_type: str) -> None:
    """Llama-3.2-1B in bf16: 2 bytes a frozen weight, and only adapters have gradients, moments and master weights."""
    shape = parse_shape("llama3.2-1b")
    how: dict[str, Any] = {"compute": "bf16", "masters": "split", "lora": LoraConfig(16), "device_type": device_type}
    spec = EngineSpec(shape, B=2, T=512, **how)
    _, table, arena = plan_engine(spec)
    trained = sum(row.numel for row in table.rows.values() if row.trainable)
    assert trained == 11_272_192  # as PEFT counts them, with all linear layers
    sizes = arena.sizes()
    assert sizes["frozen"] == 2 * (table.num_parameters - trained)
    assert checkpoint_bytes(arena) == 12 * trained + sizes["frozen"]
    assert checkpoint_bytes(arena, 5) == 5 * 12 * trained + sizes["frozen"]
    assert [sizes[name] // trained for name in ("weights", "masters", "m", "v", "grads")] == [2, 2, 4, 4, 2]


V, T, SAMPLES = 61, 12, 12


def build(group: Group = ALONE, **how: Any) -> Engine:
    shape = Config().override({"model.arch": "llama", "model.L": 3, "model.C": 32, "model.NH": 4, "model.NKV": 2,
                               "model.HS": 8, "model.F": 48, "model.V": V, "model.max_T": 16}).model  # fmt: skip
    lora = LoraConfig(3, targets="q,v,h.1.*,fcproj")
    spec = EngineSpec(shape, B=6 // group.world, T=T, compute="fp64", bucket_bytes=1 << 12, lora=lora, **how)
    return Engine(spec, group=group)


def train(engine: Engine, steps: range) -> list[float]:
    group, found, mine = engine.comm.group, [], SAMPLES // engine.comm.group.world
    for step in steps:
        rows = torch.randint(V, (SAMPLES, T + 1), generator=torch.Generator().manual_seed(step))
        rows = rows[group.rank * mine : (group.rank + 1) * mine].view(-1, engine.B, T + 1)
        engine.train_step(rows[..., :-1], rows[..., 1:], lr=1e-2, step=step)
        found.append(engine.stats()["loss"])
    engine.finish()
    return found


def three_ranks(args: list[str]) -> int:
    """Stage 2: four steps, and the last two once more from a checkpoint. args: OUT."""
    out, group = Path(args[0]), connect(os.environ, 60)
    straight, resumed = build(group, zero=2), build(group, zero=2)
    losses = train(straight, range(2))
    path = save_checkpoint(out, snapshot(straight, 2, facts(straight)), group)
    losses += train(straight, range(2, 4))
    restore(resumed, load_checkpoint(path))
    assert train(resumed, range(2, 4)) == losses[2:]
    torch.save((losses, {name: straight.param(name) for name in straight.names()}), out / f"{group.rank}.pt")
    group.close()
    return 0


def test_three_ranks_at_stage_2(tmp_path: Path) -> None:
    one = build()
    losses = train(one, range(4))
    assert losses[-1] != losses[0]
    assert ranks.finish(ranks.start(3, [tmp_path], tmp_path, run=three_ranks)) == [0] * 3, ranks.said(tmp_path, 0)
    for rank in range(3):
        found, kept = torch.load(tmp_path / f"{rank}.pt")
        assert found == pytest.approx(losses, rel=1e-9)
        for name in one.names():
            assert (kept[name] - one.param(name)).norm() <= 1e-8 * one.param(name).norm(), name


def test_two_ranks_from_the_command_line(home: Path, tmp_path: Path) -> None:
    """The same losses as one process, at ZeRO stage 1. One process resumes the run."""
    args = ["finetune", home / "base", "--data", home / "data/text-bytes", *SHORT, "--batch.B", "1", "--name", "two"]
    args += ["--lora.rank", "4", "--lora.targets", "q,v,gate,up,fcproj", "--parallel.zero", "1"]
    assert ranks.finish(ranks.start(2, args, tmp_path)) == [0, 0], ranks.said(tmp_path, 0)
    one, two = Run(home / "runs/a"), Run(tmp_path / "runs/two")
    for kind in ("step", "val"):
        losses = [[record["loss"] for record in run.metrics(kind)] for run in (one, two)]
        assert losses[1][-1] == pytest.approx(losses[0][-1], rel=1e-5)
        assert losses[1][:1] == pytest.approx(losses[0][:1], rel=1e-5)
    start, end = tensors(two.path, 0), tensors(two.path, 6)
    assert {name for name in start if not torch.equal(start[name], end[name])} == set(filter(is_adapter, start))
    inside(tmp_path, "train", "runs/two", "--steps", "7", "--optim.horizon", "7", "--quiet")


def test_drawn_adapters_depend_on_the_seed_alone() -> None:
    """Not on which layers have one; and the base is drawn as without adapters."""
    whole, some = build(), Engine(EngineSpec(build().cfg, B=1, T=T, compute="fp64", lora=LoraConfig(3, targets="q")))
    plain = Engine(EngineSpec(build().cfg, B=1, T=T, compute="fp64"))
    assert all(torch.equal(plain.param(name), whole.param(name)) for name in plain.names())
    assert torch.equal(some.param("h.0.qkv_A"), whole.param("h.0.qkv_A")[:3])
    again = build()
    assert all(torch.equal(again.param(name), whole.param(name)) for name in whole.names())
    assert len({float(whole.param(f"h.{l}.fcproj_A")[0, 0]) for l in range(3)}) == 3
