"""The command line: what it says on stdout and stderr, its exit codes, and how fast it answers."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from patience import PATIENCE, until

import daybreak
from daybreak import llmc
from daybreak.cli.main import cli, main
from daybreak.config import Config, keys_of, resolve

ROOT = Path(__file__).parents[1]
VERBS = ["prepare", "plan", "train", "finetune", "eval", "sample", "chat", "serve", "import", "export", "report",
         "watch", "doctor", "bench"]  # fmt: skip


@pytest.fixture(autouse=True)
def leave_no_handler() -> Iterator[None]:
    """`main` sets up the log of the process: put it back."""
    log = logging.getLogger("daybreak")
    before = log.handlers, log.level, log.propagate
    yield
    log.handlers, log.level, log.propagate = before


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


# ---------------------------------------------------------------------------------------------------------- errors


def _errors_folder(folder: Path) -> None:
    (folder / "empty").mkdir()
    (folder / "peft").mkdir()
    (folder / "peft/adapter_config.json").write_text("{}")
    config = Config().override({"run.name": "old", "run.steps": 10}).concrete(10 * 4096)
    (folder / "runs/old").mkdir(parents=True)
    (folder / "runs/old/config.toml").write_text(config.to_toml())
    (folder / "runs/new/checkpoints/step-00000100").mkdir(parents=True)
    (folder / "runs/new/config.toml").touch()
    (folder / "new.toml").write_text("schema = 2\n")
    (folder / "typo.toml").write_text("[optim]\nlearningrate = 1e-3\nlr = 1e-3\n")
    (folder / "broken.toml").write_text("[optim\n")
    (folder / "latin1.txt").write_bytes("first\nna\xefve\n".encode("latin-1"))
    (folder / "foreign").mkdir()
    for split in ("train", "val"):
        (folder / f"foreign/book_{split}_000000.bin").write_bytes(bytes(4096))
    (folder / "good.txt").write_text("a b c\n" * 100)
    (folder / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')


RECIPES = "Recipes: gpt2-124M, gpt2-1558M, gpt2-350M, gpt2-774M, gpt3-125M, llama-1B, nanochat-d12, nanochat-d24, " \
          "shapes, smollm-135M, tiny; or a shape such as d12, a recipe.toml, or a run's folder."  # fmt: skip
FORK = "leave it out, or start a new run from the checkpoint with --fork NAME."
ERRORS: list[tuple[str, int, str]] = [
    ("trian", 2, "unknown command 'trian'; did you mean 'train'?"),
    ("d12", 2, "unknown command 'd12'; daybreak --help lists all."),
    ("--versio", 2, "unknown flag --versio; did you mean --version?"),
    ("train tini", 2, f"unknown target 'tini'; did you mean 'tiny'? {RECIPES}"),
    ("train d13", 2, f"unknown target 'd13'; did you mean 'd12'? {RECIPES}"),
    ("train none.toml", 2, "none.toml does not exist; recipes shipped with daybreak: gpt2-124M, gpt2-1558M, gpt2-350M, "
                           "gpt2-774M, gpt3-125M, llama-1B, nanochat-d12, nanochat-d24, shapes, smollm-135M, tiny."),
    ("train new.toml", 2, "new.toml: schema = 2 is of a newer daybreak (this one reads 1); upgrade."),
    ("train typo.toml", 2, "typo.toml: unknown key 'optim.learningrate'; did you mean 'optim.lr'?"),
    ("train broken.toml", 2, "broken.toml cannot be read as TOML: "),
    ("train empty", 2, "empty is not a run: it has no config.toml; give a folder that daybreak train made."),
    ("train old", 2, "unknown target 'old'; to resume the run of that name give its folder: runs/old."),
    ("train d12 extra", 2, "Got unexpected extra argument (extra); see daybreak train --help."),
    ("train --steps 5", 2, "train needs a TARGET: a recipe (tiny), a shape (d12), a recipe.toml or a run's folder."),
    ("train d12 --lr 1", 2, "unknown flag --lr; did you mean --optim.lr?"),
    ("train d12 --optim.warmup 1", 2, "unknown flag --optim.warmup; did you mean --schedule.warmup?"),
    ("train d12 --max-hour 1", 2, "unknown flag --max-hour; did you mean --max-hours?"),
    ("train d12 --steps", 2, "Option '--steps' requires an argument; see daybreak "),
    ("train d12 --steps 1e3", 2, "run.steps = '1e3' must be a whole number; the default is 0."),
    ("train d12 --steps=-5", 2, "run.steps = -5 must be at least 0; the default is 0."),
    ("train d12 --optim.lr fast", 2, "optim.lr = 'fast' must be a number; the default is 0.0006."),
    ("train d12 --optim.lr nan", 2, "optim.lr = nan must be finite; the default is 0.0006."),
    ("train d12 --precision.tf32 1", 2, "precision.tf32 = '1' must be true or false; the default is true."),
    ("train d12 --batch.T 2048", 2,
     "batch.T = 2048 must be at most model.max_T = 1024; lower it or raise model.max_T."),
    ("train d12 --batch.total_tokens 5000", 2,
     "batch.total_tokens = 5000 must be a multiple of batch.B * T = 4 * 1024 = 4096; use 4096 or 8192."),
    ("train d12 --profile 9", 2,
     'run.profile = "9" must be A:B, two step numbers with A below B; the default is "".'),
    ("train d12 --name a/b", 2,
     'run.name = "a/b" must be a plain folder name, without \'/\' and not starting with \'.\' or \'-\'; '
     'the default is "".'),
    ("train d12 --run.device mps", 2,
     'run.device = "mps" is not supported: daybreak trains on the CPU and on NVIDIA GPUs (auto, cpu, cuda or cuda:N); '
     'the default is "auto".'),
    ("train d12 --fork other", 2,
     "--fork other needs an existing run to start from, which d12 is not; give runs/NAME."),
    ("train runs/old --init-from runs/old", 2,
     "--init-from starts at step 0, but runs/old is an existing run; give a recipe or a shape."),
    ("train runs/old --name other", 2,
     "--name other cannot rename runs/old, an existing run; leave it out, or start a new run from its checkpoint with "
     "--fork other."),
    ("train runs/old --batch.T 512", 2, f"batch.T is 1024 in the saved run and cannot become 512; {FORK}"),
    ("train runs/old --run.seed 7", 2, f"run.seed is 42 in the saved run and cannot become 7; {FORK}"),
    ("train runs/old --data other", 2, f'data.name is "stdlib" in the saved run and cannot become "other"; {FORK}'),
    ("train runs/old --fork x --model.L 3", 2, "model.L is 12 in the saved run and cannot become 3; a new shape is "
                                               "trained from the start, without --fork."),
    ("train d12 --name old", 2,
     "run.name = 'old' is taken: runs/old exists; continue it with `daybreak train runs/old` or choose another "
     "--name."),
    ("train d12 --data nothere", 4, "no dataset 'nothere' in /"),
    ("plan", 2, "Missing argument 'TARGET'; see daybreak plan --help."),
    ("plan d12 --json", 2, "unknown flag --json; see daybreak plan --help."),
    ("plan d12 --optim.zap 1", 2, "unknown flag --optim.zap; see daybreak plan --help."),
    ("plan d12 --batch.b 2", 2, "unknown flag --batch.b; did you mean --batch.B?"),
    ("plan d12 --model.C 100", 2, "model.C = 100 must be a multiple of model.NH = 12."),
    ("plan d12 --gpu v100", 2, "--gpu v100 is not known; did you mean "),
    ("plan d12 --gpu h100 --gpus 3 --batch.total_tokens 8192", 2,
     "batch.total_tokens = 8192 must be a multiple of batch.B * T * ranks = 4 * 1024 * 3 = 12288; keep it with "
     "2 ranks, or make it 12288."),
    ("plan d12 --price free", 2, "cost.price = 'free' must be a number; the default is 0.0."),
    ("train d12 --log.sinks mlflow", 2,
     'log.sinks = "mlflow" must be tensorboard or wandb, or both with a comma between; the default is "".'),
    ("report", 2, "Missing argument 'RUNS...'; see daybreak report --help."),
    ("report empty", 2, "empty is not a run; give a folder that daybreak train made, or llm.c's main.log."),
    *((f"{verb} runs/old/config.toml", 2,
       f"runs/old/config.toml is not a run{why}; it is a file of a run: give runs/old.")
      for verb, why in (("report", ""), ("watch", ""), ("doctor", ": it has no config.toml"))),
    ("report good.txt", 2, "good.txt is not a run; give a folder that daybreak train made, or llm.c's main.log."),
    ("report runs", 2, "runs is not a run; it holds 2 of them: give one, such as runs/new."),
    ("train runs", 2, "runs is not a run: it has no config.toml; it holds 2 of them: give one, such as runs/new."),
    ("watch nothere", 2, "nothere is not a run; give a folder that daybreak train made, or llm.c's main.log."),
    ("watch runs/old --port 99999", 2,
     "Invalid value for '--port': 99999 is not in the range 0<=x<=65535; see daybreak watch --help."),
    ("watch runs/old --host 0.0.0.0", 2,
     "--host 0.0.0.0 lets others in: set DAYBREAK_KEY to a secret of 16 or more characters first."),
    ("prepare", 2, "Missing argument 'NAME|FILE...'; see daybreak prepare --help."),
    ("prepare nothere.txt", 4, "'nothere.txt' is neither a file nor a folder; give one that exists."),
    ("prepare latin1.txt", 4, "latin1.txt line 2: byte 0xef is not UTF-8; convert the file, for instance with "
     "`iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW`."),
    ("prepare bad.jsonl", 4, "bad.jsonl line 2 is not valid JSON (Expecting value: line 2 column 1 (char 10)); fix or "
                             "delete the line."),
    ("prepare good.txt --shard-tokens 0", 2, "shard-tokens = 0 must be from 1 to 2147483647."),
    ("prepare good.txt --workers x", 2,
     "Invalid value for '--workers': 'x' is not a valid integer; see daybreak prepare --help."),
    ("sample", 2, "Missing argument 'RUN|HF-DIR'; see daybreak sample --help."),
    ("sample empty", 2, "empty has neither config.json nor DONE_* files; give a run, gpt2, gpt2-medium, gpt2-large, "
     "gpt2-xl, OWNER/NAME, a Hugging Face folder, a .gguf file, a .bin or a checkpoint folder of llm.c."),
    ("sample old", 2, "old does not exist; did you mean runs/old?"),
    ("sample runs/old", 5, "runs/old has no checkpoint yet; train it first: daybreak train runs/old"),
    ("sample runs/old --tokens 0", 2,
     "Invalid value for '--tokens': 0 is not in the range x>=1; see daybreak sample --help."),
    ("import gpt3", 2, "gpt3 does not exist; did you mean 'gpt2'? If not, give gpt2, "),
    ("import gpt2 --model.L 3", 2,
     "--model.L cannot be given to import: the shape comes with the weights; leave it out."),
    ("import empty --step 3", 2, "--step 3 chooses among llm.c's DONE_* checkpoints, and empty is no folder with any."),
    ("export runs/old x", 2, "Missing option '--to'. Choose from: hf, gguf, llmc, peft; see daybreak export --help."),
    ("export runs/old --to hf x --dtype q8_0", 2, "--dtype q8_0 is not one of hf's: fp32, bf16, fp16."),
    ("export runs/old --to hf x", 5, "runs/old has no checkpoint yet; train it first: daybreak train runs/old"),
    ("export runs/old --to gguf good.txt", 5, "runs/old has no checkpoint yet"),
    ("train d12 --learning_rate 1", 2, "unknown flag --learning_rate; did you mean --optim.lr?"),
    ("train d12 --max-steps 1", 2, "unknown flag --max-steps; did you mean --steps?"),
    ("train d12 --dropout 0.1", 2, "unknown flag --dropout; daybreak has nothing like it."),
    ("train d12 --model.dropout 0.1", 2, "unknown flag --model.dropout; daybreak has nothing like it."),
    ("train d12 --model.n_layer 3", 2, "unknown flag --model.n_layer; did you mean --model.L?"),
    ("sample runs/old --min_lr 1", 2, "unknown flag --min_lr; see daybreak sample --help."),
    ("sample runs/old --temp 1", 2, "unknown flag --temp; did you mean --temperature?"),
    ("train d12 --run.device cuda:99", 2,
     "run.device = 'cuda:99' does not exist here (0 CUDA devices); use cpu."),
    ("train d12 --data foreign --run.device cpu", 4,
     "foreign/book_train_000000.bin is not a GPT-2 token shard: magic number 0 instead of 20240520."),
    ("eval", 2, "Missing argument 'RUN|HF-DIR'; see daybreak eval --help."),
    ("eval runs/old", 2, "eval needs --tasks A,B or --leaderboard, --hellaswag FILE, --data NAME, or several of them."),
    ("eval runs/old --tasks ,", 2,
     "eval needs --tasks A,B or --leaderboard, --hellaswag FILE, --data NAME, or several of them."),
    ("eval runs/old --limit 0", 2,
     "Invalid value for '--limit': 0 is not in the range x>=1; see daybreak eval --help."),
    *((f"{verb} runs/new/checkpoints/step-00000100{more}", 2,
       f"runs/new/checkpoints/step-00000100 {said}; it is a checkpoint: give runs/new, and --step 100 to chat, eval, "
       "export, sample and serve.")
      for verb, more, said in (
          ("eval", " --data x", "is neither a run (config.toml) nor a Hugging Face model's folder (config.json)"),
          ("sample", "", "has neither config.json nor DONE_* files"),
          ("export", " --to hf out", "is not a run: it has no config.toml"),
          ("report", "", "is not a run"))),
    ("eval empty --tasks arc", 2,
     "empty is neither a run (config.toml) nor a Hugging Face model's folder (config.json)."),
    ("eval peft --tasks arc", 2, "peft holds adapters alone; `daybreak import peft` makes a run with their model."),
    ("eval runs/old --hellaswag x", 5, "runs/old has no checkpoint yet; train it first: daybreak train runs/old"),
    ("serve", 2, "Missing argument 'RUN|HF-DIR'; see daybreak serve --help."),
    ("serve runs/old", 5, "runs/old has no checkpoint yet; train it first: daybreak train runs/old"),
    ("serve runs/old --port 99999", 2,
     "Invalid value for '--port': 99999 is not in the range 0<=x<=65535; see daybreak serve --help."),
    ("doctor empty", 2, "empty is not a run: it has no config.toml; give a folder that daybreak train made."),
    ("doctor --verbose", 2, "unknown flag --verbose; see daybreak doctor --help."),
    ("bench", 2, "Missing argument 'TARGET'; see daybreak bench --help."),
    ("bench d13", 2, f"unknown target 'd13'; did you mean 'd12'? {RECIPES}"),
    ("bench d12 --seconds -1", 2, "Invalid value for '--seconds': -1.0 is not in the range x>=0.0; see daybreak "
                                  "bench --help."),
    ("report runs/old nothere", 2,
     "nothere is not a run; give a folder that daybreak train made, or llm.c's main.log."),
    ("watch", 2, "Missing argument 'RUNS...'; see daybreak watch --help."),
    ("llmc -b", 2, "-b needs a value: rows per micro-batch and process."),
    ("llmc -t many", 2, "-t many must be a whole number; the default is 1024."),
    ("llmc -y 1", 2, "-y 1 resumes what is in the output folder; give it with -o."),
    ("llmc -bb 4", 2, "unknown flag '-bb'; did you mean '-b'? --help lists all."),
]  # fmt: skip


@pytest.mark.parametrize(("line", "code", "sentence"), ERRORS, ids=[line for line, _, _ in ERRORS])
def test_a_user_error_is_one_sentence_and_a_documented_exit_code(
    line: str, code: int, sentence: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _errors_folder(here)
    before = sorted(here.rglob("*"))
    verb, *rest = line.split()
    assert (llmc.main(rest) if verb == "llmc" else main([verb, *rest])) == code
    out, err = capsys.readouterr()
    assert out == ""
    name = "daybreak.llmc" if verb == "llmc" else "daybreak"
    said = err.removeprefix(f"{name}: ").removesuffix("\n")
    assert err == f"{name}: {said}\n"
    assert "\n" not in said
    if sentence.endswith("."):
        assert said == sentence
    else:
        assert said.startswith(sentence)
    made = [p for p in sorted(here.rglob("*")) if p.name != "data" and p not in before]
    refused = verb == "train" and rest[0] == "runs/old" and "--fork" not in rest
    assert made == ([here / "runs/old/exit.json"] if refused else [])  # no half-made run or dataset


@pytest.mark.parametrize(
    ("raised", "why"),
    [
        (RuntimeError("The NVIDIA driver on your system is too old (found version 11040). Please update your "
                      "GPU driver by downloading ..."),
         ": The NVIDIA driver on your system is too old (found version 11040)"),
        (AssertionError("Torch not compiled with CUDA enabled"), ""),
    ],
)  # fmt: skip
def test_no_card_and_why(
    raised: Exception, why: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def init() -> None:
        raise raised

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.init", init)
    assert main(["train", "d12", "--run.device", "cuda"]) == 2
    said = f"run.device = 'cuda' does not exist here (0 CUDA devices{why}); use cpu."
    assert capsys.readouterr().err == f"daybreak: {said}\n"


def test_a_rocm_build_is_refused(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.version.hip", "6.4")
    assert main(["train", "d12"]) == 2
    said = "this torch is a ROCm build, which daybreak does not support; use an NVIDIA or CPU build."
    assert capsys.readouterr().err == f"daybreak: {said}\n"


@pytest.mark.parametrize(
    ("line", "module", "sentence"),
    [
        ("train d12 --log.sinks wandb --run.device cpu --data foreign", "wandb",
         "log.sinks = 'wandb' needs the package wandb; pip install -e '.[wandb]' in daybreak's folder."),
        ("serve runs/old", "uvicorn", "daybreak serve needs uvicorn: pip install -e '.[serve]' in daybreak's folder."),
    ],
)  # fmt: skip
def test_a_missing_extra_is_named(
    line: str,
    module: str,
    sentence: str,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _errors_folder(here)
    monkeypatch.setitem(sys.modules, module, None)
    assert main(line.split()) == 2
    assert capsys.readouterr().err == f"daybreak: {sentence}\n"


def test_an_unexpected_exception_is_exit_1_with_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    cli.add_command(click.Command("explode", callback=lambda: [][1]))
    try:
        assert main(["explode"]) == 1
    finally:
        del cli.commands["explode"]
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last):\n")
    assert err.endswith("daybreak: unexpected IndexError: list index out of range; a bug in daybreak, please report "
                        "the lines above.\n")  # fmt: skip


def test_ctrl_c_is_exit_130_and_leaves_nothing(here: Path) -> None:
    (here / "big.txt").write_text("how much wood would a woodchuck chuck\n" * 1_500_000)
    argv = [sys.executable, "-m", "daybreak", "prepare", "big.txt", "--workers", "1"]
    # A shell's background job, which a test run may be, starts with SIGINT ignored, and its children inherit that.
    process = subprocess.Popen(
        argv, cwd=here, env=environment(), stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    until(lambda: list(here.glob("data/.*")), process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert err.strip().splitlines()[-1] == "daybreak: interrupted."  # before it: what it would take
    assert not (here / "data/big").exists()


# ------------------------------------------------------------------------------------------------------------ help


def test_help_imports_little(here: Path) -> None:
    """About 160 modules are 0.15 s; torch alone would be two thousand."""
    heavy = ("torch", "numpy", "rich", "tiktoken", "safetensors")
    code = "import sys; from daybreak.cli.main import main; assert main(sys.argv[1:]) == 0; print(*sys.modules)"
    for argv in (["--help"], *([verb, "--help"] for verb in VERBS)):
        command = [sys.executable, "-c", code, *argv]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
        loaded = done.stdout.splitlines()[-1].split()
        assert len(loaded) < 200, (argv, len(loaded))
        assert not {module.partition(".")[0] for module in loaded} & set(heavy)
        assert "Examples:" in done.stdout or "First commands:" in done.stdout


def test_help_without_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    group = capsys.readouterr().out
    assert [line.split()[0] for line in group.partition("Commands:\n")[2].splitlines()] == VERBS
    assert main(["train"]) == 0
    text = capsys.readouterr().out
    first = text.partition("First commands:\n")[2].splitlines()[:3]
    assert [line.strip().partition(" --")[0] for line in first] == [
        "daybreak train tiny",
        "daybreak sample runs/tiny",
        "daybreak train tiny",
    ]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"daybreak {daybreak.__version__}\n"


# ---------------------------------------------------------------------------------------------------------- config


def test_print_config_is_the_whole_configuration(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "train gpt2-124M --name n --steps=30 --optim.lr=1e-3 --schedule.warmup -1 --eval.prompt --x --data a/b"
    assert main([*line.split(), "--print-config"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    config, _ = resolve("gpt2-124M", [("run.name", "n"), ("run.steps", "30"), ("optim.lr", "1e-3"),
                                      ("eval.prompt", "--x"), ("data.name", "a/b")])  # fmt: skip
    assert out == config.to_toml()
    Path("again.toml").write_text(out)
    assert resolve("again.toml")[0] == config
    assert main(["train", "--print-config"]) == 0
    assert capsys.readouterr().out == Config().to_toml()
    assert list(here.iterdir()) == [here / "again.toml"]


@pytest.mark.parametrize("name", keys_of())
def test_every_key_is_a_flag_of_train_and_plan(name: str) -> None:
    for verb in ("train", "plan"):
        assert any(f"--{name}" in p.opts for p in cli.commands[verb].params)


# -------------------------------------------------------------------------------------------------- the verbs at work


def test_prepare_prints_what_it_made(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("pages.jsonl").write_text("".join(json.dumps({"body": f"page {i} " * 20}) + "\n" for i in range(200)))
    line = "prepare pages.jsonl --name p --tokenizer bytes --text-field body --shard-tokens 8000 --data-dir d"
    assert main(line.split()) == 0
    out, err = capsys.readouterr()
    manifest = json.loads(Path("d/p/manifest.json").read_text())
    train, val = manifest["train"], manifest["val"]
    assert train["documents"] + val["documents"] == 200
    assert train["tokens"] + val["tokens"] == train["bytes"] + val["bytes"] + 200  # one EOT a document
    assert out == (
        f"d/p: {train['tokens']:,} training and {val['tokens']:,} validation tokens (bytes) of 200 documents in "
        f"{len(train['shards']) + len(val['shards'])} shards\n"
        f"Validation is {100 * val['tokens'] / (train['tokens'] + val['tokens']):.3g} % of the tokens. "
        "Next: daybreak train d6 --model.V 257 --data p --name p --data.dir d\n"
        "Without a GPU, train the smallest model on so small a text: daybreak train tiny --data.tokenizer bytes "
        "--model.V 257 --data p --name p --data.dir d\n"
    )
    assert err == ""  # no bar where stderr is no terminal


def test_plan_prints_the_run_and_writes_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "tiny", "--batch.B", "8", "--batch.total_tokens", "4096", "--run.device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    Vp, T, C, L = 1152, 128, 128, 2
    assert out.startswith("fits               yes: ")  # the answer first; tables when they are asked for
    assert f"\nmodel              {(Vp + T) * C + L * (12 * C * C + 13 * C) + 2 * C:,} parameters" in out
    assert "\nstep               4,096 tokens: 4 micro-steps of B 8 x T 128 on 1 x cpu" in out
    assert out.endswith("What the memory holds: --verbose\n")
    assert list(here.iterdir()) == []


def test_the_package_is_lazy_and_complete() -> None:
    code = """
import sys, daybreak
assert daybreak.Config().optim.lr == 6e-4 and daybreak.Error.exit_code == 1
assert "torch" not in sys.modules
import daybreak.training.loop
assert daybreak.train is daybreak.training.loop.train
from daybreak import train, load, Run
try:
    load("nowhere")
except daybreak.Error as e:
    assert e.exit_code == 2
try:
    daybreak.nothing
except AttributeError as e:
    assert str(e) == "module 'daybreak' has no attribute 'nothing'"
else:
    raise SystemExit("no AttributeError")
"""
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True)
    assert daybreak.__all__ == sorted(["Config", "Error", "Run", "__version__", "load", "plan", "train"])
    assert dir(daybreak) == daybreak.__all__
