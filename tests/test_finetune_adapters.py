"""Adapters in PEFT's folders: theirs loads here, ours loads there, to the same logits. Both are real programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import edit, their_decoder
from interop_runs import inside
from safetensors.torch import load_file, save_file
from test_finetune_peft import GPT2, THEIRS, gpt2
from test_finetune_runs import SHORT

from daybreak.interop import load_model
from daybreak.state.run import Run

peft = pytest.importorskip("peft", reason="the dev extra installs peft")
torch.set_num_threads(1)
TOKENS = torch.randint(257, (1, 32), generator=torch.Generator().manual_seed(3))
# Model, layers as PEFT names them, rsLoRA, what lora.targets then is.
CASES: list[tuple[str, Any, bool, str]] = [
    ("llama", "all-linear", False, "q,k,v,attproj,gate,up,fcproj"),
    ("qwen2", ["q_proj", "v_proj"], True, "q,v"),
    ("gemma-3", ["up_proj", "o_proj"], False, "attproj,up"),
    ("llama3", ["model.layers.1.self_attn.k_proj", "model.layers.3.mlp.down_proj"], False, "h.1.k,h.3.fcproj"),
    ("gpt2", ["c_attn", "mlp.c_fc"], False, "qkv,fc"),
]


def base_model(case: str, folder: Path) -> Any:
    model = gpt2(folder) if case == "gpt2" else their_decoder(case, folder)
    model.name_or_path = str(folder)  # as from_pretrained notes it
    return model


def adapted(case: str, home: Path, modules: Any, rslora: bool = False) -> Any:
    """A model with random adapters, saved in home/adapter; the model itself in home/base."""
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=modules, use_rslora=rslora, task_type="CAUSAL_LM",
                             fan_in_fan_out=case == "gpt2")  # fmt: skip
    wrapped = peft.get_peft_model(base_model(case, home / "base"), config).eval()
    with torch.no_grad():
        for key, p in wrapped.named_parameters():
            if "lora_" in key:
                p.normal_(0, 0.1)
    wrapped.save_pretrained(home / "adapter")
    return wrapped


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(("case", "modules", "rslora", "targets"), CASES, ids=lambda x: x if isinstance(x, str) else "")
def test_theirs_loads_here(case: str, modules: Any, rslora: bool, targets: str, tmp_path: Path) -> None:
    """Read where it lies, imported as a run, and that run's export: PEFT's logits, and at the end PEFT's own bytes."""
    wrapped = adapted(case, tmp_path, modules, rslora)
    with torch.no_grad():
        want, plain = wrapped(TOKENS).logits, wrapped.disable_adapter
        with plain():
            assert apart(wrapped(TOKENS).logits, want) > 0.01
    engine, *_ = load_model(tmp_path / "adapter")
    assert apart(engine.logits(TOKENS), want) <= 2e-6
    inside(tmp_path, "import", "adapter", "--name", "x", "--run.device", "cpu")
    run = Run(tmp_path / "runs/x")
    assert apart(run.load_engine()[0].logits(TOKENS), want) <= 2e-6
    assert sorted(run.config.lora.targets.split(",")) == sorted(targets.split(","))
    inside(tmp_path, "export", "runs/x", "--to", "peft", "back")
    name = "adapter_model.safetensors"
    theirs, ours = load_file(tmp_path / "adapter" / name), load_file(tmp_path / "back" / name)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())
    kept = json.loads((tmp_path / "back/adapter_config.json").read_text())
    assert Path(tmp_path / "adapter", kept["base_model_name_or_path"]).resolve() == tmp_path / "base"
    said = inside(tmp_path, "export", "runs/x", "--to", "hf", "merged").stdout
    import transformers

    with torch.no_grad():
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(TOKENS).logits
    assert apart(merged, want) <= 2e-6
    assert "adapters are merged: " in said


def test_what_is_told_of_a_merge(tmp_path: Path) -> None:
    wrapped = adapted("llama", tmp_path, ["q_proj"])
    inside(tmp_path, "import", "adapter", "--name", "x", "--run.device", "cpu")
    said = inside(tmp_path, "export", "runs/x", "--to", "hf", "merged", "--dtype", "bf16").stdout
    before = {k: p.detach().clone() for k, p in wrapped.named_parameters() if "qkv" in k or "_proj.base_layer" in k}
    after = wrapped.merge_and_unload()
    a = [torch.cat([getattr(layer.self_attn, f"{x}_proj").weight for x in "qkv"]) for layer in after.model.layers]
    b = []
    for l, layer in enumerate(after.model.layers):
        q = before[f"base_model.model.model.layers.{l}.self_attn.q_proj.base_layer.weight"]
        b.append(torch.cat([q, layer.self_attn.k_proj.weight, layer.self_attn.v_proj.weight]))
    merged, plain = torch.cat(a).detach(), torch.cat(b).detach()
    share = 100 * float((merged - plain).norm() / plain.norm())
    equal = 100 * float((merged.bfloat16() == plain.bfloat16()).float().mean())
    assert f"4 matrices change by {share:.2g} % of their norm, and {equal:.1f} % of their values stay equal" in said


@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_ours_loads_there(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters of a run that was trained here; PEFT finds the model by what the run noted of it."""
    model = base_model(case, tmp_path / "base")
    (tmp_path / "text.txt").write_text("".join(f"{i} men went to mow, went to mow a meadow.\n" for i in range(900)))
    inside(tmp_path, "prepare", "text.txt", "--tokenizer", "bytes")
    inside(tmp_path, "finetune", "base", "--data", "text", *SHORT, "--name", "a", "--lora.rslora", "true")
    inside(tmp_path, "export", "runs/a", "--to", "peft", "out")
    monkeypatch.chdir(tmp_path)
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(model, tmp_path / "out").eval()(TOKENS).logits
        found = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").eval()(TOKENS).logits
    ours = Run(tmp_path / "runs/a").load_engine()[0].logits(TOKENS)
    assert apart(ours, theirs) <= 2e-6
    assert apart(ours, found) <= 2e-6
    saved = json.loads((tmp_path / "out/adapter_config.json").read_text())
    names = GPT2 if case == "gpt2" else THEIRS
    assert set(saved["target_modules"]) == {name.rpartition(".")[2] for name in names.values()}
    assert saved["base_model_name_or_path"] == "base"
    inside(tmp_path, "finetune", "out", "--data", "text", *SHORT, "--name", "on")  # new adapters upon the merged ones
    first = Run(tmp_path / "runs/on").metrics("val")[0]["loss"]
    assert first == pytest.approx(Run(tmp_path / "runs/a").metrics("val")[-1]["loss"], rel=1e-6)
    inside(tmp_path, "import", "base", "--name", "plain")
    assert "plain has no adapters" in inside(tmp_path, "export", "runs/plain", "--to", "peft", "no", code=2).stderr


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"use_dora": True}, "use_dora = True is not supported"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern = {'q_proj': 2} is not supported"),
        ({"bias": "all"}, "bias = 'all' are not supported"),
        ({"peft_type": "IA3"}, "peft_type = 'IA3'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' also changes the model"),
        ({"r": "4"}, "r = '4' must be a whole number"),
        ({"r": 5}, "is (4, 64), and the model with r = 5 needs (5, 64)"),
        ({"base_model_name_or_path": "adapter"}, "its model, adapter, is an adapter too"),
        ({"base_model_name_or_path": "runs/a/checkpoints/step-00000010"}, "export runs/a --step 10 --to hf OUT"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path = None must be text"),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_refusals(keys: dict[str, Any], said: str, tmp_path: Path) -> None:
    adapted("llama", tmp_path, ["q_proj"])
    edit(tmp_path / "adapter/adapter_config.json", **keys)
    assert said in inside(tmp_path, "import", "adapter", "--name", "x", code=5).stderr
    assert not (tmp_path / "runs").exists()


def test_tensors_that_have_no_place(tmp_path: Path) -> None:
    adapted("llama", tmp_path, ["q_proj"])
    path = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "base_model.model.lm_head.weight": torch.zeros(264, 64)}, path)
    assert "no place for 'base_model.model.lm_head.weight'" in inside(tmp_path, "import", "adapter", code=5).stderr
    del tensors[key := min(tensors)]
    save_file(tensors, path)
    assert f"{key!r} is missing" in inside(tmp_path, "import", "adapter", code=5).stderr
