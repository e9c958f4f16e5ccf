"""The help: summaries are whole, every example is a command that exists, and those for a CPU run."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import chats
import numpy as np
import pytest

from daybreak.cli.main import cli, main
from daybreak.config import every_key
from daybreak.images.png import write_png

HELP = {name: command.help or "" for name, command in cli.commands.items()} | {"": cli.help or ""}
EXAMPLES = sorted({
    line.strip().partition("   ")[0]
    for text in HELP.values()
    for line in re.split(r"(?:Examples|First commands):\n", text)[-1].splitlines()
    if line.strip().startswith("daybreak ")
})  # fmt: skip
# Needs what is not here: the network, a GPU, minutes, another program's files, or somebody to end it.
ELSEWHERE = re.compile(r"eval|chat|serve|watch|import|prepare fineweb|bench d|doctor --check|finetune S|"
                       r"train (tiny --name longer|~)|sample my-hf|plan gpt2-1558M --gpu h100 --gpus 8,")  # fmt: skip
STEP = ["--steps", "1", "--eval.tokens", "64"]
SHORTER = {"train": STEP, "finetune": STEP, "bench": ["--seconds", "0"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, llm.c's log, and five runs under the names that the examples use."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "book.txt").write_text("".join(f"{i} men went to mow a meadow.\n" for i in range(4000)))
    chats.write_lines(folder / "chats.jsonl", [{"messages": chats.conversation(i)} for i in range(20)])
    chats.make_model(folder / "SmolLM2")
    (folder / "log124M").mkdir()
    (folder / "log124M/main.log").write_text("s:0 tel:10.9500\ns:0 trl:10.9000 lr:0.000001 norm:20.00\n")
    small = "--model.L 1 --model.C 32 --model.NH 2 --model.max_T 16 --model.V 257 --data book-bytes --batch.B 2 " \
            "--data.tokenizer bytes --eval.tokens 64 --eval.sample_tokens 8 --run.device cpu --steps 2"  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["prepare", "book.txt", "--tokenizer", "bytes"]) == 0
        assert main(["train", "d12", "--name", "tiny", *small.split()]) == 0
        for i in range(8):
            Path("photos").mkdir(exist_ok=True)
            write_png(Path(f"photos/{i}.png"), np.full((16, 16, 3), 20 * i, np.uint8))
        shape = ["--px", "16", "--row-tokens", "96", "--tokenizer", "gpt2-1024"]
        assert main(["prepare", "photos", "--as", "images", *shape]) == 0
        words = ["--data", "photos", "--data.tokenizer", "gpt2-1024", "--model.max_T", "96", "--model.V", "2000"]
        assert main(["train", "d12", "--name", "shapes", *small.split(), *words]) == 0
    for name in ("mine", "a", "b"):
        shutil.copytree(folder / "runs/tiny", folder / "runs" / name)
    return folder


def test_every_summary_is_a_whole_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.partition("Commands:\n")[2].splitlines()
    assert len(lines) == len(cli.commands)
    for line in lines:
        name, said = line.split(maxsplit=1)
        assert HELP[name].splitlines()[0].startswith(said)
        assert said.endswith(".")
        assert not said.endswith("...")


def test_every_verb_has_examples() -> None:
    assert {line.split()[1] for line in EXAMPLES} == set(cli.commands)


@pytest.mark.parametrize("line", EXAMPLES)
def test_an_example_is_a_command(line: str) -> None:
    """Every verb, flag and value in it exists."""
    _, verb, *rest = shlex.split(line)
    cli.commands[verb].make_context(verb, rest)


@pytest.mark.parametrize("line", [line for line in EXAMPLES if not ELSEWHERE.match(line.removeprefix("daybreak "))])
def test_an_example_runs(line: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, verb, *rest = shlex.split(line)
    if verb != "train":  # it makes the run whose name the others use
        shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    assert main([verb, *rest, *SHORTER.get(verb, [])]) == 0


def test_plan_bench_and_import_show_no_flag_of_a_long_run() -> None:
    for verb in ("plan", "bench", "import"):
        shown = {flag for p in cli.commands[verb].params if not getattr(p, "hidden", False) for flag in p.opts}
        assert not shown & {"--profile", "--max-hours"}


def test_the_undotted_flags_of_train_are_the_agreed_ones() -> None:
    flags = {opt for p in cli.commands["train"].params for opt in p.opts if opt.startswith("--")}
    assert flags - {f"--{name}" for name in every_key()} == {
        "--name", "--data", "--steps", "--epochs", "--tokens", "--max-hours", "--fork", "--init-from", "--profile",
        "--json", "--quiet",
        "--verbose", "--print-config",
    }  # fmt: skip
    assert {f"--{name}" for name in every_key()} < flags
