"""`daybreak doctor`: describes the machine and the kernels that it gets, or verifies the checkpoints of a run."""

from __future__ import annotations

import glob
import platform
from pathlib import Path

import torch

import daybreak
from daybreak.data.dataset import dataset_name, open_dataset
from daybreak.data.mixing import names_of, open_loaders
from daybreak.engine.device import library_versions, missing_on, pick_compute, pick_device
from daybreak.errors import CheckpointError, Error
from daybreak.files import sha256_of
from daybreak.kernels import OPS, choose
from daybreak.kernels.cuda.products import untuned
from daybreak.manifest import published
from daybreak.state.checkpoint import leftovers, load_checkpoint
from daybreak.state.run import Run
from daybreak.state.run_folder import cpu_model
from daybreak.state.throughput import peak_flops

GAINS = {  # of optional packages, measured on one H100 (bench/results)
    "quack": "faster matmuls, and more fused into them: pip install quack-kernels",
    "fa4": "a faster deterministic attention backward: pip install flash-attn-4 nvidia-cudnn-frontend",
    "cudnn": "a faster attention: pip install nvidia-cudnn-frontend",
    "triton": "the fused kernels; without it everything but matmuls is several times slower: pip install triton",
}


def machine() -> list[str]:
    """Lines about the machine: versions, GPU, the backend of each group of operations, useful packages, the verdict."""
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
        where = f"{properties.name} in {pick_compute('auto', device)}"
        lines.append("libraries: " + ", ".join(f"{name} {v}" for name, v in library_versions().items()))
        lines.append(_table_line())
    else:
        lines.append("GPU: none that torch can use")
        where = f"the CPU with {torch.get_num_threads()} threads"
    missing = missing_on(device)
    groups: dict[str, dict[str, None]] = {}
    for name, backend in choose(device.type, dtype, missing=missing).items():
        groups.setdefault(OPS[name].group, {})[backend] = None
    lines += [f"  {group:<11} {', '.join(backends)}" for group, backends in sorted(groups.items())]
    for name, reason in missing.items():
        help_ = f"; it brings {GAINS[name]}" if name in GAINS and reason.endswith("is not installed") else ""
        lines.append(f"not used: {name} ({reason}){help_}")
    lines.append(f"Ready: trains on {where}. To try it out for two minutes: daybreak doctor --check")
    return lines


def _table_line() -> str:
    """A line that says whether the matmuls of this GPU have been measured."""
    from daybreak.kernels.cuda import cublaslt

    blas = cublaslt.blas_of(torch.cuda.current_device())
    if blas is None:
        return "matmuls: through torch, there is no cuBLASLt"
    if blas.table:
        return f"matmuls: {len(blas.table)} algorithms measured for this GPU and cuBLASLt {blas.version}"
    return f"matmuls: {untuned(blas.gpu, blas.version)}"


def _driver() -> str:
    try:
        version = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return "n/a"
    return next((word for word in version.split() if word[:1].isdigit() and "." in word), "n/a")


def check_run(path: str) -> tuple[list[str], bool]:
    """Lines about a run, and whether all is good.

    Each checkpoint and each shard of its data is read in full and verified. Other lines name leftovers of saves that
    died, and say how the last attempt ended."""
    run, lines, saved = Run(path), list[str](), ""
    for checkpoint in published(run.folder.checkpoints):
        try:
            loaded = load_checkpoint(checkpoint, run=run.folder.id)
            lines.append(f"good: {checkpoint}, step {loaded.step}")
            saved = saved or loaded.manifest["data"]["fingerprint"]
        except CheckpointError as error:
            if checkpoint.exists():  # else the run in progress has just removed it
                lines.append(f"BAD: {error}")
    lines = lines or [f"{path} has no checkpoint yet"]
    left = [path for path, kind, _ in leftovers(run.folder.checkpoints) if kind == "tmp"]
    lines += [f"left by a save that died, removed by the next: {path}" for path in left]
    try:
        lines += _check_data(run, saved)
    except Error as error:  # its configuration differs from the newest checkpoint's
        lines.append(f"BAD: {error}")
    lines.append(_last_attempt(run))
    return lines, not any(line.startswith("BAD") for line in lines)


def _check_data(run: Run, saved: str) -> list[str]:
    """Lines about a run's data: its shards against the sha256 sums of their manifests, and all of it against the
    fingerprint `saved` in a checkpoint. Data that is on another machine is not checked."""
    config = run.config
    d, lines = config.data, list[str]()
    places = [d.train, d.val]
    try:
        for name in names_of(d):
            if not d.train:
                folders = [Path(d.dir) / dataset_name(name, d.tokenizer), Path(d.dir) / name]
                places = [name if set(name) & set("*?[") else f"{name}/*.bin", *(f"{folder}/*" for folder in folders)]
            found = open_dataset(name, d.dir, d.train, d.val, d.tokenizer)
            if found.manifest is None or found.folder is None:
                lines.append(f"{found.name} has no manifest with sha256 sums: only its fingerprint is compared")
                continue
            for file, sha256 in found.manifest.sums().items():
                if sha256_of(path := found.folder / file) != sha256:
                    lines.append(f"BAD: {path} is damaged (its sha256 does not match); prepare {name} again.")
            lines.append(f"data of {name}: every shard read")
        now = open_loaders(d, config.T, config.run.seed, config.model.V, beside=run.path)[1].fingerprint
        if saved not in ("", now):
            lines.append(
                f"BAD: the training data changed: its fingerprint was {saved} in a checkpoint, it is {now} now."
            )
    except (Error, OSError) as error:
        lines.append(f"{'BAD' if any(map(glob.glob, places)) else 'data not checked'}: {error}")
    return lines


def _last_attempt(run: Run) -> str:
    try:
        if said := run.folder.read_exit():
            return f"the last attempt ended with code {said['code']}: {said['reason']}"
        return "no exit.json: the run is going on, or was killed"
    except Error as error:
        return str(error)
