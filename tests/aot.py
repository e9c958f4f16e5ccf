"""Compiles the Triton kernels ahead of time, without a GPU, and prints what each needs: one line of JSON a kernel.

    python tests/aot.py [FILE ...]      files of daybreak/kernels/cuda, all by default; not under TRITON_INTERPRET

A file lists its cases in AOT, tuples of

    (kernel, {"argument": type}, {"CONSTEXPR": value}, num_warps[, num_stages])

with Triton's types ("*bf16", "*fp32", "i32", "i64", "fp32"). Every pointer and integer is taken for a multiple of 16,
as it is in GPT-2's shapes, unless its type ends in "?" ("i32?"). Every case is compiled for sm_90, for the other
architectures the first case of each kernel.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from daybreak.kernels import all_ops

FOLDER = Path(__file__).parents[1] / "daybreak" / "kernels" / "cuda"
MAIN = 90  # the architecture that every case is compiled for
OTHERS = (80, 89, 100)
TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def files() -> list[str]:
    """Names of the modules in daybreak/kernels/cuda."""
    return sorted(p.stem for p in FOLDER.glob("*.py") if p.stem != "__init__")


def module(name: str) -> Any:
    all_ops()  # the operations are registered before their backends
    return importlib.import_module(f"daybreak.kernels.cuda.{name}")


def kernels(name: str) -> list[str]:
    """Kernels that a file defines: jitted functions that are launched, `name[grid](...)`, or named so."""
    jitted = {
        k
        for k, v in vars(module(name)).items()
        if isinstance(v, triton.JITFunction) and v.fn.__module__ == module(name).__name__
    }
    launched = set(re.findall(r"\b(\w+)\[", (FOLDER / f"{name}.py").read_text()))
    return sorted(k for k in jitted if k.endswith("_kernel") or k in launched)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, and bytes of stack and local memory (spills), that cuobjdump reads from a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [TOOL, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {k.lower(): int(re.search(rf"{k}:(\d+)", text)[1]) for k in ("REG", "STACK", "LOCAL")}  # type: ignore[index]


def compile_case(name: str, index: int, arch: int) -> dict[str, Any]:
    """Compile one case of a file for one architecture."""
    kernel, signature, constants, warps, *stages = module(name).AOT[index]
    row = {"file": name, "kernel": kernel.fn.__name__, "case": index, "arch": arch, "warps": warps}
    types = {k: t.rstrip("?") for k, t in signature.items() if t != "constexpr"}
    arguments = kernel.arg_names
    missing = set(arguments) ^ (set(types) | set(constants))
    if missing:
        return row | {"error": f"signature and kernel differ in {sorted(missing)}"}
    order = {k: types.get(k, "constexpr") for k in arguments}
    whole = [k for k, t in signature.items() if t.startswith("*") or re.fullmatch(r"[iu]\d+", t)]
    attrs = {(arguments.index(k),): [["tt.divisibility", 16]] for k in whole}
    source = ASTSource(kernel, order, {(arguments.index(k),): v for k, v in constants.items()}, attrs)
    options = {"num_warps": warps} | ({"num_stages": stages[0]} if stages else {})
    start = time.perf_counter()
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    except Exception as error:
        return row | {"error": f"{type(error).__name__}: {error}"[:2000]}
    wide = len(re.findall(r"ld\.global\S*\.v4\.b32", compiled.asm["ptx"]))
    row["seconds"] = round(time.perf_counter() - start, 2)
    return row | {"shared": compiled.metadata.shared, "wide_loads": wide} | resources(compiled.asm["cubin"])


def work(names: list[str]) -> list[tuple[str, int, int]]:
    """What to compile: (file, case, architecture)."""
    todo = []
    for name in names:
        seen = set()
        for index, case in enumerate(getattr(module(name), "AOT", ())):
            first = case[0] not in seen
            seen.add(case[0])
            todo += [(name, index, arch) for arch in (MAIN, *(OTHERS if first else ()))]
    return todo


def main(names: list[str]) -> None:
    names = names or files()
    for name in names:
        print(json.dumps({"file": name, "kernels": kernels(name)}))
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for row in pool.map(compile_case, *zip(*work(names), strict=True)):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
