"""llm.c's files: ours equal, byte for byte, files built here by hand from the format's description."""

from __future__ import annotations

import io
import re
import shlex
import struct
from collections.abc import Callable
from contextlib import chdir, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interop_runs import MAX_T, ROOT, in_llmc_order, inside, shape_of, values_of, write_run, write_shards
from oracle import GPT2, Shape
from torch import Tensor

from daybreak.data.tokenizer import get_tokenizer
from daybreak.errors import Error
from daybreak.interop import llmc_files, open_source
from daybreak.interop.source import Export, make_run
from daybreak.state.run import Run

STEP = 7
Values = dict[str, Tensor]


# ------------------------------------------------------------------------------------------------- files by hand


def header(*fields: tuple[int, int]) -> bytes:
    words = [0] * 256
    for i, value in fields:
        words[i] = value
    return struct.pack("<256i", *words)


def fp32(x: Tensor) -> bytes:
    return x.numpy().astype("<f4").tobytes()


def bf16(x: Tensor) -> bytes:
    """Round to nearest, ties to even, on the bits."""
    u = x.numpy().astype("<f4").view("<u4").astype(np.uint64)
    return ((u + 0x7FFF + ((u >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)).astype("<u2").tobytes()


def model_bytes(shape: Shape, values: Values, version: int) -> bytes:
    s = shape
    fields = enumerate((20240326, version, s.max_T, s.V, s.L, s.NH, s.C, s.Vp))
    encode = {3: fp32, 5: bf16}[version]
    return header(*fields) + b"".join(encode(x) for _, x in in_llmc_order(shape, values))


class Twister:
    """MT19937 as its authors wrote it (Matsumoto & Nishimura 1998), one state word at a time."""

    def __init__(self, seed: int) -> None:
        self.state = [seed]
        for i in range(1, 624):
            x = self.state[-1]
            self.state.append((1812433253 * (x ^ (x >> 30)) + i) & 0xFFFFFFFF)
        self.left, self.next = 1, 0

    def draw(self) -> int:
        self.left -= 1
        if self.left == 0:
            s = self.state
            for i in range(624):
                y = (s[i] & 0x80000000) | (s[(i + 1) % 624] & 0x7FFFFFFF)
                s[i] = s[(i + 397) % 624] ^ (y >> 1) ^ (0x9908B0DF if y & 1 else 0)
            self.left, self.next = 624, 0
        y = self.state[self.next]
        self.next += 1
        y ^= y >> 11
        y ^= (y << 7) & 0x9D2C5680
        y ^= (y << 15) & 0xEFC60000
        return y ^ (y >> 18)

    def permutation(self, n: int) -> list[int]:
        order = list(range(n))
        for i in range(n - 1, 0, -1):
            j = self.draw() % (i + 1)
            order[i], order[j] = order[j], order[i]
        return order

    def to_bytes(self) -> bytes:
        return struct.pack("<QiI624I2I", 0, self.left, self.next, *self.state, 0, 0x9908B0DF)


def loader_bytes(samples: list[int], rank: int) -> bytes:
    rng = Twister(42 + rank)
    shards = rng.permutation(len(samples))
    inside = rng.permutation(samples[shards[0]])
    parts = [struct.pack(f"<Q{len(p)}i", len(p), *p) for p in (shards, inside)]
    return b"".join(parts) + rng.to_bytes()


def state_bytes(
    shape: Shape, parts: list[Values], rank: int, P: int, zero: int, samples: list[int], masters: int = 1
) -> bytes:
    """parts: m, v and, with `masters`, the fp32 weights."""
    seed = 13371337 + rank
    head = bytearray(
        header((0, 20240527), (1, 1), (2, P), (3, rank), (4, masters), (5, int(bool(samples))), (10, STEP))
    )
    head[80:96] = struct.pack("<QQ", seed, seed)
    body = b""
    for values in parts[: 2 + masters]:
        for _, x in in_llmc_order(shape, values):
            flat = x.reshape(-1)
            body += fp32(flat[rank * (flat.numel() // P) : (rank + 1) * (flat.numel() // P)] if zero else flat)
    return bytes(head) + body + (loader_bytes(samples, rank) if samples else b"")


def all_parts(shape: Shape, seed: int = 5) -> list[Values]:
    """m, v, weights of `write_run`."""
    v = {name: x.abs() for name, x in values_of(shape, seed + 2).items()}
    return [values_of(shape, seed + 1), v, values_of(shape, seed)]


def write_checkpoint(
    folder: Path, *, P: int = 1, zero: int = 0, version: int = 5, masters: int = 1, samples: tuple[int, ...] = ()
) -> Shape:
    shape = shape_of()
    parts = all_parts(shape)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"model_{STEP:08d}.bin").write_bytes(model_bytes(shape, parts[2], version))
    for rank in range(P):
        data = state_bytes(shape, parts, rank, P, zero, list(samples), masters)
        (folder / f"state_{STEP:08d}_{rank:05d}.bin").write_bytes(data)
    (folder / f"DONE_{STEP:08d}").touch()
    tok = get_tokenizer("gpt2-1024")
    words = [tok.token_bytes(i) for i in range(1025)]
    data = header((0, 20240328), (1, 2), (2, 1025), (3, 1024)) + b"".join(bytes([len(w)]) + w for w in words)
    (folder / "gpt2_tokenizer.bin").write_bytes(data)
    return shape


def test_the_generator_of_this_file_is_llmc_s() -> None:
    """Numbers that llm.c's own headers produced."""
    rng = Twister(42)
    assert [rng.draw() for _ in range(6)] == [1608637542, 3421126067, 4083286876, 787846414, 3143890026, 3348747335]
    for rank, shards, samples in [
        (0, [1, 3, 9, 7, 6, 0, 8, 4, 5, 2], [7, 3, 5, 2, 6, 4, 0, 1]),
        (1, [2, 6, 9, 4, 0, 1, 5, 7, 3, 8], [7, 0, 1, 6, 5, 4, 2, 3]),
    ]:
        rng = Twister(42 + rank)
        assert rng.permutation(10) == shards
        assert rng.permutation(8) == samples


# --------------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize(("P", "zero", "version"), [(1, 0, 5), (1, 1, 3), (2, 0, 5), (4, 1, 5)], ids=lambda x: str(x))
def test_the_writer_is_byte_exact(tmp_path: Path, P: int, zero: int, version: int) -> None:
    shards = tmp_path / "shards"
    write_shards(shards, 1025, (1200, 900, 700))
    shape = write_run(tmp_path / "run", data__name=str(shards))
    per_sample = 2 * MAX_T * P
    samples = [(n - 1) // per_sample for n in (1200, 900, 700)]
    write_checkpoint(tmp_path / "want", P=P, zero=zero, version=version, samples=tuple(samples))
    dtype = {3: "fp32", 5: "bf16"}[version]
    inside(tmp_path, "export", "run", "--to", "llmc", "out", "--dtype", dtype, "--ranks", str(P), "--zero", str(zero))
    want, got = tmp_path / "want", tmp_path / "out"
    assert sorted(p.name for p in got.iterdir()) == sorted(p.name for p in want.iterdir())
    for path in want.iterdir():
        assert (got / path.name).read_bytes() == path.read_bytes(), path.name
    assert shape.L == 3


@pytest.mark.parametrize("samples", [[1], [1, 1], [700], [300, 400], [5, 6, 7] * 300], ids=lambda s: f"{len(s)}x{s[0]}")
def test_the_loader_is_byte_exact_wherever_its_generator_stands(samples: list[int]) -> None:
    """No number drawn, few, more than one block of 624, and just as many as a block has."""
    for rank in (0, 3):
        assert llmc_files._fresh_loader(samples, 42 + rank) == loader_bytes(samples, rank)


def test_the_state_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    """In other formats, which hold no state, such a run is written."""
    write_shards(tmp_path / "data", 1024)
    keys = {"model.L": 1, "model.C": 32, "model.NH": 1, "model.V": 1025, "model.max_T": 16, "batch.B": 1, "batch.T": 16,
            "batch.total_tokens": 16, "eval.tokens": 32, "eval.sample_tokens": 0, "run.steps": 1, "optim.name": "muon",
            "data.train": "data/*train*", "data.val": "data/*val*", "data.tokenizer": "gpt2-1024",
            "run.device": "cpu"}  # fmt: skip
    inside(tmp_path, "train", "d12", "--name", "muon", *(x for key, y in keys.items() for x in (f"--{key}", str(y))))
    said = inside(tmp_path, "export", "runs/muon", "--to", "llmc", "out", code=2).stderr
    assert "llm.c trains with AdamW, and cannot hold the state of muon; use --to hf or --to gguf." in said
    assert not (tmp_path / "out").exists()
    inside(tmp_path, "export", "runs/muon", "--to", "hf", "out")


def test_without_its_data_the_loader_does_not_shuffle(tmp_path: Path) -> None:
    write_run(tmp_path / "run", data__name="gone")
    said = inside(tmp_path, "export", "run", "--to", "llmc", "out")
    assert "unshuffled: no dataset 'gone'" in said.stderr
    write_checkpoint(tmp_path / "want")
    name = f"state_{STEP:08d}_00000.bin"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "want" / name).read_bytes()
    refused = inside(tmp_path, "export", "run", "--to", "llmc", "o", "--ranks", "7", "--zero", "1", code=2)
    assert "--ranks 7 does not divide the tensor 'wte'" in refused.stderr
    assert not (tmp_path / "o").exists()
    assert "out exists already" in inside(tmp_path, "export", "run", "--to", "llmc", "out", code=2).stderr
    assert (
        "--dtype f16 is not one of llmc's"
        in inside(tmp_path, "export", "run", "--to", "llmc", "o", "--dtype", "f16", code=2).stderr
    )
    assert (
        "--ranks, --zero and --debug-state belong to --to llmc"
        in inside(tmp_path, "export", "run", "--to", "hf", "o", "--zero", "1", code=2).stderr
    )


def test_the_tokenizer_file_of_gpt2(tmp_path: Path) -> None:
    """Size and ends of the file that llm.c ships: 50,257 tokens, EOT 50256 last."""
    llmc_files.write_tokenizer(tmp_path / "t.bin", get_tokenizer("gpt2"))
    data = (tmp_path / "t.bin").read_bytes()
    assert data[:16] == struct.pack("<4i", 20240328, 2, 50257, 50256)
    assert data[1024:1028] == b'\x01!\x01"'  # the first two tokens, '!' and '"'
    assert data.endswith(b"\x0d<|endoftext|>")
    words = llmc_files.read_tokenizer(tmp_path / "t.bin")
    assert words == [get_tokenizer("gpt2").token_bytes(i) for i in range(50257)]


def test_the_debug_state_is_byte_exact(tmp_path: Path) -> None:
    """Every byte but those of computed numbers by hand; those against the autograd oracle in fp64."""
    write_shards(tmp_path / "shards", 1025)
    shape = write_run(tmp_path / "run", data__name=str(tmp_path / "shards"))
    inside(tmp_path, "export", "run", "--to", "llmc", "out", "--debug-state")
    data = (tmp_path / "out/debug_state.bin").read_bytes()
    B, T, V = 4, MAX_T, shape.V
    tokens = np.fromfile(tmp_path / "shards/x_val_000000.bin", "<u2", offset=1024).astype("<i4")
    x = np.stack([tokens[i * T : (i + 1) * T] for i in range(B)])
    y = np.stack([tokens[i * T + 1 : (i + 1) * T + 1] for i in range(B)])
    assert data[: 1024 + 8 * B * T] == header((0, 20240327), (1, 2), (2, B), (3, T)) + x.tobytes() + y.tobytes()
    rest = torch.from_numpy(np.frombuffer(data, "<f4", offset=1024 + 8 * B * T).astype(np.float64))
    oracle = GPT2(shape).load({k: v.double() for k, v in values_of(shape).items()})
    tx, ty = torch.from_numpy(x).long(), torch.from_numpy(y).long()
    loss, grads = oracle.gradients(tx, ty)
    with torch.no_grad():
        logits = oracle.logits(tx).reshape(-1)
    want = torch.cat([logits, torch.tensor([loss]), *(g.reshape(-1) for _, g in in_llmc_order(shape, grads))])
    assert rest.shape == want.shape
    at = 0
    for n in (B * T * V, 1, *(g.numel() for _, g in in_llmc_order(shape, grads))):
        part, truth = rest[at : at + n], want[at : at + n]
        assert (part - truth).norm() <= 1e-5 * truth.norm(), at
        at += n


# --------------------------------------------------------------------------------------------------------- reading


def as_read(run: Run) -> list[Values]:
    """m, v and weights of a run's newest checkpoint, each by name."""
    export = Export(run.checkpoint(), whole=True)
    parts = [{n: export.read_moment(k, n, 0, x.numel()).view(x.shape) for n, x in values_of(shape_of()).items()}
             for k in ("m", "v")]  # fmt: skip
    return [*parts, {n: export.read(n) for n in values_of(shape_of())}]


@pytest.mark.parametrize(
    ("P", "zero", "version", "masters", "samples"),
    [(1, 0, 3, 1, ()), (1, 0, 5, 0, (4, 3)), (3, 0, 5, 1, (4,)), (2, 1, 5, 1, (9, 9)), (4, 1, 3, 0, ()),
     (8, 1, 5, 1, (1,))],
    ids=str,
)  # fmt: skip
def test_a_checkpoint_becomes_a_run(
    tmp_path: Path, P: int, zero: int, version: int, masters: int, samples: tuple[int, ...]
) -> None:
    """Weights (the masters where there are any), m, v and step are exact for any rank count and ZeRO stage."""
    shape = write_checkpoint(tmp_path / "log", P=P, zero=zero, version=version, masters=masters, samples=samples)
    source = open_source(tmp_path / "log")
    config = config_for(tmp_path, "run")
    run = Run(make_run(source, config))
    want = all_parts(shape)
    if version == 5 and not masters:
        want[2] = {name: x.bfloat16().float() for name, x in want[2].items()}
    for got, expected in zip(as_read(run), want, strict=True):
        for name, x in expected.items():
            assert torch.equal(got[name], x), name
    manifest = run.checkpoint().manifest
    assert (manifest["step"], manifest["samples"]) == (STEP, STEP * 256 // MAX_T)
    assert manifest["tokenizer"]["name"] == "gpt2-1024"


def config_for(folder: Path, name: str) -> Any:
    from interop_runs import config_of

    return config_of(shape_of(), "", run__dir=str(folder), run__name=name, batch__total_tokens=256)


def test_the_newest_or_the_named_step(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "log")
    for file in list((tmp_path / "log").glob("*000007*")):
        data = bytearray(file.read_bytes())
        if file.name.startswith("state"):
            data[40:44] = struct.pack("<i", 3)
        (tmp_path / "log" / file.name.replace("000007", "000003")).write_bytes(data)
    assert open_source(tmp_path / "log").step == 7
    assert open_source(tmp_path / "log", step=3).step == 3
    with pytest.raises(Error, match="no checkpoint of step 4; there are: 7, 3"):
        open_source(tmp_path / "log", step=4)
    with pytest.raises(Error, match="--step 3 chooses among"):
        open_source(tmp_path / "log" / "model_00000007.bin", step=3)
    (tmp_path / "log/DONE_00000007").unlink()  # what is not done does not count
    assert open_source(tmp_path / "log").step == 3


def test_training_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """daybreak -> llm.c's files (four ranks, ZeRO 1) -> daybreak, mid-run: the same losses, bit for bit."""
    write_shards(tmp_path / "shards", 1025, (3000, 2000))
    keys = ["--data", "shards", "--batch.B", "2", "--batch.total_tokens", "256", "--eval.tokens", "128", "--steps", "8",
            "--eval.sample_tokens", "2", "--schedule.warmup", "2", "--run.device", "cpu", "--checkpoint.every", "4",
            "--precision.compute", "fp32"]  # fmt: skip
    shape = ["--model.L", "2", "--model.C", "32", "--model.NH", "2", "--model.max_T", "64", "--model.V", "1025"]
    inside(tmp_path, "train", "d12", "--name", "a", "--data.tokenizer", "gpt2-1024", *shape, *keys)
    inside(tmp_path, "export", "runs/a", "--to", "llmc", "log", "--step", "4", "--ranks", "4", "--zero", "1")
    said = inside(tmp_path, "import", "log", "--name", "b", *keys).stdout
    assert "the data order restarts at step x batch = 1,024 tokens" in said
    inside(tmp_path, "train", "runs/b")
    a, b = ({r["step"]: (r["loss"], r["norm"]) for r in Run(tmp_path / "runs" / n).metrics("step")} for n in ("a", "b"))
    assert sorted(b) == [5, 6, 7, 8]
    assert {step: a[step] for step in b} == b
    assert (tmp_path / "runs/b/main.log").read_text().splitlines()[-1] == (
        (tmp_path / "runs/a/main.log").read_text().splitlines()[-1]
    )


def test_the_round_trip_of_the_documentation(tmp_path: Path) -> None:
    """llm.c -> daybreak -> Hugging Face -> daybreak: docs/interop.md as it stands, then against the oracle in fp64."""
    pytest.importorskip("transformers")
    shape = write_checkpoint(tmp_path / "log", P=2, zero=1)
    text = (ROOT / "docs/interop.md").read_text()
    assert set(re.findall(r"^```(\S.*)$", text, re.M)) == {"bash ci", "python ci"}
    (bash,), (code,) = (re.findall(rf"^```{kind} ci\n(.*?)^```$", text, re.M | re.S) for kind in ("bash", "python"))
    for line in bash.splitlines():
        words = shlex.split(line, comments=True)
        assert words[0] == "daybreak"
        inside(tmp_path, *words[1:])
    said = io.StringIO()
    with chdir(tmp_path), redirect_stdout(said):
        exec(code, {})
    assert "daybreak twice: True" in said.getvalue()
    tokens = torch.randint(shape.V, (1, MAX_T), generator=torch.Generator().manual_seed(2))
    got = Run(tmp_path / "runs/b").load_engine(device="cpu")[0].logits(tokens).float()
    truth = GPT2(shape).load({k: v.double() for k, v in values_of(shape).items()}).logits(tokens).detach()
    assert (got - truth).norm() <= 2e-6 * truth.norm()


# -------------------------------------------------------------------------------------------------------- refusals

MODEL_FILE, STATE_FILE, TOKENIZER_FILE = "model_00000007.bin", "state_00000007_00001.bin", "gpt2_tokenizer.bin"


def word(name: str, index: int, value: int) -> Callable[[Path], None]:
    """Change one int32 of a header."""

    def change(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[4 * index : 4 * index + 4] = struct.pack("<i", value)
        (folder / name).write_bytes(data)

    return change


def cut(name: str, n: int) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).write_bytes(((folder / name).read_bytes() + bytes(9))[: -9 - n or None])][0]


BAD: list[tuple[Callable[[Path], Any], str]] = [
    (word(MODEL_FILE, 0, 20240520), f"{MODEL_FILE} is not a model file of llm.c: magic number 20240520 instead of"),
    (word(MODEL_FILE, 1, 1), f"{MODEL_FILE} has version 1 of a model file; only 3 and 5 can be read"),
    (word(MODEL_FILE, 1, 3), "an fp32 model of its shape has 1810816; copy it again"),
    (word(MODEL_FILE, 5, 5), "daybreak cannot compute: model.C = 96 must be a multiple of model.NH = 5"),
    (word(MODEL_FILE, 4, 0), "describes a model that daybreak cannot compute: model.L = 0"),
    (word(MODEL_FILE, 7, 1025), "pads its vocabulary of 1025 to 1025 instead of 1152"),
    (cut(MODEL_FILE, 1), "a bf16 model of its shape has"),
    (lambda f: (f / MODEL_FILE).write_bytes(b"x" * 1000), "1000 bytes, shorter than the 1024-byte header"),
    (lambda f: (f / MODEL_FILE).unlink(), f"{MODEL_FILE} cannot be read (No such file or directory)"),
    (word(STATE_FILE, 0, 1), f"{STATE_FILE} is not an optimizer state of llm.c"),
    (word(STATE_FILE, 1, 2), f"{STATE_FILE} has version 2 of an optimizer state"),
    (word(STATE_FILE, 2, 3), f"{STATE_FILE} has"),
    (word(STATE_FILE, 3, 0), f"{STATE_FILE} is of rank 0 of 2 at step 7 and does not belong to"),
    (word(STATE_FILE, 3, 2), f"{STATE_FILE} has a header of rank 2 of 2"),
    (word(STATE_FILE, 4, 0), "fits neither ZeRO stage 0 nor 1"),
    (word(STATE_FILE, 5, 1), "fits neither ZeRO stage 0 nor 1"),
    (word(STATE_FILE, 10, 8), f"{STATE_FILE} is of rank 1 of 2 at step 8"),
    (cut(STATE_FILE, 4), "fits neither ZeRO stage 0 nor 1"),
    (lambda f: (f / STATE_FILE).unlink(), f"{STATE_FILE} cannot be read"),
    (word(TOKENIZER_FILE, 0, 3), f"{TOKENIZER_FILE} is not a tokenizer of llm.c"),
    (word(TOKENIZER_FILE, 2, 1026), "ends after 1025 of its 1026 tokens"),
    (word(TOKENIZER_FILE, 2, 1024), "its 1024 tokens take"),
    (cut(TOKENIZER_FILE, 3), "ends after 1024 of its 1025 tokens"),
    (word(TOKENIZER_FILE, 256, 0x22012301), "1025 tokens of no tokenizer of daybreak's; name it: daybreak import "),
    (lambda f: (f / TOKENIZER_FILE).unlink(), "does not say which tokenizer its 1025 ids are of"),
]  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    write_checkpoint(folder, P=2, zero=1)
    return folder


@pytest.mark.parametrize(("spoil", "reason"), BAD, ids=[f"{i}" for i in range(len(BAD))])
def test_a_bad_file_is_refused_by_name_and_reason(
    spoil: Callable[[Path], Any], reason: str, good: Path, tmp_path: Path
) -> None:
    for path in good.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    open_source(tmp_path)
    spoil(tmp_path)
    with pytest.raises(Error) as refused:
        open_source(tmp_path)
    assert reason in str(refused.value)
    assert refused.value.exit_code in (2, 5)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "index", "said"),
    [
        (MODEL_FILE, 256 + 1100, "'wte' has values that are NaN"),
        (STATE_FILE, 256 + 3, "'optimizer state m' has values"),
    ],
)
def test_values_that_are_not_finite_make_no_run(name: str, index: int, said: str, good: Path, tmp_path: Path) -> None:
    """Two bf16 NaNs in the weights, or an fp32 NaN in the optimizer state."""
    (tmp_path / "log").mkdir()
    for path in good.iterdir():
        if name == STATE_FILE or path.name in (MODEL_FILE, TOKENIZER_FILE):
            (tmp_path / "log" / path.name).write_bytes(path.read_bytes())
    word(name, index, 0x7FC07FC0)(tmp_path / "log")
    given = "log" if name == STATE_FILE else f"log/{MODEL_FILE}"
    assert said in inside(tmp_path, "import", given, "--name", "r", code=5).stderr
    assert not (tmp_path / "runs/r").exists()
