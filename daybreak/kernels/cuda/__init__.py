"""Kernels for CUDA: Triton's, and the vendors' GEMM and attention, registered behind the operations' signatures.

The files here import without a GPU and without Triton, so that a plan for a GPU can be made on any machine; what a
backend lacks is told by `missing_backends`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from daybreak.kernels import all_ops

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, or a torch without it: the kernels are never launched, only their scratch is planned

    class _Absent:
        """Stands in for the names that kernels use at import time."""

        constexpr = staticmethod(lambda value: value)
        jit = staticmethod(lambda fn: fn)
        cdiv = staticmethod(lambda a, b: -(-a // b))
        next_power_of_2 = staticmethod(lambda n: 1 << (n - 1).bit_length())

    triton = tl = _Absent()

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own switch: kernels run on the CPU
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
all_ops()  # the operations are registered before their backends in this package
NEEDS = {
    "triton": ("triton",),
    "quack": ("triton", "quack"),  # the bias gradient's second stage is a Triton kernel
    "cublaslt": (),
    "cudnn": ("triton", "cudnn"),  # shapes that cuDNN does not take go through the Triton kernels
    "fa4": ("triton", "cudnn", "flash_attn.cute"),
}


@cache
def _overlap(device: torch.device) -> bool:
    """Whether a launch may begin while the one before it runs."""
    return device.type == "cuda" and not INTERPRET and torch.cuda.get_device_capability(device) >= (9, 0)


def overlapping(device: torch.device) -> dict[str, Any]:
    """Arguments of such a launch (see decode.py)."""
    return {"OVERLAP": True, "launch_pdl": True} if _overlap(device) else {"OVERLAP": False}


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


OURS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def apart() -> Iterator[None]:
    """Inside, a package sees no command line, and its warnings to its own developers are silent. Afterwards its
    exception hook and its signal handlers are gone again.

    CUTLASS parses sys.argv at every compile, prints its own usage for `-h` and exits at `-d 1024`; it replaces the
    exception hook when it is imported, and keeps files in a folder in /tmp unless this variable names another one.
    """
    os.environ.setdefault("CUTE_DSL_CACHE_DIR", cache_folder("cute"))
    argv, hook, handlers = sys.argv, sys.excepthook, [(number, signal.getsignal(number)) for number in OURS]
    sys.argv = argv[:1]
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        sys.argv, sys.excepthook = argv, hook
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers:
                if handler is not None and signal.getsignal(number) is not handler:
                    signal.signal(number, handler)


def broken(package: str, load: Callable[[], object]) -> str | None:
    """Why a package that is installed cannot be used, or None. Ones that do not fit each other raise anything."""
    try:
        with apart():
            load()
    except Exception as error:
        return f"the package {package} does not work ({type(error).__name__}: {error})"
    return None


def cache_folder(name: str) -> str:
    """Where a package may keep what it compiles."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return str(Path(home) / "daybreak" / name)


@cache
def missing_backends(capability: tuple[int, int] | None = None) -> dict[str, str]:
    """Backends that cannot be used, each with the reason; on a GPU of this compute capability, if given."""
    missing = {
        name: f"the package {absent[0]} is not installed"
        for name, modules in NEEDS.items()
        if (absent := [m for m in modules if not _has(m)])
    }
    if not (os.environ.get("CC") or any(map(shutil.which, ("cc", "gcc", "clang")))):
        for name in ("triton", "quack", "cudnn", "fa4"):
            missing.setdefault(name, "Triton needs a C compiler: install gcc or set CC")
    if capability:
        for name in ("cublaslt", "quack", "cudnn", "fa4"):
            module = importlib.import_module(f"daybreak.kernels.cuda.{name}")
            if name not in missing and (reason := module.usable(capability)):
                missing[name] = reason
    return missing
