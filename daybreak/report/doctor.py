"""What this machine has and what daybreak makes of it; and whether a run's checkpoints are sound."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import torch

import daybreak
from daybreak.engine.device import missing_on, pick_device
from daybreak.errors import CheckpointError
from daybreak.kernels import OPS, choose
from daybreak.state.checkpoint import load_checkpoint
from daybreak.state.run import Run
from daybreak.state.run_folder import cpu_model
from daybreak.state.throughput import peak_flops

GAINS = {  # what an optional package brings: measured on one H100, see bench/results
    "fa4": "a faster deterministic attention backward: pip install flash-attn-4 nvidia-cudnn-frontend",
    "cudnn": "a faster attention: pip install nvidia-cudnn-frontend",
    "triton": "the fused kernels; without it everything but products is several times slower: pip install triton",
}


def machine() -> list[str]:
    """Lines about the machine: versions, card, the backend of every group of operations, what would help."""
    lines = [
        f"daybreak {daybreak.__version__}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"{platform.system()} {platform.machine()}",
        f"CPU: {cpu_model()}, {torch.get_num_threads()} threads",
    ]
    device = pick_device("auto")
    dtype = torch.float32
    if device.type == "cuda":
        properties, dtype = torch.cuda.get_device_properties(device), torch.bfloat16
        peak = peak_flops(properties.name)
        lines.append(
            f"GPU: {properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{properties.total_memory >> 20:,} MiB, CUDA {torch.version.cuda}, driver {_driver()}, bf16 peak "
            + (f"{peak / 1e12:.0f} TFLOP/s" if peak else "n/a")
        )
    else:
        lines.append("GPU: none that torch can use")
    missing = missing_on(device)
    groups: dict[str, dict[str, None]] = {}
    for name, backend in choose(device.type, dtype, missing=missing).items():
        groups.setdefault(OPS[name].group, {})[backend] = None
    lines += [f"  {group:<11} {', '.join(backends)}" for group, backends in sorted(groups.items())]
    for name, reason in missing.items():
        lines.append(f"not used: {name} ({reason})" + (f"; it brings {GAINS[name]}" if name in GAINS else ""))
    return lines


def _driver() -> str:
    try:
        version = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return "n/a"
    return next((word for word in version.split() if word[:1].isdigit() and "." in word), "n/a")


def check_run(path: str) -> tuple[list[str], bool]:
    """Lines about every checkpoint of a run, each read and verified in full, and whether all are good."""
    run, lines, good = Run(path), [], True
    for checkpoint in run.checkpoints:
        try:
            loaded = load_checkpoint(checkpoint, verify="full")
            lines.append(f"good: {checkpoint}, step {loaded.step}")
        except CheckpointError as error:
            lines.append(f"BAD: {error}")
            good = False
    return lines or [f"{path} has no checkpoint yet"], good


def print_lines(lines: list[str]) -> None:
    """To stdout."""
    print("\n".join(lines), file=sys.stdout)
