"""Mutated files of every format that is read: the documented error or a consistent result, never anything else.

Each format is read in a process of its own whose address space is limited. 2,000 mutations in all, 100,000 with --full.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import re
import resource
import struct
import sys
import traceback
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from snapshots import FACTS
from test_packing import write_packed

import daybreak
from daybreak.config import read_toml
from daybreak.data.chat import Chat, Template, chat_of
from daybreak.data.dataset import Manifest
from daybreak.data.loader import Loader
from daybreak.data.packing import PackedLoader, row_tokens
from daybreak.data.shards import read_header
from daybreak.data.tokenizer import get_tokenizer, load_ranks
from daybreak.errors import DataError
from daybreak.evaluate.multiple_choice import read_eval_bin
from daybreak.interop import huggingface
from daybreak.interop.llmc_files import open_folder, open_model, read_tokenizer
from daybreak.state.checkpoint import load_checkpoint
from daybreak.state.metrics import read_metrics
from daybreak.state.safetensors_io import SafetensorsFile

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
HEADER, ROOM = 1024, 256 << 20  # bytes of address space that reading may take beyond what the process has


def ints(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}i", *values).ljust(HEADER, b"\0")


# ---- one good file of each format, by hand

PARAMETERS = 384 * 8 + 4 * 8 + (2 * 8 + 24 * 8 + 24 + 64 + 8 + 2 * 8 + 32 * 8 + 32 + 32 * 8 + 8) + 2 * 8


def floats(count: int) -> bytes:
    return np.linspace(-1, 1, count, dtype="<f4").tobytes()


def make_shard(folder: Path) -> None:
    (folder / "a.bin").write_bytes(ints(20240520, 1, 100) + np.arange(100, dtype="<u2").tobytes())


def make_wide_shard(folder: Path) -> None:
    (folder / "a.bin").write_bytes(ints(20240801, 7, 100) + np.arange(100, dtype="<u4").tobytes())


def make_model(folder: Path) -> None:
    (folder / "a.bin").write_bytes(ints(20240326, 3, 4, 257, 1, 1, 8, 384) + floats(PARAMETERS))


def make_llmc(folder: Path) -> None:
    (folder / "DONE_00000005").write_bytes(b"")
    (folder / "model_00000005.bin").write_bytes(ints(20240326, 5, 4, 257, 1, 1, 8, 384) + b"\x80\x3f" * PARAMETERS)
    loader = struct.pack("<Qi", 1, 0) + struct.pack("<Q2i", 2, 0, 1) + bytes(2520)
    fields = ints(20240527, 1, 1, 0, 1, 1, 0, 0, 0, 0, 5)
    (folder / "state_00000005_00000.bin").write_bytes(fields + floats(3 * PARAMETERS) + loader)


def make_llmc_tokenizer(folder: Path) -> None:
    tokens = b"".join(bytes([1, i]) for i in range(256)) + b"\x0d<|endoftext|>"
    (folder / "a.bin").write_bytes(ints(20240328, 2, 257, 256) + tokens)


def make_eval(folder: Path) -> None:
    rows = [[i, 1, 2, 3, 5, 6, 7, 2, 8, 9, 1, 4] for i in range(3)]
    body = b"".join(struct.pack(f"<{len(r) + 2}H", 65535, 2 * len(r) + 4, *r) for r in rows)
    (folder / "a.bin").write_bytes(ints(20240522, 1, 3, 28) + body)


def make_tokenizer_json(folder: Path) -> None:
    vocabulary = {"a": 0, "b": 1, "Ġ": 2, "ab": 3, "<|endoftext|>": 4}
    special = {"id": 4, "content": "<|endoftext|>", "single_word": False, "lstrip": False, "rstrip": False,
               "normalized": False, "special": True}  # fmt: skip
    pre = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "vocab": vocabulary,
             "merges": ["a b"]}  # fmt: skip
    text = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [special], "normalizer": None,
            "pre_tokenizer": pre, "post_processor": None, "decoder": {**pre}, "model": model}  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(text))


def make_ranks(folder: Path) -> None:
    (folder / "a").write_bytes(b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256)))


def make_safetensors(folder: Path) -> None:
    tensors = {"a": torch.arange(20.0).view(4, 5), "b": torch.ones(3, dtype=torch.bfloat16), "c": torch.tensor([1, 2])}
    safetensors.torch.save_file(tensors, folder / "a.safetensors", {"note": "x"})


def make_checkpoint(folder: Path) -> None:
    safetensors.torch.save_file({"w": torch.arange(10.0).view(2, 5)}, folder / "model.safetensors")
    optimizer, ranges = {"m[0:10]": torch.arange(10.0)}, json.dumps({"m": [[0, 10]]})
    safetensors.torch.save_file(optimizer, folder / "optimizer-00000-of-00001.safetensors", {"ranges": ranges})
    files = {p.name: {"size": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()}
             for p in folder.iterdir()}  # fmt: skip
    manifest = {"format": 1, "step": 5, "world": 1, "flat_numel": 10, "layout": [["w", 0, [2, 5]]], "files": files,
                **FACTS}  # fmt: skip
    seal = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({**manifest, "checksum": seal}))


def make_dataset(folder: Path) -> None:
    shard = {"file": "a.bin", "tokens": 10, "size": 1044, "sha256": "00"}
    split = {"tokens": 10, "documents": 1, "bytes": 20, "shards": [shard]}
    about = dict.fromkeys(("name", "tokenizer", "tokenizer_fingerprint", "source", "revision", "licence"), "x") | {
        "tokenizer": "bytes"
    }
    (folder / "manifest.json").write_text(json.dumps({"format": 1, **about, "train": split, "val": split}))


def make_packed(folder: Path) -> None:
    write_packed(folder / "a.bin", [[([1, 2, 3, 4, 5], [0, 0, 1, 1, 1]), ([6, 7], [0, 1])]] * 3, 8)


def make_chats(folder: Path) -> None:
    said = [{"role": "user", "content": "q", "weight": 1}, {"role": "assistant", "content": "a"}]
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    lines: list[Any] = [
        {"messages": said, "tools": "[1]"}, {"conversations": turns, "system": "s"},
        {"instruction": "i", "input": "x", "output": "o", "history": [["q", "a"]]},
        {"prompt": said, "completion": said}, {"question": "q", "answer": "a"},
    ]  # fmt: skip
    (folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_template(folder: Path) -> None:
    loop = "{% for m in messages %}{% generation %}{{ m.content | trim }}{% endgeneration %}{% endfor %}"
    (folder / "chat_template.jinja").write_text("{{ bos_token }}" + loop)
    special = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": [{"name": "a", "template": "b"}]}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))


def make_metrics(folder: Path) -> None:
    line = '{"v":1,"kind":"val","step":%d,"tokens":7,"t":1.5,"loss":"NaN","tokens_evaluated":5,"bpb":null}\n'
    (folder / "a.jsonl").write_text("".join(line % i for i in range(5)))


def make_config(folder: Path) -> None:
    (folder / "a.toml").write_text(
        'schema = 1\n[model]\nL = 2\n[optim]\nlr = 1e-3\n[batch]\nramp = [[5, 64]]\n[run]\nname = "x"\n'
    )


def make_huggingface(folder: Path) -> None:
    C, shapes = 8, {"ln_1": 8, "ln_2": 8}
    tensors = {"wte.weight": torch.ones(257, C), "wpe.weight": torch.ones(4, C)}
    for name, n in (*((f"h.0.{k}", v) for k, v in shapes.items()), ("ln_f", C)):
        tensors |= {f"{name}.weight": torch.ones(n), f"{name}.bias": torch.ones(n)}
    for name, (i, o) in {"attn.c_attn": (C, 24), "attn.c_proj": (C, C), "mlp.c_fc": (C, 32),
                         "mlp.c_proj": (32, C)}.items():  # fmt: skip
        tensors |= {f"h.0.{name}.weight": torch.ones(i, o), f"h.0.{name}.bias": torch.ones(o)}
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    about = {"model_type": "gpt2", "n_layer": 1, "n_embd": C, "n_head": 1, "n_positions": 4, "vocab_size": 257}
    (folder / "config.json").write_text(json.dumps(about))


# ---- reading all of it


def read_shard(folder: Path) -> None:
    info = read_header(folder / "a.bin")
    loader = Loader([info], 4, V=1 << 16, eot=7) if info.tokens < 10**6 else Loader([info], 4, V=1 << 16)
    loader.batch(0, 3)
    assert len(loader.fingerprint) == 64


def read_packed(folder: Path) -> None:
    info = read_header(folder / "a.bin")
    loader = PackedLoader([info], row_tokens(info), V=1 << 16)
    tokens, targets, positions = loader.batch(0, 4)
    assert tokens.shape == targets.shape == positions.shape
    assert (positions <= np.arange(loader.T)).all()
    assert len(loader.fingerprint) == 64


TEMPLATE = Template("{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}", {}, "t")


def read_chats(folder: Path) -> None:
    for line in (folder / "a.jsonl").read_text(errors="replace").splitlines():  # test_data_faults reads such files
        try:
            chat = chat_of(json.loads(line))
            TEMPLATE.prompt(chat.messages, chat.tools)
        except ValueError as refused:  # `prepare` names the place
            raise DataError(f"{folder} {refused}.") from None


def read_template(folder: Path) -> None:
    chat = Chat([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}])
    if template := Template.load(folder):
        try:
            text, spans = template.text(chat, ["</s>"])
            assert all(0 <= start <= stop <= len(text) for start, stop in spans)
        except ValueError as refused:
            raise DataError(f"a record {refused}.") from None


def read_source(source: Any) -> None:
    for name in source.names():
        source.read(name).float().sum()
    for ranges in source.optimizer.values():
        for _, values in ranges:
            values.sum()


def read_hf_tokenizer(folder: Path) -> None:
    tokenizer = get_tokenizer(str(folder / "tokenizer.json"))
    assert all(isinstance(tokenizer.token_bytes(i), bytes) for i in range(tokenizer.V))
    tokenizer.decode(tokenizer.encode("ab a<|endoftext|>b"))


def read_tensors(folder: Path) -> None:
    file = SafetensorsFile(folder / "a.safetensors")
    for name, entry in file.entries.items():
        file.read(name, torch.empty(entry.shape, dtype=entry.dtype))


def read_checkpoint(folder: Path) -> None:
    loaded = load_checkpoint(folder, "off")
    loaded.read_model("w", torch.empty(2, 5))
    loaded.read_optimizer("m", 0, torch.empty(loaded.flat_numel))


def read_all_metrics(folder: Path) -> None:
    rows = read_metrics(folder / "a.jsonl")
    assert all(isinstance(row["step"], int) for row in rows)


# name -> (makes the good file, reads it, exit codes that a refusal may have)
FORMATS: dict[str, tuple[Callable[[Path], None], Callable[[Path], Any], set[int]]] = {
    "token shard": (make_shard, read_shard, {4}),
    "token shard, 32 bits": (make_wide_shard, read_shard, {4}),
    "llm.c model": (make_model, lambda f: read_source(open_model(f / "a.bin", "bytes")), {2, 5}),
    "llm.c checkpoint": (make_llmc, lambda f: read_source(open_folder(f, None, "bytes")), {2, 5}),
    "llm.c tokenizer": (make_llmc_tokenizer, lambda f: read_tokenizer(f / "a.bin"), {5}),
    "eval file": (make_eval, lambda f: read_eval_bin(f / "a.bin"), {4}),
    "tokenizer.json": (make_tokenizer_json, read_hf_tokenizer, {2, 4}),
    "GPT-2 ranks": (make_ranks, lambda f: load_ranks(f / "a"), {4}),
    "safetensors": (make_safetensors, read_tensors, {5}),
    "checkpoint": (make_checkpoint, read_checkpoint, {5}),
    "Hugging Face model": (make_huggingface, lambda f: read_source(huggingface.open_folder(f, "bytes")), {2, 5}),
    "data set manifest": (make_dataset, lambda f: Manifest.load(f / "manifest.json"), {4}),
    "packed rows": (make_packed, read_packed, {4}),
    "chats": (make_chats, read_chats, {4}),
    "chat template": (make_template, read_template, {4, 5}),
    "metrics": (make_metrics, read_all_metrics, set()),
    "config.toml": (make_config, lambda f: read_toml(f / "a.toml"), {2}),
}
NUMBERS = (0, 1, -1, 2, 7, 255, 65535, 65536, 2**24, 2**31 - 1, -(2**31), 2**30 + 1)
WORDS = (b"-1", b"0", b"1e999", b"99999999999999999999", b"4294967295", b"2147483648", b"null", b"[]", b"{}", b'"x"',
         b"true", b"NaN", b"1.5", b"\xff")  # fmt: skip


def mutate(rng: random.Random, data: bytes) -> bytes:
    """Bits, fields, numbers in text, cuts, growth, pieces moved; mostly near the front, where structure is."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(out)) if rng.random() < 0.5 or len(out) < 80 else rng.randrange(80)
        kind = rng.randrange(8)
        if kind <= 1:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            out[at] = rng.randrange(256)
        elif kind == 3:
            struct.pack_into("<i", out, min(at // 4 * 4, max(len(out) - 4, 0)), rng.choice(NUMBERS))
        elif kind == 4:
            del out[rng.randrange(len(out)) :]
        elif kind == 5:
            out += rng.randbytes(rng.choice((1, 2, 8, 1000)))
        elif kind == 6:
            piece = out[at : at + rng.randrange(1, 40)]
            out[(to := rng.randrange(len(out))) : to + rng.choice((0, len(piece)))] = piece
        elif found := [*re.finditer(rb'-?\d+(\.\d+)?|"[^"]*"', bytes(out[:4000]))]:
            spot = rng.choice(found)
            out[spot.start() : spot.end()] = rng.choice(WORDS)
        if len(out) < 4:
            break
    return bytes(out)


def fuzz(name: str, folder: Path, count: int, report: int) -> None:
    """Runs in a child. Writes (refused, accepted, most bytes allocated per byte of file) to the pipe."""
    make, read, codes = FORMATS[name]
    make(folder)
    read(folder) if name != "GPT-2 ranks" else None  # the good file is accepted
    files = [p for p in sorted(folder.iterdir()) if p.stat().st_size]
    good = {p: p.read_bytes() for p in files}
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, resource.RLIM_INFINITY))
    rng, refused, accepted, worst = random.Random(f"{name} 1"), 0, 0, 0.0
    tracemalloc.start()
    for i in range(count):
        path = rng.choice(files)
        data = mutate(rng, good[path])
        path.write_bytes(data)
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        error: daybreak.Error | None = None
        try:
            read(folder)
            accepted += 1
        except daybreak.Error as refusal:
            error = refusal
            refused += 1
        except BaseException:
            print(f"{name}, mutation {i} of {path.name}: {data[:300]!r}", file=sys.stderr)
            raise
        assert error is None or (error.exit_code in codes and str(folder) in str(error)), (i, str(error))
        total = max(sum(p.stat().st_size for p in files), 1)
        peak = tracemalloc.get_traced_memory()[1] - before
        assert peak < 64 * total + (1 << 20), (i, peak, total)
        worst = max(worst, (peak - (1 << 16)) / total)
        path.write_bytes(good[path])
    os.write(report, json.dumps([refused, accepted, worst]).encode())


@pytest.mark.parametrize("name", FORMATS)
def test_a_mutated_file_is_refused_or_consistent(name, tmp_path, full, figures):
    count = (100_000 if full else 2_000) // len(FORMATS) + 1
    folder = tmp_path / "f"
    folder.mkdir()
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            fuzz(name, folder, count, write)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(write)
    answer = os.read(read, 1 << 16)
    os.close(read)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    refused, accepted, worst = json.loads(answer)
    assert refused + accepted == count
    figures[f"mutations of {name}: refused"] = refused
    figures[f"mutations of {name}: accepted and consistent"] = accepted
    figures[f"mutations of {name}: bytes allocated per byte of file, beyond 64 KiB, at most"] = round(max(worst, 0), 1)
