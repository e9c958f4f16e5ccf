"""Pictures over HTTP: OpenAI's client, refusals, and the page that draws."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from serving import KEY, Browser, serving
from test_images_codec import blobs

from daybreak.cli.main import main
from daybreak.data.tokenizer import get_tokenizer
from daybreak.generate import Sampling, Text, write_all
from daybreak.images.codec import Codec
from daybreak.images.draw import draw, head
from daybreak.images.png import png, write_png
from daybreak.images.prepare import prepare_images
from daybreak.state.run import Run

openai = pytest.importorskip("openai", reason="the dev extra installs openai")
torch.set_num_threads(1)
BROWSER = shutil.which("chromium")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that has seen pictures for one step."""
    folder = tmp_path_factory.mktemp("draws")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("set").mkdir()
        for i, picture in enumerate(blobs(40, 8)):
            write_png(Path(f"set/picture-{i}.png"), picture)
        manifest = prepare_images(["set"], tokenizer="bytes", px=8, val_fraction=0.3)
        tokenizer = get_tokenizer(manifest.tokenizer, Path("data/set-bytes"))
        keys = {"model.L": 1, "model.C": 32, "model.NH": 1, "model.V": tokenizer.V, "batch.B": 4, "eval.every": 0,
                "eval.sample_tokens": 0, "model.max_T": tokenizer.pictures.D, "run.steps": 1}  # fmt: skip
        words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
        assert (
            main(["train", "shapes", "--data", "set-bytes", "--data.tokenizer", "bytes", "--name", "art", *words]) == 0
        )
    return folder


@pytest.fixture(scope="module")
def port(home: Path) -> Iterator[int]:
    with serving(home, "runs/art", "--rows", "3", DAYBREAK_KEY=KEY) as (_, port):
        yield port


@pytest.fixture(scope="module")
def client(port: int) -> Any:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0)


def test_openais_client_gets_the_pictures_that_sample_draws(client: Any, home: Path) -> None:
    """Five pictures on three rows, the i-th with seed + i, as PNG files in base64."""
    engine, tokenizer = Run(home / "runs/art").load_engine(rows=3)
    codec = Codec.load(home / "runs/art", tokenizer)
    asked = {"model": "art", "prompt": "a dog", "n": 5, "response_format": "b64_json", "size": "8x8"}
    answer = client.images.generate(**asked, extra_body={"seed": 5, "top_k": 7})
    wanted = codec.decode(draw(engine, tokenizer, ["a dog"] * 5, Sampling(seed=5, top_k=7)))
    assert [base64.b64decode(each.b64_json) for each in answer.data] == [png(pixels) for pixels in wanted]
    assert len({each.b64_json for each in answer.data}) > 1
    assert answer.created > 1_700_000_000
    one = client.images.generate(model="art", prompt="a dog", extra_body={"seed": 6, "top_k": 7})
    assert [each.b64_json for each in one.data] == [answer.data[1].b64_json]
    assert client.models.list().data[0].draws is True
    assert "img" not in client.completions.create(model="art", prompt="x", max_tokens=9, temperature=5).choices[0].text


def test_a_run_of_an_adapter_draws_with_the_codec_of_its_model(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its matrix B is 0, so it draws what the model draws."""
    monkeypatch.chdir(home)
    assert main(["export", "runs/art", "--to", "hf", "model"]) == 0
    Path("adapter").mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": str(home / "model"), "r": 2, "lora_alpha": 2}
    Path("adapter/adapter_config.json").write_text(json.dumps(config))
    name = "base_model.model.transformer.h.0.attn.c_proj.lora_{}.weight"
    tensors = {name.format("A"): torch.ones(2, 32), name.format("B"): torch.zeros(32, 2)}
    save_file(tensors, "adapter/adapter_model.safetensors")
    assert main(["import", "adapter", "--name", "adapted", "--run.device", "cpu"]) == 0
    for target in ("runs/art", "runs/adapted"):
        assert main(["sample", target, "--prompt", "", "--out", f"{target}-drawn"]) == 0
    drawn = [Path(f"{target}-drawn/picture-1337.png").read_bytes() for target in ("runs/art", "runs/adapted")]
    assert drawn[0] == drawn[1]


def test_texts_and_pictures_are_made_together(home: Path) -> None:
    """Each as it would be alone: a picture takes only codes, and a text only ids of text, with its bias."""
    engine, tokenizer = Run(home / "runs/art").load_engine(rows=3)
    pictures = tokenizer.pictures
    hot = Sampling(pictures.N, temperature=5.0, seed=3)
    biased = replace(hot, logit_bias=((65, 100.0),))

    def made() -> list[Text]:
        codes = range(pictures.first, pictures.boi)
        return [Text(head(tokenizer, pictures, "a"), hot, codes=codes), Text([256, 66], hot, tokenizer),
                Text([256, 66], biased, tokenizer)]  # fmt: skip

    together, alone = made(), made()
    write_all(engine, together)
    for text in alone:
        write_all(engine, [text])
    ids = [[token.id for token in text.made] for text in together]
    assert ids == [[token.id for token in text.made] for text in alone]
    assert np.array_equal(np.array(ids[0]) - pictures.first, draw(engine, tokenizer, ["a"], hot)[0])
    assert max(ids[1]) < 257
    assert ids[2] == [65] * pictures.N


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"response_format": "url"}, "response_format = 'url' must be b64_json."),
        ({"size": "1024x1024"}, "size = '1024x1024' must be 8x8, which 'art' draws."),
        ({"n": 17}, "n = 17 must be a whole number, from 1 to 16."),
        ({"prompt": "x" * 99}, "of 99 characters does not fit into the 13 tokens before a picture; shorten it."),
        ({"quality": "hd"}, "quality = 'hd' is not supported; leave it out."),
        ({"extra_body": {"temperature": -1}}, "temperature = -1 must be a number, from 0 to 100."),
        ({"extra_body": {"sead": 1}}, "unknown field 'sead'; did you mean 'seed'?"),
        ({"extra_body": {"prompt": 7}}, "prompt must be a text; an empty one asks for a picture of any kind."),
    ],
)
def test_refusals(client: Any, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.images.generate(**{"model": "art", "prompt": "a dog", **fields})
    assert said in error.value.message


def test_another_model_is_not_found(client: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="model = 'dall-e-3' is not served here; use 'art'"):
        client.images.generate(model="dall-e-3", prompt="a dog")


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_the_page_draws(port: int, tmp_path: Path) -> None:
    """Pictures stand below the prompt, the newest first; errors show their sentence; text is a click away."""
    assert BROWSER
    browser = Browser(BROWSER, tmp_path)
    try:
        browser.call("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=1, mobile=True)
        browser.call("Page.navigate", url=f"http://127.0.0.1:{port}/")
        browser.until("typeof at === 'function' && at('key').className === 'asked'")
        browser.run(f"at('secret').value = '{KEY}', at('secret').dispatchEvent(new Event('change'))")
        browser.until("document.title === 'art · daybreak' && document.body.className === 'draw'")
        each = "[x.innerText.trim(), x.querySelectorAll('img').length]"
        shown = f"[...document.querySelectorAll('figure')].map(x => {each})"
        wide = "[...document.images].every(x => x.complete && x.naturalWidth === 8 && x.offsetWidth === 128)"
        want: list[list[Any]] = []
        for prompt, n in (("a <b>dog</b>", 3), ("", 1)):
            browser.run(f"at('n').value = {n}, at('prompt').value = '{prompt}', at('form').requestSubmit()")
            browser.until("!running && at('state').textContent.includes('picture')")
            want.insert(0, [prompt or "any picture", n])
            assert browser.run(shown) == want
            browser.until(wide)
        assert browser.run("document.documentElement.scrollWidth") == 390
        browser.run(f"at('prompt').value = '{'x' * 99}', at('form').requestSubmit()")
        browser.until("!running && at('error').textContent.includes('shorten it')")
        assert browser.run("[at('go').textContent, getComputedStyle(at('text')).display]") == ["Draw", "none"]
        browser.run(
            "at('plain').click(), at('max_tokens').value = 5, at('prompt').value = 'On ', at('form').requestSubmit()"
        )
        browser.until(
            "!running && at('text').textContent.startsWith('On ') && at('state').textContent.includes('token')"
        )
        assert browser.run("getComputedStyle(at('pictures')).display") == "none"
    finally:
        browser.close()
