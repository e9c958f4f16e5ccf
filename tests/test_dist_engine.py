"""ZeRO stages on 1 to 4 real ranks (gloo): equal to one process, equal across ranks, and sending what they should."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import dist_engine
import pytest
import ranks
import torch

from daybreak.engine import Engine, EngineSpec, plan_engine
from daybreak.engine.collectives import Sharding
from daybreak.engine.moments import final_moments
from daybreak.engine.params import ALIGN, ParamTable
from daybreak.models.registry import build_model
from daybreak.parallel import Group
from daybreak.shapes import GPT2Config, parse_shape
from daybreak.state.restore import snapshot

ROWS = {1: 6, 2: 3, 3: 2, 4: 1}  # per micro-step: 2, 2, 2 and 3 micro-steps of the same 12 samples
STEPS = {1: 50, 2: 50, 3: 15, 4: 15}  # in fp64 and fp32: two ranks show how errors grow, more of them the sharding
STAGES = (0, 1, 2)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int, str], list[dict[str, Any]]]:
    """(ranks, stage, run) -> what each rank ended with. Runs: STEPS in fp64 and fp32, 4 in bf16."""
    out, found = tmp_path_factory.mktemp("out"), {}
    runs = {"fp64": ("fp64", 0, "auto"), "fp32": ("fp32", 0, "auto")}
    runs |= {"split": ("bf16", 4, "split"), "masters": ("bf16", 4, "fp32"), "none": ("bf16", 4, "none")}
    for world, B in ROWS.items():
        jobs = [f"{z},{compute},{steps or STEPS[world]},{B},{m}" for compute, steps, m in runs.values() for z in STAGES
                if world > 1 or z == 0 or compute == "fp32"]  # fmt: skip
        jobs = [job for job in jobs if "bf16" not in job or world < 3]
        codes = ranks.finish(ranks.start(world, [out, *jobs], out, run=dist_engine.run))
        assert codes == [0] * world, ranks.said(out, 0)
        for run, (compute, _, masters) in runs.items():
            for z in STAGES:
                files = [out / f"{world}-{z}-{compute}-{masters}-{rank}.pt" for rank in range(world)]
                if files[0].exists():
                    found[world, z, run] = [torch.load(file) for file in files]
    return found


def apart(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("zero", STAGES)
@pytest.mark.parametrize("world", [2, 3, 4])
def test_equal_to_one_process(results: Any, world: int, zero: int) -> None:
    exact, one, steps = results[world, zero, "fp64"][0], results[1, 0, "fp64"][0], STEPS[world]
    assert len(exact["losses"]) == steps
    assert apart(exact["losses"], one["losses"][:steps]) < 1e-9
    assert apart(exact["norms"], one["norms"][:steps]) < 1e-9
    assert one["losses"][-1] < one["losses"][0] - 0.01  # it moved
    single, one = results[world, zero, "fp32"][0], results[1, 0, "fp32"][0]
    for name, norm in one["first"].items():
        assert single["first"][name] == pytest.approx(norm, rel=1e-6), name
        ((_, exact),), found = one["grads"][name], torch.full((one["grads"][name][0][1].numel(),), torch.nan)
        for each in results[world, zero, "fp32"]:
            for at, part in each["grads"][name]:
                found[at : at + part.numel()] = part
        assert torch.linalg.vector_norm(found - exact) < 1e-6 * torch.linalg.vector_norm(exact), name
    assert len(single["losses"]) == steps
    assert apart(single["losses"][:3], one["losses"][:3]) < 1e-6
    assert apart(single["losses"], one["losses"][:steps]) < 1e-4


def test_one_rank_has_no_stages(results: Any) -> None:
    plain = results[1, 0, "fp32"][0]
    for zero in (1, 2):
        assert (found := results[1, zero, "fp32"][0])["losses"] == plain["losses"]
        assert all(torch.equal(w, found["weights"][name]) for name, w in plain["weights"].items())
        assert found["nbytes"] == plain["nbytes"]


def test_weights_are_the_same_bits_on_every_rank(results: Any) -> None:
    for (world, zero, run), each in results.items():
        for rank, result in enumerate(each[1:], 1):
            assert result["losses"] == each[0]["losses"]
            for name, weight in each[0]["weights"].items():
                assert torch.equal(weight, result["weights"][name]), (world, zero, run, rank, name)


def test_masters_split_or_whole_train_with_the_same_bits_and_random_rounding_with_any_sharding(results: Any) -> None:
    for zero in STAGES:
        split, whole = results[2, zero, "split"][0], results[2, zero, "masters"][0]
        assert split["losses"] == whole["losses"]
        assert all(torch.equal(w, whole["weights"][name]) for name, w in split["weights"].items())
    a, b = results[2, 0, "none"][0], results[2, 1, "none"][0]  # the same sums, another owner: the same random bits
    assert all(torch.equal(w, b["weights"][name]) for name, w in a["weights"].items())


def test_run_to_run_bits(results: Any, tmp_path: Path) -> None:
    jobs = [f"{zero},fp32,50,3,auto" for zero in STAGES]
    assert ranks.finish(ranks.start(2, [tmp_path, *jobs], tmp_path, run=dist_engine.run)) == [0, 0]
    for zero in STAGES:
        again, before = torch.load(tmp_path / f"2-{zero}-fp32-auto-0.pt"), results[2, zero, "fp32"][0]
        assert again["losses"] == before["losses"]
        assert all(torch.equal(w, before["weights"][name]) for name, w in again["weights"].items())


def test_an_outlier_that_one_rank_sees_is_skipped_by_all(tmp_path: Path) -> None:
    """A loss far off, then a NaN, of three ranks on one: weights and moments stay, the window does not take it in."""
    assert ranks.finish(ranks.start(3, [tmp_path], tmp_path, run=dist_engine.outliers)) == [0, 0, 0]
    for zero in STAGES:
        each = [torch.load(tmp_path / f"{zero}-{rank}.pt") for rank in range(3)]
        for step, before, after in ((1, 0, 1), (2, 0, 2), (3, 2, 3)):
            for rank, found in enumerate(each):
                stats, kept = found[after]
                assert str(stats) == str(each[0][after][0])  # NaN too
                same = {name: torch.equal(value, found[before][1][name]) for name, value in kept.items()}
                assert stats["skip"] == (step != 3), (zero, rank)
                assert set(same.values()) == {step != 3}, (zero, rank, step, same)
        assert each[0][1][0]["loss_z"] > 4.0
        for rank in (1, 2):
            assert torch.equal(each[0][3][1]["weights"], each[rank][3][1]["weights"])


@pytest.mark.parametrize("zero", STAGES)
@pytest.mark.parametrize(("world", "steps"), [(2, 2), (3, 2), (4, 3)])
def test_volume_is_the_formula(results: Any, world: int, steps: int, zero: int) -> None:
    """The second step: its weights' gathering belongs to the first update, as the third's will to this one."""
    result = results[world, zero, "fp32"][0]
    P, trips = result["numel"] * 4, {0: 2, 1: 2, 2: steps + 1}[zero]
    assert sum(sent for _, _, sent in result["record"]) == pytest.approx(trips * P * (world - 1) / world, rel=1e-12)
    assert result["volume"] == pytest.approx(trips * P * (world - 1) / world, rel=1e-12)
    assert result["numel"] - results[1, 0, "fp32"][0]["numel"] < world * ALIGN  # all the padding there is


def test_order_of_calls(results: Any) -> None:
    """Buckets start in the order in which backward ends, block 0 behind the embedding; forward's order comes back."""
    result = results[2, 1, "fp32"][0]
    moments = [result["buckets"][k][2] for what, k, _ in result["record"] if what == "reduce_scatter"]
    assert moments == sorted(moments)
    assert moments[0] == 0
    assert set(moments) == {0, 1, 2}  # block 1, the embedding, block 0
    gathered = [k for what, k, _ in result["record"] if what == "all_gather"]
    reduced = [k for what, k, _ in result["record"] if what == "reduce_scatter"]
    assert gathered == reduced[::-1]
    assert [what for what, _, _ in result["record"]][: len(gathered)] == ["all_gather"] * len(gathered)
    calls = result["calls"]
    starts = [i for i, name in enumerate(calls) if name == "reduce_scatter"]
    embedding = calls.index("embedding_backward")
    assert len(starts) == len(reduced)
    assert starts[0] < embedding  # under backward, not after it
    after = calls[embedding + 1 :]
    hidden = after[after.index("reduce_scatter") : after.index("wait")]
    assert hidden.count("matmul_backward_weight") == 2  # what the embedding's exchange hides behind
    assert calls.index("wait") > starts[-1]


@pytest.mark.parametrize("world", [1, 2, 3, 7, 8, 64, 513])
@pytest.mark.parametrize("bucket", [1, 5000, 1 << 23])
@pytest.mark.parametrize("shape", ["tiny", "d12"])
def test_every_element_has_one_owner(world: int, bucket: int, shape: str) -> None:
    cfg = GPT2Config(L=3, C=24, NH=2, max_T=12, V=61) if shape == "tiny" else parse_shape(shape)
    model = build_model(cfg)
    table = ParamTable(model.rows())
    ranges, state, moments = [], set(), final_moments(model, table)
    for rank in range(world):
        plan = Sharding(table, moments, Group(rank, world), 1, bucket)
        shards = [r for r in plan.shards() if r[0] < r[1]]
        ranges += [(a, b) for a, b, _ in shards]
        state.add(plan.shard)
        assert sum(p.stop - p.start for p in plan.launches()) == sum(b - a for a, b, _ in shards)
        assert all(b - a <= plan.shard for a, b, _ in shards) or world == 1
    assert len(state) == 1  # equal shards
    ranges.sort()
    assert ranges[0][0] == 0
    assert ranges[-1][1] == table.numel
    assert all(a[1] == b[0] for a, b in pairwise(ranges))
    for bucket_ in plan.buckets:  # no bucket is sent before the last of its rows is final
        for name, at in table.offsets.items():
            if at < bucket_.stop and bucket_.start < at + table.rows[name].numel:
                assert moments[name] <= bucket_.moment


@pytest.mark.parametrize("recompute", range(4))
def test_moments_by_hand(recompute: int) -> None:
    """Blocks from the last to the second, the embedding, block 0 with all vectors, whatever is computed again."""
    model = build_model(GPT2Config(L=3, C=24, NH=2, max_T=12, V=61), recompute)
    moments = final_moments(model, ParamTable(model.rows()))
    matrices = {"h.2.": 0, "h.1.": 1, "wte": 2, "wpe": 2, "h.0.": 3}
    want = {name: next((m for p, m in matrices.items() if name.startswith(p)), 3) for name in moments}
    want |= {name: 3 for name in moments if name.endswith("b") or "ln" in name}
    assert moments == want


@pytest.mark.parametrize("zero", STAGES)
def test_the_space_for_a_save_is_that_of_all_ranks(zero: int) -> None:
    """Rank 0 looks at the disk before all four write. Their slices of m and v add up to what one process writes."""
    shape, snaps = GPT2Config(L=2, C=24, NH=2, max_T=12, V=61), []
    for group in [Group(), *(Group(rank, 4) for rank in range(4))]:
        engine = Engine(EngineSpec(shape, B=1, T=8, zero=zero, bucket_bytes=16384), group=group)
        snaps.append(snapshot(engine, 1, {}))
    shared = sum(t.nbytes for kept in (snaps[0].model, snaps[0].extra) for t in kept.values())
    assert snaps[0].nbytes() == shared + sum(snap.nbytes() - shared for snap in snaps[1:])


def test_stage_2_needs_less_memory_than_1_than_0() -> None:
    """d12 on 8 ranks in bf16, to the byte of the plan; at stage 2 whole gradients are nowhere."""
    sizes, buffers = [], {}
    for zero in STAGES:
        arena = plan_engine(EngineSpec(parse_shape("d12"), B=1, T=64, compute="bf16", zero=zero), Group(0, 8))[2]
        sizes.append(arena.nbytes)
        buffers[zero] = arena.sizes()
    P = 124_475_904
    assert buffers[0]["m"] == pytest.approx(4 * P, rel=1e-3)
    assert buffers[1]["m"] == buffers[2]["m"] == pytest.approx(4 * P / 8, rel=1e-3)
    assert buffers[1]["grads"] == pytest.approx(2 * P + 2 * P / 8, rel=1e-3)
    assert buffers[2]["grads"] == pytest.approx(4 * P / 8, rel=1e-3)
    assert sizes[0] > sizes[1] > sizes[2]
