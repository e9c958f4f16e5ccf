"""Matrix products, their gradients and bias gradients, against formulas in fp64."""

from __future__ import annotations

import inspect
import json
import math
from contextlib import suppress

import pytest
import torch
from kernel_harness import DEVICE, F64, close, draw, each_dtype, either, f64, output, poison, run, skip_unless_served
from torch import Tensor

from daybreak.kernels import matmul
from daybreak.kernels.cuda import cublaslt, decode, products, quack, tune

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
each_backend = pytest.mark.parametrize(
    "backend", ["torch", pytest.param("cublaslt", marks=gpu), pytest.param("quack", marks=gpu)]
)
# odd sizes, which no fast algorithm takes; sizes that every algorithm takes, none a power of two
SHAPES = [(1, 63, 1), (5, 1000, 63), (7, 63, 1023), (72, 200, 136)]
# enough tiles of every side for quack to serve all three products (H100, H200); rows that end within a tile
LARGE = [pytest.param(4000, 3192, 4008, marks=gpu)]


def skip_unless_meant(n: int, dtype: torch.dtype) -> None:
    """LARGE is for quack, which is for bf16: in fp32 so many terms err by more than `close` allows."""
    if n == 4000 and dtype != torch.bfloat16:
        pytest.skip("large products are compared in bf16")


ROOT = math.sqrt(2 / math.pi)


@pytest.fixture(autouse=True)
def full_precision():
    """fp32 products without TF32, whatever ran before."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(ROOT * (x + 0.044715 * x**3)))


def gelu_slope(x: Tensor) -> Tensor:
    t = torch.tanh(ROOT * (x + 0.044715 * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t**2) * ROOT * (1 + 3 * 0.044715 * x**2)


def within(got: Tensor, want: Tensor, limit: Tensor) -> None:
    """|got - want| <= limit everywhere, beside what `close` allows for the sum and the last rounding."""
    arithmetic, half_ulp = (1e-5, 2.0**-8) if got.dtype == torch.bfloat16 else (2e-6, 0.0)
    allowed = limit + half_ulp * want.abs() + arithmetic * want.abs().amax()
    excess = ((f64(got) - want).abs() / allowed).amax().item()
    assert excess <= 1, f"{excess:.2f} times the tolerance"


def hardware_tanh(backend: str) -> float:
    """Relative error of tanh. A library's epilogue may use the instruction tanh.approx.f32 (2^-10.987, PTX ISA)."""
    return 2.0**-10.98 if backend in ("cublaslt", "quack") else 0.0


@each_dtype
@each_backend
@pytest.mark.parametrize(("n", "I", "O"), [*SHAPES, *LARGE])
def test_matmul(dtype, backend, n, I, O):
    skip_unless_served("matmul_forward", backend, dtype)
    skip_unless_meant(n, dtype)
    x, w, dout = draw(n, I, dtype=dtype), draw(O, I, dtype=dtype), draw(n, O, dtype=dtype)
    b, add = draw(O, dtype=dtype), draw(n, O, dtype=dtype, seed=3)
    X, W, D, A = f64(x), f64(w), f64(dout), f64(add)
    out, dx = poison(n, O, dtype=dtype), poison(n, I, dtype=dtype)
    for bias, addend in [(None, None), (b, None), (b, add), (None, add)]:
        product = X @ W.T if bias is None else X @ W.T + f64(b)
        out.fill_(math.nan)
        run("matmul_forward", out, x, w, bias, addend, backend=backend)
        # torch rounds the product before it adds; cuBLASLt adds first, which is within the same bound
        close(out, product if addend is None else product + A, also_rounded=None if addend is None else product)
    run("matmul_backward_input", dx, dout, w, backend=backend)
    close(dx, D @ W)


@each_dtype
@each_backend
@either
@pytest.mark.parametrize(("n", "I", "O"), [(1, 63, 1), (63, 1000, 5), (1023, 63, 7), (200, 136, 72), *LARGE])
def test_weight_gradient(dtype, backend, accumulate, n, I, O):
    skip_unless_served("matmul_backward_weight", backend, dtype)
    skip_unless_meant(n, dtype)
    x, dout = draw(n, I, dtype=dtype), draw(n, O, dtype=dtype)
    dw, dw0 = output(O, I, dtype=dtype, accumulate=accumulate)
    run("matmul_backward_weight", dw, dout, x, accumulate=accumulate, backend=backend)
    product = f64(dout).T @ f64(x)
    close(dw, dw0 + product, also_rounded=product if accumulate else None)  # Hopper's kernels round it before they add


@each_dtype
@either
@pytest.mark.parametrize(("n", "O"), [(1, 1), (63, 5), (1023, 7)])
def test_bias_gradient(dtype, accumulate, n, O):
    dout = draw(n, O, dtype=dtype)
    db, db0 = output(O, dtype=dtype, accumulate=accumulate)
    total = f64(dout).sum(0)
    run("bias_backward", db, dout, accumulate=accumulate)
    close(db, db0 + total, also_rounded=total if accumulate else None)


@each_dtype
@each_backend
@pytest.mark.parametrize(("n", "I", "O"), [*SHAPES, *LARGE])
def test_product_then_gelu(dtype, backend, n, I, O):
    skip_unless_served("matmul_gelu_forward", backend, dtype)
    skip_unless_meant(n, dtype)
    x, w, b = draw(n, I, dtype=dtype), draw(O, I, dtype=dtype, scale=I**-0.5), draw(O, dtype=dtype)
    want = f64(x) @ f64(w).T + f64(b)
    out, pre = poison(n, O, dtype=dtype), poison(n, O, dtype=dtype)
    run("matmul_gelu_forward", out, pre, x, w, b, backend=backend)
    close(pre, want)
    # gelu of the sum or of its rounding: the rounding of pre, carried to out by the slope (and once more by its change)
    moved = (f64(pre) - want).abs()
    within(out, gelu(want), moved * (gelu_slope(want).abs() + moved) + hardware_tanh(backend) * want.abs() / 2)


@each_dtype
@each_backend
@either
@pytest.mark.parametrize(("n", "I", "O"), [*SHAPES, *LARGE])
def test_gradient_through_gelu(dtype, backend, accumulate, n, I, O):
    skip_unless_served("matmul_gelu_backward", backend, dtype)
    skip_unless_meant(n, dtype)
    dout, w, pre = draw(n, O, dtype=dtype), draw(O, I, dtype=dtype, scale=O**-0.5), draw(n, I, dtype=dtype)
    dpre, product, slope = poison(n, I, dtype=dtype), f64(dout) @ f64(w), gelu_slope(f64(pre))
    db, db0 = output(I, dtype=dtype, accumulate=accumulate)
    again = poison(n, I, dtype=dtype) if accumulate else None
    run("matmul_gelu_backward", dpre, again, db, dout, w, pre, accumulate=accumulate, backend=backend)
    # torch rounds the product before it multiplies; an error of tanh moves the slope by at most that much
    rounded = 2.0**-8 * slope.abs() * (1 + 2.0**-8) if dtype == torch.bfloat16 else torch.zeros_like(slope)
    p = f64(pre).abs()
    tanh = hardware_tanh(backend) * (0.5 + p * ROOT * (1 + 3 * 0.044715 * p**2))
    within(dpre, product * slope, product.abs() * (rounded + tanh))
    total = f64(dpre).sum(0)  # of what was stored; quack, which serves large ones, sums before the rounding
    if backend == "quack" and n == 4000:
        total = (product * slope).sum(0)
        assert torch.linalg.vector_norm(f64(db) - db0 - total) < 2.0**-8 * torch.linalg.vector_norm(db0 + total)
    else:
        close(db, db0 + total, also_rounded=total if accumulate else None)
    if again is not None:
        within(again, gelu(f64(pre)), hardware_tanh(backend) * p / 2)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_operands_may_be_columns_of_a_wider_matrix(dtype, backend):
    """Only the rows are contiguous; what lies between them is not touched."""
    n, I, O = 72, 200, 136

    def part(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
        whole = draw(rows, columns + 64, dtype=dtype, seed=seed)
        return whole, whole[:, 16 : 16 + columns]

    (_, x), (_, w), (_, dout), (_, add) = part(n, I, 1), part(O, I, 2), part(n, O, 3), part(n, O, 4)
    for name, shape, args, want in [
        ("matmul_forward", (n, O), (x, w, None, add), f64(x) @ f64(w).T + f64(add)),
        ("matmul_backward_input", (n, I), (dout, w), f64(dout) @ f64(w)),
    ]:
        whole, out = part(*shape, 5)
        before = whole.clone()
        out.fill_(math.nan)
        run(name, out, *args, backend=backend)
        close(out, want, also_rounded=want.abs() + f64(add).abs() if name == "matmul_forward" else None)
        for outside in (slice(0, 16), slice(16 + shape[1], None)):
            assert torch.equal(whole[:, outside], before[:, outside])
    whole, dw = part(O, I, 6)
    product, before = f64(dout).T @ f64(x), f64(dw)
    run("matmul_backward_weight", dw, dout, x, accumulate=True, backend=backend)
    close(dw, before + product, also_rounded=product)


@pytest.mark.parametrize("_", [pytest.param(0, marks=gpu)])
def test_tf32_only_where_it_is_allowed(_):
    """TF32 keeps 10 bits of an operand's fraction: two operands rounded or cut, at most 2^-10 each."""
    x, w = draw(128, 512, dtype=torch.float32), draw(256, 512, dtype=torch.float32)
    want, bound = f64(x) @ f64(w).T, (f64(x).abs() @ f64(w).abs().T) * 2.0**-9 * (1 + 2.0**-10)
    full, fast = poison(128, 256, dtype=torch.float32), poison(128, 256, dtype=torch.float32)
    run("matmul_forward", full, x, w, backend="cublaslt")
    torch.set_float32_matmul_precision("high")
    run("matmul_forward", fast, x, w, backend="cublaslt")
    close(full, want)
    within(fast, want, bound)
    used = cublaslt.choices()
    assert {"fp32 tn m256 n128 k512 plain beta0", "tf32 tn m256 n128 k512 plain beta0"} <= set(used)
    assert not used["tf32 tn m256 n128 k512 plain beta0"].startswith("torch")


@pytest.mark.parametrize("backend", [pytest.param("cublaslt", marks=gpu), pytest.param("quack", marks=gpu)])
@either
def test_bits_are_the_same_under_load(backend, accumulate):
    """d48's attention projection, whose weight gradient sums over 16,384 rows, beside other work on another stream."""
    n, C, dtype = 16384, 1600, torch.bfloat16
    x, w, dout = draw(n, C, dtype=dtype), draw(C, C, dtype=dtype), draw(n, C, dtype=dtype, seed=1)
    start, noise, busy = draw(C, C, dtype=dtype, seed=2), torch.cuda.Stream(), torch.randn(4096, 4096, device=DEVICE)
    first: list[Tensor] = []
    for _repeat in range(4):
        out, dx, dw = poison(n, C, dtype=dtype), poison(n, C, dtype=dtype), start.clone()
        with torch.cuda.stream(noise):
            for _ in range(8):
                busy @ busy
        run("matmul_forward", out, x, w, backend=backend)
        run("matmul_backward_input", dx, dout, w, backend=backend)
        run("matmul_backward_weight", dw, dout, x, accumulate=accumulate, backend=backend)
        first = first or [out, dx, dw]
        assert all(torch.equal(a, b) for a, b in zip(first, (out, dx, dw), strict=True))
    if backend != "cublaslt":
        return
    # the shapes that training runs on must not go through torch
    used = [u for key, u in cublaslt.choices().items() if "m1600" in key]
    assert used
    assert not any(u.startswith("torch") for u in used)


@pytest.mark.parametrize("_", [pytest.param(0, marks=gpu)])
def test_elements_beyond_two_to_the_31(_):
    n, I, O, dtype = (1 << 31) // 50304 + 64, 64, 50304, torch.bfloat16
    x, w, b = draw(n, I, dtype=dtype), draw(O, I, dtype=dtype), draw(O, dtype=dtype)
    out = torch.empty(n, O, dtype=dtype, device=DEVICE)
    scratch = lambda temps: [torch.empty(*temps[0][0], dtype=temps[0][1], device=DEVICE)]  # noqa: E731
    cublaslt.matmul_forward(out, x, w, b, scratch=scratch)
    far = slice(n - 3, n)
    close(out[far], f64(x[far]) @ f64(w).T + f64(b))
    dx, dw = poison(n, I, dtype=dtype), poison(O, I, dtype=dtype)
    out[:-3] = 0  # so that the far rows alone decide
    cublaslt.matmul_backward_input(dx, out, w, scratch=scratch)
    close(dx[far], f64(out[far]) @ f64(w))
    cublaslt.matmul_backward_weight(dw, out, x, accumulate=False, scratch=scratch)
    close(dw, f64(out[far]).T @ f64(x[far]))


# ------------------------------------------------------------------------------------------ keys and tables


@pytest.mark.parametrize(
    "text",
    [
        "bf16 tn m4800 n16384 k1600 bias beta0",
        "bf16 nt m1600 n6400 k16384 plain beta1",
        "tf32 tn m1600 n16384 k6400 bias add",
        "bf16 tn m6400 n16384 k1600 gelu beta0",
        "fp32 nn m6400 n16384 k1600 dgelu beta0 lda6464 ldaux6408 align8",
    ],
)
def test_a_key_is_written_and_read(text):
    key = products.parse(text)
    assert str(key) == text
    assert key == tuple(key)  # the launcher looks plain tuples up
    assert (key.ldaux > 0) == ("gelu" in text)


def test_a_dense_key_has_the_usual_leading_dimensions():
    key = products.dense("bf16", "nt", 1600, 4800, 16384, mode="beta1")
    assert (key.lda, key.ldb, key.ldc, key.ldd, key.ldaux, key.align) == (1600, 4800, 1600, 1600, 0, 16)
    with pytest.raises(ValueError, match="not a matmul"):
        products.parse("bf16 tn m1 n2 k3 relu beta0")


def test_a_table_serves_one_card_and_one_version(tmp_path):
    path = tmp_path / "table.json"
    plans = {"bf16 tn m4800 n16384 k1600 bias beta0": {"algo": "00" * 64}}
    path.write_text(json.dumps({"card": "NVIDIA H100 80GB HBM3", "cublaslt": 130101, "plans": plans}))
    assert products.read_table(path, "NVIDIA H100 80GB HBM3", 130101) == plans
    assert products.read_table(path, "NVIDIA H100 PCIe", 130101) == {}
    assert products.read_table(path, "NVIDIA H100 80GB HBM3", 130100) == {}
    assert products.read_table(tmp_path / "none.json", "NVIDIA H100 80GB HBM3", 130101) == {}
    name = products.table_path("NVIDIA H100 80GB HBM3", 130101).name
    assert name == "nvidia-h100-80gb-hbm3-cublaslt-130101.json"


def test_shipped_tables_are_readable():
    """Every key can be parsed, every algorithm has the library's 64 bytes, or a separate pass is named."""
    for path in products.TABLES.glob("*.json"):
        table = json.loads(path.read_text())
        assert products.table_path(table["card"], table["cublaslt"]).name == path.name
        for text, entry in table["plans"].items():
            assert str(products.parse(text)) == text
            assert entry.get("separate") or len(bytes.fromhex(entry["algo"])) == 64
    assert len(products.tables_digest()) == 16


def test_the_librarys_structures_have_its_sizes():
    assert cublaslt.ctypes.sizeof(cublaslt.Algo) == 64
    assert cublaslt.ctypes.sizeof(cublaslt.Heuristic) == 96


def test_the_nearest_number_of_rows_serves():
    """A table made at one batch size serves others: the same weight, the nearest number of rows."""
    table = {
        text: {"algo": text}
        for text in (
            "bf16 tn m1600 n16384 k1600 bias add", "bf16 tn m1600 n65536 k1600 bias add",
            "bf16 nt m1600 n4800 k16384 plain beta1", "bf16 tn m1600 n16384 k6400 bias add",
            "e5m2slow tn m1600 n4800 k16384 plain beta1",
        )
    }  # fmt: skip

    def found(text: str) -> str:
        return products.nearest(table, products.parse(text))[1].get("algo", "")

    assert found("bf16 tn m1600 n16384 k1600 bias add") == "bf16 tn m1600 n16384 k1600 bias add"
    assert found("bf16 tn m1600 n28672 k1600 bias add") == "bf16 tn m1600 n16384 k1600 bias add"
    assert found("bf16 tn m1600 n40000 k1600 bias add") == "bf16 tn m1600 n65536 k1600 bias add"
    assert found("bf16 nt m1600 n4800 k28672 plain beta1") == "bf16 nt m1600 n4800 k16384 plain beta1"
    assert found("bf16 nt m1600 n4800 k28672 plain beta0") == ""
    assert found("bf16 tn m1600 n16384 k1600 bias beta0") == ""
    # In fp8 the rows of a weight's gradient are k, and n is the weight's: that of another weight does not serve.
    assert found("e5m2slow tn m1600 n4800 k28672 plain beta1") == "e5m2slow tn m1600 n4800 k16384 plain beta1"
    assert found("e5m2slow tn m1600 n6400 k16384 plain beta1") == ""


def towards_zero(x: Tensor) -> Tensor:
    """x (fp64) in fp32, cut: what a tensor core does with its sums."""
    near = x.float()
    return torch.where(near.double().abs() > x.abs(), torch.nextafter(near, torch.zeros_like(near)), near)


@pytest.mark.parametrize("k", [16384, 50304, 65536])
def test_the_tuner_takes_a_long_sum_of_a_tensor_core_and_no_wrong_one(k):
    """16 products at a time, each sum cut to fp32: its error grows with k, as a limit of its own kind must."""
    key = products.dense("bf16", "nt", 64, 64, k)
    x = tune.operands(key, torch.device("cpu"))
    want, limit = tune.target(key, x)
    a, b = x.a.double(), x.b.double()
    total, most = torch.zeros(64, 64), b[:16].t() @ a[:16]
    for start in range(0, k, 16):
        total = towards_zero(total.double() + b[start : start + 16].t() @ a[start : start + 16])

    def excess(result: Tensor) -> float:
        return ((result.bfloat16().float() - want).abs() / limit).amax().item()

    assert excess(total) <= 1
    assert excess((total.double() - most).float()) > 1  # a slice of 16 forgotten


@pytest.mark.parametrize(("n", "I", "O"), [(72, 200, 136), (40, 136, 520)])
def test_products_by_onednn_in_pieces(monkeypatch: pytest.MonkeyPatch, n: int, I: int, O: int) -> None:
    """The way of AMD's CPUs with AVX-512 for large fp32 matmuls, here with small ones and pieces of all sides."""
    if DEVICE != "cpu":
        pytest.skip("is for CPUs")
    monkeypatch.setattr(matmul, "onednn", lambda: torch.ops.mkldnn._linear_pointwise)
    for name, value in (("LARGE", 0), ("PIECE", 1000), ("DEPTH", 16)):
        monkeypatch.setattr(matmul, name, value)
    x, w, dout, b = (draw(*s, dtype=torch.float32) for s in ((n, I), (O, I), (n, O), (O,)))
    X, W, D = f64(x), f64(w), f64(dout)
    for bias in (None, b):
        out = poison(n, O, dtype=torch.float32)
        run("matmul_forward", out, x, w, bias, None)
        close(out, X @ W.T if bias is None else X @ W.T + f64(b))
    dx = poison(n, I, dtype=torch.float32)
    run("matmul_backward_input", dx, dout, w)
    close(dx, D @ W)
    for accumulate in (False, True):
        dw, dw0 = output(O, I, dtype=torch.float32, accumulate=accumulate)
        run("matmul_backward_weight", dw, dout, x, accumulate=accumulate)
        close(dw, dw0 + D.T @ X)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@each_dtype
@pytest.mark.parametrize(("n", "I", "O"), [(1, 7, 5), (1, 1000, 203), (2, 96, 1300), (5, 40, 24)])
@pytest.mark.parametrize(
    ("norm", "biased", "added", "act"),
    [(True, True, False, False), (True, True, False, True), (False, True, True, False), (True, False, False, False)],
    ids=["qkv", "fc", "proj", "head"],
)
def test_decode(backend, dtype, n, I, O, norm, biased, added, act):
    """The four products of a token."""
    skip_unless_served("matmul_decode", backend, dtype)
    x, w = draw(n, I, dtype=dtype, scale=3.0) + 1, draw(O, I, dtype=dtype, seed=1, scale=I**-0.5)
    b = draw(O, dtype=dtype, seed=2) if biased else None
    add = draw(n, O, dtype=dtype, seed=3) if added else None
    lnw, lnb = (draw(I, dtype=dtype, seed=s) for s in (4, 5)) if norm else (None, None)
    out = poison(n, O, dtype=dtype)
    run("matmul_decode", out, x, w, b, add, lnw, lnb, gelu=act, backend=backend)

    half_ulp = 2.0**-8 if dtype == torch.bfloat16 else 0.0
    X, W = f64(x), f64(w)
    if norm:
        X = torch.nn.functional.layer_norm(X, (I,), f64(lnw), f64(lnb), eps=1e-5)
    limit = half_ulp * (X.abs() @ W.abs().T) if norm else torch.zeros(n, O, dtype=F64, device=DEVICE)
    want = X @ W.T
    if biased:
        if backend == "torch":  # rounds before it adds
            limit = limit + half_ulp * want.abs()
        want = want + f64(b)
    if act:
        limit, want = 1.13 * (limit + half_ulp * want.abs()), gelu(want)
    if added:
        limit, want = limit + half_ulp * want.abs(), want + f64(add)
    within(out, want, limit)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@each_dtype
@pytest.mark.parametrize(("n", "I", "O"), [(1, 24, 40), (2, 200, 72), (1, 1500, 6), (2, 1300, 10)])
@pytest.mark.parametrize("gate", ["", "silu", "gelu"])
@pytest.mark.parametrize("biased", [True, False])
def test_decode_of_the_decoder_family(backend, dtype, n, I, O, gate, biased):
    """RMSNorm before the matmul and a gate after it: as the operations for it round their result. 1,300 columns are in
    two tiles, of 1,024 and 512."""
    skip_unless_served("matmul_rms_decode", backend, dtype)
    x, w, normw = (
        draw(n, I, dtype=dtype, scale=3.0),
        draw(O, I, dtype=dtype, seed=1, scale=I**-0.5),
        draw(I, dtype=dtype),
    )
    b, out = draw(O, dtype=dtype, seed=2) if biased else None, poison(n, O // 2 if gate else O, dtype=dtype)
    run("matmul_rms_decode", out, x, w, b, normw, eps=0.5, offset=1.0, gate=gate, backend=backend)

    half_ulp, X, W = 2.0**-8 if dtype == torch.bfloat16 else 0.0, f64(x), f64(w)
    Y = X / (X.square().mean(-1, keepdim=True) + 0.5).sqrt() * (1 + f64(normw))
    want, limit = Y @ W.T, half_ulp * (Y.abs() @ W.abs().T)
    if b is not None:
        limit, want = limit + half_ulp * want.abs(), want + f64(b)
    if gate:  # which also meets the error of the matmul's sums
        limit = limit + (1e-5 if dtype == torch.bfloat16 else 2e-6) * want.abs().amax()
        (left, up), (slack, more) = want.chunk(2, -1), (limit + half_ulp * want.abs()).chunk(2, -1)
        act = gelu(left) if gate == "gelu" else left * torch.sigmoid(left)
        want, limit = act * up, 1.13 * slack * (up.abs() + more) + act.abs() * more
    within(out, want, limit)


@pytest.mark.parametrize(("I", "gpt2", "tiles"), [
    (1536, False, (1024, 512)), (8960, False, (8192, 1024)), (2048, False, (2048, 0)), (1600, False, (2048, 0)),
    (1, False, (1, 0)), (1536, True, (2048, 0)), (768, True, (1024, 0)),
])  # fmt: skip
def test_a_row_is_in_one_tile_or_two(I, gpt2, tiles):
    """Two where they have fewer columns than one, but not in GPT-2's matmuls, whose bits stay."""
    rows, cols, rest, _ = decode._tile(I, 1 << 15, gpt2)
    assert (cols, rest) == tiles
    assert cols + rest >= I
    assert rows * (cols + rest) <= decode.TILE


def test_quack_is_imported_without_torch_compile():
    """And torch is as it was afterwards, whatever happened."""
    plain = torch.compile, torch.compiler.disable
    with suppress(KeyError), quack._uncompiled():
        assert torch.compile(math.sqrt) is torch.compiler.disable(math.sqrt) is math.sqrt
        assert torch.compile(dynamic=True)(math.sqrt) is math.sqrt
        assert "recompile_limit" in inspect.signature(torch.compile).parameters  # else quack asks torch._dynamo for it
        raise KeyError
    assert (torch.compile, torch.compiler.disable) == plain
