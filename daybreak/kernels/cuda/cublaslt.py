"""Matmuls through cuBLASLt, with epilogues that save time: bias, an addend, GELU, GELU's derivative.

The library is the one that torch has loaded, called through ctypes. It stores matrices column by column, so it sees a
row-major tensor (r, s) as a matrix (s, r), and it computes every matmul transposed: D (m, n) = op(A) op(B) + C. Here m
are the columns of the row-major output and n its rows. In this file m, n, k, A, B, C, D are the library's letters. For
x with N rows and I columns, and w with O rows and I columns:

    operation          row-major                   op(A), op(B)   A   B     m  n  k
    forward            out (N, O) = x w^T          t n            w   x     O  N  I
    backward input     dx (N, I) = dout w          n n            w   dout  I  N  O
    backward weight    dw (O, I) = dout^T x        n t            x   dout  I  O  N

Every operation below calls `gemm`, which finds a prepared matmul or prepares one:

    tensors --> Key --> matmuls[key] --> launch
                           | first call with this key: `Blas.prepare`
                           +--> PreparedMatmul with the table's algorithm, or of a Key with the nearest number of rows
                           +--> PreparedMatmul with the library's first offer
                           +--> None: the caller uses torch or, with GELU, two passes if the table says so

A `Key` (products.py) holds all that the choice of an algorithm may depend on: dtype, op(A) and op(B), m, n, k, the
epilogue, whether C is added, row strides, and the alignment of all addresses, but not the addresses. A `PreparedMatmul`
holds the library's descriptors and the algorithm, and is kept for the life of the process. tune.py measures a table for
one GPU and one version of the library. Timing never decides at run time, since another algorithm may give other bits.
Where the library has no algorithm, as for odd row strides in bf16, torch computes the matmul. `choices` lists the
choice of every key. Only algorithms that add up in fp32 are used: a split over k that reduces in bf16 would round
partial sums.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from daybreak.kernels import Scratch, Temps, backend, matmul, temps_bytes
from daybreak.kernels.cuda import bias, missing_backends
from daybreak.kernels.cuda import gelu as gelu_kernels
from daybreak.kernels.cuda.products import Key, nearest, read_table, table_path

WORKSPACE = 32 << 20  # bytes, as the library recommends on Hopper; algorithms that need more are not used
_TEMPS = [((WORKSPACE,), torch.uint8)]

# Numbers of the library's enumerations, the same in CUDA 11.4 to 13. Types: cudaDataType_t, cublasComputeType_t.
R_32F, R_16BF, E4M3, E5M2 = 0, 14, 28, 29
COMPUTE_32F, COMPUTE_32F_FAST_TF32 = 68, 77
TRANSA, TRANSB, EPILOGUE, BIAS_POINTER, AUX_POINTER, AUX_LD, AUX_TYPE, BIAS_TYPE = 3, 4, 7, 8, 11, 12, 22, 26
A_SCALE, B_SCALE, FAST = 17, 18, 25  # addresses of what A and B are multiplied by; fast accumulation
EPILOGUES = {"plain": 1, "bias": 4, "gelu": 32 | 128 | 4, "dgelu": 64 | 128}  # default, bias, GELU_AUX_BIAS, DGELU
PREF_WORKSPACE, PREF_REDUCTION, PREF_ALIGN_A = 1, 3, 5  # alignments of A, B, C, D are 5, 6, 7, 8
REDUCE_IN_COMPUTE_TYPE = 2
CAP_OUT_OF_PLACE, CAP_TILES = 4, 6
CONFIG = {  # number and type of an algorithm's settings
    "algo": (0, ctypes.c_int32),
    "tile": (1, ctypes.c_uint32),
    "stages": (6, ctypes.c_uint32),
    "splitk": (2, ctypes.c_int32),
    "reduction": (3, ctypes.c_uint32),
    "swizzle": (4, ctypes.c_uint32),
    "custom": (5, ctypes.c_uint32),
    "inner": (7, ctypes.c_uint16),
    "cluster": (8, ctypes.c_uint16),
}
STATUS = {
    0: "SUCCESS", 1: "NOT_INITIALIZED", 3: "ALLOC_FAILED", 7: "INVALID_VALUE", 8: "ARCH_MISMATCH", 11: "MAPPING_ERROR",
    13: "EXECUTION_FAILED", 14: "INTERNAL_ERROR", 15: "NOT_SUPPORTED", 16: "LICENSE_ERROR",
}  # fmt: skip
REFUSED = (7, 15)  # the library's answers to a matmul that it cannot do
DTYPES = {  # of A, of B, of the rest, of the sums
    "bf16": (R_16BF, R_16BF, R_16BF, COMPUTE_32F), "fp32": (R_32F, R_32F, R_32F, COMPUTE_32F),
    "tf32": (R_32F, R_32F, R_32F, COMPUTE_32F_FAST_TF32),
    "e4m3": (E4M3, E4M3, R_16BF, COMPUTE_32F), "e4m3slow": (E4M3, E4M3, R_16BF, COMPUTE_32F),
    "e5m2": (E4M3, E5M2, R_16BF, COMPUTE_32F), "e5m2slow": (E4M3, E5M2, R_16BF, COMPUTE_32F),
}  # fmt: skip


class Algo(ctypes.Structure):
    """cublasLtMatmulAlgo_t: opaque, valid for one version of the library."""

    _fields_ = [("data", ctypes.c_uint64 * 8)]


class Heuristic(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = [
        ("algo", Algo),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    ]


_VOID, _INT, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
_SET, _GET = [_VOID, _INT, _VOID, _SIZE], [_VOID, _INT, _VOID, _SIZE, _VOID]
SIGNATURES: dict[str, list[Any]] = {  # all return a status
    "cublasLtCreate": [_VOID],
    "cublasLtMatmulDescCreate": [_VOID, _INT, _INT],
    "cublasLtMatmulDescSetAttribute": _SET,
    "cublasLtMatmulDescDestroy": [_VOID],
    "cublasLtMatrixLayoutCreate": [_VOID, _INT, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int64],
    "cublasLtMatrixLayoutDestroy": [_VOID],
    "cublasLtMatmulPreferenceCreate": [_VOID],
    "cublasLtMatmulPreferenceSetAttribute": _SET,
    "cublasLtMatmulPreferenceDestroy": [_VOID],
    "cublasLtMatmulAlgoGetHeuristic": [_VOID] * 7 + [_INT, _VOID, _VOID],
    "cublasLtMatmulAlgoCheck": [_VOID] * 8,
    "cublasLtMatmulAlgoCapGetAttribute": _GET,
    "cublasLtMatmulAlgoConfigGetAttribute": _GET,
    "cublasLtMatmulAlgoConfigSetAttribute": _SET,
    "cublasLtMatmul": [_VOID] * 14 + [_SIZE, _VOID],
}


# ------------------------------------------------------------------------------------------------ the library


def library_paths() -> list[str]:
    """Where cuBLASLt may be, best first: loaded by this process, beside torch, in the system."""
    loaded: list[str] = []
    maps = Path("/proc/self/maps")
    if maps.exists():
        loaded = [line.split(maxsplit=5)[5] for line in maps.read_text().splitlines() if "/libcublasLt.so" in line]
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    found = [str(p) for folder in folders for p in sorted(folder.glob("*/lib/libcublasLt.so.*"), reverse=True)]
    found += [str(p) for p in sorted((Path(torch.__file__).parent / "lib").glob("libcublasLt.so.*"), reverse=True)]
    system = ctypes.util.find_library("cublasLt")
    return list(dict.fromkeys([*loaded, *found, *([system] if system else [])]))


@cache
def library() -> Any | None:
    """The library with its signatures declared; None if there is no library."""
    for path in library_paths():
        try:
            lib = ctypes.CDLL(path)
            for name, arguments in SIGNATURES.items():
                getattr(lib, name).argtypes = arguments
                getattr(lib, name).restype = _INT
        except (OSError, AttributeError):  # no such file, or another library of that name
            continue
        lib.cublasLtGetVersion.argtypes, lib.cublasLtGetVersion.restype = [], _SIZE
        return lib
    return None


def check(status: int, what: str) -> None:
    """Raise if the library refused."""
    if status:
        raise RuntimeError(f"cuBLASLt: {what} answered {STATUS.get(status, status)}")


_ONE, _ZERO = ctypes.c_float(1.0), ctypes.c_float(0.0)
ONE, ZERO = ctypes.addressof(_ONE), ctypes.addressof(_ZERO)


class Blas:
    """The library on one device: its handle, the GPU's table, the matmuls prepared so far (None: torch computes it)."""

    def __init__(self, lib: Any, device: int) -> None:
        self.lib, self.device = lib, device
        self.version = int(lib.cublasLtGetVersion())
        self.gpu = torch.cuda.get_device_name(device)
        self.table = read_table(table_path(self.gpu, self.version), self.gpu, self.version)
        self.matmuls: dict[Key, PreparedMatmul | None] = {}
        self.used: dict[str, str] = {}
        handle = _VOID()
        with torch.cuda.device(device):
            check(lib.cublasLtCreate(ctypes.byref(handle)), "cublasLtCreate")
        self.handle = handle.value

    def prepare(self, key: Key) -> PreparedMatmul | None:
        """Prepare a matmul: with the table's algorithm if it fits, else with the first that the library offers."""
        name = str(key)
        found, entry = nearest(self.table, key)
        if entry.get("separate"):
            self.used[name] = f"{found}: a matmul, then gelu"
            return None
        prepared, source = PreparedMatmul(self, key), "first heuristic"
        if "algo" in entry:
            algo = Algo.from_buffer_copy(bytes.fromhex(entry["algo"]))
            if prepared.checked(algo):
                prepared.algo, source = algo, found
            else:
                source = "the table's was refused, first heuristic"
        if prepared.algo is None:
            offered = prepared.offered(8)
            if not offered:
                self.used[name] = "torch: cuBLASLt has no algorithm"
                prepared.destroy()
                return None
            prepared.algo = offered[0].algo
        self.used[name] = f"{source}: {prepared.config(prepared.algo)}"
        return prepared


class PreparedMatmul:
    """Descriptors of one matmul and its algorithm. Two threads must not use it at once: `launch` writes addresses into
    the descriptor before the call."""

    def __init__(self, blas: Blas, key: Key) -> None:
        self.blas, self.key = blas, key
        self.algo: Algo | None = None
        self.lib, (of_a, of_b, dtype, compute) = blas.lib, DTYPES[key.dtype]
        self.alpha, self.beta = ONE, ZERO if key.mode == "beta0" else ONE
        self.pointer = ctypes.c_uint64()
        self.pointer_at = ctypes.addressof(self.pointer)
        made = _VOID()
        check(self.lib.cublasLtMatmulDescCreate(ctypes.byref(made), compute, R_32F), "cublasLtMatmulDescCreate")
        self.desc = made.value
        for side, letter in zip((TRANSA, TRANSB), key.trans, strict=True):
            self._set(side, ctypes.c_int32("nt".index(letter)))
        self._set(EPILOGUE, ctypes.c_uint32(EPILOGUES[key.epilogue]))
        # The heuristic reads only the alignment of a pointer.
        pointer = ctypes.c_uint64((1 << 28) + key.align)
        if key.epilogue in ("bias", "gelu"):
            self._set(BIAS_TYPE, ctypes.c_int32(dtype))
            self._set(BIAS_POINTER, pointer)
        if key.epilogue in ("gelu", "dgelu"):
            self._set(AUX_TYPE, ctypes.c_int32(dtype))
            self._set(AUX_LD, ctypes.c_int64(key.ldaux))
            self._set(AUX_POINTER, pointer)
        if of_a == E4M3:
            self._set(FAST, ctypes.c_int8(not key.dtype.endswith("slow")))
        self.a = self._layout(of_a, *((key.k, key.m) if key.trans[0] == "t" else (key.m, key.k)), key.lda)
        self.b = self._layout(of_b, *((key.k, key.n) if key.trans[1] == "n" else (key.n, key.k)), key.ldb)
        self.d = self._layout(dtype, key.m, key.n, key.ldd)
        self.c = self._layout(dtype, key.m, key.n, key.ldc) if key.mode == "add" else self.d

    def _set(self, attribute: int, value: Any) -> None:
        size = ctypes.sizeof(value)
        status = self.lib.cublasLtMatmulDescSetAttribute(self.desc, attribute, ctypes.addressof(value), size)
        check(status, f"cublasLtMatmulDescSetAttribute {attribute}")

    def _layout(self, dtype: int, rows: int, columns: int, ld: int) -> Any:
        made = _VOID()
        check(self.lib.cublasLtMatrixLayoutCreate(ctypes.byref(made), dtype, rows, columns, ld), "a matrix layout")
        return made.value

    def destroy(self) -> None:
        """Free the descriptors; the object cannot be used afterwards."""
        self.lib.cublasLtMatmulDescDestroy(self.desc)
        for layout in {self.a, self.b, self.c, self.d}:
            self.lib.cublasLtMatrixLayoutDestroy(layout)

    def offered(self, count: int) -> list[Heuristic]:
        """Offers of the library's heuristic, best guess first: deterministic, fp32 sums, at most WORKSPACE bytes."""
        key, preference, returned = self.key, _VOID(), ctypes.c_int()
        odd = key.align < 16 or any(ld % 8 for ld in (key.lda, key.ldb, key.ldc, key.ldd, key.ldaux))
        fp8_odd = key.dtype[0] == "e" and (odd or key.lda % 16 or key.ldb % 16)
        if fp8_odd or (odd and (key.ldaux or (key.epilogue == "bias" and key.dtype == "bf16"))):
            return []  # documented: no aux here; and the bias would be added after a rounding
        check(self.lib.cublasLtMatmulPreferenceCreate(ctypes.byref(preference)), "a preference")
        wishes: list[tuple[int, Any]] = [(PREF_ALIGN_A + i, ctypes.c_uint32(key.align)) for i in range(4)]
        wishes.append((PREF_WORKSPACE, ctypes.c_uint64(WORKSPACE)))
        wishes.append((PREF_REDUCTION, ctypes.c_uint32(REDUCE_IN_COMPUTE_TYPE)))
        for attribute, value in wishes:
            at, size = ctypes.addressof(value), ctypes.sizeof(value)
            check(self.lib.cublasLtMatmulPreferenceSetAttribute(preference, attribute, at, size), "a preference")
        results = (Heuristic * count)()
        status = self.lib.cublasLtMatmulAlgoGetHeuristic(
            self.blas.handle, self.desc, self.a, self.b, self.c, self.d, preference, count,
            ctypes.addressof(results), ctypes.addressof(returned),
        )  # fmt: skip
        self.lib.cublasLtMatmulPreferenceDestroy(preference)
        if status in REFUSED:
            return []
        check(status, "cublasLtMatmulAlgoGetHeuristic")
        found = results[: returned.value]
        return [r for r in found if r.state == 0 and r.workspace <= WORKSPACE and self._fits(r.algo)]

    def _fits(self, algo: Algo) -> bool:
        """The heuristic does not know whether C is another matrix than D, so ask the algorithm."""
        if self.key.mode != "add":
            return True
        value, written = ctypes.c_int32(1), ctypes.c_size_t()
        at = (ctypes.addressof(value), 4, ctypes.addressof(written))
        self.lib.cublasLtMatmulAlgoCapGetAttribute(ctypes.addressof(algo), CAP_OUT_OF_PLACE, *at)
        return value.value != 0

    def checked(self, algo: Algo) -> Heuristic | None:
        """The library's answer if the algorithm can do this matmul in the workspace with fp32 sums, else None."""
        result = Heuristic()
        status = self.lib.cublasLtMatmulAlgoCheck(
            self.blas.handle, self.desc, self.a, self.b, self.c, self.d, ctypes.addressof(algo),
            ctypes.addressof(result),
        )  # fmt: skip
        if status or result.state or result.workspace > WORKSPACE or not self._fits(algo):
            return None
        return result if self.setting(algo, "reduction") & ~REDUCE_IN_COMPUTE_TYPE == 0 else None

    def setting(self, algo: Algo, name: str) -> int:
        """One setting of an algorithm; 0 if it has no such setting."""
        number, kind = CONFIG[name]
        value, written = kind(), ctypes.c_size_t()
        at = (ctypes.addressof(value), ctypes.sizeof(value), ctypes.addressof(written))
        self.lib.cublasLtMatmulAlgoConfigGetAttribute(ctypes.addressof(algo), number, *at)
        return int(value.value)

    def config(self, algo: Algo) -> str:
        """An algorithm's settings in words."""
        return " ".join(f"{name}{self.setting(algo, name)}" for name in CONFIG)

    def launch(
        self, algo: Algo, a: int, b: int, c: int, d: int, bias: int, aux: int, work: int, stream: int,
        a_scale: int = 0, b_scale: int = 0,
    ) -> int:  # fmt: skip
        """Queue the matmul on the stream; every argument but the first is an address. Returns the status."""
        for attribute, address in ((BIAS_POINTER, bias), (AUX_POINTER, aux), (A_SCALE, a_scale), (B_SCALE, b_scale)):
            if address:
                self.pointer.value = address
                self.lib.cublasLtMatmulDescSetAttribute(self.desc, attribute, self.pointer_at, 8)
        return int(self.lib.cublasLtMatmul(
            self.blas.handle, self.desc, self.alpha, a, self.a, b, self.b, self.beta, c, self.c, d, self.d,
            ctypes.addressof(algo), work, WORKSPACE, stream,
        ))  # fmt: skip


# ------------------------------------------------------------------------------------------------ tables, choices


def choices() -> dict[str, str]:
    """The choices so far: key of a matmul -> its algorithm and its source, or the reason that torch computes it."""
    return {key: used for blas in _devices.values() if blas for key, used in sorted(blas.used.items())}


def listed(run: Callable[[], None]) -> list[Key]:
    """The keys of all matmuls that `run` makes on meta tensors, sorted. Nothing is computed."""
    _listed.clear()
    run()
    return sorted(_listed)


_devices: dict[int, Blas | None] = {}
_listed: set[Key] = set()


def blas_of(device: int) -> Blas | None:
    """The library on a device; None if there is no library."""
    if device not in _devices:
        lib = library()
        _devices[device] = Blas(lib, device) if lib else None
    return _devices[device]


def usable(capability: tuple[int, int]) -> str | None:
    """Why there is no cuBLASLt for a GPU of this compute capability, or None."""
    return None if library() else "libcublasLt is not where torch has its libraries"


# ------------------------------------------------------------------------------------------------ the operations


def gemm(
    trans: str, epilogue: str, d: Tensor, a: Tensor, b: Tensor, scratch: Scratch,
    bias: Tensor | None = None, aux: Tensor | None = None, c: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None, slow: bool = False,
) -> bool:  # fmt: skip
    """D = epilogue(op(A) op(B) + C), where c is None, d itself or another tensor. The steps are at the top of the file.

    trans: n or t for A and for B. scales: of A and B in fp8, which are multiplied by them. slow: fp8 adds up in fp32.
    False: the library cannot do it and nothing was queued; the caller uses torch.
    """
    n, m = d.shape
    mode = "beta0" if c is None else "beta1" if c is d else "add"
    k = a.shape[1] if trans[0] == "t" else a.shape[0]
    name = "bf16" if d.dtype == torch.bfloat16 else "tf32" if torch.backends.cuda.matmul.allow_tf32 else "fp32"
    if scales:
        name = f"{'e5m2' if b.dtype == torch.float8_e5m2 else 'e4m3'}{'slow' if slow else ''}"
    pa, pb, pd = a.data_ptr(), b.data_ptr(), d.data_ptr()
    pc = pd if c is None else c.data_ptr()
    pbias = 0 if bias is None else bias.data_ptr()
    paux = 0 if aux is None else aux.data_ptr()
    low = (pa | pb | pc | pd | pbias | paux) & 15
    # A tensor with a single row can have any stride, so it is at least the row's length. The lowest bit that is set in
    # any address is the alignment of all.
    key = Key(
        dtype=name, trans=trans, m=m, n=n, k=k, epilogue=epilogue, mode=mode,
        lda=max(a.stride(0), a.shape[1]), ldb=max(b.stride(0), b.shape[1]),
        ldc=max(c.stride(0), m) if mode == "add" and c is not None else max(d.stride(0), m), ldd=max(d.stride(0), m),
        ldaux=0 if aux is None else max(aux.stride(0), m), align=low & -low or 16,
    )  # fmt: skip
    if d.is_meta:  # for `listed`
        _listed.add(key)
        return True
    device = d.get_device()
    blas = _devices[device] if device in _devices else blas_of(device)
    if blas is None:
        return False
    if key not in blas.matmuls:
        blas.matmuls[key] = blas.prepare(key)
    prepared = blas.matmuls[key]
    if prepared is None or prepared.algo is None:
        return False
    (workspace,) = scratch(_TEMPS)
    stream = torch.cuda.current_stream(device).cuda_stream
    status = prepared.launch(prepared.algo, pa, pb, pc, pd, pbias, paux, workspace.data_ptr(), stream,
                             *(s.data_ptr() for s in scales or ()))  # fmt: skip
    if status in REFUSED:  # it offered the algorithm but refuses the call, before anything is queued
        blas.matmuls[key], blas.used[str(prepared.key)] = None, f"torch: cuBLASLt answered {STATUS[status]}"
        return False
    check(status, f"cublasLtMatmul {prepared.key}")
    return True


def workspace(*_: object, **__: object) -> Temps:
    """The workspace that the library may use."""
    return _TEMPS


def gelu_pass(out: Tensor, x: Tensor) -> None:
    """out = gelu(x) in a separate pass."""
    if "triton" not in missing_backends() and out.is_contiguous() and x.is_contiguous():
        gelu_kernels.gelu_forward(out, x)
    else:
        torch.ops.aten.gelu.out(x, approximate="tanh", out=out)


def slope_pass(grad: Tensor, pre: Tensor) -> None:
    """grad *= gelu'(pre) in a separate pass."""
    if "triton" not in missing_backends() and grad.is_contiguous() and pre.is_contiguous():
        gelu_kernels.multiply_by_slope(grad, pre)
    else:
        torch.ops.aten.gelu_backward.grad_input(grad, pre, approximate="tanh", grad_input=grad)


@backend("cublaslt", temps=workspace)
def matmul_forward(
    out: Tensor, x: Tensor, w: Tensor, b: Tensor | None = None, add: Tensor | None = None, *, scratch: Scratch
) -> None:
    """out (n, O) = x (n, I) @ w (O, I)^T + b (O) + add (n, O), rounded once."""
    if not gemm("tn", "plain" if b is None else "bias", out, w, x, scratch, bias=b, c=add):
        matmul.matmul_forward(out, x, w, b, add)


@backend("cublaslt", temps=workspace)
def matmul_gelu_forward(out: Tensor, pre: Tensor, x: Tensor, w: Tensor, b: Tensor, *, scratch: Scratch) -> None:
    """pre (n, O) = x (n, I) @ w (O, I)^T + b (O); out (n, O) = gelu(pre), in its tanh form.

    The table chooses between an epilogue, which uses pre before its rounding, and a separate pass, which uses it after.
    """
    if gemm("tn", "gelu", out, w, x, scratch, bias=b, aux=pre):
        return
    if not gemm("tn", "bias", pre, w, x, scratch, bias=b):
        torch.addmm(b, x, w.t(), out=pre)
    gelu_pass(out, pre)


@backend("cublaslt", temps=workspace)
def matmul_backward_input(dx: Tensor, dout: Tensor, w: Tensor, *, scratch: Scratch) -> None:
    """dx (n, I) = dout (n, O) @ w (O, I)."""
    if not gemm("nn", "plain", dx, w, dout, scratch):
        torch.mm(dout, w, out=dx)


def gelu_backward_temps(dpre: Tensor, gelu: Tensor | None, db: Tensor | None, *_: object, **__: object) -> Temps:
    """The library's workspace and, later in the same bytes, the partial sums of the bias gradient."""
    return max(_TEMPS, _bias(dpre).bias_temps(db, dpre), key=temps_bytes)


def _bias(dout: Tensor) -> Any:
    """The module that computes this bias gradient."""
    return bias if "triton" not in missing_backends() and dout.is_contiguous() else matmul


@backend("cublaslt", temps=gelu_backward_temps)
def matmul_gelu_backward(
    dpre: Tensor, gelu: Tensor | None, db: Tensor | None, dout: Tensor, w: Tensor, pre: Tensor,
    *, accumulate: bool, scratch: Scratch,
) -> None:  # fmt: skip
    """dpre (n, I) = (dout (n, O) @ w (O, I)) * gelu'(pre (n, I)), multiplied before rounding.

    Separate passes compute the bias gradient and, if it is given, gelu (n, I).
    """
    if not gemm("nn", "dgelu", dpre, w, dout, scratch, aux=pre):
        if not gemm("nn", "plain", dpre, w, dout, scratch):
            torch.mm(dout, w, out=dpre)
        slope_pass(dpre, pre)
    if dpre.is_meta:  # for `listed`
        return
    if gelu is not None:
        gelu_pass(gelu, pre)
    if db is not None:
        _bias(dpre).bias_backward(db, dpre, accumulate=accumulate, scratch=scratch)


@backend("cublaslt", temps=workspace)
def matmul_backward_weight(dw: Tensor, dout: Tensor, x: Tensor, *, accumulate: bool, scratch: Scratch) -> None:
    """dw (O, I) = dout (n, O)^T @ x (n, I), added to dw if `accumulate`, rounded once."""
    if not gemm("nt", "plain", dw, x, dout, scratch, c=dw if accumulate else None):
        matmul.matmul_backward_weight(dw, dout, x, accumulate=accumulate)
