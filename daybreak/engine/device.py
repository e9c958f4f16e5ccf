"""The device and the precision of a run, and facts about the device: free memory, versions, temperature."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import fields, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from daybreak.config import Config
from daybreak.engine.spec import EngineSpec
from daybreak.errors import ConfigError
from daybreak.kernels.matmul import onednn
from daybreak.parallel import ALONE, Group


def pick_device(name: str, group: Group = ALONE) -> torch.device:
    """The device that run.device names. Several ranks on a machine get one each, unless the name has a number. Raises
    ConfigError if it does not exist here."""
    if torch.version.hip is not None:
        raise ConfigError("this torch is a ROCm build, which daybreak does not support; use an NVIDIA or CPU build.")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and group.world > 1 and torch.cuda.is_available():
        name = f"cuda:{group.local_rank % torch.cuda.device_count()}"
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            why = ""
            try:
                torch.cuda.init()  # type: ignore[no-untyped-call]
            except (RuntimeError, AssertionError) as error:  # no driver, or one too old for this torch
                why = f": {str(error).partition('. ')[0]}" if "driver" in str(error) else ""
            raise ConfigError(f"run.device = {name!r} does not exist here ({count} CUDA devices{why}); use cpu.")
        device = torch.device("cuda", device.index or 0)
    return device


def pick_compute(name: str, device: torch.device) -> str:
    """The dtype that precision.compute names; auto is bf16 on GPUs that compute in it (sm_80), else fp32."""
    if name != "auto":
        return name
    return "bf16" if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"


def check_fp8(capability: tuple[int, int], gpu: str, key: str, missing: Collection[str]) -> None:
    """Raise ConfigError if a GPU of this compute capability, without the `missing` backends, cannot train in fp8."""
    from daybreak.kernels.cuda.fp8 import usable

    if needs := usable(capability, missing):
        other = "bf16" if key == "precision.compute" else "compute"
        raise ConfigError(f"{key} = fp8 needs {needs}; use {other} on {gpu}.")


def fp8_steps(config: Config) -> int | None:
    """The number of steps in fp8, after which a run continues in bf16; None if it never does."""
    p = config.precision
    return round(p.fp8_until * config.run.steps) if p.compute == "fp8" and p.fp8_until < 1 else None


def engine_spec(
    config: Config, device: torch.device, missing: Collection[str] | None = None, **changes: Any
) -> EngineSpec:
    """The engine that a configuration describes, on a device. missing: absent backends, looked up if not given."""
    kernels = {key.name: getattr(config.kernels, key.name) for key in fields(config.kernels)}
    spec = EngineSpec(
        config.model, B=config.batch.B, T=config.T, compute=pick_compute(config.precision.compute, device),
        fp8=tuple(config.precision.fp8.split(",")), fp8_steps=fp8_steps(config), masters=config.precision.masters,
        moments=config.precision.moments, recompute=config.batch.recompute, zero=config.parallel.zero,
        bucket_bytes=config.parallel.bucket_bytes, optim=config.optim, schedule=config.schedule, lora=config.lora,
        guard=config.guard, kernels=kernels, documents=config.data.packed, device_type=device.type,
        missing=missing_on(device) if missing is None else missing,
    )  # fmt: skip
    return replace(spec, **changes)


@cache
def missing_on(device: torch.device) -> dict[str, str]:
    """Kernel backends that cannot be used on this device, each with the reason. Nothing is missing on a CPU."""
    if device.type != "cuda":
        return {}
    from daybreak.kernels.cuda import missing_backends

    return missing_backends(torch.cuda.get_device_capability(device))


def numerics(config: Config, device: torch.device, choices: Mapping[str, str], ranks: int) -> dict[str, str]:
    """All that decides the bits of a step and may differ when a run resumes: how the step is cut, kernels, libraries,
    GPU or threads, measured tables."""
    c, p = config.batch, config.parallel
    shared = f" (parallel.zero {p.zero}, parallel.bucket_bytes {p.bucket_bytes})" if ranks > 1 else ""
    what = {"batch.B": str(c.B), "batch.recompute": str(c.recompute), "ranks": f"{ranks}{shared}"}
    what |= {**choices, "torch": str(torch.__version__), "device": device.type}
    if device.type == "cpu":
        products = "oneDNN" if onednn() else "torch.mm"
        what |= {"device": torch.backends.cpu.get_cpu_capability(), "fp32 products": products}
        return {**what, "threads": str(torch.get_num_threads())}
    what["device"] = torch.cuda.get_device_name(device)
    if {"cublaslt", "quack"} & set(choices.values()):
        from daybreak.kernels.cuda.products import tables_digest

        what["product tables"] = tables_digest()
    return {**what, **library_versions()}


def library_versions() -> dict[str, str]:
    """Versions of the installed libraries that CUDA kernels come from."""
    found = {"cuDNN": str(torch.backends.cudnn.version())}  # type: ignore[no-untyped-call]
    packages = ("triton", "nvidia-cudnn-frontend", "flash-attn-4", "quack-kernels", "nvidia-cutlass-dsl")
    for package in (*packages, "nvidia-cublas"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def set_precision(config: Config, device: torch.device) -> None:
    """How torch multiplies fp32 matrices from now on, for the whole process."""
    torch.set_float32_matmul_precision("high" if config.precision.tf32 and device.type == "cuda" else "highest")


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware. On others bf16 is slower than fp32."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def used_mib(device: torch.device) -> int:
    """Memory in use in MiB: of a GPU by all programs, as the driver says; on a CPU this process's resident memory."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return (total - free) >> 20
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") >> 20


class Sensors:
    """A GPU's temperature in degrees Celsius and power in watts, read at most once a second (it is not free).

    None on a CPU, and if the package nvidia-ml-py or the driver does not tell.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.monotonic) -> None:
        self.device, self._clock, self._next = device, clock, -math.inf
        self._values: dict[str, float | None] = {"temp_c": None, "power_w": None}

    def read(self) -> dict[str, float | None]:
        """The latest values."""
        if self.device.type == "cuda" and self._clock() >= self._next:
            self._next = self._clock() + 1.0
            try:
                watts = torch.cuda.power_draw(self.device) / 1000
                self._values = {"temp_c": float(torch.cuda.temperature(self.device)), "power_w": watts}
            except Exception:  # no package, no permission, another driver: whatever it is, training continues
                self._next = math.inf
        return self._values


def available_bytes(device: torch.device) -> int | None:
    """Free memory of the GPU, or of the machine for a CPU; None if the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    free = next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), None)
    return free if (limit := _cgroup_limit()) is None or free is None else min(free, limit)


def _cgroup_limit() -> int | None:
    """Bytes that this process's container may still take; None without a limit."""
    root = Path("/sys/fs/cgroup")
    try:
        limit, used = (root / "memory.max").read_text().strip(), int((root / "memory.current").read_text())
        stat = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    cache = int(stat["active_file"]) + int(stat["inactive_file"])  # counted as used, given back on demand
    return int(limit) - used + cache if limit.isdigit() else None
