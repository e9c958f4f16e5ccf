"""`serve --adapter`: adapters that PEFT made, beside one model; texts are those of transformers with PEFT."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import V, edit, their_decoder
from interop_runs import inside, write_run
from serving import KEY, serving

from daybreak.interop import load_model
from daybreak.serve.adapters import with_adapters

openai = pytest.importorskip("openai", reason="the dev extra installs openai")
peft = pytest.importorskip("peft", reason="the dev extra installs peft")
torch.set_num_threads(1)
PROMPTS = ["The mat", "a", "naïve", "x = 1; y"]
LENGTH = 24
HOW: dict[str, dict[str, Any]] = {
    "one": {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "two": {"r": 7, "lora_alpha": 28, "target_modules": "all-linear", "use_rslora": True},
}
TEMPLATE = "{% for m in messages %}[{{ m.content }}]{% endfor %}"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders `model`, `one` and `two`: a decoder with grouped keys, and adapters of other ranks, scales and
    targets."""
    home = tmp_path_factory.mktemp("adapters")
    their_decoder("llama", home / "model")
    for name, how in HOW.items():
        wrapped = peft.get_peft_model(theirs(home), peft.LoraConfig(task_type="CAUSAL_LM", **how))
        torch.manual_seed(len(name) + how["r"])
        with torch.no_grad():
            for key, x in wrapped.named_parameters():
                if "lora_" in key:
                    x.copy_(0.15 * torch.randn_like(x))
        wrapped.save_pretrained(home / name)
    (home / "two/chat_template.jinja").write_text(TEMPLATE)
    return home


def theirs(home: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(home / "model", dtype=torch.float32)


@pytest.fixture(scope="module")
def want(home: Path) -> dict[tuple[str, str], list[int]]:
    """Greedy tokens of transformers with PEFT, for each model and prompt, up to and without an end of text."""
    found = {}
    for name in ("model", *HOW):
        model = theirs(home) if name == "model" else peft.PeftModel.from_pretrained(theirs(home), home / name)
        for prompt in PROMPTS:
            ids = [256, *prompt.encode()]
            for _ in range(LENGTH):
                with torch.no_grad():
                    ids.append(int(model(torch.tensor([ids])).logits[0, -1, :257].argmax()))
            made = ids[1 + len(prompt.encode()) :]
            found[name, prompt] = made[: made.index(256)] if 256 in made else made
    return found


def test_each_text_is_that_of_its_adapter(home: Path, want: dict[tuple[str, str], list[int]]) -> None:
    """All at once, in any mixture of rows; some leave early."""
    assert len({tuple(want[name, "The mat"]) for name in ("model", *HOW)}) == 3
    named = [f"--adapter={name}={name}" for name in HOW]
    got: dict[tuple[str, str], Any] = {}
    with serving(home, "model", *named, "--rows", "5", DAYBREAK_KEY=KEY) as (_, port):
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0)
        assert [m.id for m in client.models.list()] == ["model", *HOW]
        assert [m.chat for m in client.models.list()] == [False, False, True]

        def ask(name: str, prompt: str, tokens: int) -> None:
            one = client.completions.create(model=name, prompt=prompt, max_tokens=tokens, temperature=0, logprobs=0)
            got[name, prompt] = one.choices[0]

        lengths = {prompt: LENGTH - 5 * i for i, prompt in enumerate(PROMPTS)}
        threads = [threading.Thread(target=ask, args=[*key, lengths[key[1]]]) for key in want]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for (name, prompt), tokens in want.items():
            tokens = tokens[: lengths[prompt]]
            assert got[name, prompt].text == bytes(tokens).decode("utf-8", "replace"), (name, prompt)
            assert len(got[name, prompt].logprobs.tokens) == len(tokens)
        # Prompts are scored by the adapter too.
        scores = {}
        for name in ("model", *HOW):
            one = client.completions.create(model=name, prompt="The mat", max_tokens=0, echo=True, logprobs=0)
            scores[name] = one.choices[0].logprobs.token_logprobs
        model = peft.PeftModel.from_pretrained(theirs(home), home / "two")
        ids = torch.tensor([[256, *b"The mat"]])
        with torch.no_grad():
            logits = model(ids).logits[0].double().log_softmax(-1)
        expected = [float(logits[i, ids[0, i + 1]]) for i in range(7)]
        assert scores["two"] == pytest.approx(expected, abs=1e-4)
        assert scores["one"] != pytest.approx(expected, abs=1e-2)
        # The adapter has a template, and the model has none.
        chat = client.chat.completions.create(
            model="two", messages=[{"role": "user", "content": "Hi"}], max_tokens=3, temperature=0
        )
        assert chat.usage.prompt_tokens == len("[Hi]")
        with pytest.raises(openai.BadRequestError, match="'one' does not chat, since it has no chat template"):
            client.chat.completions.create(model="one", messages=[{"role": "user", "content": "Hi"}])
        said = "model = 'three' is not served here; use 'model' or 'one' or 'two'."
        hello = [{"role": "user", "content": "Hi"}]
        for wrong in (
            lambda: client.completions.create(model="three", prompt="x"),
            lambda: client.chat.completions.create(model="three", messages=hello),
            lambda: client.models.retrieve("three"),
        ):
            with pytest.raises(openai.NotFoundError) as error:
                wrong()
            assert error.value.body["message"] == said


def test_a_run_with_adapters_of_its_own(home: Path, want: dict[tuple[str, str], list[int]], tmp_path: Path) -> None:
    """They are merged, and another adapter goes upon them."""
    import shutil

    for name in ("model", "one", "two"):
        shutil.copytree(home / name, tmp_path / name)
    edit(tmp_path / "one/adapter_config.json", base_model_name_or_path=str(tmp_path / "model"))
    inside(tmp_path, "import", "one", "--name", "one", "--run.device", "cpu")
    with serving(tmp_path, "runs/one", "--adapter", "two=two", DAYBREAK_KEY=KEY) as (_, port):
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0)
        ask = {"prompt": "The mat", "max_tokens": LENGTH, "temperature": 0}
        text = {name: client.completions.create(model=name, **ask).choices[0].text for name in ("one", "two", "one")}
    assert text["one"] == bytes(want["one", "The mat"]).decode("utf-8", "replace")
    merged = peft.PeftModel.from_pretrained(theirs(home), home / "one").merge_and_unload()
    both = peft.PeftModel.from_pretrained(merged, home / "two")
    ids = [256, *b"The mat"]
    for _ in range(LENGTH):
        with torch.no_grad():
            ids.append(int(both(torch.tensor([ids])).logits[0, -1, :257].argmax()))
    made = ids[8:]
    assert text["two"] == bytes(made[: made.index(256)] if 256 in made else made).decode("utf-8", "replace")


def test_without_serve_an_adapter_has_its_own_template_and_ends_too(home: Path, tmp_path: Path) -> None:
    """Of the folder itself and of a run that it becomes, as `serve --adapter` has them."""
    import shutil

    for name in ("model", "two"):
        shutil.copytree(home / name, tmp_path / name)
    edit(tmp_path / "two/adapter_config.json", base_model_name_or_path=str(tmp_path / "model"))
    (tmp_path / "two/generation_config.json").write_text('{"eos_token_id": [97]}')
    inside(tmp_path, "import", "two", "--name", "two", "--run.device", "cpu")
    base = load_model(tmp_path / "model", device="cpu")
    (want,) = (m for n, m in with_adapters(base, "model", {"two": tmp_path / "two"}).items() if n == "two")
    assert base.template is None
    for target in ("two", "runs/two"):
        _, tokenizer, template = load_model(tmp_path / target, device="cpu")
        assert template is not None
        assert want.template is not None
        assert template.source == want.template.source == TEMPLATE
        assert tokenizer.ends == want.tokenizer.ends
        assert 97 in tokenizer.ends


def test_refusals(home: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    for given, said in (
        ("one", "--adapter one must be NAME=DIR, where DIR holds PEFT's adapter_config.json."),
        ("one=nowhere", "must be NAME=DIR"),
        (f"run={home / 'one'}", "the name 'run' is taken; choose another one."),
    ):
        done = inside(tmp_path, "serve", "run", "--adapter", given, code=2)
        assert said in done.stderr
    done = inside(tmp_path, "serve", "run", "--adapter", f"one={home / 'one'}", code=5)
    assert "has more than adapters of linear layers" in done.stderr  # of another model
    assert V > 257
