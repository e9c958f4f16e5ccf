"""Finds the fastest way to compute each matmul of a step and writes the table that cublaslt.py and quack.py read.

    search(keys, folder)      # report.bench.step_products gives the keys of all matmuls of a step

`search` takes one key after the other, those with GELU last, and writes the table after each. It skips keys that the
folder's table has, so that a search may be stopped at any time. For each key, `Search.tune` narrows many candidates
down:

    1 collect   the library's OFFERS, and their variations (other tiles, clusters, block orders): CANDIDATES at most;
                with GELU also two passes, the matmul that the table has and then GELU; where it can, quack's tiles
    2 time      all of them shortly: 2 rounds of SHORT_S seconds
    3 check     the fast ones, fastest first: within PRUNE times the best, until more than FINALISTS are
                sound; and the library's first offer, however slow it is
    4 time      the finalists longer: ROUNDS rounds of ROUND_S seconds
    5 choose    the first offer, unless another is faster by more than GAIN; a smaller difference could be noise
    6 quack     its best tile is named beside that winner if it is faster; it passes steps 2 to 4 too

A sound candidate agrees with an fp32 matmul. It also gives the same bits three times while another stream keeps the GPU
busy. All times are taken as in training, at the power limit. The GPU is heated first and is never idle. The operands
rotate through more memory than the L2 cache holds. The candidates take turns, every other round in reverse order, and
their medians are compared.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import functools
import itertools
import json
import math
import statistics
import subprocess
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from daybreak.files import write_atomic
from daybreak.kernels.cuda import cublaslt, missing_backends, products, quack
from daybreak.kernels.cuda.cublaslt import CAP_TILES, CONFIG, WORKSPACE, Algo, Blas, PreparedMatmul
from daybreak.kernels.cuda.products import Key

GAIN = 0.01
HEAT_S, SHORT_S, ROUND_S, ROUNDS = 2.0, 0.004, 0.02, 5
OFFERS, CANDIDATES, FINALISTS, PRUNE = 32, 96, 6, 1.15  # see the steps above
TANH = 2.0**-10.98  # relative error of tanh.approx.f32 (PTX ISA), which an epilogue may use
ROTATE = 256 << 20  # bytes of operands that take turns, at least
TILES = (20, 23, 24, 31, 32)  # 128x128, 128x256, 256x128, 192x128, 128x192: tried beside the offered ones
CLUSTERS = (2, 3, 4, 5, 6)  # 1x1, 2x1, 4x1, 1x2, 2x2
BUDGET_S = 300.0  # seconds of one search
DTYPES = {  # of A, of B, of the rest
    "bf16": (torch.bfloat16,) * 3, "fp32": (torch.float32,) * 3, "tf32": (torch.float32,) * 3,
    **dict.fromkeys(("e4m3", "e4m3slow"), (torch.float8_e4m3fn, torch.float8_e4m3fn, torch.bfloat16)),
    **dict.fromkeys(("e5m2", "e5m2slow"), (torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16)),
}  # fmt: skip
PAIRED = ((128, 128), (128, 160), (128, 192), (128, 208), (192, 128))
SHARED = ((256, 128), (256, 160), (256, 192), (256, 208), (128, 256))
QUACK = [
    quack.Tile(*size, pair, *cluster)
    for sizes, pair in ((PAIRED, True), (SHARED, False))
    for size, cluster in itertools.product(sizes, ((2, 1), (1, 2)))
]


@dataclass
class Operands:
    """One set of buffers for a matmul, row-major as in the operations."""

    a: Tensor
    b: Tensor
    c: Tensor
    d: Tensor
    bias: Tensor | None
    aux: Tensor | None
    scales: Tensor | None = None  # of a and b in fp8, fp32 (2): each at a multiple of 16 bytes, as cuBLASLt asks

    def addresses(self) -> tuple[int, ...]:
        """In the order of `PreparedMatmul.launch`."""
        optional = (0 if x is None else x.data_ptr() for x in (self.bias, self.aux))
        return (self.a.data_ptr(), self.b.data_ptr(), self.c.data_ptr(), self.d.data_ptr(), *optional)

    def scale_addresses(self) -> tuple[int, ...]:
        """The last two of `PreparedMatmul.launch`; empty but for fp8."""
        return () if self.scales is None else tuple(scale.data_ptr() for scale in self.scales)

    def factors(self) -> tuple[Tensor, Tensor]:
        """a and b in fp32."""
        a, b = self.a.float(), self.b.float()
        return (a, b) if self.scales is None else (a.mul_(self.scales[0]), b.mul_(self.scales[1]))

    def nbytes(self) -> int:
        """Bytes of all buffers, each counted once."""
        tensors = [x for x in (self.a, self.b, self.d, self.bias, self.aux) if x is not None]
        return sum(x.nbytes for x in tensors) + (0 if self.c is self.d else self.c.nbytes)


def operands(key: Key, device: torch.device) -> Operands:
    """Random buffers with the key's row strides; the entries of the result have a variance of about 1."""
    of_a, of_b, dtype = DTYPES[key.dtype]
    scales = None
    if of_a != dtype:  # fp8: numbers of about 1, and the factor of b in its scale
        scales = torch.zeros(2, 4, device=device)[:, 0]
        scales.copy_(torch.tensor([1.0, 2.0 ** round(math.log2(key.k**-0.5))]))

    def matrix(rows: int, columns: int, ld: int, scale: float = 1.0, kind: torch.dtype = dtype) -> Tensor:
        whole = torch.empty(rows, ld, dtype=dtype, device=device).normal_(0, scale).to(kind)
        return whole[:, :columns]

    a = matrix(*((key.m, key.k) if key.trans[0] == "t" else (key.k, key.m)), key.lda, kind=of_a)
    small = key.k**-0.5 if scales is None else 1.0
    b = matrix(*((key.n, key.k) if key.trans[1] == "n" else (key.k, key.n)), key.ldb, small, of_b)
    d = matrix(key.n, key.m, key.ldd)
    c = matrix(key.n, key.m, key.ldc) if key.mode == "add" else d
    bias = matrix(1, key.m, key.m)[0] if key.epilogue in ("bias", "gelu") else None
    aux = matrix(key.n, key.m, key.ldaux) if key.ldaux else None
    return Operands(a, b, c, d, bias, aux, scales)


def product(key: Key, x: Operands) -> Tensor:
    """The matmul with the addend and the bias but without GELU, by torch in fp32."""
    a, b = x.factors()
    left = b if key.trans[1] == "n" else b.t()
    right = a.t() if key.trans[0] == "t" else a
    addend = x.bias if x.bias is not None else None if key.mode == "beta0" else x.c
    if addend is None:
        return left @ right
    out = torch.addmm(addend.float(), left, right)
    return out.add_(x.c) if x.bias is not None and key.mode != "beta0" else out


def target(key: Key, x: Operands) -> tuple[Tensor, Tensor]:
    """The result in fp32, and how far a sound result may be from it.

    The limit adds up several errors: the rounding of the result, and that of the sum. It adds the effect of rounded
    operands (TF32), of sums with 14 bits (fp8), of GELU's rounded input, and of the GPU's tanh, as far as the key has
    them.
    """
    with full_precision():
        first = product(key, x)
        want, half_ulp = first, 2.0**-8 if x.d.dtype == torch.bfloat16 else 0.0
        carried = torch.zeros((), device=x.d.device)
        if key.mode != "beta0":  # Hopper's kernels round the matmul before they add C
            carried = half_ulp * (first - x.c.float()).abs()
        if key.epilogue == "gelu":
            want = torch.ops.aten.gelu(first, approximate="tanh")
            carried = first.abs() * (1.13 * half_ulp + TANH / 2)  # GELU's slope is at most 1.129
        elif key.epilogue == "dgelu" and x.aux is not None:
            pre = x.aux.float()
            want = torch.ops.aten.gelu_backward(first, pre, approximate="tanh")
            carried = first.abs() * TANH * (0.5 + 0.8 * pre.abs() * (1 + 0.1342 * pre * pre))
        inexact = 0.0
        if key.dtype == "tf32":  # each operand keeps 10 bits of its fraction, rounded or cut
            inexact = 2.0**-9 * 1.13
        elif x.scales is not None:  # a sum of 14 bits is cut for every 32 numbers; the slow one is, within 128
            inexact = 2.0**-12 if key.dtype.endswith("slow") else key.k / 32 * 2.0**-13
        if inexact:
            a, b = (side.float().abs().to(side.dtype) for side in (x.a, x.b))
            sizes = Operands(a, b, x.c.abs(), x.d, None if x.bias is None else x.bias.abs(), x.aux, x.scales)
            carried = carried + inexact * product(key, sizes)
        return want, half_ulp * want.abs() + 1e-5 * max(1.0, key.k / 8192) * want.abs().amax() + carried


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Inside the block, torch computes fp32 matmuls without TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@dataclass
class Candidate:
    """A way to compute a matmul. `launch` runs it on a set of operands and returns a status.

    `algo` is cuBLASLt's algorithm. It is None for quack's tile, which `config` names, and for two passes.
    """

    launch: Callable[[Operands], int]
    algo: Algo | None
    config: str
    seconds: float = math.inf


def tile_ids(prepared: PreparedMatmul, algo: Algo) -> list[int]:
    """The tiles that an algorithm supports."""
    at, written = ctypes.addressof(algo), ctypes.c_size_t()
    get, size_at = prepared.lib.cublasLtMatmulAlgoCapGetAttribute, ctypes.addressof(written)
    if get(at, CAP_TILES, None, 0, size_at) or not written.value:
        return []
    known = (ctypes.c_uint32 * (written.value // 4))()
    return list(known) if not get(at, CAP_TILES, ctypes.addressof(known), ctypes.sizeof(known), size_at) else []


def varied(prepared: PreparedMatmul, base: Algo, **settings: int) -> Algo | None:
    """A copy of an algorithm with other settings; None if this algorithm has no such setting."""
    algo = Algo.from_buffer_copy(bytes(base))
    for name, value in settings.items():
        number, kind = CONFIG[name]
        boxed = kind(value)
        at = (ctypes.addressof(boxed), ctypes.sizeof(boxed))
        if prepared.lib.cublasLtMatmulAlgoConfigSetAttribute(ctypes.addressof(algo), number, *at):
            return None
    return algo


def variations(prepared: PreparedMatmul, offered: list[Algo]) -> list[Algo]:
    """Other tiles, clusters and block orders of the best offered algorithms, where the library accepts them."""
    bases: dict[int, Algo] = {}
    for algo in offered[:4]:
        bases.setdefault(prepared.setting(algo, "algo"), algo)
    seen, found = {bytes(algo) for algo in offered}, []
    wanted = {prepared.setting(algo, "tile") for algo in offered} | set(TILES)
    for base in bases.values():
        tiles = [tile for tile in tile_ids(prepared, base) if tile in wanted]
        for cluster, swizzle, tile in itertools.product(CLUSTERS, (0, 1), tiles):
            other = varied(prepared, base, tile=tile, cluster=cluster, swizzle=swizzle)
            if other is not None and bytes(other) not in seen and prepared.checked(other):
                seen.add(bytes(other))
                found.append(other)
    return found


class Search:
    """The tools of one search on the current device."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        blas = cublaslt.blas_of(self.device.index)
        if blas is None:
            raise RuntimeError("cuBLASLt was not found: there is nothing to tune")
        self.blas: Blas = blas
        self.workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=self.device)
        self.noise: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.busy = torch.randn(4096, 4096, device=self.device).bfloat16()
        self.noise_out = torch.empty_like(self.busy)
        self.quack = "quack" not in missing_backends(torch.cuda.get_device_capability(self.device))

    def stream(self) -> int:
        """The current stream's address."""
        return int(torch.cuda.current_stream(self.device).cuda_stream)

    def heat(self, seconds: float) -> None:
        """Run large matmuls back to back, so that the clock is as in training."""
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            for _ in range(50):
                torch.mm(self.busy, self.busy, out=self.noise_out)
            torch.cuda.synchronize()

    def measure(self, candidates: list[Candidate], sets: list[Operands], s: float, rounds: int) -> None:
        """Set the median seconds of each candidate, over `rounds` rounds without a pause between them.

        In each round every candidate runs for about `s` seconds. A first round only finds how often to call it.
        """
        runs = [c.launch for c in candidates]
        event: Callable[[], Any] = functools.partial(torch.cuda.Event, enable_timing=True)
        events = [[(event(), event()) for _ in runs] for _ in range(rounds + 1)]
        counts, turn = [2] * len(runs), 0
        for number, row in enumerate(events):
            order = range(len(runs)) if number % 2 else reversed(range(len(runs)))
            for i in order:
                row[i][0].record()
                for _ in range(counts[i]):
                    runs[i](sets[turn % len(sets)])
                    turn += 1
                row[i][1].record()
            if number == 0:  # this round is not counted
                torch.cuda.synchronize()
                counts = [max(2, math.ceil(s / (max(a.elapsed_time(b), 1e-3) / 2e3))) for a, b in row]
        torch.cuda.synchronize()
        seconds = [[a.elapsed_time(b) / 1e3 / counts[i] for i, (a, b) in enumerate(row)] for row in events[1:]]
        for candidate, column in zip(candidates, zip(*seconds, strict=True), strict=True):
            candidate.seconds = statistics.median(column)

    def candidates(self, prepared: PreparedMatmul, x: Operands) -> list[Candidate]:
        """The library's offers, best guess first, and their variations; each has run once."""
        offered = [offer.algo for offer in prepared.offered(OFFERS)]
        algos, found = (offered + variations(prepared, offered))[:CANDIDATES], []
        for algo in algos:

            def launch(x: Operands, algo: Algo = algo) -> int:
                return prepared.launch(
                    algo, *x.addresses(), self.workspace.data_ptr(), self.stream(), *x.scale_addresses()
                )  # type: ignore[call-arg]

            if not (status := launch(x)):
                found.append(Candidate(launch, algo, prepared.config(algo)))
        if algos and not found:
            print(f"  refused: all {len(algos)}: {cublaslt.STATUS.get(status, status)}")
        torch.cuda.synchronize()
        return found

    def tiles(self, key: Key, x: Operands) -> list[Candidate]:
        """quack's tiles, each compiled and run once.

        Empty for GELU and its derivative, where no table chooses the tile, and for operands that quack cannot take.
        """
        if not self.quack or key.dtype != "bf16" or key.epilogue not in ("plain", "bias"):
            return []

        def sides(x: Operands) -> tuple[Tensor, Tensor]:
            return x.b if key.trans[1] == "n" else x.b.t(), x.a.t() if key.trans[0] == "n" else x.a

        if not quack.served(*sides(x), x.c, x.d):
            return []
        found = []
        for tile in QUACK:

            def launch(x: Operands, tile: quack.Tile = tile) -> int:
                quack.product(tile, x.d, *sides(x), None if key.mode == "beta0" else x.c, x.bias)
                return 0

            found.append(Candidate(launch, None, str(tile)))
        return compiled(found, x)

    def two_passes(self, key: Key, entry: dict[str, Any] | None) -> Candidate | None:
        """The table's matmul with bias, then GELU in a separate pass."""
        if not entry or "algo" not in entry:
            return None
        prepared = PreparedMatmul(self.blas, with_bias(key))
        algo = Algo.from_buffer_copy(bytes.fromhex(entry["algo"]))

        def launch(x: Operands) -> int:
            a, b, _, _, bias, pre = x.addresses()
            status = prepared.launch(algo, a, b, pre, pre, bias, 0, self.workspace.data_ptr(), self.stream())
            cublaslt.gelu_pass(x.d, x.aux)  # type: ignore[arg-type]
            return status

        return Candidate(launch, None, "a matmul, then gelu")

    def sound(self, key: Key, candidate: Candidate, x: Operands, start: Tensor, wanted: tuple[Tensor, Tensor]) -> str:
        """Why a candidate may not be used, or "" if it is right and gives the same bits three times under load."""
        results = []
        for _ in range(3):
            x.d.copy_(start) if key.mode == "beta1" else x.d.fill_(math.nan)
            if key.epilogue == "gelu" and x.aux is not None:
                x.aux.fill_(math.nan)
            self.workspace.fill_(255)
            torch.cuda.synchronize()
            with torch.cuda.stream(self.noise):
                for _ in range(4):
                    torch.mm(self.busy, self.busy, out=self.noise_out)
            if status := candidate.launch(x):
                return cublaslt.STATUS.get(status, str(status))
            results.append(x.d.clone())
            torch.cuda.synchronize()
        if not all(torch.equal(results[0], other) for other in results[1:]):
            return "its bits differ from run to run"
        outputs = [results[0].float()]
        if key.epilogue == "gelu" and x.aux is not None:
            outputs.append(torch.ops.aten.gelu(x.aux.float(), approximate="tanh"))
        excess = max(float(((out - wanted[0]).abs_() / wanted[1]).amax()) for out in outputs)
        return "" if excess <= 1 else f"off by {excess:.1f} times the limit"

    def finalists(self, key: Key, found: list[Candidate], x: Operands) -> list[Candidate]:
        """The fast candidates that are sound: step 3. The first offer comes first if it is sound."""
        start = x.d.normal_().clone()  # the timed matmuls have added to it many times
        wanted, best = target(key, x), min(c.seconds for c in found)
        near = sorted((c for c in found[1:] if c.seconds <= PRUNE * best), key=lambda c: c.seconds)
        kept: list[Candidate] = []
        for candidate in [found[0], *near]:
            if why := self.sound(key, candidate, x, start, wanted):
                print(f"  refused: {candidate.config}: {why}")
            else:
                kept.append(candidate)
            if len(kept) > FINALISTS:
                break
        x.d.copy_(start)
        return kept

    def tune(self, key: Key, bias_entry: dict[str, Any] | None) -> dict[str, Any] | None:
        """The table's entry for one key, in steps 1 to 6; None if the library has no sound algorithm for it."""
        prepared, sets = PreparedMatmul(self.blas, key), [operands(key, self.device)]
        while sum(x.nbytes() for x in sets) < ROTATE:
            sets.append(operands(key, self.device))
        found = self.candidates(prepared, sets[0])
        if not found:
            return None
        first, tried = found[0], len(found)
        if separate := self.two_passes(key, bias_entry):
            found.append(separate)
        tiles = self.tiles(key, sets[0])
        self.measure([*found, *tiles], sets, SHORT_S, 2)
        finalists = self.finalists(key, found, sets[0])
        if not finalists:
            return None
        tiles = self.finalists(key, tiles, sets[0]) if tiles else []
        self.heat(0.1)
        self.measure([*finalists, *tiles], sets, ROUND_S, ROUNDS)
        winner = min(finalists, key=lambda c: c.seconds)
        if finalists[0] is first and winner.seconds > (1 - GAIN) * first.seconds:
            winner = first
        tera = 2e-12 * key.m * key.n * key.k
        entry: dict[str, Any] = {"config": winner.config, "candidates": tried, "us": round(1e6 * winner.seconds, 1)}
        entry |= {"algo": bytes(winner.algo).hex()} if winner.algo is not None else {"separate": True}
        entry |= {"tflops": round(tera / winner.seconds, 1), "first_tflops": round(tera / first.seconds, 1)}
        if tiles:
            tile = min(tiles, key=lambda c: c.seconds)
            entry["quack"] = tile.config if tile.seconds < winner.seconds else ""
            entry["quack_tflops"] = round(tera / tile.seconds, 1)
        prepared.destroy()
        return entry


def compiled(candidates: list[Candidate], x: Operands) -> list[Candidate]:
    """Those of quack's candidates that run; each has run once. Other processes compile them in parallel."""
    from quack.cache import CompilePending, pool_scope

    kept, waiting = [], candidates
    with pool_scope():
        while waiting:
            later = []
            for candidate in waiting:
                try:
                    candidate.launch(x)
                except CompilePending:
                    later.append(candidate)
                except Exception as error:  # this matmul or this GPU does not support the tile
                    print(f"  left out: {candidate.config}: {type(error).__name__}: {str(error)[:80]}")
                else:
                    kept.append(candidate)
            waiting = later
            time.sleep(0.05 if later else 0)
    torch.cuda.synchronize()
    return kept


def with_bias(key: Key) -> Key:
    """The key of a matmul with GELU, without its GELU: the bias is added, and the result is GELU's input."""
    return key._replace(epilogue="bias", ldd=key.ldaux, ldc=key.ldaux, ldaux=0)


def search(keys: Collection[Key], folder: Path) -> Path:
    """Write the fastest sound algorithm for each key to the current device's table in `folder`, key by key.

    Keys that the table has stay as they are, so the next search resumes where one was stopped. After BUDGET_S seconds
    the remaining keys are left out and printed. Raises ConfigError for a damaged table.
    """
    tools, start = Search(), time.perf_counter()
    path = folder / products.table_path(tools.blas.gpu, tools.blas.version).name
    plans = products.read_table(path, tools.blas.gpu, tools.blas.version)
    folder.mkdir(parents=True, exist_ok=True)
    tools.heat(HEAT_S)
    about = {
        "schema": 1,
        "card": tools.blas.gpu,
        "cublaslt": tools.blas.version,
        "torch": str(torch.__version__),
        "machine": machine(),
        "measured": datetime.date.today().isoformat(),
    }
    # A matmul with bias comes before the same matmul with GELU: its algorithm is the first of the two passes.
    todo = {*keys, *(with_bias(key) for key in keys if key.epilogue == "gelu")}
    waiting = [key for key in todo if str(key) not in plans]
    try:
        for key in sorted(waiting, key=lambda key: (key.epilogue == "gelu", key)):
            if time.perf_counter() - start > BUDGET_S:
                print(f"{key}: left out, the budget of {BUDGET_S:.0f} s is spent")
                continue
            entry = tools.tune(key, plans.get(str(with_bias(key))) if key.epilogue == "gelu" else None)
            if entry is None:
                print(f"{key}: no sound algorithm")
                continue
            plans[str(key)] = entry
            write({**about, "plans": {str(key): entry}}, folder)
            figures = " ".join(f"{n} {entry[n]}" for n in ("tflops", "first_tflops", "quack_tflops") if n in entry)
            print(f"{key}: {figures} of {entry['candidates']}: {entry.get('quack') or entry['config']}")
    finally:
        had, has = len(todo) - len(waiting), sum(str(key) in plans for key in todo)
        rest = "" if has == len(todo) else "; the same command tries the others"
        print(f"{has} of {len(todo)} matmuls, {had} from before, in {time.perf_counter() - start:.0f} s{rest}")
    return path


def machine() -> str:
    """Driver, power limit, power and clock as nvidia-smi prints them."""
    query = "--query-gpu=driver_version,power.limit,power.draw,clocks.sm"
    try:
        run = subprocess.run(["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "n/a"
    return run.stdout.strip().splitlines()[0] if run.returncode == 0 and run.stdout.strip() else "n/a"


def write(table: dict[str, Any], folder: Path) -> None:
    """Write a table to its file in an existing folder. Entries of an earlier search stay unless this table has the
    key."""
    path = folder / products.table_path(table["card"], table["cublaslt"]).name
    before = products.read_table(path, table["card"], table["cublaslt"])
    merged = {**table, "plans": dict(sorted({**before, **table["plans"]}.items()))}
    write_atomic(path, json.dumps(merged, indent=1) + "\n")
