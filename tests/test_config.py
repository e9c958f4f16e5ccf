"""Configuration: every key, every rule, where values come from, what a resumed run may change."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from daybreak.config import Config, check_resume, every_key, keys_of, parse_value, read_toml, resolve
from daybreak.config_keys import NOTHING, THEIRS, theirs
from daybreak.errors import ConfigError
from daybreak.formatting import nearest

KINDS = {name: type(key.default) for name, key in keys_of().items()}
DOCS = {name: key.metadata["doc"] for name, key in keys_of().items()}

# key: (default, text on the command line, the value it means, values out of range)
KEYS: dict[str, tuple[Any, str, Any, tuple[Any, ...]]] = {
    "model.arch": ("gpt2", "gpt2", "gpt2", ()),
    "model.L": (12, "3", 3, (0, -1)),
    "model.C": (768, "1_536", 1536, (0, 100)),
    "model.NH": (12, "6", 6, (0,)),
    "model.max_T": (1024, "2048", 2048, (0,)),
    "model.V": (50257, "257", 257, (0,)),
    "lora.rank": (0, "16", 16, (-1,)),
    "lora.alpha": (0.0, "32", 32.0, (-1.0,)),
    "lora.targets": ("*", "q,v", "q,v", ()),
    "lora.rslora": (False, "true", True, ()),
    "lora.base": ("compute", "fp8", "fp8", ("int8",)),
    "data.name": ("stdlib", "book", "book", ("",)),
    "data.train": ("", "a_*.bin", "a_*.bin", ()),
    "data.val": ("", "b_*.bin", "b_*.bin", ()),
    "data.tokenizer": ("", "gpt2-1024", "gpt2-1024", ("llama", "gpt2-", "gpt2-x")),
    "data.dir": ("data", "/tmp/x y", "/tmp/x y", ()),
    "data.bos": (False, "true", True, ()),
    "data.best_fit": (False, "true", True, ()),
    "data.packed": (False, "true", True, ()),
    "data.skip": (
        "",
        "5-6,7-7,9-100",
        "5-6,7-7,9-100",
        ("5", "0-3", "7-6", "5-6,5-9", "5-9,4-4", "1-2,", "05-6", "a-b", "1-2 3-4", "1-2,3", "1-1000000000"),
    ),
    "batch.B": (4, "8", 8, (0, -4)),
    "batch.T": (0, "512", 512, (-1, 1025)),
    "batch.total_tokens": (0, "8192", 8192, (-1, 4097)),
    "batch.ramp": ((), "[[10, 4096], [20, 8192]]", ((10, 4096), (20, 8192)), (((0, 4096),), ((2, 4096), (2, 4096)))),
    "batch.recompute": (0, "2", 2, (-1, 4)),
    "optim.name": ("adamw", "muon", "muon", ("sgd", "")),
    "optim.lr": (6e-4, "1e-3", 1e-3, (-1e-3,)),
    "optim.beta1": (0.9, "0", 0.0, (1.0, -0.1)),
    "optim.beta2": (0.95, "0.99", 0.99, (1.0, -0.1)),
    "optim.eps": (1e-8, "1e-10", 1e-10, (0.0, -1.0)),
    "optim.weight_decay": (0.1, "0", 0.0, (-0.1,)),
    "optim.muon_lr": (0.02, "0.03", 0.03, (-0.1,)),
    "optim.muon_momentum": (0.95, "0.9", 0.9, (1.0, -0.1)),
    "optim.muon_warmup": (300, "0", 0, (-1,)),
    "optim.muon_beta2": (0.95, "0.9", 0.9, (1.0, -0.1)),
    "optim.muon_final_momentum": (0.0, "0.9", 0.9, (1.0, -0.1)),
    "optim.muon_weight_decay": (0.1, "0.3", 0.3, (-0.1,)),
    "optim.muon_decay_schedule": ("constant", "cosine", "cosine", ("linear", "")),
    "optim.clip": (1.0, "0.5", 0.5, (-1.0,)),
    "optim.z_loss": (0.0, "1e-4", 1e-4, (-1e-4,)),
    "optim.horizon": (0, "100", 100, (-1,)),
    "schedule.name": ("cosine", "wsd", "wsd", ("cos", "")),
    "schedule.warmup": (-1, "10", 10, (-2,)),
    "schedule.final_frac": (0.0, "0.1", 0.1, (1.1, -0.1)),
    "schedule.wsd_frac": (0.8, "1", 1.0, (1.1, -0.1)),
    "precision.compute": ("auto", "fp64", "fp64", ("fp16",)),
    "precision.fp8": ("h.*", "h.3.*", "h.3.*", ()),
    "precision.fp8_until": (1.0, "0.9", 0.9, (1.5, -0.1)),
    "precision.tf32": (True, "false", False, ()),
    "precision.masters": ("auto", "none", "none", ("bf16",)),
    "precision.moments": ("fp32", "bf16", "bf16", ("fp16",)),
    "kernels.matmul": ("auto", "torch", "torch", ("cutlass",)),
    "kernels.attention": ("auto", "fa4", "fa4", ("fa2",)),
    "kernels.norm": ("auto", "triton", "triton", ("cudnn",)),
    "kernels.embedding": ("auto", "torch", "torch", ("cudnn",)),
    "kernels.classifier": ("auto", "torch", "torch", ("cudnn",)),
    "kernels.guard": ("auto", "torch", "torch", ("cudnn",)),
    "kernels.optimizer": ("auto", "torch", "torch", ("cudnn",)),
    "parallel.zero": (0, "1", 1, (3, -1)),
    "parallel.bucket_bytes": (33554432, "1048576", 1048576, (0,)),
    "parallel.timeout": (300.0, "20", 20.0, (0.0,)),
    "eval.every": (250, "0", 0, (-1,)),
    "eval.hellaswag": ("", "h.jsonl", "h.jsonl", ()),
    "eval.hellaswag_every": (0, "500", 500, (-1,)),
    "eval.hellaswag_examples": (0, "100", 100, (-1,)),
    "eval.tokens": (1048576, "1000", 1000, (0,)),
    "eval.sample_every": (0, "5", 5, (-1,)),
    "eval.sample_tokens": (128, "0", 0, (-1,)),
    "eval.prompt": ("", "-- Hi", "-- Hi", ()),
    "eval.temperature": (1.0, "0", 0.0, (-0.5,)),
    "eval.top_k": (0, "40", 40, (-1,)),
    "checkpoint.every": (1000, "0", 0, (-1,)),
    "checkpoint.keep": (3, "0", 0, (-1,)),
    "checkpoint.major": (0, "5000", 5000, (-1,)),
    "checkpoint.background": (True, "false", False, ()),
    "checkpoint.on_error": ("warn", "stop", "stop", ("ignore",)),
    "guard.loss_z": (0.0, "7", 7.0, (-1.0,)),
    "guard.norm_z": (0.0, "7.5", 7.5, (-1.0,)),
    "guard.max_skips": (10, "3", 3, (0,)),
    "guard.hang_factor": (20.0, "0", 0.0, (-1.0,)),
    "guard.hang_seconds": (300.0, "60", 60.0, (0.0,)),
    "log.every": (1, "10", 10, (0,)),
    "log.norms_every": (0, "100", 100, (-1,)),
    "log.sinks": ("", "tensorboard,wandb", "tensorboard,wandb", ("mlflow", "wandb tensorboard")),
    "log.display": ("auto", "plain", "plain", ("fancy",)),
    "cost.price": (0.0, "23.5", 23.5, (-1.0,)),
    "run.name": ("", "my run.2", "my run.2", ("a/b", "..", ".x", "-x", "a\nb")),
    "run.dir": ("runs", "elsewhere", "elsewhere", ()),
    "run.steps": (0, "20_000", 20000, (-1,)),
    "run.epochs": (0.0, "1.5", 1.5, (-1.0,)),
    "run.tokens": (0, "1.5B", 1_500_000_000, (-1,)),
    "run.max_hours": (0.0, "1.5", 1.5, (-1.0,)),
    "run.seed": (42, "0", 0, (-1,)),
    "run.device": ("auto", "cuda:1", "cuda:1", ("mps", "cuda:", "cuda:-1", "")),
    "run.overfit": (False, "TRUE", True, ()),
    "run.profile": ("", "10:20", "10:20", ("10", "20:10", "5:5", "a:b", ":3")),
}
WRONG_TYPE = {int: ("5", 5.0, True, None, 2**63), float: ("0.5", True, None, [0.5]), bool: (1, "true", None),
              str: (5, None, ["x"]), tuple: (3, "x", [1, 2], [[1]], [[1, 2, 3]], [[1, "2"]], [[1, True]])}  # fmt: skip
WRONG_TEXT = {int: ("", "x", "5x", "5.0", "1e6", "0x10"), float: ("", "x", "1e-3x", "1,5", "1 2"),
              bool: ("", "yes", "1", "truee"), tuple: ("", "x", "[", "[[1, 2]] x", "[1, 2]", "[[1]]", "5")}  # fmt: skip


def test_the_table_has_every_key_with_its_default() -> None:
    assert [(name, default) for name, (default, *_) in KEYS.items()] == list(Config().items())
    assert all(type(value) is KINDS[name] for name, (_, _, value, _) in KEYS.items())
    assert all(len(DOCS[name]) > 3 for name in KEYS)
    Config().check()


@pytest.mark.parametrize("name", KEYS)
def test_a_key_is_parsed_replaced_and_round_trips(name: str, tmp_path: Path) -> None:
    _, text, value, _ = KEYS[name]
    assert parse_value(name, text) == value
    assert type(parse_value(name, text)) is type(value)
    config = Config().override({name: parse_value(name, text)})
    assert dict(config.items()) == dict(Config().items()) | {name: value}
    path = tmp_path / "config.toml"
    path.write_text(config.to_toml(), encoding="utf-8")
    assert read_toml(path) == config
    assert f"{name.split('.')[1]} = " in config.to_toml()
    assert f"  # {DOCS[name]}\n" in config.to_toml()


@pytest.mark.parametrize("name", KEYS)
def test_another_type_is_an_error_that_names_key_value_and_default(name: str) -> None:
    default = KEYS[name][0]
    for value in WRONG_TYPE[KINDS[name]]:
        with pytest.raises(ConfigError, match=rf"^{re.escape(f'{name} = {value!r} must be ')}.*; the default is "):
            Config().override({name: value})
    for text in WRONG_TEXT.get(KINDS[name], ()):
        with pytest.raises(
            ConfigError, match=rf"^{re.escape(name)} = '?{re.escape(text)}'? must be .*; the default is "
        ) as e:
            parse_value(name, text)
        if KINDS[name] is int:
            assert str(e.value) == f"{name} = {text!r} must be a whole number; the default is {default}."


@pytest.mark.parametrize(("name", "value"), [(name, v) for name, row in KEYS.items() for v in row[3]])
def test_a_value_out_of_range_is_an_error_that_names_the_key(name: str, value: Any) -> None:
    config = Config().override({name: value})
    with pytest.raises(ConfigError, match=rf"^{re.escape(name)} .*(must|is not supported)") as e:
        config.check()
    assert e.value.exit_code == 2
    assert str(e.value).count("\n") == 0


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999"])
def test_floats_are_finite(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^optim\.lr = .* must be finite; the default is 0\.0006\.$"):
        parse_value("optim.lr", text)


def test_text_that_is_not_unicode_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^eval\.prompt = '\\udcff' must be valid UTF-8 text, "):
        Config().override({"eval.prompt": "\udcff"})


CONFLICTS: list[tuple[dict[str, Any], int, str]] = [
    ({"batch.T": 2048}, 1, "batch.T = 2048 must be at most model.max_T = 1024; lower it or raise model.max_T."),
    ({"batch.total_tokens": 10000}, 1,
     "batch.total_tokens = 10000 must be a multiple of batch.B * T = 4 * 1024 = 4096; use 8192 or 12288."),
    ({"batch.total_tokens": 100}, 1,
     "batch.total_tokens = 100 must be a multiple of batch.B * T = 4 * 1024 = 4096; use 4096."),
    ({"batch.total_tokens": 12288}, 2,
     "batch.total_tokens = 12288 must be a multiple of batch.B * T * ranks = 4 * 1024 * 2 = 8192; keep it with "
     "batch.B = 3, or make it 8192 or 16384."),
    ({"batch.total_tokens": 4096, "batch.T": 512}, 4,
     "batch.total_tokens = 4096 must be a multiple of batch.B * T * ranks = 4 * 512 * 4 = 8192; keep it with "
     "batch.B = 2, or make it 8192."),
    ({"batch.total_tokens": 32768}, 7,  # no batch.B helps: one of eight GPUs is lost
     "batch.total_tokens = 32768 must be a multiple of batch.B * T * ranks = 4 * 1024 * 7 = 28672; keep it with "
     "4 ranks, or make it 28672 or 57344."),
    ({"batch.ramp": [[5, 5000]]}, 1,
     "batch.ramp at step 5: total_tokens = 5000 must be a multiple of batch.B * T = 4 * 1024 = 4096; "
     "use 4096 or 8192."),
    ({"batch.ramp": [[5, 4096], [4, 8192]]}, 1,
     "batch.ramp = [[5, 4096], [4, 8192]] must be [step, total_tokens] pairs with steps above 0 and ascending and "
     "tokens above 0; [4, 8192] is not."),
    ({"schedule.warmup": 101, "run.steps": 100}, 1,
     "schedule.warmup = 101 must be at most the learning-rate horizon of 100 steps; lower it, or set it to -1 for "
     "min(700, horizon // 20)."),
    ({"schedule.warmup": 51, "run.steps": 100, "optim.horizon": 50}, 1,
     "schedule.warmup = 51 must be at most the learning-rate horizon of 50 steps; lower it, or set it to -1 for "
     "min(700, horizon // 20)."),
    ({"data.train": "a.bin"}, 1,
     'data.train = "a.bin" and data.val = "" must be given together; give both globs, or neither and data.name.'),
    ({"data.val": "a.bin"}, 1,
     'data.train = "" and data.val = "a.bin" must be given together; give both globs, or neither and data.name.'),
    ({"data.name": ""}, 1, 'data.name = "" must name a dataset; give one, or data.train and data.val.'),
    ({"model.NH": 7}, 1, "model.C = 768 must be a multiple of model.NH = 7."),
    ({"run.device": "mps"}, 1,
     'run.device = "mps" is not supported: daybreak trains on the CPU and on NVIDIA GPUs (auto, cpu, cuda or cuda:N); '
     'the default is "auto".'),
    ({"schedule.name": "cos"}, 1,
     'schedule.name = "cos" must be cosine or linear or constant or wsd or wsd-linear; the default is "cosine".'),
]  # fmt: skip


@pytest.mark.parametrize(("values", "ranks", "sentence"), CONFLICTS)
def test_conflicts_between_keys(values: dict[str, Any], ranks: int, sentence: str) -> None:
    with pytest.raises(ConfigError) as e:
        Config().override(values).check(ranks=ranks)
    assert str(e.value) == sentence


def test_what_is_allowed_at_the_edge() -> None:
    for values in (
        {"batch.T": 1024},
        {"batch.total_tokens": 8192, "batch.ramp": [[1, 4096], [2, 12288]]},
        {"schedule.warmup": 100, "run.steps": 100},
        {"data.name": "", "data.train": "a", "data.val": "b"},
    ):
        Config().override(values).check()


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("optim.warmup", "schedule.warmup"),
        ("optimizer.lr", "optim.lr"),
        ("lr", "optim.lr"),
        ("batch.b", "batch.B"),
        ("model.T", "batch.T"),
        ("run.step", "run.steps"),
        ("eval.evry", "eval.every"),
        ("data.tokeniser", "data.tokenizer"),
        ("seed", "run.seed"),
        ("train.max_hours", "run.max_hours"),
    ],
)
def test_an_unknown_key_names_the_nearest(typed: str, meant: str) -> None:
    assert nearest(typed, KINDS) == meant
    with pytest.raises(ConfigError) as e:
        Config().override({typed: 1})
    assert str(e.value) == f"unknown key {typed!r}; did you mean {meant!r}?"


def test_every_name_of_another_program_leads_to_a_key() -> None:
    ours = {ours for ours in THEIRS.values() if ours != NOTHING}
    assert ours < set(KINDS)
    assert set(THEIRS).isdisjoint(name.rpartition(".")[2] for name in every_key())  # it would be a name of ours
    assert [theirs(name) for name in ("n_layer", "model.n-layer", "perDeviceTrainBatchSize", "optim.lr", "layers")] == [
        "model.L", "model.L", "batch.B", "", "",
    ]  # fmt: skip


@pytest.mark.parametrize("typed", ["json", "model.heads", "optim.zap", "verbose", "x" * 1000])
def test_a_name_that_is_not_near_is_not_taken_for_another(typed: str) -> None:
    assert nearest(typed, KINDS) == ""
    with pytest.raises(ConfigError, match=r"; daybreak train tiny --print-config lists all\.$"):
        Config().override({typed: 1})


def test_a_key_of_another_family_names_that_family() -> None:
    with pytest.raises(ConfigError) as e:
        Config().override({"model.NKV": 2})
    assert str(e.value) == "model.NKV is a key of model.arch llama; set model.arch = llama too, or leave it out."
    assert Config().override({"model.arch": "llama", "model.NKV": 2}).model.NKV == 2


@pytest.mark.parametrize("text", ['say "hi"\\', "two\nlines\ttab\r", "\x00\x1f\x7f", "день 日 🌅", "'''", "# no", ""])
def test_any_text_round_trips(text: str, tmp_path: Path) -> None:
    config = Config().override({"eval.prompt": text})
    path = tmp_path / "c.toml"
    path.write_bytes(config.to_toml().encode())
    assert read_toml(path).eval.prompt == text


@pytest.mark.parametrize("value", [0.1 + 0.2, 1e-300, 5e-324, 1e22, 123456789.0, 2.5e-4])
def test_floats_round_trip_exactly(value: float) -> None:
    text = Config().override({"optim.lr": value}).to_toml()
    assert tomllib.loads(text)["optim"]["lr"] == value


def test_to_toml_starts_with_the_schema_and_comments_every_key() -> None:
    lines = Config().to_toml().splitlines()
    assert lines[:2] == ["schema = 1", ""]
    keys = [line for line in lines[1:] if "=" in line.partition("#")[0]]
    assert len(keys) == len(KEYS)
    assert all("  # " in line for line in keys)
    assert "total_tokens = 0  # tokens per step over all ranks; 0 = one micro-step each (B * T * ranks)" in lines


BAD_FILES = [
    ("schema = 2\n", "schema = 2 is of a newer daybreak (this one reads 1); upgrade."),
    ('schema = "1"\n', "schema = '1' must be a whole number, at least 1; write schema = 1."),
    ("[optim]\nlearning = 1\n", "unknown key 'optim.learning'; daybreak train tiny --print-config lists all."),
    ("[model]\ndropout = 0.1\n", "unknown key 'model.dropout'; daybreak has nothing like it."),
    ("[model]\nn_layer = 6\n", "unknown key 'model.n_layer'; did you mean 'model.L'?"),
    ("learning_rate = 1e-3\n", "unknown key 'learning_rate'; did you mean 'optim.lr'?"),
    ("[train]\nmax-iters = 5\n", "unknown key 'train.max-iters'; did you mean 'run.steps'?"),
    ("[optimizer]\nlr = 1.0\n", "unknown key 'optimizer.lr'; did you mean 'optim.lr'?"),
    ("[optimizer]\n", "unknown key 'optimizer'; did you mean 'kernels.optimizer'?"),
    ("[job]\n", "unknown key 'job'; daybreak train tiny --print-config lists all."),
    ("lr = 1.0\n", "unknown key 'lr'; did you mean 'optim.lr'?"),
    ("optim = 3\n", "unknown key 'optim'; did you mean 'optim.lr'?"),
    ("[optim]\nlr = true\n", "optim.lr = True must be a number; the default is 0.0006."),
    ("[optim.lr]\nx = 1\n", "optim.lr = {'x': 1} must be a number; the default is 0.0006."),
    ("[batch]\nB = 4.0\n", "batch.B = 4.0 must be a whole number; the default is 4."),
]


@pytest.mark.parametrize(("text", "sentence"), BAD_FILES)
def test_a_bad_file_is_named(text: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as e:
        read_toml(path)
    assert str(e.value) == f"{path}: {sentence}"


def test_a_file_that_is_not_toml_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    for content in (b"[optim\n", b"\xff\xfe", b"a = 1\na = 2\n"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=rf"^{re.escape(str(path))} cannot be read as TOML: "):
            read_toml(path)


OPEN = ("eval", "checkpoint", "guard", "log", "cost", "parallel", "kernels")
MAY_CHANGE = {
    *(name for name in KEYS if name.split(".")[0] in OPEN),
    "batch.B", "batch.total_tokens", "batch.ramp", "batch.recompute", "optim.horizon", "precision.masters", "data.skip",
    "run.name", "run.dir", "run.steps", "run.epochs", "run.tokens", "run.max_hours", "run.device", "run.profile",
}  # fmt: skip


@pytest.mark.parametrize("name", [n for n, (default, _, value, _) in KEYS.items() if default != value])
def test_what_may_change_on_resume(name: str) -> None:
    default, _, value, _ = KEYS[name]
    saved, new = Config(), Config().override({name: value})
    if name in MAY_CHANGE:
        check_resume(saved, new)
    else:
        fix = "--name" if name.startswith("model.") else "with --fork NAME"
        fix = "from its weights with --init-from" if name == "optim.name" else fix
        with pytest.raises(ConfigError, match=rf"; leave it out, or (start|train) a new run .*{fix}\.$") as e:
            check_resume(saved, new)
        assert str(e.value).startswith(f"{name} is ")
        for shown in (default, value):
            text = str(shown).lower() if isinstance(shown, bool) else f'"{shown}"' if isinstance(shown, str) else shown
            assert f" {text}" in str(e.value)
    check_resume(saved, new, moved=True) if name in ("data.name", "data.dir", "data.train", "data.val") else None
    if name.startswith(("model.", "lora.")):
        made = "a new shape is trained from the start|leave it out, or make other adapters with `daybreak finetune`"
        with pytest.raises(ConfigError, match=rf"cannot become .*; ({made})"):
            check_resume(saved, new, fork=True)
    else:
        check_resume(saved, new, fork=True)


def test_concrete_fills_what_depends_on_the_data() -> None:
    made = Config().concrete(epoch_tokens=30_000 * 4096)
    changed = {k: v for k, v in made.items() if v != dict(Config().items())[k]}
    assert changed == {
        "batch.T": 1024,
        "batch.total_tokens": 4096,
        "optim.horizon": 30_000,
        "schedule.warmup": 700,
        "run.steps": 30_000,
    }
    assert made.concrete(epoch_tokens=7 * 4096) == made
    assert Config().concrete(10**7, ranks=8).batch.total_tokens == 32768
    assert Config().override({"run.steps": 100}).concrete(30_000 * 4096).schedule.warmup == 5
    given = {"run.steps": 9, "optim.horizon": 90, "schedule.warmup": 0, "batch.T": 64, "batch.total_tokens": 512}
    assert Config().override(given).concrete(512) == Config().override(given)


def test_more_steps_on_resume_leave_the_schedule_alone() -> None:
    longer = Config().concrete(1000 * 4096).override({"run.steps": 5000}).concrete(1000 * 4096)
    assert (longer.run.steps, longer.optim.horizon, longer.schedule.warmup) == (5000, 1000, 50)


def test_an_epoch_with_a_batch_ramp() -> None:
    """T = 8, B = 1: steps of 8 tokens, of 16 from step 5, of 64 from step 10: 40, then 80, then 64 each."""
    ramp = Config().override({"batch.B": 1, "batch.T": 8, "batch.ramp": [[5, 16], [10, 64]]})
    assert [ramp.steps_in(n) for n in (7, 8, 39, 40, 55, 56, 119, 120, 183, 184, 120 + 640)] == [
        0, 1, 4, 5, 5, 6, 9, 10, 10, 11, 20
    ]  # fmt: skip
    assert [ramp.tokens_between(a, b) for a, b in ((0, 5), (4, 6), (0, 12), (10, 10), (3, 11))] == [40, 24, 248, 0, 160]
    assert ramp.concrete(184).run.steps == 11


def test_data_smaller_than_a_step() -> None:
    with pytest.raises(ConfigError) as e:
        Config().concrete(4095)
    assert str(e.value) == (
        "one step takes 4096 tokens, more than all of data.name = 'stdlib'; use --batch.B 3 --batch.total_tokens 3072, "
        "or prepare more data."
    )
    fewer = Config().override({"batch.B": 3, "batch.total_tokens": 3072})
    assert fewer.concrete(4095).run.steps == 1  # the values of the message fit
    for config, ranks in ((Config().override({"batch.ramp": [[5, 8192]]}), 1), (Config(), 8)):  # no B is small enough
        with pytest.raises(ConfigError, match=r"; lower batch.total_tokens, batch.ramp or batch.B, or prepare more"):
            config.concrete(4095, ranks=ranks)
    with pytest.raises(ConfigError, match=r"more than all .*; lower batch.total_tokens to 8192 or less, or prepare"):
        Config().override({"batch.total_tokens": 16384}).concrete(12287)
    assert Config().override({"batch.total_tokens": 8192}).concrete(12287).run.steps == 1


def test_a_model_of_hugging_face_is_no_target_and_the_message_says_how_to_train_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"not a run; train it further with `daybreak finetune .* --data NAME`"):
        resolve(str(tmp_path))


def test_tokens_at_follows_the_ramp() -> None:
    config = Config().override({"batch.ramp": [[2, 8192], [5, 16384]]})
    assert [config.tokens_at(s) for s in range(7)] == [4096, 4096, 8192, 8192, 8192, 16384, 16384]
    assert Config().tokens_at(0, ranks=8) == 4 * 1024 * 8
    assert Config().override({"batch.total_tokens": 8192}).tokens_at(3, ranks=8) == 8192
