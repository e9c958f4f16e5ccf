"""The wheel, outside the checkout: it installs, holds its data files, and trains."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def clone(source: Path) -> Path:
    """The files of which a wheel is built, copied into the new folder `source`."""
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(["cp", "-r", str(ROOT / "daybreak"), str(source / "daybreak")], check=True)
    return source


def test_the_wheel_trains_outside_the_checkout(tmp_path: Path) -> None:
    source = clone(tmp_path / "source")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("daybreak-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "daybreak/data/gpt2.tiktoken" in names
    assert "daybreak/recipes/tiny.toml" in names
    assert "daybreak/interop/families/modeling_nanochat.py.txt" in names
    assert "daybreak/py.typed" in names
    assert {f"daybreak/report/web/{n}" for n in ("page.html", "page.js", "uPlot.iife.min.js", "uPlot.LICENSE")} <= set(
        names
    )
    assert not [n for n in names if n.startswith(("tests", "bench"))]
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    work = tmp_path / "work"
    work.mkdir()
    env = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    for code in ("import daybreak, pathlib; print(pathlib.Path(daybreak.__file__).parent)",):
        where = subprocess.run(
            [sys.executable, "-c", code], cwd=work, env=env, capture_output=True, text=True, check=True
        )
        assert where.stdout.strip() == str(site / "daybreak")
    train = [sys.executable, "-m", "daybreak", "train", "tiny", "--steps", "5", "--eval.tokens", "4096"]
    done = subprocess.run(train, cwd=work, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "step    5/5 | loss" in done.stderr
    assert (work / "runs/tiny/checkpoints/step-00000005/manifest.json").is_file()


def test_an_editable_install_is_found_by_a_script_beside_the_clone(tmp_path: Path) -> None:
    """There Python sees the clone first, a folder `daybreak` without code of its own. The package in it must win."""
    source = clone(tmp_path / "daybreak")
    build = "import sys; from setuptools import build_meta; build_meta.build_editable(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("daybreak-*editable*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    script = tmp_path / "script.py"
    script.write_text(f"import site; site.addsitedir({str(site)!r})\nimport daybreak; print(daybreak.__file__)\n")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # -S leaves out the packages that are installed here, an editable daybreak among them
    command = [sys.executable, "-S", str(script)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(source / "daybreak/__init__.py")


def test_gpt2_shape_on_the_embedded_corpus(tmp_path: Path) -> None:
    """`train d12 --data stdlib` with GPT-2's BPE: 3 steps of the real 124M model; the first loss is about ln 50257."""
    command = [sys.executable, "-m", "daybreak", "train", "d12", "--data", "stdlib", "--steps", "3", "--batch.B", "1",
               "--batch.T", "64", "--eval.tokens", "64", "--eval.sample_tokens", "4"]  # fmt: skip
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    first = next(line for line in done.stderr.splitlines() if line.startswith("step    1/3 | loss"))
    assert 10.7 < float(first.split("loss ")[1].split()[0]) < 11.3
    assert (tmp_path / "data/stdlib/stdlib_train_000000.bin").is_file()
