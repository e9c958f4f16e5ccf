"""Everything that is read from a file is checked by type before it is used.

Real files of a real run, key by key: the key is missing or stands twice, or its value is of another type, huge, NaN,
nested deeply, or a path that leads elsewhere. Reading ends well, or with one sentence that names the file and the key,
in bounded memory and a bounded number of calls.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import runpy
import shutil
import struct
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from recovery import config
from test_recovery_fuzz import make_tokenizer_json, read_hf_tokenizer

import daybreak
from daybreak.config import SCHEMA, resolve, run_config
from daybreak.data.dataset import open_dataset
from daybreak.data.prepare import prepare
from daybreak.data.tokenizer import get_tokenizer
from daybreak.errors import DataError
from daybreak.evaluate.multiple_choice import read_hellaswag
from daybreak.interop import huggingface
from daybreak.interop.families import FAMILIES
from daybreak.interop.source import Export
from daybreak.kernels.cuda.products import TABLES, read_table
from daybreak.manifest import checksum
from daybreak.report.page import page_data, to_json
from daybreak.report.plan import plan
from daybreak.report.series import Follower
from daybreak.state.checkpoint import load_checkpoint
from daybreak.state.metrics import COMMON, FIELDS, MetricsWriter, read_metrics
from daybreak.state.safetensors_io import SafetensorsFile

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
ROOM, MOST_CALLS = 512 << 20, 3_000_000  # bytes of address space beyond what the process has; calls of Python
DEEP = "nested deeply"  # written as 100,000 brackets
HUGE = 2**62
VALUES: list[Any] = [None, True, -1, 1.5, HUGE, 10**30, float("nan"), "x", "../x", "\ud800", "\0", [], {}, DEEP]
MISSING, TWICE = "missing", "twice"


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every key of a JSON value, and the first item of every list."""
    inside = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, part in inside:
        yield (*at, key)
        yield from places(part, (*at, key))


def changed(whole: Any, at: tuple[Any, ...], value: Any) -> Any:
    """A copy with another value, or none, at a place; TWICE: the key stands twice."""
    copy = json.loads(json.dumps(whole))
    part = copy
    for key in at[:-1]:
        part = part[key]
    if value is MISSING:
        del part[at[-1]]
    elif value is TWICE:
        part["TWICE"] = part[at[-1]]
    else:
        part[at[-1]] = value
    return copy


def text_of(value: Any, key: Any = "") -> str:
    return json.dumps(value).replace('"TWICE"', json.dumps(key)).replace(json.dumps(DEEP), "[" * 10**5 + "]" * 10**5)


def mutations(whole: Any, values: list[Any] = VALUES) -> Iterator[tuple[tuple[Any, ...], Any, Any]]:
    """(place, what is done there, the new value of the whole)"""
    for at in places(whole):
        for value in [*values, MISSING, TWICE]:
            if value is not TWICE or isinstance(at[-1], str):
                yield at, value, changed(whole, at, value)


@contextmanager
def bounded() -> Iterator[None]:
    """Fails after MOST_CALLS calls of functions."""
    calls = 0

    def count(frame: Any, event: str, arg: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")
        if calls > MOST_CALLS:
            sys.setprofile(None)
            raise AssertionError("too many calls")

    sys.setprofile(count)
    try:
        yield
    finally:
        sys.setprofile(None)


class Said(logging.Handler):
    """The lines of the log."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def kind_of(value: Any) -> Any:
    return "number" if type(value) in (int, float) else type(value)


def attempt(read: Callable[[], Any], codes: set[int], value: Any = HUGE) -> str:
    """The messages of `read`: its error, else its warnings. Fails for undocumented exit codes and for two lines. Calls
    are counted, which is slow, where `value` is a huge number."""
    log, said = logging.getLogger("daybreak"), Said()
    log.addHandler(said)
    error = None
    try:
        with bounded() if value == HUGE else nullcontext():
            read()
    except daybreak.Error as refused:
        error = refused
    finally:
        log.removeHandler(said)
    assert error is None or (error.exit_code in codes and "\n" not in str(error)), str(error)
    return "\n".join(said.lines) if error is None else str(error)


def every_mutation(
    file: Path, read: Callable[[], Any], codes: set[int], free: set[str], write: Callable[[Any], str] = text_of,
    anywhere: bool = False, values: list[Any] = VALUES,
) -> None:  # fmt: skip
    """Try them all on a JSON file. free: keys of which nothing is read, or which may be missing; "a.*": keys of a.
    anywhere: of a file with a checksum, it is enough that the file is named."""
    before = file.read_text()
    whole = json.loads(before)
    for at, value, new in mutations(whole, values):
        old = whole
        for key in at:
            old = old[key]
        name = at[-1] if isinstance(at[-1], str) else at[-2]
        file.write_text(text_of(new, at[-1]) if value in (TWICE, DEEP) else write(new), errors="surrogatepass")
        what = f"{file.name}: {'.'.join(map(str, at))} = {str(value)[:40]!r}"
        try:
            said = attempt(read, codes, value)
            other = value is MISSING or value is TWICE or kind_of(value) is not kind_of(old)
            lacks = value is MISSING and (isinstance(at[-1], int) or f"{at[0]}.*" in free)
            if other and not lacks and not set(map(str, at)) & free:
                assert file.name in said, (what, said)
                assert value is DEEP or anywhere or str(name) in said, (what, said)
        except BaseException:
            print(what, file=sys.stderr)
            raise
    file.write_text(before)


def in_a_child(body: Callable[[], None]) -> None:
    """Run it in a process whose memory is limited."""
    if (pid := os.fork()) == 0:
        try:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, resource.RLIM_INFINITY))
            body()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set, a run on it, and its weights as transformers' files."""
    folder = tmp_path_factory.mktemp("checked")
    (folder / "book.txt").write_text("".join(f"Line {i} of a book.\n" for i in range(400)))
    prepare(folder / "book.txt", data_dir=folder / "data", tokenizer="bytes")
    keys = {"data.train": "", "data.val": "", "data.name": "book-bytes", "data.dir": str(folder / "data")}
    run = daybreak.train(config(folder, folder, "run", run__steps=2).override(keys))
    source = Export(run.checkpoint())
    huggingface.export(source, folder / "whole")
    huggingface.export(source, folder / "parts", max_shard=20_000)
    return folder


def sealed(manifest: Any) -> str:
    return json.dumps(manifest | {"checksum": checksum(manifest)})


def test_manifest_of_a_checkpoint(made: Path) -> None:
    run = made / "run"
    checkpoint = run / "checkpoints/step-00000002"

    def read() -> None:
        source = Export(load_checkpoint(checkpoint, "off"))
        source.read("wte")
        source.read_moment("m", "lnfb", 0, 16)

    file = checkpoint / "manifest.json"
    manifest = json.loads(file.read_text())
    few = {k: v for k, v in manifest["config"].items() if k.startswith("model.") or k in ("batch.ramp", "data.bos")}
    file.write_text(sealed(manifest | {"config": few | {"optim.lr": 0.003}}))  # the others are read alike
    free = {"config.*", "kernels.*", "seed", "samples", "tokens", "rng", "val", "run", "checksum", "format"}
    in_a_child(lambda: every_mutation(file, read, {2, 5}, free, sealed))
    file.write_text(json.dumps(manifest))


def test_manifest_of_a_data_set(made: Path) -> None:
    folder = made / "data/book-bytes"
    in_a_child(lambda: every_mutation(folder / "manifest.json", lambda: open_dataset(str(folder)), {4}, {"format"}))


@pytest.mark.parametrize("name", ["env.json", "exit.json"])
def test_what_a_run_says_of_itself(made: Path, name: str) -> None:
    """Reports are written all the same; a damaged file is named in a warning, or on the page."""
    run = made / "run"

    def read() -> None:
        follower = Follower(run)
        follower.update()
        logging.getLogger("daybreak").warning("%s", follower.state())
        to_json(page_data([follower]))
        daybreak.Run(run).folder.say_done()

    free = {"t", "packages.*", *(json.loads((run / name).read_text()) if name == "env.json" else ())}
    in_a_child(lambda: every_mutation(run / name, read, set(), free))


def test_files_of_transformers(made: Path) -> None:
    def check(folder: Path, name: str, free: set[str], tokenizer: str = "") -> None:
        def read() -> None:
            source = huggingface.open_folder(folder, tokenizer)
            source.read("wte")

        every_mutation(folder / name, read, {2, 4, 5}, free)

    config = json.loads((made / "whole/config.json").read_text())
    table = FAMILIES["gpt2"]
    known = {"model_type", "n_inner", *table.arithmetic, *(key for key, _ in table.sizes.values())}
    free = config.keys() - known | {f"{key}.*" for key in known}  # each has a default
    in_a_child(lambda: check(made / "whole", "config.json", free))
    in_a_child(lambda: check(made / "parts", "model.safetensors.index.json", {"metadata", "weight_map.*"}))


TOML = {"true": bool, "-1": int, "1.5": float, str(HUGE): int, "9" * 30: int, "nan": float, "1e999": float, '"x"': str,
        '"../x"': str, '"\\u0000"': str, "[]": tuple, "{}": dict, "1979-05-27": object, "[" * 5000: object}  # fmt: skip


def test_config_toml(made: Path) -> None:
    """As a recipe of a few keys, and as a run's whole file. A huge number that is accepted can be planned."""
    file, recipe = made / "run/config.toml", made / "recipe.toml"
    before, good = file.read_text(), run_config(made / "run")
    keys, lines = {"schema": SCHEMA, **dict(good.items())}, good.to_toml().splitlines(keepends=True)

    small = {"model.L": 1, "model.C": 16, "model.NH": 2, "model.max_T": 16, "model.V": 257, "batch.B": 2}

    def read(path: Path) -> None:
        made_of = resolve(str(path.parent if path == file else path))[0]
        if str(HUGE) in path.read_text():
            plan(made_of)

    def check(path: Path, text: str, name: str, value: str) -> None:
        path.write_text(text)
        try:
            said = attempt(lambda: read(path), {2, 4, 6}, HUGE if value == str(HUGE) else value)
            kind = type(keys[name])
            if value == TWICE or (TOML[value] is not kind and (TOML[value], kind) != (int, float)):
                assert path.name in said
                assert value == TWICE or len(value) > 1000 or name in said
        except BaseException:
            print(f"{path.name}: {name} = {value[:40]}", file=sys.stderr)
            raise

    def every_key() -> None:
        for name in keys:
            section, _, leaf = name.rpartition(".")
            head = f"[{section}]\n" if section else ""
            rest = "".join(f"{key} = {n}\n" for key, n in small.items() if key != name)
            for value in TOML:
                check(recipe, f"{rest}{name} = {value}\n", name, value)
            check(recipe, f"{rest}{name} = 1\n{name} = 1\n", name, TWICE)
            at = next(i for i, line in enumerate(lines) if line.startswith(f"{leaf} = ") and head in lines[:i] + [""])
            for value in (str(HUGE), "[]"):
                check(file, "".join([*lines[:at], f"{leaf} = {value}\n", *lines[at + 1 :]]), name, value)

    in_a_child(every_key)
    file.write_text(before)


def test_metrics(made: Path) -> None:
    """A line that is none costs that line, and is named; the report shows the others."""
    run, follower = made / "run", Follower(made / "run")
    with closing(MetricsWriter(made / "m.jsonl")) as writer:
        values = {int: 3, float: 2.0, str: "text", bool: False, float | None: 0.5, int | None: 2}
        for kind, fields in FIELDS.items():
            writer.write(kind, 3, 7, **{key: values[spec] for key, spec in fields.items()})
    rows = (made / "m.jsonl").read_text().splitlines(keepends=True)

    def read() -> None:
        read_metrics(run / "metrics.jsonl")
        follower.update()
        to_json(follower.payload())

    def every_line() -> None:
        for i, row in enumerate(rows):
            whole, spec = json.loads(row), {}
            for at, value, new in mutations(whole):
                follower.offset = 1 << 40  # it begins anew where a file is shorter than before
                text = text_of(new, at[-1]) + "\n"
                (run / "metrics.jsonl").write_text("".join([*rows[:i], text, *rows[i + 1 :], "{}\n"]))
                what = f"metrics.jsonl: {whole['kind']}.{at[0]} = {str(value)[:40]!r}"
                try:
                    said = attempt(read, set(), value)
                    spec = (COMMON | FIELDS[whole["kind"]])[at[0]]
                    nothing = spec in (float | None, int | None) and value in (None, MISSING)
                    alike = value == TWICE or nothing or kind_of(value) is kind_of(whole[at[0]])
                    if not alike and at[0] != "kind":
                        assert f"metrics.jsonl line {i + 1} is not a metrics record" in said, (what, said)
                        assert value is DEEP or f"({at[0]} " in said, (what, said)
                except BaseException:
                    print(what, file=sys.stderr)
                    raise

    in_a_child(every_line)


def test_a_table_of_products(tmp_path: Path) -> None:
    shipped = next(TABLES.glob("*.json"))
    table = json.loads(shipped.read_text())
    name = next(name for name, entry in table["plans"].items() if "quack" in entry)
    file = tmp_path / "table.json"
    file.write_text(json.dumps(table | {"plans": {name: table["plans"][name]}}))
    unread = {"schema", "torch", "machine", "measured", "config", "candidates", "us", "tflops", "first_tflops"}
    free = {"plans.*", "quack_tflops", *unread}
    every_mutation(file, lambda: read_table(file, table["card"], table["cublaslt"]), {2}, free)
    for bad in ("", "x", "bf16 nn m1 n1 k1", "bf16 nn m1 n1 kx plain beta0", "fp8 nn m1 n1 k1 plain beta0"):
        file.write_text(json.dumps({"card": "x", "cublaslt": 1, "plans": {bad: {}}}))
        assert f"table.json: plans has the key {bad!r}" in attempt(lambda: read_table(file, "x", 1), {2})


def test_a_journal(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is in the journal of a preparation that was stopped: the next one ends with the same data set."""
    data, folder = tmp_path / "data", tmp_path / "data/.book-bytes.tmp"
    options: dict[str, Any] = {"data_dir": data, "tokenizer": "bytes", "shard_tokens": 3000}
    monkeypatch.setattr("daybreak.data.prepare.UNIT", 1000)
    with monkeypatch.context() as stopping:
        stopping.setattr("daybreak.data.prepare.finish", lambda *_: open("/nowhere/x"))  # noqa: SIM115
        with pytest.raises(DataError, match="No such file"):
            prepare(made / "book.txt", **options)
    shutil.copytree(folder, kept := tmp_path / "kept")
    prepare(made / "book.txt", **options)
    want = {path.name: path.read_bytes() for path in (data / "book-bytes").iterdir()}
    before = (kept / "journal.json").read_text()

    def read() -> None:
        for old in (data / "book-bytes", folder):
            shutil.rmtree(old, ignore_errors=True)
        shutil.copytree(kept, folder)
        prepare(made / "book.txt", **options)
        assert {path.name: path.read_bytes() for path in (data / "book-bytes").iterdir()} == want

    every_mutation(kept / "journal.json", read, set(), {"identity"}, anywhere=True, values=[None, HUGE])
    (kept / "journal.json").write_text(before)
    for path in sorted(kept.glob("*.bin")):
        path.write_bytes(path.read_bytes()[:-10])  # it is shorter than the journal says
        read()


def test_tokenizer_json(tmp_path: Path) -> None:
    """The library reads it; whatever it raises, panics too, is a sentence."""
    make_tokenizer_json(tmp_path)
    file = tmp_path / "tokenizer.json"
    for at, value, new in mutations(json.loads(file.read_text()), [None, HUGE, "x", "../x", []]):
        file.write_text(text_of(new, at[-1]))
        said = attempt(lambda: read_hf_tokenizer(tmp_path), {2, 4}, value)
        assert said == "" or "tokenizer" in said


@pytest.mark.parametrize("name", ["../x.bin", "/tmp/x.bin", "..", "a/b.bin", "", "\0"])
def test_a_shard_lies_in_its_data_set(made: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(made / "data/book-bytes", folder := tmp_path / "set")
    (tmp_path / "x.bin").write_bytes((folder / "book-bytes_val_000000.bin").read_bytes())
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["val"]["shards"][0]["file"] = name
    (folder / "manifest.json").write_text(json.dumps(manifest))
    said = attempt(lambda: open_dataset(str(folder)), {4})
    assert "manifest.json is not a dataset manifest: val.shards[0].file = " in said
    assert "must be the name of a file in the same folder" in said


def test_a_link_out_of_a_data_set_is_refused_and_the_folder_may_be_one(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "data/book-bytes", folder := tmp_path / "set")
    (tmp_path / "link").symlink_to(folder)
    assert open_dataset(str(tmp_path / "link")).manifest is not None
    shard = folder / "book-bytes_val_000000.bin"
    shard.rename(tmp_path / "elsewhere.bin")
    shard.symlink_to(tmp_path / "elsewhere.bin")
    assert f"{shard} is a link out of the dataset's folder" in attempt(lambda: open_dataset(str(folder)), {4})


def test_header_of_safetensors(made: Path, tmp_path: Path) -> None:
    data = (made / "run/checkpoints/step-00000002/optimizer-00000-of-00001.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, values = json.loads(data[8 : 8 + size]), data[8 + size :]
    small = {name: row for name, row in header.items() if name.startswith(("extra", "__"))}
    end = max(row["data_offsets"][1] for name, row in small.items() if name.startswith("extra"))
    path = tmp_path / "a.safetensors"

    def write(text: str) -> None:
        made_of = text.encode(errors="replace")
        path.write_bytes(struct.pack("<Q", len(made_of)) + made_of + values[:end])

    def read() -> None:
        file = SafetensorsFile(path)
        for name, entry in file.entries.items():
            file.read(name, torch.empty(entry.shape, dtype=entry.dtype))

    def every_key() -> None:
        for at, value, new in mutations(small):
            write(text_of(new, at[-1]))
            try:
                said = attempt(read, {5}, value)
                assert said == "" or "a.safetensors" in said
            except BaseException:
                print("safetensors", at, str(value)[:40], file=sys.stderr)
                raise
        many = ",".join(f'"{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(300_000))
        write(f"{{{many}}}")
        assert "its header has 16" in attempt(read, {5})

    in_a_child(every_key)


def test_lines_of_hellaswag(tmp_path: Path) -> None:
    file, whole = tmp_path / "a.jsonl", {"ctx": "A cat", "endings": ["sat.", "ran."], "label": 1}
    for at, value, new in mutations(whole):
        file.write_text(text_of(new, at[-1]) + "\n")
        said = attempt(lambda: read_hellaswag(file, get_tokenizer("bytes")), {4}, value)
        fine = value is TWICE or (at == ("endings", 0) and (value is MISSING or kind_of(value) is str))
        fine |= (at, kind_of(value)) == (("ctx",), str) or (at == ("label",) and value == 1)
        assert fine or "a.jsonl line 1" in said, (at, value, said)


def test_what_a_restart_loop_reads(tmp_path: Path) -> None:
    """Whatever lies in the folder, a word and a code come out; what is damaged counts as killed."""
    verdict = runpy.run_path(str(Path(__file__).parents[1] / "scripts/verdict.py"))["verdict"]
    for name, whole in (("exit.json", {"code": 75, "reason": "SIGTERM", "t": 1.5}), (".restarts", 1)):
        texts = [text_of(new, at[-1]) for at, _, new in mutations(whole)]
        for text in [*texts, "1 2", "-1 1\n", "9" * 5000, "\0", "1 999"]:
            shutil.rmtree(run := tmp_path / "run", ignore_errors=True)
            run.mkdir()
            (run / name).write_text(text)
            assert verdict(run) in {("again", 1), ("again", 137), ("stopped", 75), ("failed", 137)}
