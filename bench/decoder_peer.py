"""A training step of transformers with Liger's kernels on one GPU, in full or with PEFT's adapters, on random weights.

    python bench/decoder_peer.py llama3.2-1b --B 8 --T 2048 --tokens 131072
    python bench/decoder_peer.py llama3-8b --lora 16 --B 4 --T 2048 --tokens 8192 [--checkpointing]

This is the other side of bench/gpu_step.py and bench/finetune_step.py. All is in bf16: weights, gradients, and moments
of torch's fused AdamW. Attention is torch's own. The model's shape is daybreak's, as an export to Hugging Face has it.
Without liger-kernel it says so, and runs transformers alone. It prints one line, with the driver's figure of memory.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from timing import append_row

from daybreak.engine.device import used_mib
from daybreak.interop.families import family_of
from daybreak.shapes import parse_shape
from daybreak.shapes.shape import Shape

SETS = 8  # batches that steps take in turn
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def liger(kind: str) -> str:
    """Replaces transformers' operations by Liger's. Returns what runs."""
    if importlib.util.find_spec("liger_kernel") is None:
        return "transformers"
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as patches

    patches[kind](rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=True)
    return "transformers + Liger"


def made(shape: Shape, device: torch.device, rank: int, checkpointing: bool) -> tuple[torch.nn.Module, str]:
    """The model with random weights on the device, its base frozen where it has adapters, and what runs it."""
    values = family_of(shape, "hf").config(shape)
    system = liger(values["model_type"])
    config = transformers.AutoConfig.for_model(**{**values, "use_cache": False})
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    torch.set_default_dtype(torch.float32)
    model.to(torch.bfloat16).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    if rank:
        from peft import LoraConfig, get_peft_model

        model, system = get_peft_model(model, LoraConfig(r=rank, target_modules=LINEAR)), f"{system} + PEFT"
    return model, system


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="a published shape, such as llama3-8b or llama3.2-1b")
    parser.add_argument("--lora", type=int, default=0, help="rank of adapters on all linear layers")
    parser.add_argument("--B", type=int, default=8)
    parser.add_argument("--T", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=131072, help="of one step")
    parser.add_argument("--checkpointing", action="store_true", help="recompute each layer")
    parser.add_argument("--layers", type=int, help="instead of the shape's, to try this script")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="of one block")
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    device, cfg = torch.device(a.device), parse_shape(a.model)
    model, system = made(replace(cfg, L=a.layers or cfg.L), device, a.lora, a.checkpointing)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-5, fused=True)
    generator = torch.Generator().manual_seed(7)
    tokens = ((cfg.V + 1) ** torch.rand(SETS, a.B, a.T, generator=generator) - 1).long().clamp_(max=cfg.V - 1)
    micro, count = a.tokens // (a.B * a.T), 0

    def step() -> float:
        nonlocal count
        for _ in range(micro):
            ids = tokens[count % SETS].to(device)
            loss = model(input_ids=ids, labels=ids).loss
            (loss / micro).backward()
            count += 1
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()  # waits

    first, times = step(), list[float]()
    step()
    for _ in range(a.rounds):
        taken: list[float] = []
        while len(taken) < 2 or sum(taken) < a.seconds:
            start = time.perf_counter()
            step()
            taken.append(time.perf_counter() - start)
        times += taken[1:]
    seconds = statistics.median(times)
    row = {
        "model": a.model, "system": system, "version": transformers.__version__, "lora": a.lora, "B": a.B, "T": a.T,
        "tokens": micro * a.B * a.T, "checkpointing": int(a.checkpointing), "ms": f"{1e3 * seconds:.1f}",
        "tok_s": f"{micro * a.B * a.T / seconds:.0f}", "memory_mib": used_mib(device), "steps": len(times),
        "card": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"), "first_loss": f"{first:.3f}", "learned": sum(p.numel() for p in learned),
    }  # fmt: skip
    print(", ".join(f"{key} {value}" for key, value in row.items()))
    if a.out:
        append_row(a.out, row)


if __name__ == "__main__":
    main()
