"""Finetuning on chats: from messages to answers, whose losses equal PEFT's for each conversation alone."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import recovery
import torch
from chats import CHATML, conversation, make_model, write_lines
from interop_runs import inside

import daybreak.training.samples as samples_file
from daybreak.cli.main import main
from daybreak.data.tokenizer import Tokenizer, get_tokenizer
from daybreak.interop import open_source
from daybreak.interop.huggingface import write_tokenizer
from daybreak.state.run import Run
from daybreak.training.samples import HELD_OUT

torch.set_num_threads(1)
SHORT = ["--run.device", "cpu", "--batch.B", "2", "--batch.total_tokens", "256", "--steps", "6",
         "--eval.tokens", "4096",
         "--optim.lr", "5e-3", "--eval.sample_every", "3", "--eval.sample_tokens", "4", "--lora.rank", "4",
         "--quiet"]  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with a chat template, 60 conversations in rows of 128 tokens, and a run with adapters."""
    transformers = pytest.importorskip("transformers", reason="the test extra installs transformers")
    home = tmp_path_factory.mktemp("chats")
    make_model(home / "model", CHATML)
    V = len(json.loads((home / "model/tokenizer.json").read_text())["model"]["vocab"]) + 40
    torch.manual_seed(1)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.1}  # fmt: skip
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=V, **sizes))
    model.save_pretrained(home / "model")
    write_lines(home / "talk.jsonl", [{"messages": conversation(i, turns=1)} for i in range(60)])
    inside(
        home,
        "prepare",
        "talk.jsonl",
        "--tokenizer",
        "model/tokenizer.json",
        "--row-tokens",
        "128",
        "--val-fraction",
        "0.2",
    )
    inside(home, "finetune", "model", "--data", "talk", *SHORT, "--name", "a")
    return home


def test_rows_and_template_come_with_the_data(home: Path) -> None:
    run = Run(home / "runs/a")
    assert run.config.data.packed
    assert run.config.T == 128  # of the rows, not the model's 256
    assert (home / "runs/a/chat_template.jinja").read_text() == CHATML
    losses = [record["loss"] for record in run.metrics("step")]
    assert losses[-1] < losses[0]


def test_the_next_step_names_the_model(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model is the one beside the tokenizer that `prepare` was given."""
    monkeypatch.chdir(home)
    Path("book.txt").write_text("some text and more of it. " * 200)
    assert main(["prepare", "book.txt", "--tokenizer", "model/tokenizer.json", "--name", "b"]) == 0
    assert (
        "Next: daybreak finetune model --data b; from scratch: daybreak train d6 --model.V" in capsys.readouterr().out
    )


def test_an_export_stops_at_the_end_of_a_turn(home: Path) -> None:
    """The base model ends texts only with its own token. Its chat template says which one ends an answer."""
    import gguf
    import transformers

    own = open_source(home / "model").tokenizer.ends
    for kind, out in (("hf", "out"), ("peft", "adapters"), ("gguf", "out.gguf")):
        inside(home, "export", "runs/a", "--to", kind, out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(home / "out")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end not in own
    for folder in ("out", "adapters"):
        ends = json.loads((home / folder / "generation_config.json").read_text())["eos_token_id"]
        assert ends == [*own, end]
    keys = gguf.GGUFReader(home / "out.gguf").fields
    found = [keys[f"tokenizer.ggml.{name}_token_id"].contents() for name in ("eos", "eot")]
    assert found == [own[0], end]
    assert keys["tokenizer.chat_template"].contents() == CHATML
    for out in ("out", "out.gguf"):
        assert end in open_source(home / out).tokenizer.ends


def test_samples_answer_held_out_questions(home: Path) -> None:
    """The same ones each time, up to where the answer begins."""
    samples = Run(home / "runs/a").metrics("sample")
    assert [sample["step"] for sample in samples] == [3, 6]
    asked = [
        [part.partition("<|im_start|>assistant\n")[0] for part in sample["text"].split("<s>")] for sample in samples
    ]
    assert asked[0] == asked[1]
    said = samples[-1]["text"]
    assert said.count("<|im_start|>assistant\n") == HELD_OUT
    questions = [conversation(i, turns=1)[0]["content"] for i in range(60)]
    assert sum(f"<|im_start|>user\n{question}<|im_end|>" in said for question in questions) == HELD_OUT
    inside(home, "finetune", "model", "--data", "talk", *SHORT, "--name", "asked", "--eval.prompt", "What of λ?")
    (text,) = {s["text"].partition("assistant\n")[0] for s in Run(home / "runs/asked").metrics("sample")}
    assert "<|im_start|>user\nWhat of λ?<|im_end|>\n<|im_start|>" in text


def test_samples_answer_different_questions(home: Path) -> None:
    """Where the first held-out chats share a question, the second sample is of the next other one."""
    (home / "same").mkdir()
    write_lines(home / "same/train.jsonl", [{"messages": conversation(i, turns=1)} for i in range(9)])
    held_out = [conversation(i, turns=1) for i in (20, 20, 20, 21, 22)]
    held_out[1] = [held_out[1][0], {**held_out[1][1], "content": "Another answer."}]
    write_lines(home / "same/val.jsonl", [{"messages": messages} for messages in held_out])
    inside(home, "prepare", "same", "--tokenizer", "model/tokenizer.json", "--row-tokens", "128")
    inside(home, "finetune", "model", "--data", "same", *SHORT, "--steps", "1", "--name", "same")
    said = Run(home / "runs/same").metrics("sample")[-1]["text"]
    times = [said.count(f"<|im_start|>user\n{conversation(i, turns=1)[0]['content']}<|im_end|>") for i in (20, 21, 22)]
    assert times == [1, 1, 0]


def test_data_of_another_tokenizer_is_prepared_with_the_model_file(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """For chats that file is the only way, since the template lies beside it. The advice is followed."""
    monkeypatch.chdir(home)
    Path("its").mkdir()
    write_tokenizer(get_tokenizer("gpt2-600"), 256, Path("its"))
    for name in ("config.json", "model.safetensors"):
        (Path("its") / name).write_bytes((Path("model") / name).read_bytes())
    each = "{{ m.role }}\n{{ m.content }}{{ eos_token }}\n"
    Path("its/chat_template.jinja").write_text(
        "{% for m in messages %}" + each + "{% endfor %}{% if add_generation_prompt %}assistant\n{% endif %}"
    )
    write_lines(Path("pairs.jsonl"), [{"prompt": f"{i}?", "completion": f" {i}"} for i in range(9)])
    assert main(["prepare", "pairs.jsonl", "--tokenizer", "bytes", "--name", "pairs", "--row-tokens", "64"]) == 0
    capsys.readouterr()
    assert main(["finetune", "its", "--data", "pairs", *SHORT]) == 4
    assert capsys.readouterr().err.endswith(
        "data/pairs was made with tokenizer 'bytes', not 'gpt2-600'; prepare the text again under another --name with "
        "--tokenizer its/tokenizer.json.\n"
    )
    assert main(["finetune", "its", "--data", "nothere", *SHORT]) == 4
    assert capsys.readouterr().err.endswith(
        "make it with: daybreak prepare FILE --name nothere --tokenizer its/tokenizer.json\n"
    )
    line = ["--name", "nothere", "--tokenizer", "its/tokenizer.json", "--row-tokens", "128"]
    assert main(["prepare", "talk.jsonl", *line]) == 0
    assert main(["finetune", "its", "--data", "nothere", *SHORT, "--steps", "1", "--name", "its"]) == 0
    capsys.readouterr()
    assert main(["finetune", "runs/its", "--data", "pairs", *SHORT]) == 4  # a run that has the template alone
    said = " with --tokenizer MODEL/tokenizer.json (daybreak export runs/its --to hf MODEL makes it).\n"
    assert capsys.readouterr().err.endswith(said)
    inside(home, "export", "runs/its", "--to", "hf", "MODEL")
    assert main(["prepare", "talk.jsonl", "--name", "more", *line[2:3], "MODEL/tokenizer.json", *line[4:]]) == 0
    assert main(["finetune", "runs/its", "--data", "more", *SHORT, "--steps", "1", "--name", "further"]) == 0
    Path("text.txt").write_text("some text and more of it. " * 90)
    assert main(["prepare", "text.txt", "--tokenizer", "gpt2-600", "--name", "words"]) == 0
    capsys.readouterr()
    assert main(["finetune", "runs/a", "--data", "words", *SHORT]) == 4  # of a run with a file of its own
    assert capsys.readouterr().err.endswith(" under another --name with --tokenizer runs/a/tokenizer.json.\n")


def test_samples_stop_at_the_end_of_a_turn(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []

    def answer(_: Any, tokenizer: Tokenizer, *rest: Any) -> list[str]:
        ends.append([tokenizer.token_bytes(i) for i in tokenizer.ends])
        return ["yes"]

    monkeypatch.chdir(home)
    monkeypatch.setattr(samples_file, "sample_text", answer)
    assert main(["finetune", "model", "--data", "talk", *SHORT, "--steps", "1", "--name", "ends"]) == 0
    assert ends
    assert all(b"<|im_end|>" in each for each in ends)
    assert b"<|im_end|>" not in [open_source(home / "model").tokenizer.token_bytes(i) for i in (2, 600)]


def test_the_loss_is_that_of_each_conversation_alone(home: Path) -> None:
    """Held-out ones before the first step, by transformers, with its own rendering and our masks of the answers."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(home / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(home / "model")
    run = Run(home / "runs/a")
    from daybreak.data.dataset import open_dataset
    from daybreak.data.packing import read_examples

    (folder,) = (home / "data").glob("talk*")
    held_out = read_examples(open_dataset(str(folder)).val, 100)
    assert len(held_out) >= 5
    known = set()
    for i in range(60):
        chat = conversation(i, turns=1)
        known.add(tuple(tokenizer.apply_chat_template(chat, return_dict=False)))
    total, count = 0.0, 0
    for example in held_out:
        ids = [int(x) for part, _ in example for x in part]
        assert tuple(ids) in known
        targets = [int(x) if learned else -100 for part, learned in example for x in part]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(targets[1:]), reduction="sum"))
        count += sum(target >= 0 for target in targets)
    assert run.metrics("val")[0]["loss"] == pytest.approx(total / count, rel=1e-5)


def test_a_killed_run_resumes_bit_for_bit(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 amid the steps of a run with adapters on packed rows."""
    monkeypatch.chdir(home)
    args: list[Any] = ["model", "--data", "talk", *SHORT, "--steps", "60", "--checkpoint.every", "7"]
    inside(home, "finetune", *[str(x) for x in args], "--name", "whole")
    process = recovery.spawn([*args, "--name", "killed"], verb="finetune")
    recovery.wait_for(home / "runs/killed", process, 23)
    process.kill()
    process.wait()
    inside(home, "train", "runs/killed", "--quiet")
    recovery.assert_same(Run(home / "runs/whole"), Run(home / "runs/killed"))


def test_a_few_chats_need_no_flags_for_their_size(home: Path) -> None:
    """Four conversations are two rows, and the defaults would take 16 rows in a step."""
    write_lines(home / "few.jsonl", [{"messages": conversation(i, turns=1)} for i in range(5)])
    prepare = ["prepare", "few.jsonl", "--tokenizer", "model/tokenizer.json"]
    inside(home, *prepare, "--row-tokens", "1024")
    short = ["--data", "few", "--run.device", "cpu", "--epochs", "12", "--optim.lr", "5e-3", "--quiet"]
    for flags in ([], ["--batch.T", "128"]):
        said = inside(home, "finetune", "model", *short, *flags, "--name", "no", code=2).stderr
        assert "the packed rows of few have 1024 tokens, and the model reads at most 256; " in said
        assert "prepare them with --row-tokens 256." in said
    assert "in rows of 256 tokens" in inside(home, *prepare).stdout
    printed = inside(home, "finetune", "model", *short, "--name", "few").stdout
    run = Run(home / "runs/few")
    assert "  daybreak chat runs/few" in printed
    assert "daybreak sample" not in printed
    assert (run.config.batch.B, run.config.batch.total_tokens, run.config.run.steps) == (2, 512, 12)
    losses = [record["loss"] for record in run.metrics("step")]
    assert losses[-1] < losses[0] - 0.1
    said = inside(home, "finetune", "model", *short, "--batch.B", "3", "--name", "no", code=2).stderr
    assert (
        "one step takes 768 tokens, more than all of data.name = 'few'; use --batch.B 2 --batch.total_tokens 512"
        in said
    )
    # With 60 conversations the step is as before: 4 sequences at once, of at most 16.
    printed = inside(home, "finetune", "model", "--data", "talk", "--print-config").stdout
    rows = sum(p.stat().st_size - 1024 for p in (home / "data").glob("talk*/*_train_*.bin")) // 2 // 128
    sizes = tomllib.loads(printed)["batch"]
    assert rows >= 8
    assert (sizes["B"], sizes["total_tokens"]) == (4, min(rows, 16) // 4 * 4 * 128)
