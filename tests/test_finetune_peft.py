"""Full finetuning and LoRA in fp64, held to transformers with PEFT: from the same weights, over the same batches.

Two things of theirs would hide ours behind rounding. Their models compute norms, angles and softmax in fp32 even in
fp64; here their casts to fp32 widen to fp64. Torch's clipping divides by the norm + 1e-6; here by the norm.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import their_decoder
from torch import Tensor

from daybreak.config_keys import LoraConfig, OptimConfig
from daybreak.engine import Engine, EngineSpec
from daybreak.interop import open_source
from daybreak.models.adapters import is_adapter

torch.set_num_threads(1)
STEPS, T, LR = 10, 24, 5e-3
# transformers' name of each linear layer that ours calls q, attproj and so on.
THEIRS = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "attproj": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "fcproj": "mlp.down_proj",
}  # fmt: skip
GPT2 = {"qkv": "attn.c_attn", "attproj": "attn.c_proj", "fc": "mlp.c_fc", "fcproj": "mlp.c_proj"}
# Model, targets, keys of LoRA: every layer; what PEFT trains by default, with rsLoRA; a part of a packed layer alone.
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "*", {"rank": 4, "alpha": 8.0}),
    ("qwen2", "q,v", {"rank": 8, "rslora": True}),
    ("llama3", "up,attproj", {"rank": 3, "alpha": 2.0}),
    ("gemma-3", "*", {"rank": 2}),
    ("gpt2", "*", {"rank": 4}),
    ("gpt2", "qkv", {"rank": 4, "rslora": True, "alpha": 5.0}),
]


def gpt2(folder: Path) -> Any:
    import transformers

    from daybreak.data.tokenizer import get_tokenizer
    from daybreak.interop import huggingface

    torch.manual_seed(5)
    sizes = {"n_layer": 2, "n_head": 3, "n_embd": 48, "n_positions": 32, "vocab_size": 257}
    config = transformers.GPT2Config(**sizes, **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0))
    model = transformers.GPT2LMHeadModel._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_((1 if "ln" in name and "weight" in name else 0) + 0.2 * torch.randn_like(p))
    model.save_pretrained(folder)
    huggingface.write_tokenizer(get_tokenizer("bytes"), 32, folder)
    (folder / "generation_config.json").unlink()
    return model


def batches() -> list[tuple[Tensor, Tensor]]:
    """Tokens and targets (2, 3, T) of each step: two micro-steps, with targets that are not learned."""
    g, found = torch.Generator().manual_seed(7), []
    for _ in range(STEPS):
        rows = torch.randint(257, (2, 3, T + 1), generator=g)
        targets = rows[..., 1:].clone()
        targets[torch.rand(targets.shape, generator=g) < 0.5] = -1
        found.append((rows[..., :-1], targets))
    return found


def build(folder: Path, lora: LoraConfig, recompute: int = 0) -> Engine:
    source = open_source(folder)
    optim = OptimConfig(beta2=0.999, weight_decay=0.0)
    spec = EngineSpec(source.model, B=3, T=T, compute="fp64", optim=optim, lora=lora, recompute=recompute)
    engine = Engine(spec)
    for name in source.names():
        engine.set_exact(name, source.read(name).double())
    return engine


def ours(engine: Engine) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step."""
    found = []
    for step, (tokens, targets) in enumerate(batches()):
        engine.train_step(tokens, targets, lr=LR, step=step)
        stats = engine.stats()
        assert not stats["skip"]
        found.append((stats["loss"], stats["norm"]))
    return found


def theirs(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """The same of a model of transformers, with torch's AdamW."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    trained = [p for p in model.parameters() if p.requires_grad]
    adamw, found = torch.optim.AdamW(trained, lr=LR, betas=(0.9, 0.999), weight_decay=0.0), []
    for tokens, targets in batches():
        adamw.zero_grad()
        logits = model(tokens.flatten(0, 1), use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        loss.backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in trained))
        for p in trained:
            p.grad *= min(1.0, 1.0 / norm)
        adamw.step()
        found.append((loss.item(), norm))
    monkeypatch.undo()
    return found


def close(got: list[tuple[float, float]], want: list[tuple[float, float]]) -> None:
    for (loss, norm), (their_loss, their_norm) in zip(got, want, strict=True):
        assert loss == pytest.approx(their_loss, rel=1e-9)
        assert norm == pytest.approx(their_norm, rel=1e-9)
    assert len({round(loss, 6) for loss, _ in got}) == STEPS  # something was learned
    assert min(norm for _, norm in got) > 0


def their_model(case: str, folder: Path) -> Any:
    return (gpt2 if case == "gpt2" else lambda path: their_decoder(case, path))(folder).double()


@pytest.mark.parametrize(("case", "targets", "keys"), CASES, ids=lambda x: str(x) if isinstance(x, str) else "")
def test_lora_equals_peft(
    case: str, targets: str, keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft = pytest.importorskip("peft", reason="the dev extra installs peft")
    model = their_model(case, tmp_path)
    engine = build(tmp_path, LoraConfig(targets=targets, **keys), recompute=3 if case == "llama" else 1)
    names = GPT2 if case == "gpt2" else THEIRS
    chosen = [names[part] for part in (names if targets == "*" else targets.split(","))]
    alpha = keys.get("alpha", 2 * keys["rank"])
    how = {"use_rslora": keys.get("rslora", False), "fan_in_fan_out": case == "gpt2"}
    config = peft.LoraConfig(r=keys["rank"], lora_alpha=alpha, target_modules=chosen, task_type="CAUSAL_LM", **how)
    wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    given = dict(wrapped.named_parameters())
    generator = torch.Generator().manual_seed(3)
    found = 0
    with torch.no_grad():
        for name, adapter in engine.table.adapters.items():
            bound = 1 / math.sqrt(engine.param(name + "_A").shape[1])
            assert engine.param(name + "_A").abs().max() < bound < 1.2 * engine.param(name + "_A").abs().max()
            assert not engine.param(name + "_B").any()
            engine.param(name + "_B").normal_(0, 0.05, generator=generator)  # so that both gradients start to matter
            downs = engine.param(name + "_A").split(keys["rank"])
            ups = engine.param(name + "_B").split([stop - first for first, stop in adapter.columns])
            for part, down, up in zip(adapter.parts, downs, ups, strict=True):
                _, layer, leaf = part.split(".")
                stem = "transformer.h" if case == "gpt2" else "model.layers"
                for letter, value in (("A", down), ("B", up)):
                    key = f"base_model.model.{stem}.{layer}.{names[leaf]}.lora_{letter}.default.weight"
                    given[key].copy_(value)
                    found += 1
    assert found == sum("lora_" in key for key in given)
    start = {name: engine.param(name).clone() for name in engine.names()}
    close(ours(engine), theirs(wrapped, monkeypatch))
    assert {name for name in start if not torch.equal(engine.param(name), start[name])} == {
        name for name in start if is_adapter(name)
    }


@pytest.mark.parametrize("case", ["llama", "qwen2", "gpt2"])
def test_full_finetuning_equals_transformers(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = their_model(case, tmp_path)
    close(ours(build(tmp_path, LoraConfig())), theirs(model, monkeypatch))
