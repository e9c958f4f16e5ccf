"""One thread per test process: two torch threads collapse when anything else wants a core."""

import logging
import os
import platform
import time
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start

import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():  # Triton's kernels run under its interpreter; to be said before it is imported
    os.environ["TRITON_INTERPRET"] = "1"

# Minutes that a group of tests may take on 2 cores. A file belongs to the group whose list names it, else foundation.
BUDGETS = {"foundation": 4.0, "kernels": 3.0, "interop": 2.0, "data": 2.0, "pages": 1.0, "recovery": 3.0}
BUDGETS["distributed"] = 3.0
KERNELS = ("attention", "bias", "classifier", "embedding", "gelu", "guard", "matmul", "norm", "optimizer", "tune")
INTEROP = ("test_interop_hf", "test_interop_llmc", "test_interop_gguf", "test_llmc_cli", "test_generate", "test_serve")
INTEROP += ("test_llmc_ranks",)
DATA = ("test_data_formats", "test_data_hub", "test_data_mixing", "test_eval_choice", "test_eval_harness")
GROUPS = {
    **{f"tests/test_kernel_{name}.py": "kernels" for name in KERNELS},
    **{f"tests/test_{name}.py": "kernels" for name in ("aot", "bench_kernels")},
    **{f"tests/{name}.py": "interop" for name in INTEROP},
    **{f"tests/{name}.py": "data" for name in DATA},
    **{f"tests/test_dist_{name}.py": "distributed" for name in ("engine", "train", "elastic")},
}
GROUPS |= {f"tests/test_{name}.py": "pages" for name in ("plan", "display", "sinks", "pages", "docs")}
RECOVERY = ("kill", "faults", "fuzz", "signals")
GROUPS |= {f"tests/test_recovery_{name}.py": "recovery" for name in RECOVERY}
spent = dict.fromkeys(BUDGETS, 0.0)


@pytest.fixture(autouse=True)
def _as_before():
    """The command line, called in the tests' process, sets up the log and tells libraries to stay offline: undone."""
    log = logging.getLogger("daybreak")
    before, environ = (log.handlers[:], log.level, log.propagate), dict(os.environ)
    yield
    log.handlers[:], log.level, log.propagate = before
    for name in [name for name in os.environ if name.startswith("HF_") and name not in environ]:
        del os.environ[name]


def pytest_runtest_logreport(report):
    spent[GROUPS.get(report.nodeid.split("::")[0], "foundation")] += report.duration


def pytest_sessionfinish(session, exitstatus):
    if not os.environ.get("CI"):
        return
    print("\nminutes: " + ", ".join(f"{g} {s / 60:.1f} of {BUDGETS[g]:.0f}" for g, s in spent.items()))
    over = [g for g, s in spent.items() if s > 60 * BUDGETS[g]]
    if over and exitstatus == 0:
        print("test groups over their budget: " + ", ".join(over))
        session.exitstatus = 1


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="the recovery tests at full scale (make test-recovery)")


@pytest.fixture(scope="session")
def full(request):
    """Whether the recovery tests run at full scale."""
    return request.config.getoption("--full")


@pytest.fixture(scope="session")
def figures(full):
    """What the recovery tests measured; at full scale it becomes bench/results/recovery.csv."""
    found = {}
    yield found
    rows = "".join(f'"{name}",{value}\n' for name, value in found.items())
    print(f"\n{rows}", end="")
    if full:
        from daybreak.state.run_folder import cpu_model, package_commit

        root = Path(__file__).parents[1]
        head = {"date": time.strftime("%Y-%m-%d"), "commit": package_commit(root), "processor": cpu_model(),
                "python": platform.python_version(), "torch": torch.__version__}  # fmt: skip
        text = "figure,value\n" + "".join(f"{k},{v}\n" for k, v in head.items()) + rows
        (root / "bench/results/recovery.csv").write_text(text)
