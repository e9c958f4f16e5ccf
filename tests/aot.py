"""Compiles the Triton kernels ahead of time, without a GPU, and prints what each needs: one line of JSON a kernel.

    python tests/aot.py [FILE ...]      files of daybreak/kernels/cuda, all by default; not under TRITON_INTERPRET

Every case of tests/aot_cases.py is compiled for sm_90, for the other architectures the first case of each kernel, for
sm_100 also those whose launches overlap, and for sm_89, which has the least shared memory, those that keep STAGES
there. Cases that write fp8 are compiled for both.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from aot_cases import CASES
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

FOLDER = Path(__file__).parents[1] / "daybreak" / "kernels" / "cuda"
MAIN = 90  # the architecture that every case is compiled for
OTHERS = (80, 89, 100)
SINCE = {"rounding": 89}  # the architecture from which on a file's kernels run
TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def files() -> list[str]:
    """Names of the modules in daybreak/kernels/cuda that may hold Triton kernels: one needs the package quack."""
    return sorted(p.stem for p in FOLDER.glob("*.py") if p.stem not in ("__init__", "quack_epilogues"))


def kernels(name: str) -> list[str]:
    """Kernels that a file defines: jitted functions that are launched, `name[grid](...)`, or named so."""
    module = import_module(f"daybreak.kernels.cuda.{name}")
    own = module.__name__
    jitted = {k for k, v in vars(module).items() if isinstance(v, triton.JITFunction) and v.fn.__module__ == own}
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
    kernel, signature, constants, warps, *more = CASES[name][index]
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
    options = {"num_warps": warps} | (more[0] if more else {})
    start = time.perf_counter()
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    except Exception as error:
        return row | {"error": f"{type(error).__name__}: {error}"[:2000]}
    wide = len(re.findall(r"ld\.global\S*\.v4\.b32", compiled.asm["ptx"]))
    row["seconds"] = round(time.perf_counter() - start, 2)
    row |= {"shared": compiled.metadata.shared, "wide_loads": wide} | resources(compiled.asm["cubin"])
    if constants.get("OVERLAP"):  # what comes before the wait for the launch ahead
        early = compiled.asm["ptx"].partition("griddepcontrol.wait")[0]
        row |= {"early_loads": early.count("ld.global"), "early_stores": early.count("st.global")}
        row |= {"rows": constants.get("ROWS"), "waits": compiled.asm["ptx"].count("griddepcontrol.wait")}
    return row


def work(names: list[str]) -> list[tuple[str, int, int]]:
    """The work: (file, case, architecture)."""
    todo = []
    for name in names:
        seen = set()
        for index, case in enumerate(CASES.get(name, ())):
            first = case[0] not in seen
            seen.add(case[0])
            eight = any(t.startswith("*fp8") for t in case[1].values())
            others = OTHERS if first else (100,) if case[2].get("OVERLAP") else (89,) if "STAGES" in case[2] else ()
            others = sorted({*others, 89, 100} if eight else others)
            todo += [(name, index, arch) for arch in (MAIN, *others) if arch >= SINCE.get(name, 0)]
    return todo


def main(names: list[str]) -> None:
    names = names or files()
    for name in names:
        print(json.dumps({"file": name, "kernels": kernels(name)}))
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # a tenth of the time, for numbers of lines that nobody reads
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        for row in pool.map(compile_case, *zip(*work(names), strict=True)):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
