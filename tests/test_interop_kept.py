"""The files beside a model's weights go with it: chat template, ends of texts, the tokenizer's settings."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import MAX_T, V, edit, their_decoder
from interop_runs import inside, write_shards
from test_interop_hf import their_model

from daybreak.data.chat import template_text
from daybreak.data.tokenizer import get_tokenizer
from daybreak.errors import CheckpointError, DataError
from daybreak.generate import Sampling, Text, write_all
from daybreak.interop import load_model, open_source
from daybreak.state.run import Run

transformers = pytest.importorskip("transformers", reason="the test extra installs transformers")
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
CHAT = [{"role": "user", "content": "Hé\n"}, {"role": "assistant", "content": "Yes."}]


def exported(folder: Path, run: str = "runs/m") -> Any:
    """The tokenizer that transformers loads from the export of a run."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    inside(folder, "export", run, "--to", "hf", "out")
    return transformers.AutoTokenizer.from_pretrained(folder / "out")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_chat_template_stays(family: str, tmp_path: Path) -> None:
    """In a file of its own, as transformers 5 writes it, or in tokenizer_config.json, as older ones do."""
    their_model(tmp_path / "m") if family == "gpt2" else their_decoder("llama", tmp_path / "m")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    theirs.chat_template, theirs.pad_token = TEMPLATE, "<|endoftext|>"
    want = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    theirs.save_pretrained(tmp_path / "m")
    assert (tmp_path / "m/chat_template.jinja").read_text() == TEMPLATE
    inside(tmp_path, "import", "m", "--run.device", "cpu")
    assert (tmp_path / "runs/m/chat_template.jinja").read_text() == TEMPLATE
    assert want == "<user>Hé\n<assistant>Yes.<a>"
    got = exported(tmp_path)
    assert got.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True) == want
    assert (got.pad_token, got.model_max_length) == ("<|endoftext|>", MAX_T)

    (tmp_path / "m/chat_template.jinja").unlink()
    edit(tmp_path / "m/tokenizer_config.json", chat_template=TEMPLATE)
    inside(tmp_path, "import", "m", "--name", "old", "--run.device", "cpu")
    old = exported(tmp_path, "runs/old")
    assert old.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True) == want
    assert template_text(open_source(tmp_path / "m").kept) == TEMPLATE
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": TEMPLATE}]
    edit(tmp_path / "m/tokenizer_config.json", chat_template=named)
    assert template_text(open_source(tmp_path / "m").kept) == TEMPLATE


def test_generation_stops_at_any_of_the_ends(tmp_path: Path) -> None:
    """generation_config.json lists them; config.json's one is for those without. A new document ends a text too."""
    their_decoder("llama", tmp_path / "m")
    prompt, eot = [256, 72, 105], get_tokenizer("bytes").eot

    def made(target: Path) -> tuple[list[int], tuple[int, ...]]:
        engine, tokenizer, _ = load_model(target, device="cpu")
        text = Text(prompt, Sampling(30, temperature=0.0), tokenizer)
        write_all(engine, [text])
        return [token.id for token in text.made], tokenizer.ends

    edit(tmp_path / "m/config.json", eos_token_id=None)
    free, ends = made(tmp_path / "m")
    assert (ends, len(free)) == ((eot,), 30)
    first = next(i for i in range(5, 30) if free[i] not in free[:i])
    edit(tmp_path / "m/config.json", eos_token_id=free[first])
    assert made(tmp_path / "m") == (free[:first], (free[first], eot))
    later = next(i for i in range(first + 1, 30) if free[i] not in free[:i])
    said = {"eos_token_id": [999_999, free[later]], "temperature": 0.6}
    (tmp_path / "m/generation_config.json").write_text(json.dumps(said))
    assert made(tmp_path / "m") == (free[:later], (free[later], eot))

    inside(tmp_path, "import", "m", "--run.device", "cpu")
    assert made(tmp_path / "runs/m") == (free[:later], (free[later], eot))
    inside(tmp_path, "export", "runs/m", "--to", "hf", "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generation_config.eos_token_id == [free[later], eot]
    assert model.generation_config.temperature == 0.6
    answer = model.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False)[0].tolist()
    assert answer == [*prompt, *free[: later + 1]]
    inside(tmp_path, "import", "out", "--name", "again", "--run.device", "cpu")
    assert made(tmp_path / "runs/again") == (free[:later], (free[later], eot))


def test_ids_without_a_token_are_never_generated(tmp_path: Path) -> None:
    """Models have more rows than their tokenizers have ids, Qwen's for example."""
    their_decoder("llama", tmp_path / "m")
    engine, tokenizer, _ = load_model(tmp_path / "m", device="cpu")
    assert (engine.cfg.V, tokenizer.V) == (V, 257)
    bias = tuple((i, 100.0) for i in range(257, V))  # nothing else would be chosen
    greedy, hot = (Text([256], Sampling(20, temperature=t, logit_bias=bias), tokenizer) for t in (0.0, 2.0))
    free = Text([256], Sampling(20, temperature=0.0), tokenizer)
    write_all(engine, [greedy, hot, free])
    assert [token.id for token in greedy.made] == [token.id for token in free.made]
    assert all(token.id < 257 for token in hot.made)


def test_new_runs_with_the_weights_have_it_too(tmp_path: Path) -> None:
    """--init-from a folder or a run, and --fork."""
    their_model(tmp_path / "m")
    (tmp_path / "m/chat_template.jinja").write_text(TEMPLATE)
    write_shards(tmp_path / "shards", 1025)
    inside(tmp_path, "import", "m", "--run.device", "cpu")
    small = ["--data", "shards", "--batch.B", "2", "--eval.tokens", "128", "--eval.sample_tokens", "0", "--steps", "1"]
    shape = [f"--model.{key}={value}" for key, value in {"L": 2, "C": 48, "NH": 3, "max_T": 64, "V": 1025}.items()]
    new = ["train", "d12", *shape, *small, "--data.tokenizer", "gpt2-1024", "--run.device", "cpu", "--init-from"]
    inside(tmp_path, *new, "m", "--name", "a")
    inside(tmp_path, *new, "runs/a", "--name", "b")
    inside(tmp_path, "train", "runs/b", "--fork", "c", "--steps", "2", "--optim.horizon", "2")
    assert Run(tmp_path / "runs/c").metrics("step")[-1]["step"] == 2
    assert exported(tmp_path, "runs/c").chat_template == TEMPLATE


def test_damaged_files_are_named(tmp_path: Path) -> None:
    their_decoder("llama", tmp_path / "m")
    inside(tmp_path, "import", "m", "--run.device", "cpu")
    (tmp_path / "runs/m/generation_config.json").write_text("{")
    said = inside(tmp_path, "sample", "runs/m", code=4).stderr
    assert "generation_config.json is not JSON" in said
    with pytest.raises(DataError, match=r"generation_config\.json is not JSON"):
        get_tokenizer("bytes", tmp_path / "runs/m")
    (tmp_path / "m/chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja cannot be read"):
        open_source(tmp_path / "m")


def test_weights_of_another_shape_name_every_flag(tmp_path: Path) -> None:
    """The flags of the message are those with which the same command trains."""
    (tmp_path / "shards").mkdir()
    write_shards(tmp_path / "shards", 257)
    their_decoder("qwen3", tmp_path / "m")
    start = ("train", "d12", "--init-from", "m", "--data", "shards", "--data.tokenizer", "bytes", "--run.device", "cpu")
    few = ("--steps", "1", "--batch.B", "1", "--eval.tokens", "64", "--eval.sample_tokens", "0")
    said = inside(tmp_path, *start, *few, "--name", "q", code=5).stderr
    flags = re.findall(r"\((--model.*)\)\.", said)[0].split()
    assert not (tmp_path / "runs").exists()
    inside(tmp_path, *start, *few, "--name", "q", *(word.strip('"') for word in flags))
    assert Run(tmp_path / "runs/q").config.model == load_model(tmp_path / "m")[0].cfg
