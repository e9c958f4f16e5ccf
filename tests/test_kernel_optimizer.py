"""Global norm and AdamW, against formulas in fp64; splitting and rounding, against definitions in integers."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_harness import DEVICE, F64, close, draw, each_backend, each_dtype, f64, poison, run, skip_unless_served
from oracle import AdamW
from torch import Tensor

import daybreak.kernels.cuda.optimizer as cuda_file
import daybreak.kernels.optimizer as optimizer_file
from daybreak.kernels import Kernels, acc_dtype, all_ops, temps_bytes
from daybreak.kernels.optimizer import (
    GOLDEN,
    M_STREAM,
    V_STREAM,
    WORD,
    join_masters,
    mix,
    moment_key,
    round_weights,
    split_masters,
    stream_key,
)

BF16, F32, I16, I32 = torch.bfloat16, torch.float32, torch.int16, torch.int32
OPTIONS = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "seed": 7, "offset": 0}
# compute dtype, where the exact parameters lie, dtype of the gradients
CASES = {
    "fp32": (F32, "weights", F32),
    "fp32-none": (F32, "none", F32),
    "fp32-apart": (F32, "masters", F32),
    "fp64": (F64, "weights", F64),
    "bf16-masters": (BF16, "masters", BF16),
    "bf16-masters-fp32grads": (BF16, "masters", F32),
    "bf16-split": (BF16, "split", BF16),
    "bf16-split-fp32grads": (BF16, "split", F32),
    "bf16-none": (BF16, "none", BF16),
    "bf16-none-fp32grads": (BF16, "none", F32),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
far_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
FAR = 2**31 + 1152


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch, request):
    """Many chunks and programs, so that their seams are tested."""
    if "far" not in request.node.name:
        monkeypatch.setattr(optimizer_file, "FLAT_CHUNK", 100)
        for name, value in (("ADAMW_BLOCK", 256), ("NORM_BLOCK", 128), ("NORM_PROGRAMS", 4)):
            monkeypatch.setattr(cuda_file, name, value)


@each_backend
@each_dtype
@pytest.mark.parametrize("n", [1, 63, 1000, 1023])
def test_global_norm(backend, dtype, n):
    skip_unless_served("global_norm", backend, dtype)
    grads, norm = draw(n, dtype=dtype), poison(dtype=F64)
    run("global_norm", norm, grads, backend=backend)
    assert norm.item() == pytest.approx(f64(grads).norm().item(), rel=1e-14 if dtype == F64 else 1e-6)
    for bad in (math.inf, -math.inf, math.nan):
        grads[n // 2] = bad
        run("global_norm", norm, grads, backend=backend)
        assert not math.isfinite(norm.item())


class State:
    """The tensors of one adamw_update, from exact values; and its call."""

    def __init__(self, case: tuple, values: Tensor, moments: torch.dtype | None = None) -> None:
        self.dtype, self.layout, self.grads_dtype = case
        acc = acc_dtype(self.dtype)
        self.m, self.v = (torch.zeros_like(values, dtype=moments or acc) for _ in range(2))
        self.weights, self.masters = values.to(self.dtype, copy=True), None
        if self.layout == "weights":
            self.masters = self.weights
        elif self.layout == "masters":
            self.weights, self.masters = poison(*values.shape, dtype=self.dtype), values.to(acc, copy=True)
        elif self.layout == "split":
            self.masters = torch.zeros_like(values, dtype=I16)
            split_masters(self.weights, self.masters, values.float())

    def exact(self) -> Tensor:
        if self.layout == "split":
            return join_masters(torch.empty_like(self.weights, dtype=F32), self.weights, self.masters)
        return self.weights if self.masters is None else self.masters

    def tensors(self) -> list[Tensor]:
        return [x for x in (self.weights, self.masters, self.m, self.v) if x is not None]

    def update(self, grads: Tensor, backend: str, *, lr: float, t: int, scale: float = 1.0, skip=0, **options) -> None:
        options = OPTIONS | options
        bias = [1 - options[beta] ** t for beta in ("beta1", "beta2")]
        stats = torch.tensor([math.nan, math.nan, scale, skip, math.nan, math.nan], dtype=F64, device=DEVICE)
        hyper = torch.tensor([lr, t, math.nan, *bias], dtype=F64, device=DEVICE)
        arguments = (self.weights, self.masters, self.m, self.v, grads, stats, hyper)
        run("adamw_update", *arguments, backend=backend, **options)


@each_backend
@each_case
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_update(backend, case, weight_decay):
    skip_unless_served("adamw_update", backend, case[0])
    state = State(case, draw(1023, dtype=BF16 if case[1] == "none" else acc_dtype(case[0])))
    oracle = AdamW({"p": f64(state.exact()).view(-1, 1)}, weight_decay=weight_decay, clip=2.0)  # 2-D, so it decays
    for step in range(5):
        grads = draw(1023, dtype=state.grads_dtype, seed=step)
        lr, scale = 1e-2 / (step + 1), 2.0 / f64(grads).norm().item()
        state.update(grads, backend, lr=lr, t=step + 1, scale=scale, weight_decay=weight_decay)
        oracle.step({"p": f64(grads).view(-1, 1)}, lr, step)
        want = oracle.params["p"].flatten()
        if state.dtype == BF16 and state.layout == "none":  # rounded at random: less than one bf16 step away
            assert ((f64(state.weights) - want).abs() <= 2.0**-7 * want.abs()).all()
            oracle.params["p"].copy_(f64(state.weights).view(-1, 1))
        else:
            close(state.exact(), want)
        close(state.m, oracle.m["p"].flatten())
        close(state.v, oracle.v["p"].flatten())
        if state.layout in ("masters", "split"):
            assert torch.equal(state.weights, rounded_away(state.exact()) if state.dtype == BF16 else state.exact())
    before = [x.clone() for x in state.tensors()]
    state.update(torch.full_like(grads, math.nan), backend, lr=lr, t=6, skip=1)
    assert all(torch.equal(x, y) for x, y in zip(state.tensors(), before, strict=True))


@each_backend
def test_adamw_small_gradients(backend):
    """v and its root far below 1, subnormal for the smallest: nothing is flushed to zero."""
    values, sizes = torch.zeros(300, dtype=F32, device=DEVICE), torch.logspace(-21, 3, 300, dtype=F64)
    state = State(CASES["fp32"], values)
    grads = sizes.to(DEVICE, F32)
    state.update(grads, backend, lr=1.0, t=1, eps=1e-30, beta2=0.5)
    v = 0.5 * f64(grads) ** 2
    assert ((f64(state.v) - v).abs() <= 1e-6 * v + 2.0**-149).all()
    large = grads > 1e-17  # whose v is normal
    assert torch.allclose(f64(state.masters)[large], torch.full_like(v, -1.0)[large], rtol=1e-6)
    assert (state.masters < -0.3).all()


@each_backend
def test_split_masters_train_with_the_same_bits(backend):
    start = draw(1023, dtype=F32)
    a, b = State(CASES["bf16-masters"], start), State(CASES["bf16-split"], start)
    for step in range(6):
        grads = draw(1023, dtype=BF16, seed=step)
        for state in (a, b):
            state.update(grads, backend, lr=1e-3, t=step + 1)
        assert torch.equal(a.masters.view(I32), b.exact().view(I32))
        assert torch.equal(a.weights, b.weights)
        assert torch.equal(a.m, b.m)
        assert torch.equal(a.v, b.v)


# ------------------------------------------------------------------------------------------------ splitting, rounding


def extremes() -> Tensor:
    """fp32 of both signs: around every seam of the low half, with high halves from zero to infinity; random ones."""
    high = torch.tensor([0, 1, 0x7F, 0x80, 0x3F7F, 0x3F80, 0x3F81, 0x7F00, 0x7F7E, 0x7F7F], dtype=torch.int64)
    low = torch.tensor([0, 1, 2, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF], dtype=torch.int64)
    some = torch.randint(0, 0x7F800000, (1000,), generator=torch.Generator().manual_seed(3))
    ties = some[:300] & ~0xFFFF | 0x8000
    bits = torch.cat([(high[:, None] * 0x10000 + low).flatten(), some, ties, torch.tensor([0x7F800000])])
    return torch.cat([bits, bits - 2**31]).to(I32).to(DEVICE).view(F32)


def rounded_away(values: Tensor) -> Tensor:
    """bf16 nearest to fp32 values, ties away from zero: half of the last place added to the magnitude, the rest cut."""
    bits = values.view(I32).to(torch.int64)
    magnitude = ((bits & 0x7FFFFFFF) + 0x8000) >> 16
    return torch.where(bits < 0, magnitude - 0x8000, magnitude).to(I16).view(BF16)


def test_split_is_exact():
    values = extremes()
    weights, low = torch.empty_like(values, dtype=BF16), torch.empty_like(values, dtype=I16)
    split_masters(weights, low, values)
    assert torch.equal(weights.view(I16), rounded_away(values).view(I16))
    assert torch.equal(join_masters(torch.empty_like(values), weights, low).view(I32), values.view(I32))
    again = torch.empty_like(weights)
    round_weights(again, values)
    assert torch.equal(again.view(I16), weights.view(I16))
    largest = torch.tensor([0x7F7F7FFF, 0x7F7F8000], dtype=I32).view(F32)  # what a weight holds, what overflows it
    pair, rest = torch.empty(2, dtype=BF16), torch.empty(2, dtype=I16)
    split_masters(pair, rest, largest)
    assert pair.tolist() == [torch.finfo(BF16).max, math.inf]


def test_split_of_shapes_and_nan():
    values = draw(30, 20, dtype=F32).t()
    weights, low = torch.empty(20, 30, dtype=BF16, device=DEVICE), torch.empty(20, 30, dtype=I16, device=DEVICE)
    split_masters(weights, low, values)
    assert torch.equal(join_masters(torch.empty(20, 30, device=DEVICE), weights, low), values)
    nans = torch.tensor([0x7FFFFFFF, 0x7F800001, 0x7FC00000, -1, 0x7F8F8000 - 2**31], dtype=I32).view(F32)
    weights, low = torch.empty(5, dtype=BF16), torch.empty(5, dtype=I16)
    split_masters(weights, low, nans)
    assert weights.isnan().all()
    assert join_masters(torch.empty(5), weights, low).isnan().all()
    round_weights(weights.zero_(), nans)
    assert weights.isnan().all()
    exact = draw(9, dtype=F64)
    round_weights(other := poison(9, dtype=F32), exact)
    assert torch.equal(other, exact.float())


@each_backend
@pytest.mark.parametrize("case", ["bf16-masters", "bf16-split"])
def test_update_rounds_and_splits_every_value(backend, case):
    """A learning rate of 0 leaves the parameters, so the update must split and round them as before."""
    values = extremes()
    values = values[values.isfinite()]  # 0 * inf would be a NaN: infinite masters cannot come from finite updates
    state = State(CASES[case], values)
    state.update(torch.zeros_like(values, dtype=BF16), backend, lr=0.0, t=1, eps=1.0)
    assert torch.equal(state.exact(), values)
    assert torch.equal(state.weights, rounded_away(values))


@each_backend
@pytest.mark.parametrize("case", ["bf16-masters", "bf16-split", "bf16-none"])
def test_nan_stays_nan(backend, case):
    state = State(CASES[case], torch.ones(40, dtype=F32, device=DEVICE))
    grads = torch.ones(40, dtype=BF16, device=DEVICE)
    grads[::2] = math.nan
    state.update(grads, backend, lr=0.1, t=1)
    for x in (state.weights, state.exact()):
        assert x[::2].isnan().all()
        assert x[1::2].isfinite().all()


# ----------------------------------------------------------------------------------------------------- random rounding


def between(n: int, backend: str, *, step: float = 2.0**-12, t: int = 1, **options) -> Tensor:
    """Weights 1 (bf16's next is 1 + 2^-7) after an update that is exact in fp32 and adds `step` to each."""
    state = State(CASES["bf16-none"], torch.ones(n, dtype=F32, device=DEVICE))
    plain = {"beta1": 0.0, "beta2": 0.0, "eps": 1.0, "weight_decay": 0.0}  # 1 / (1 + 1) is half the learning rate
    grads = torch.full((n,), -1.0, dtype=BF16, device=DEVICE)
    state.update(grads, backend, lr=2 * step, t=t, **plain, **options)
    return state.weights


def random_bits(index: int, key: int, t: int) -> int:
    """The 16 bits that round element `index` of all parameters in update t."""
    a = mix(key ^ t & WORD)
    return mix((mix(index & WORD ^ a) + mix((a + GOLDEN) & WORD) + GOLDEN * (index >> 32)) & WORD) >> 16


@each_backend
@pytest.mark.parametrize("offset", [0, 1, 2**32 - 500, 2**40 + 128])
@pytest.mark.parametrize(("seed", "t"), [(0, 1), (42, 2), (2**63 + 12345, 70000), (-1, 3)])
def test_random_bits_are_the_hash(backend, offset, seed, t):
    """Which weights went up tells the random bits from a threshold: equal to the hash in plain integers."""
    key = stream_key(seed)
    bits = torch.tensor([random_bits(offset + i, key, t) for i in range(1023)], device=DEVICE)
    for low in (0x0800, 0x8000, 0xC000):  # the value's low 16 bits
        up = between(1023, backend, step=low * 2.0**-23, t=t, seed=seed, offset=offset) > 1
        assert torch.equal(up, bits + low >= 0x10000)


def test_random_bits_do_not_depend_on_the_cut(monkeypatch):
    whole = between(1000, "torch", offset=5)
    parts = [between(400, "torch", offset=5), between(600, "torch", offset=405)]
    assert torch.equal(whole, torch.cat(parts))
    monkeypatch.setattr(optimizer_file, "FLAT_CHUNK", 1 << 20)
    assert torch.equal(whole, between(1000, "torch", offset=5))
    for other in ({"offset": 6}, {"offset": 5, "seed": 8}, {"offset": 5, "t": 2}):
        assert not torch.equal(whole, between(1000, "torch", **other))


def test_random_rounding_is_unbiased(monkeypatch):
    """The share that goes up is the probability within 5 standard deviations; neighbours and steps are independent."""
    monkeypatch.setattr(optimizer_file, "FLAT_CHUNK", 1 << 20)
    N, p = 1 << 20, 0x5000 / 0x10000
    up = [f64(between(N, "torch", step=0x5000 * 2.0**-23, t=t) > 1) - p for t in (1, 2)]
    sigma = math.sqrt(p * (1 - p) / N)
    assert all(abs(x.mean().item()) < 5 * sigma for x in up)
    pairs = [up[0] * up[1], *(up[0][:-k] * up[0][k:] for k in (1, 2, 64, 1024, 65536))]
    assert all(abs(x.mean().item()) < 5 * p * (1 - p) / math.sqrt(x.numel()) for x in pairs)
    shares = torch.stack([up[0][k :: 1 << 10].mean() for k in range(1 << 10)])  # 1024 samples of 1024 elements
    assert shares.abs().max().item() < 5 * sigma * 32


@each_backend
def test_random_rounding_leaves_exact_values(backend):
    values = torch.cat([extremes().to(BF16).float(), torch.zeros(8, device=DEVICE)])
    values = values[values.isfinite()]
    state = State(CASES["bf16-none"], values)
    state.update(torch.zeros_like(values, dtype=BF16), backend, lr=0.0, t=1, eps=1.0)
    assert torch.equal(state.weights, values.to(BF16))


@each_backend
def test_random_rounding_of_both_signs(backend):
    """From weight 0 the update itself is rounded: to a neighbour, in either direction of either sign."""
    grads = draw(1023, dtype=BF16)
    state = State(CASES["bf16-none"], torch.zeros(1023, dtype=F32, device=DEVICE))
    state.update(grads, backend, lr=0.01, t=1, weight_decay=0.0, eps=0.5)
    exact = -0.01 * f64(grads) / (f64(grads).abs() + 0.5)
    error = f64(state.weights).sub(exact) / exact.abs()
    assert error.abs().max() <= 2.0**-7
    for sign in (grads > 0, grads < 0):
        assert 0.25 < (error[sign] > 0).double().mean() < 0.75
    infinite = State(CASES["bf16-none"], torch.full((8,), math.inf, device=DEVICE))
    infinite.update(grads[:8], backend, lr=0.01, t=1, weight_decay=0.0)
    assert not infinite.weights.isfinite().any()


# ------------------------------------------------------------------------------------------------- narrow moments


def up_or_down(values: Tensor, bits: list[int]) -> Tensor:
    """bf16 from fp32: 16 random bits are added to the bits of each value, and the lower half is cut."""
    return ((values.view(I32).to(torch.int64) + torch.tensor(bits, device=DEVICE)) >> 16).to(I16).view(BF16)


@each_backend
@pytest.mark.parametrize("case", ["fp32", "bf16-masters", "bf16-split-fp32grads", "bf16-none"])
def test_narrow_moments_are_the_wide_ones_rounded_by_the_hash(backend, case):
    """Parameters move as with fp32 moments of the same values, bit for bit."""
    start, seed, offset = draw(700, dtype=F32).to(BF16).float(), 2**40 + 3, 2**32 - 300
    narrow, wide = State(CASES[case], start, BF16), State(CASES[case], start)
    for step in range(3):
        wide.m, wide.v = narrow.m.float(), narrow.v.float()
        grads = draw(700, dtype=narrow.grads_dtype, seed=step)
        for state in (narrow, wide):
            state.update(grads, backend, lr=1e-2, t=step + 1, seed=seed, offset=offset)
        assert torch.equal(narrow.exact(), wide.exact())
        assert torch.equal(narrow.weights, wide.weights)
        for got, want, stream in ((narrow.m, wide.m, M_STREAM), (narrow.v, wide.v, V_STREAM)):
            key = moment_key(stream_key(seed), stream)
            assert torch.equal(got, up_or_down(want, [random_bits(offset + i, key, step + 1) for i in range(700)]))
            assert not torch.equal(got.float(), want)
    before = [x.clone() for x in narrow.tensors()]
    narrow.update(torch.full_like(grads, math.nan), backend, lr=1e-2, t=4, skip=1)
    assert all(torch.equal(x, y) for x, y in zip(narrow.tensors(), before, strict=True))
    narrow.update(torch.full_like(grads, math.nan), backend, lr=1e-2, t=4)
    assert narrow.m.isnan().all()
    assert narrow.v.isnan().all()


def test_narrow_moments_are_unbiased_and_independent(monkeypatch):
    """Weight, m and v of 2^18 elements with one gradient: their means are the fp32 values, within 5 deviations."""
    monkeypatch.setattr(optimizer_file, "FLAT_CHUNK", 1 << 20)
    N, grads = 1 << 18, torch.full((1 << 18,), -0.7001953125, dtype=BF16, device=DEVICE)
    start = torch.ones(N, device=DEVICE)
    narrow, wide = State(CASES["bf16-none"], start, BF16), State(CASES["bf16-masters"], start)
    for state in (narrow, wide):
        state.update(grads, "torch", lr=3e-3, t=1, eps=1.0)
    errors = []
    for got, want in ((narrow.weights, wide.masters), (narrow.m, wide.m), (narrow.v, wide.v)):
        low, high = f64(got).min(), f64(got).max()
        assert low < want[0].double() < high
        p = ((want[0].double() - low) / (high - low)).item()
        ups = (f64(got) == high).double() - p
        assert abs(ups.mean().item()) < 5 * math.sqrt(p * (1 - p) / N)
        errors.append(ups / math.sqrt(p * (1 - p)))
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert abs((errors[a] * errors[b]).mean().item()) < 5 / math.sqrt(N)


def test_a_long_run_s_narrow_v_stays_near_the_wide_one():
    """2,000 steps of beta2 = 0.999 from 0: rounding to nearest stalls where a step adds less than half a place."""
    grads, to_nearest = torch.ones(512, dtype=BF16, device=DEVICE), torch.zeros((), dtype=BF16)
    start = torch.ones(512, device=DEVICE)
    narrow, wide = State(CASES["bf16-none"], start, BF16), State(CASES["bf16-none"], start)
    for t in range(1, 2001):
        to_nearest.copy_(0.999 * to_nearest.float() + 0.001)
        for state in (narrow, wide):
            state.update(grads, "torch", lr=0.0, t=t, beta2=0.999)
    want = 1 - 0.999**2000
    assert wide.v.mean().item() == pytest.approx(want, rel=1e-4)
    assert f64(narrow.v).mean().item() == pytest.approx(want, rel=5e-3)
    assert f64(narrow.v).std().item() < 0.05 * want
    assert to_nearest.item() < 0.5 * want


# ------------------------------------------------------------------------------------------- beyond 2^31, on a GPU only


def launch(name: str, *args, **options) -> None:
    """`run` without its copies of the inputs."""
    impl = all_ops("cuda")[name].impls["triton"]
    size = temps_bytes(impl.temps(*args, **options)) if impl.temps else 0
    getattr(Kernels(torch.empty(size, dtype=torch.uint8, device=DEVICE), {name: "triton"}), name)(*args, **options)


@pytest.mark.gpu
@far_gpu
def test_global_norm_far():
    grads, norm = torch.zeros(FAR, dtype=BF16, device=DEVICE), poison(dtype=F64)
    for place, value in ((0, 3.0), (2**31 - 1, 4.0), (2**31, 12.0), (FAR - 1, 84.0)):
        grads[place] = value
    launch("global_norm", norm, grads)
    assert norm.item() == 85.0


@pytest.mark.gpu
@far_gpu
@pytest.mark.parametrize("layout", ["split", "none"])
def test_adamw_update_far(layout):
    """The last rows of a long buffer equal an update of those rows alone."""
    grads = torch.zeros(FAR, dtype=BF16, device=DEVICE)
    weights, m, v = (torch.ones_like(grads, dtype=dtype) for dtype in (BF16, F32, F32))
    low = torch.zeros_like(grads, dtype=I16) if layout == "split" else None
    places = [slice(0, 1024), slice(2**31 - 512, 2**31 + 512), slice(FAR - 1024, FAR)]
    for i, place in enumerate(places):
        grads[place] = draw(1024, dtype=BF16, seed=i)
    hyper = torch.tensor([1e-3, 1, 1, 0.1, 0.05], dtype=F64, device=DEVICE)
    stats = torch.tensor([0, 0, 1, 0, 0, 0], dtype=F64, device=DEVICE)
    launch("adamw_update", weights, low, m, v, grads, stats, hyper, **OPTIONS)
    for place in places:
        alone = State((BF16, layout, BF16), torch.ones(1024, device=DEVICE))
        alone.m.fill_(1)
        alone.v.fill_(1)
        state = (alone.weights, alone.masters, alone.m, alone.v)
        launch("adamw_update", *state, grads[place], stats, hyper, **OPTIONS | {"offset": place.start})
        assert not torch.equal(alone.m, torch.ones_like(alone.m))
        assert torch.equal(weights[place], alone.weights)
        assert torch.equal(m[place], alone.m)
        assert torch.equal(v[place], alone.v)
        if low is not None:
            assert torch.equal(low[place], alone.masters)
