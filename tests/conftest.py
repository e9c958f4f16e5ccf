"""One thread per test process: two torch threads collapse when anything else wants a core."""

import logging
import os
import platform
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start

import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():  # Triton's kernels run under its interpreter; to be said before it is imported
    os.environ["TRITON_INTERPRET"] = "1"

# Each group's share of `make test`, in minutes of CPU time. A file belongs to the group whose list names it, else
# foundation. The minutes are printed, never asserted: a slower or busier machine spends more of them.
BUDGETS = {"foundation": 5.0, "kernels": 4.0, "interop": 3.0, "data": 3.0, "pages": 2.0, "recovery": 4.0}
BUDGETS |= {"distributed": 4.0, "decoder": 2.0, "pictures": 2.0}
KERNELS = ("attention", "bias", "classifier", "embedding", "gelu", "guard", "matmul", "norm", "optimizer", "tune")
KERNELS += ("glu", "nanochat", "rope")
INTEROP = (
    "test_interop_hf",
    "test_interop_refused",
    "test_interop_decoders",
    "test_interop_kept",
    "test_interop_nanochat",
    "test_tokenizer_kinds",
    "test_interop_llmc",
    "test_interop_gguf",
    "test_interop_gguf_in",
    "test_interop_scores",
    "test_llmc_cli",
    "test_generate",
    "test_serve",
    "test_serve_network",
)
INTEROP += ("test_llmc_runs", "test_llmc_ranks")
DATA = (
    "test_data_faults",
    "test_data_formats",
    "test_data_hub",
    "test_chat",
    "test_data_mixing",
    "test_packed",
    "test_packing",
    "test_prepare_chat",
    "test_eval_choice",
    "test_eval_core",
    "test_eval_harness",
)
GROUPS = {
    **{f"tests/test_kernel_{name}.py": "kernels" for name in KERNELS},
    **{f"tests/test_{name}.py": "kernels" for name in ("aot", "bench_kernels", "formats", "llama_kernels")},
    **{f"tests/{name}.py": "interop" for name in INTEROP},
    **{f"tests/{name}.py": "data" for name in DATA},
    **{f"tests/test_dist_{name}.py": "distributed" for name in ("engine", "train", "elastic")},
    **{f"tests/test_{name}.py": "distributed" for name in ("optimizers", "frozen")},
}
GROUPS |= {
    f"tests/test_{name}.py": "pages"
    for name in ("plan", "scaling", "display", "sinks", "pages", "series", "docs", "site")
}
RECOVERY = ("kill", "faults", "fuzz", "signals", "slurm")
GROUPS |= {f"tests/test_recovery_{name}.py": "recovery" for name in RECOVERY}
GROUPS |= {f"tests/test_{name}.py": "recovery" for name in ("saved_config", "files_checked")}
GROUPS |= {f"tests/test_{name}.py": "decoder" for name in ("llama", "llama_train")}
GROUPS |= {
    f"tests/test_images_{name}.py": "pictures"
    for name in ("codec", "prepare", "draw", "learn", "faults", "grow", "known")
}
spent = dict.fromkeys(BUDGETS, 0.0)
FIGURES: dict[str, object] = {}  # what the recovery tests measured, of all worker processes
counted = [0.0]  # CPU seconds of this process and its children at the last report


@pytest.fixture(autouse=True, scope="session")
def _signals_are_heard():
    """Jobs in the background, and those under nohup, ignore some signals; what tests start would inherit that."""
    nothing = {signal.SIGQUIT: lambda *_: None, signal.SIGHUP: lambda *_: None}
    for number, handler in (nothing | {signal.SIGINT: signal.default_int_handler}).items():
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _as_before():
    """The command line, called in the tests' process, sets up the log and tells libraries to stay offline: undone. A
    fixture of a whole module may have called it before."""
    log, environ = logging.getLogger("daybreak"), dict(os.environ)
    log.handlers[:], log.level, log.propagate = [], logging.NOTSET, True
    yield
    log.handlers[:], log.level, log.propagate = [], logging.NOTSET, True
    for name in [name for name in os.environ if name.startswith("HF_") and name not in environ]:
        del os.environ[name]


def children(pid: int) -> list[int]:
    """Processes that this process started and that still run, or were not waited for."""
    return [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and of all its descendants, those that still run and those that ended."""
    try:
        seconds = sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]))
        return seconds / os.sysconf("SC_CLK_TCK") + sum(map(cpu_seconds, children(pid)))
    except OSError:  # it ended meanwhile, or this system has no /proc
        return 0.0


def end_leftovers(pid: int, folder: str) -> None:
    """End descendants of a process that work in a folder: a failed test must not leave a run that takes a core."""
    for child in children(pid):
        with suppress(OSError):
            end_leftovers(child, folder)
            if folder in Path(f"/proc/{child}/cmdline").read_text() + os.readlink(f"/proc/{child}/cwd"):
                os.kill(child, signal.SIGKILL)


def pytest_collection_finish():
    counted[0] = cpu_seconds(os.getpid())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    if report.failed and "tmp_path" in item.funcargs:
        end_leftovers(os.getpid(), str(item.funcargs["tmp_path"]))
    now = cpu_seconds(os.getpid())
    report.cpu, counted[0] = max(now - counted[0], 0.0), now
    return report


def pytest_runtest_logreport(report):
    seconds = getattr(report, "cpu", 0.0)  # nobody knows those of a worker that crashed
    spent[GROUPS.get(report.nodeid.split("::")[0], "foundation")] += seconds


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """pytest-xdist: a worker process ended, and hands over what its tests measured."""
    FIGURES.update(getattr(node, "workeroutput", {}).get("figures", {}))


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["figures"] = FIGURES
        return
    if FIGURES:
        write_figures(session.config.getoption("--full"))
    over = {g: "over" if s > 60 * BUDGETS[g] else "of" for g, s in spent.items()}
    print("\nCPU minutes: " + ", ".join(f"{g} {s / 60:.1f} {over[g]} {BUDGETS[g]:.0f}" for g, s in spent.items()))


def write_figures(full):
    """Print what the recovery tests measured; at full scale it becomes bench/results/recovery.csv."""
    rows = "".join(f'"{name}",{FIGURES[name]}\n' for name in sorted(FIGURES))
    print(f"\n{rows}", end="")
    if full:
        from daybreak.state.run_folder import cpu_model, package_commit

        root = Path(__file__).parents[1]
        head = {"date": time.strftime("%Y-%m-%d"), "commit": package_commit(root), "processor": cpu_model(),
                "python": platform.python_version(), "torch": torch.__version__}  # fmt: skip
        text = "figure,value\n" + "".join(f"{k},{v}\n" for k, v in head.items()) + rows
        (root / "bench/results/recovery.csv").write_text(text)


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="the recovery tests at full scale (make test-recovery)")


@pytest.fixture(scope="session")
def full(request):
    """Whether the recovery tests run at full scale."""
    return request.config.getoption("--full")


@pytest.fixture(scope="session")
def figures():
    """Where the recovery tests put what they measured."""
    return FIGURES
