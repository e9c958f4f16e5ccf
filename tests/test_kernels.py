"""The set of operations as a whole."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_harness import DEVICE, draw, each_backend, run

from daybreak.cli.main import main
from daybreak.engine.device import check_fp8
from daybreak.errors import ConfigError
from daybreak.kernels import all_ops, choose


def test_every_operation_is_tested():
    """`quantise` is each number format's own: see test_formats.py and test_kernel_fp8.py."""
    tests = "".join(p.read_text() for p in Path(__file__).parent.glob("test_kernel_*.py"))
    assert set(re.findall(r'run\(\s*"(\w+)"', tests)) == {name for name, op in all_ops().items() if op.impls}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_operation_has_a_backend_on_every_device(dtype):
    """LoRA's had none on CUDA once, so no GPU could finetune with it."""
    for device_type in ("cpu", "cuda"):
        assert choose(device_type, dtype).keys() == {
            name for name, op in all_ops(device_type).items() if "torch" in op.impls
        }


IMPORT_ALONE = """
import importlib, os, pkgutil, torch, daybreak
try:
    import triton
except ImportError:
    pass
path = os.path.dirname(daybreak.__file__)
rooms = {name: f"{path}/{name.replace('.', '/')}" for name in ("kernels", "kernels.cuda", "models", "optimizers")}
for room, folder in rooms.items():
    for module in pkgutil.iter_modules([folder]):
        if (child := os.fork()) == 0:
            try:
                importlib.import_module(f"daybreak.{room}.{module.name}")
            except ModuleNotFoundError:  # a library that this machine lacks
                pass
            except BaseException as e:
                print(room, module.name, repr(e), flush=True)
            os._exit(0)
        os.waitpid(child, 0)
"""


def test_every_module_can_be_imported_first():
    """One made kernels for fp8 from those of a module that it did not import. A GPU's first import then failed."""
    result = subprocess.run([sys.executable, "-c", IMPORT_ALONE], capture_output=True, text=True, check=True)
    assert result.stdout == ""


UNWANTED = [
    ("layernorm_backward", {"dw"}), ("layernorm_backward", {"dw", "db"}), ("layernorm_backward", {"db", "dbias"}),
    ("matmul_gelu_backward", {"db"}), ("embedding_backward", {"dwte"}), ("embedding_backward", {"dwpe"}),
]  # fmt: skip


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("name", "unwanted"), UNWANTED)
def test_a_gradient_that_nobody_wants_is_none(backend, dtype, name, unwanted):
    """As of a frozen parameter. The other outputs have the bits that they have beside it."""
    n, C, stats = 10, 40, torch.float32
    x, y, w = draw(n, C, dtype=dtype), draw(n, C, dtype=dtype, seed=1), draw(C, C, dtype=dtype, seed=2)
    mean, rstd = draw(n, dtype=stats), draw(n, dtype=stats, seed=3).abs()
    tokens = torch.tensor([[1, 4, 1, 1, 0], [2, 2, 1, 6, 4]], device=DEVICE)
    calls: dict[str, tuple[dict, list]] = {
        "layernorm_backward": ({"dx": y, "dw": w[0], "db": w[1], "dbias": w[2]}, [None, y, x, mean, rstd, w[3], w[4]]),
        "matmul_gelu_backward": ({"dpre": y, "gelu": y, "db": w[0]}, [x, w, y]),
        "embedding_backward": ({"dwte": w, "dwpe": w}, [x, tokens]),
    }
    outputs, inputs = calls[name]
    options = {"accumulate": True} | ({"accumulate_dx": True} if "layernorm" in name else {})
    found = []
    for without in (set(), unwanted):
        out = {key: None if key in without else value.clone() for key, value in outputs.items()}
        run(name, *out.values(), *inputs, backend=backend, **options)
        found.append(out)
    assert found[1].keys() - {key for key, value in found[1].items() if value is None} == outputs.keys() - unwanted
    assert all(torch.equal(value, found[0][key]) for key, value in found[1].items() if value is not None)
    assert not any(torch.equal(value, outputs[key]) for key, value in found[0].items())


PLANS = (
    "tiny --gpu 4090",
    "tiny --gpu h100 --precision.compute fp8 --optim.name muon",
    "tiny --gpu b200 --model.arch llama --lora.rank 4 --lora.base nf4",
    "tiny --gpu h100 --model.arch llama --lora.rank 4 --lora.base fp8",
    "tiny --gpu h100 --model.arch nanochat",
)
WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # its import fails, as with torch's build for CPUs
from daybreak.cli.main import main
sys.exit(max([main(["plan", *words.split(), "--verbose"]) for words in sys.argv[1:]]))
"""


def test_a_plan_for_a_gpu_needs_no_triton(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All kernels for GPUs are imported without it, and every line of the plan stays the same."""
    monkeypatch.chdir(tmp_path)  # data that is here, as `make demo` leaves it, is a part of a plan
    command = [sys.executable, "-c", WITHOUT_TRITON, *PLANS]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [main(["plan", *words.split(), "--verbose"]) for words in PLANS] == [0] * len(PLANS)
    assert done.stdout == capsys.readouterr().out
    assert done.stdout.count("\nlargest B ") == len(PLANS)


def test_fp8_needs_a_gpu_for_it_and_triton_there() -> None:
    check_fp8((9, 0), "this GPU", "lora.base", {"quack"})
    for key, other in {"precision.compute": "bf16", "lora.base": "compute"}.items():
        for able, lacks in (((8, 6), "a GPU of compute capability 8.9 or higher, not 8.6"),
                            ((9, 0), "Triton, which is missing or lacks a C compiler")):  # fmt: skip
            with pytest.raises(ConfigError) as refused:
                check_fp8(able, "this GPU", key, {"triton": "a reason"})
            assert str(refused.value) == f"{key} = fp8 needs {lacks}; use {other} on this GPU."
