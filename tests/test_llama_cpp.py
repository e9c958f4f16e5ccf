"""llama.cpp itself on an exported GGUF: its ids and its greedy tokens are ours. `make test-llama` builds it first."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from interop_runs import inside, write_run
from tokenizer_kinds import KINDS, TEXTS, their_model

from daybreak.data.tokenizer import get_tokenizer
from daybreak.generate import Sampling, Text, write_all
from daybreak.state.run import Run

llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python, which is built from source")


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_gives_the_ids_of_any_tokenizer(tmp_path: Path, kind: str) -> None:
    library = KINDS[kind][0]()
    their_model(tmp_path / "theirs", library)
    inside(tmp_path, "import", "theirs", "--name", "run", "--run.device", "cpu")
    inside(tmp_path, "export", "runs/run", "--to", "gguf", "m.gguf")
    llama = llama_cpp.Llama(str(tmp_path / "m.gguf"), vocab_only=True, verbose=False)
    library.encode_special_tokens = True
    for text in filter(None, TEXTS):
        ids = library.encode(text, add_special_tokens=False).ids
        assert llama.tokenize(text.encode(), add_bos=False) == ids, text
        assert llama.tokenize(text.encode(), add_bos=True) == library.encode(text).ids, text


@pytest.mark.parametrize("dtype", ["f32", "q8_0"])
@pytest.mark.parametrize("tokenizer", ["gpt2-1024", "gpt2"])
def test_llama_cpp_continues_as_we_do(tmp_path: Path, dtype: str, tokenizer: str) -> None:
    write_run(tmp_path / "run", tokenizer, max_T=256)
    inside(tmp_path, "export", "run", "--to", "gguf", "m.gguf", "--dtype", dtype)
    llama = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=256, logits_all=True, verbose=False, n_threads=1)
    tok = get_tokenizer(tokenizer)
    for text in ("  Hello world, don't\n\n\tnaïve 漢字 🙂 12345", "def f(x):\n    return x\n"):
        assert llama.tokenize(text.encode(), add_bos=False) == tok.encode(text).tolist()
    if dtype != "f32":  # greedy tokens are promised for exact weights only
        return
    prompt = [tok.eot, *map(int, tok.encode("The meaning of life"))]
    text = Text(prompt, Sampling(100, temperature=0.0))
    write_all(Run(tmp_path / "run").load_engine()[0], [text])
    ours = [token.id for token in text.made]
    assert len(set(ours)) > 3
    llama.eval(prompt)
    theirs = []
    for _ in ours:
        theirs.append(int(np.argmax(llama.scores[llama.n_tokens - 1])))
        llama.eval(theirs[-1:])
    assert theirs == ours
