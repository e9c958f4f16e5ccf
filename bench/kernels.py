"""Every kernel of bench/kernel_GROUP.py against this GPU's own limits: bytes over its copy rate, FLOPs over its rate
of a large matmul.

    python bench/kernels.py [--groups norm,attention] [--shapes d48,d12] [--ops NAME,NAME] [--out FILE.csv]

The kernels' tests run first: an operation whose tests fail gets no figure. Memory-bound kernels must reach 85 % of
the copy rate, or say why they need not.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from timing import Case, copy_rate, product_rate, seconds

from daybreak.kernels import all_ops

HERE = Path(__file__).parent
SHAPES = {"d48": (16, 1024, 1600, 25, 50304), "d12": (64, 1024, 768, 12, 50304)}  # B, T, C, NH, Vp
RULE = 85.0  # percent of the copy rate
COLUMNS = ("op", "backend", "shape", "note", "microseconds", "TB/s", "TFLOP/s", "percent", "verdict")


def output_of(*command: str) -> str:
    """The output of a command, or "unknown"."""
    try:
        return (
            subprocess.run(command, capture_output=True, text=True, check=True, cwd=HERE).stdout.split("\n")[0].strip()
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine() -> dict[str, str]:
    """GPU, driver, library versions, date and commit: columns of every row."""
    import triton

    return {
        "card": torch.cuda.get_device_name(),
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": output_of("git", "rev-parse", "--short", "HEAD"),
    }


def test_files(op: str) -> list[Path]:
    """The files of tests that call this operation."""
    names = sorted((HERE.parent / "tests").glob("test_kernel_*.py"))
    return [p for p in names if f'run("{op}"' in (text := p.read_text()) or f'"{op}", ' in text]


def passing(ops: set[str]) -> set[str]:
    """Those operations all of whose test files pass; each file runs once."""
    files = {op: test_files(op) for op in ops}
    good = {}
    for path in sorted({p for paths in files.values() for p in paths}):
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "--no-header", path], capture_output=True, text=True, cwd=HERE.parent
        )
        good[path] = done.returncode == 0
        print(f"{path.name}: {done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-300:]}")
    return {op for op, paths in files.items() if paths and all(good[p] for p in paths)}


def measure(case: Case, shape: str, copy: float, product: float) -> dict[str, Any]:
    """One row of the table."""
    row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
    row |= {"op": case.op, "backend": case.backend, "shape": shape, "note": case.note}
    try:
        t = seconds(case)
    except Exception as error:  # a backend that this machine lacks must not hide the other rows
        return row | {"verdict": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]}
    percent = 100 * max(case.nbytes / copy, case.flops / product) / t
    verdict = f"exempt: {case.exempt}" if case.exempt else "PASS" if percent >= RULE else f"below {RULE:.0f} %"
    return row | {
        "microseconds": f"{t * 1e6:.1f}",
        "TB/s": f"{case.nbytes / t / 1e12:.3f}",
        "TFLOP/s": f"{case.flops / t / 1e12:.0f}" if case.flops else "",
        "percent": f"{percent:.1f}",
        "verdict": verdict,
    }


def show(row: dict[str, Any]) -> None:
    """One line on the terminal."""
    figures = f"{row['microseconds']:>9} us  {row['TB/s']:>6} TB/s  {row['TFLOP/s']:>4} TFLOP/s  {row['percent']:>5} %"
    print(
        f"{row['op']:<27} {row['backend']:<9} {row['shape']:<4} {row['note']:<28} {figures}  {row['verdict']}",
        flush=True,
    )


def main(arguments: list[str] | None = None) -> int:
    """Test, measure, print, write each row as soon as it is there. 0 if every kernel passes its tests and the rule."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", help="files kernel_GROUP.py to run, by comma (default: all)")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="of %(default)s")
    parser.add_argument("--ops", help="only these operations, by comma")
    parser.add_argument("--out", type=Path, default=Path(os.devnull), help="CSV to write")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench/kernels.py needs a CUDA device", file=sys.stderr)
        return 2
    found = sorted(p.stem.removeprefix("kernel_") for p in HERE.glob("kernel_*.py"))
    groups, shapes = args.groups.split(",") if args.groups else found, args.shapes.split(",")
    for given, known in ((groups, found), (shapes, SHAPES)):
        if unknown := sorted(set(given) - set(known)):
            parser.error(f"there is no {unknown[0]}, only {', '.join(known)}")
    all_ops("cuda")
    modules = [importlib.import_module(f"kernel_{group}") for group in groups]
    chosen = [(shape, case) for shape in shapes for module in modules for case in module.cases(*SHAPES[shape])]
    if args.ops:
        chosen = [(shape, case) for shape, case in chosen if case.op in args.ops.split(",")]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    tested = passing({case.op for _, case in chosen})
    copy, product = copy_rate(), product_rate()
    limits, here = {"copy TB/s": f"{copy / 1e12:.3f}", "product TFLOP/s": f"{product / 1e12:.0f}"}, machine()
    print(", ".join(here.values()))
    print(f"copy {copy / 1e12:.3f} TB/s, 8192^3 bf16 matmul {product / 1e12:.0f} TFLOP/s", flush=True)
    good = True
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *limits, *here])
        writer.writeheader()
        for shape, case in chosen:
            if case.op not in tested:
                print(f"{case.op:<27} {case.backend:<9} {shape:<4} its tests fail or are missing: no figure")
                good = False
                continue
            row = measure(case, shape, copy, product)
            show(row)
            writer.writerow(row | limits | here)
            file.flush()  # what was measured outlives a time limit
            good = good and row["verdict"].startswith(("PASS", "exempt"))
            torch.cuda.empty_cache()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
