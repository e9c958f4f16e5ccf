"""llama.cpp itself on exported GGUF files: its ids and its greedy tokens are ours. `make test-llama` installs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from decoders import CASES, MAX_T, their_decoder
from interop_runs import inside, write_run
from patience import PATIENCE
from test_interop_gguf_in import by_hand
from test_interop_scores import THEIRS, vocabulary
from tokenizer_kinds import KINDS, TEXTS, their_model

from daybreak.data.tokenizer import get_tokenizer
from daybreak.generate import Sampling, Text, write_all
from daybreak.state.run import Run

xllamacpp = pytest.importorskip("xllamacpp", reason="needs xllamacpp, llama.cpp as a package: make test-llama")


class LlamaCpp:
    """llama.cpp's server with a model, in this process. Everything in fp32: its flash attention would use fp16."""

    def __init__(self, path: Path, n_ctx: int = 256) -> None:
        p = xllamacpp.CommonParams()
        p.model.path, p.n_ctx, p.n_parallel, p.n_gpu_layers, p.port = str(path), n_ctx, 1, 0, 0
        p.cpuparams.n_threads, p.warmup, p.verbosity = 1, False, 0
        p.cache_type_k = p.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        p.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = xllamacpp.Server(p)

    def ask(self, path: str, **body: Any) -> Any:
        request = Request(f"{self.server.listening_address}/{path}", json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        with urlopen(request, timeout=PATIENCE) as answer:
            return json.loads(answer.read())

    def ids(self, text: str, around: bool = False) -> list[int]:
        return self.ask("tokenize", content=text, add_special=around, parse_special=False)["tokens"]

    def greedy(self, prompt: list[int], count: int, ends: bool = False) -> list[int]:
        """The likeliest tokens; ends: up to one that ends the text."""
        how = {"temperature": 0.0, "ignore_eos": not ends, "return_tokens": True, "cache_prompt": False}
        return self.ask("completion", prompt=prompt, n_predict=count, **how)["tokens"]


def greedy(run: Path, prompt: list[int], count: int) -> list[int]:
    """Our own."""
    text = Text(prompt, Sampling(count, temperature=0.0))
    write_all(Run(run).load_engine()[0], [text])
    ours = [token.id for token in text.made]
    assert len(set(ours)) > 3
    return ours


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_gives_the_ids_of_any_tokenizer(tmp_path: Path, kind: str) -> None:
    library = KINDS[kind][0]()
    their_model(tmp_path / "theirs", library)
    inside(tmp_path, "import", "theirs", "--name", "run", "--run.device", "cpu")
    inside(tmp_path, "export", "runs/run", "--to", "gguf", "m.gguf")
    llama = LlamaCpp(tmp_path / "m.gguf")
    library.encode_special_tokens = True
    for text in filter(None, TEXTS):
        ids = library.encode(text, add_special_tokens=False).ids
        assert llama.ids(text) == ids, text
        assert llama.ids(text, around=True) == library.encode(text).ids, text


@pytest.mark.parametrize("of", range(len(THEIRS["models"])))
def test_llama_cpp_gives_the_ids_that_an_import_gives(tmp_path: Path, of: int) -> None:
    """SentencePiece's vocabularies with tokens that were added to them, in a file by hand, in one that went through a
    run, and by SentencePiece itself."""
    by_hand(tmp_path / "m.gguf", {}, vocabulary=lambda writer: vocabulary(writer, of))
    inside(tmp_path, "import", "m.gguf", "--name", "run", "--run.device", "cpu")
    inside(tmp_path, "export", "runs/run", "--to", "gguf", "back.gguf")
    ours = Run(tmp_path / "runs/run").load_engine()[1]
    more = ["x <tool>y", "<tool><tool>  z", " <tool>\n", "a <|im_end|> b", "<s> <ctl>", "漢<tool>🙂"]
    for name in ("m.gguf", "back.gguf"):
        llama = LlamaCpp(tmp_path / name, 32)
        for text in filter(None, [*more, *TEXTS, *THEIRS["texts"]]):
            ids = ours.encode(text).tolist()
            assert llama.ids(text) == ids, (name, text)
            assert llama.ids(text, around=True) == [1, *ids], (name, text)
        for text, ids in zip(THEIRS["texts"], THEIRS["models"][of]["ids"], strict=True):
            assert not text or llama.ids(text) == ids, text


@pytest.mark.parametrize("dtype", ["f32", "q8_0"])
@pytest.mark.parametrize("tokenizer", ["gpt2-1024", "gpt2"])
def test_llama_cpp_continues_as_we_do(tmp_path: Path, dtype: str, tokenizer: str) -> None:
    write_run(tmp_path / "run", tokenizer, max_T=256)
    inside(tmp_path, "export", "run", "--to", "gguf", "m.gguf", "--dtype", dtype)
    llama, tok = LlamaCpp(tmp_path / "m.gguf"), get_tokenizer(tokenizer)
    for text in ("  Hello world, don't\n\n\tnaïve 漢字 🙂 12345", "def f(x):\n    return x\n"):
        assert llama.ids(text) == tok.encode(text).tolist()
    if dtype == "f32":  # greedy tokens are promised for exact weights only
        prompt = [tok.eot, *map(int, tok.encode("The meaning of life"))]
        assert llama.greedy(prompt, 100) == greedy(tmp_path / "run", prompt, 100)


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("mistral", "qwen2-window", "gemma-3-own")])
def test_llama_cpp_computes_the_decoder_family(tmp_path: Path, case: str) -> None:
    """Llama with each scaling of its angles, Qwen 2 and 3, SmolLM3, Gemma 3: the order of rows, keys and biases.

    For GELU llama.cpp has a table in fp16, so that it may differ where two tokens are almost equally likely."""
    their_decoder(case, tmp_path / "theirs", "gpt2-1024")
    inside(tmp_path, "import", "theirs", "--name", "run", "--run.device", "cpu")
    inside(tmp_path, "export", "runs/run", "--to", "gguf", "m.gguf")
    llama, tok = LlamaCpp(tmp_path / "m.gguf"), get_tokenizer("gpt2-1024")
    prompt = [tok.eot, *map(int, tok.encode("The meaning of life"))]
    count = MAX_T - len(prompt)
    assert llama.greedy(prompt, count) == greedy(tmp_path / "runs/run", prompt, count)
