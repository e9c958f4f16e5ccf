"""Special tokens on their way: every end of a text, its start, the filler, the unknown; and reasons of refusals.

The folder is one of transformers, with the special tokens of Llama 3. llama.cpp ends a text at tokens that the keys of
a GGUF file name, and at those whose names it knows.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from decoders import edit, their_decoder
from interop_runs import inside
from test_interop_gguf_in import by_hand, contents
from tokenizer_kinds import LLAMA3, split_by

from daybreak.data.chat import Template
from daybreak.data.tokenizer import get_tokenizer
from daybreak.errors import CheckpointError
from daybreak.interop import open_source
from daybreak.interop.families import FAMILIES, family_named
from daybreak.interop.gguf_vocabulary import read_ends
from daybreak.interop.source import Export
from daybreak.manifest import kept_files
from daybreak.state.run import Run

gguf = pytest.importorskip("gguf", reason="the test extra installs gguf")
transformers = pytest.importorskip("transformers", reason="the test extra installs transformers")
NAMES = ["<|eom_id|>", "<|eot_id|>", "<|pad_id|>", "<|start_id|>"]
CHAT = "{{ bos_token }}{% for m in messages %}<|start_id|>{{ m.role }}\n{{ m.content }}<|eot_id|>{% endfor %}"
Folder = tuple[Path, dict[str, int]]


def made(folder: Path, names: list[str], **special: str) -> dict[str, int]:
    """A Llama of transformers whose tokenizer has these special tokens; their ids, by name."""
    library = split_by(LLAMA3, ignore_merges=True)
    library.add_special_tokens(names)
    their_decoder("llama", folder, "gpt2-512")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(library.get_vocab_size() + 3)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=library, **special)
    tokenizer.save_pretrained(folder)
    return library.get_vocab()


@pytest.fixture(scope="module")
def llama3(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """config.json alone says which tokens end, begin and fill."""
    folder = tmp_path_factory.mktemp("special")
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|pad_id|>"}
    ids = made(folder / "m", NAMES, **names)
    ends = [ids[name] for name in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")]
    said = {"eos_token_id": ends, "pad_token_id": ids["<|pad_id|>"], "bos_token_id": ids["<|begin_of_text|>"]}
    edit(folder / "m/config.json", **said)
    (folder / "m/chat_template.jinja").write_text(CHAT)
    inside(folder, "import", "m", "--name", "a", "--run.device", "cpu")
    inside(folder, "export", "runs/a", "--to", "hf", "out")
    inside(folder, "export", "runs/a", "--to", "gguf", "a.gguf")
    inside(folder, "import", "a.gguf", "--name", "g", "--run.device", "cpu")
    inside(folder, "export", "runs/g", "--to", "hf", "out2")
    inside(folder, "export", "runs/g", "--to", "gguf", "g.gguf")
    return folder, ids


def ends_of(run: Path) -> tuple[int, ...]:
    return Run(run).load_engine()[1].ends


def test_every_end_comes_through_gguf(llama3: Folder) -> None:
    """Three ends and daybreak's own. Each has a key of the file, which is the same when it went through it twice."""
    folder, ids = llama3
    start, text, eom, eot = (ids[n] for n in ("<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"))
    assert ends_of(folder / "runs/a") == (text, eom, eot, start)
    for name in ("a.gguf", "g.gguf"):
        keys = contents(folder / name)[0]
        want = {"bos": start, "eos": eot, "eot": text, "eom": eom, "padding": ids["<|pad_id|>"]}
        assert {key: keys[f"tokenizer.ggml.{key}_token_id"] for key in want} == want
        assert keys["tokenizer.ggml.add_bos_token"] is True
        assert keys["tokenizer.ggml.add_eos_token"] is False
    assert ends_of(folder / "runs/g") == (eot, text, eom, start)
    said = json.loads((folder / "runs/g/generation_config.json").read_text())
    assert said == {"bos_token_id": start, "eos_token_id": [eot, text, eom, start], "pad_token_id": ids["<|pad_id|>"]}


@pytest.mark.parametrize("out", ["out", "out2"])
def test_transformers_finds_each_special_token_in_an_export(out: str, llama3: Folder) -> None:
    """As in the folder that was imported, also in config.json, for programs that read no other file."""
    folder, ids = llama3
    theirs, ours = (transformers.AutoTokenizer.from_pretrained(folder / name) for name in ("m", out))
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours("a <|eot_id|>b").input_ids == theirs("a <|eot_id|>b").input_ids
    chat = [{"role": "user", "content": "x"}]
    assert ours.apply_chat_template(chat, tokenize=False) == theirs.apply_chat_template(chat, tokenize=False)
    was, now = (transformers.AutoConfig.from_pretrained(folder / name) for name in ("m", out))
    assert (now.bos_token_id, now.pad_token_id) == (was.bos_token_id, was.pad_token_id)
    assert set(now.eos_token_id) == {*was.eos_token_id, ids["<|begin_of_text|>"]}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / out)
    assert model.generation_config.eos_token_id == now.eos_token_id
    assert model.generation_config.pad_token_id == ids["<|pad_id|>"]


def test_transformers_reads_them_from_the_gguf_file(llama3: Folder) -> None:
    folder, _ = llama3
    theirs = transformers.AutoTokenizer.from_pretrained(folder / "m").special_tokens_map
    assert transformers.AutoTokenizer.from_pretrained(folder, gguf_file="a.gguf").special_tokens_map == theirs


def test_a_template_finds_the_tokens_that_a_gguf_file_names(llama3: Folder) -> None:
    folder, _ = llama3
    for name in ("m", "a.gguf"):
        source = open_source(folder / name)
        template = Template.of(source.kept, source.path, source.tokenizer)
        assert template is not None
        assert template.special["bos_token"] == "<|begin_of_text|>"
        assert template.special["eos_token"] == "<|eot_id|>"
        assert template.special["pad_token"] == "<|pad_id|>"


def test_adapters_keep_them(llama3: Folder, tmp_path: Path) -> None:
    """Also if the data were prepared with a copy whose generation_config.json names fewer."""
    folder, ids = llama3
    shutil.copytree(folder / "m", tmp_path / "m")
    (tmp_path / "m/generation_config.json").write_text(json.dumps({"eos_token_id": [ids["<|eot_id|>"]]}))
    turns = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d"}]
    (tmp_path / "c.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 40)
    chats = ("--tokenizer", "m/tokenizer.json", "--name", "c", "--row-tokens", "32", "--val-fraction", "0.2")
    inside(tmp_path, "prepare", "c.jsonl", *chats)
    few = ("--steps", "1", "--batch.B", "1", "--eval.tokens", "32", "--eval.sample_tokens", "0", "--run.device", "cpu")
    inside(tmp_path, "finetune", "m", "--data", "c", "--name", "t", "--lora.rank", "2", *few)
    for kind in ("hf", "peft"):
        inside(tmp_path, "export", "runs/t", "--to", kind, kind)
        said = json.loads((tmp_path / kind / "generation_config.json").read_text())
        assert said["pad_token_id"] == ids["<|pad_id|>"], kind
        assert said["bos_token_id"] == ids["<|begin_of_text|>"], kind
        assert transformers.AutoTokenizer.from_pretrained(tmp_path / kind).pad_token == "<|pad_id|>"
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["eos_token_id"] == [ids["<|eot_id|>"], ids["<|begin_of_text|>"]]
    assert config["pad_token_id"] == ids["<|pad_id|>"]
    inside(tmp_path, "export", "runs/t", "--to", "gguf", "t.gguf")
    assert contents(tmp_path / "t.gguf")[0]["tokenizer.ggml.padding_token_id"] == ids["<|pad_id|>"]


def test_files_of_older_transformers_name_them_elsewhere(llama3: Folder, tmp_path: Path) -> None:
    """special_tokens_map.json, which transformers reads too; and a start that is not daybreak's."""
    folder, ids = llama3
    shutil.copytree(folder / "m", tmp_path / "m")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (tmp_path / "m/tokenizer_config.json").write_text(json.dumps(config))
    named = {"bos_token": "<|start_id|>", "eos_token": {"content": "<|eot_id|>", "lstrip": False, "rstrip": False},
             "unk_token": "<|eom_id|>", "pad_token": "<|pad_id|>"}  # fmt: skip
    (tmp_path / "m/special_tokens_map.json").write_text(json.dumps(named))
    plain = json.loads((tmp_path / "m/tokenizer.json").read_text()) | {"post_processor": None}
    (tmp_path / "m/tokenizer.json").write_text(json.dumps(plain))
    inside(tmp_path, "import", "m", "--name", "a", "--run.device", "cpu")
    inside(tmp_path, "export", "runs/a", "--to", "hf", "out")
    want = transformers.AutoTokenizer.from_pretrained(tmp_path / "m").special_tokens_map
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").special_tokens_map == want
    inside(tmp_path, "export", "runs/a", "--to", "gguf", "a.gguf")
    keys = contents(tmp_path / "a.gguf")[0]
    said = {"bos": "<|start_id|>", "eos": "<|eot_id|>", "unknown": "<|eom_id|>", "padding": "<|pad_id|>"}
    assert {key: keys[f"tokenizer.ggml.{key}_token_id"] for key in said} == {k: ids[n] for k, n in said.items()}
    assert keys["tokenizer.ggml.add_bos_token"] is False
    inside(tmp_path, "import", "a.gguf", "--name", "g", "--run.device", "cpu")
    inside(tmp_path, "export", "runs/g", "--to", "hf", "out2")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out2").special_tokens_map == want


def test_an_id_that_the_model_lacks_is_no_filler(llama3: Folder, tmp_path: Path) -> None:
    """transformers would refuse to build its embedding."""
    folder, _ = llama3
    shutil.copytree(folder / "runs/a", tmp_path / "a")
    edit(tmp_path / "a/generation_config.json", pad_token_id=9999)
    edit(tmp_path / "a/tokenizer_config.json", pad_token=...)
    inside(tmp_path, "export", "a", "--to", "hf", "out")
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.pad_token_id is None
    inside(tmp_path, "export", "a", "--to", "gguf", "a.gguf")
    assert "tokenizer.ggml.padding_token_id" not in contents(tmp_path / "a.gguf")[0]


def test_ends_without_a_name_that_llama_cpp_knows_take_the_keys(tmp_path: Path) -> None:
    names = ["<|im_end|>", "<|halt|>", "<|stop|>"]
    ids = made(tmp_path / "m", names, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>")
    edit(tmp_path / "m/config.json", eos_token_id=[ids[name] for name in ("<|end_of_text|>", *names)])
    inside(tmp_path, "import", "m", "--run.device", "cpu")
    inside(tmp_path, "export", "runs/m", "--to", "gguf", "m.gguf")
    keys = contents(tmp_path / "m.gguf")[0]
    got = [keys[f"tokenizer.ggml.{key}_token_id"] for key in ("eos", "eot", "eom")]
    assert got == [ids[name] for name in ("<|end_of_text|>", "<|halt|>", "<|stop|>")]
    back = open_source(tmp_path / "m.gguf").tokenizer
    assert sorted(back.ends) == sorted(ends_of(tmp_path / "runs/m"))


def test_tokens_of_code_take_no_place_of_an_end(tmp_path: Path) -> None:
    """llama.cpp knows them by name. SmolLM2 has such a token."""
    ids = made(tmp_path / "m", ["<reponame>", "<|im_end|>"], bos_token="<|begin_of_text|>", eos_token="<|im_end|>")
    edit(tmp_path / "m/config.json", eos_token_id=ids["<|im_end|>"])
    inside(tmp_path, "import", "m", "--run.device", "cpu")
    inside(tmp_path, "export", "runs/m", "--to", "gguf", "m.gguf")
    inside(tmp_path, "import", "m.gguf", "--name", "g", "--run.device", "cpu")
    end, repo, text = (ids[name] for name in ("<|im_end|>", "<reponame>", "<|end_of_text|>"))
    assert ends_of(tmp_path / "runs/g") == (end, text, repo, ids["<|begin_of_text|>"])
    inside(tmp_path, "export", "runs/g", "--to", "gguf", "g.gguf")
    keys = contents(tmp_path / "g.gguf")[0]
    got = [keys.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    assert got == [end, text, None]
    assert open_source(tmp_path / "g.gguf").tokenizer.ends == ends_of(tmp_path / "runs/g")


# Tokens of a file, keys that name one, and at which of them llama.cpp ends a text.
NAMED: list[tuple[list[str], dict[str, int], list[int]]] = [
    (["a", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"], {"eos": 3}, [3, 1, 2, 3]),
    (["a", "</s>", "<|im_end|>", "b"], {"eos": 3, "eot": 0}, [3, 0, 1, 2]),
    (["<|endoftext|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|fim_prefix|>"], {}, [0, 1, 2, 3]),
    (["<|end|>", "<|return|>"], {}, [0, 1]),
    (["<|end|>", "<|call|>", "<|return|>"], {}, [1, 2]),  # there an answer has several parts, each with its end
    (["<|end|>", "<|calls|>", "<|flush|>"], {"eos": 0}, [0, 1, 2]),
    (["</s>", "<|tool_response>"], {}, [1]),
    (["<eos>", "<end_of_turn>", "<turn|>", "<pad>", "<bos>"], {"eom": 4}, [4, 0, 1, 2]),
]


@pytest.mark.parametrize(("tokens", "keys", "want"), NAMED, ids=str)
def test_llama_cpp_knows_ends_by_name(tokens: list[str], keys: dict[str, int], want: list[int]) -> None:
    said = {f"tokenizer.ggml.{key}_token_id": i for key, i in keys.items()}
    assert read_ends({"tokenizer.ggml.tokens": tokens, **said}) == want


def test_a_file_of_others_ends_where_llama_cpp_does(tmp_path: Path) -> None:
    """One key, and three tokens that it knows by name, of any type."""

    def vocabulary(writer: Any) -> int:
        spec = json.loads(get_tokenizer("bytes").to_json())
        tokens = [*spec["model"]["vocab"], "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>", "<|pad|>"]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(tokens)
        writer.add_token_types([1] * 256 + [3, 1, 4, 3, 3])
        writer.add_token_merges([])
        writer.add_eos_token_id(259)
        writer.add_pad_token_id(260)
        return len(tokens)

    by_hand(tmp_path / "m.gguf", {}, vocabulary=vocabulary)
    inside(tmp_path, "import", "m.gguf", "--run.device", "cpu")
    assert ends_of(tmp_path / "runs/m") == (259, 256, 257, 258)
    kept = kept_files(tmp_path / "runs/m")
    assert json.loads(kept["generation_config.json"])["pad_token_id"] == 260
    named = json.loads(kept["tokenizer_config.json"])
    assert (named["bos_token"], named["eos_token"], named["pad_token"]) == ("<|endoftext|>", "<|eot_id|>", "<|pad|>")
    inside(tmp_path, "export", "runs/m", "--to", "gguf", "back.gguf")
    keys = contents(tmp_path / "back.gguf")[0]
    got = {key: keys[f"tokenizer.ggml.{key}_token_id"] for key in ("eos", "eot", "eom", "padding")}
    assert got == {"eos": 259, "eot": 257, "eom": 258, "padding": 260}


def test_a_run_that_an_older_daybreak_imported_goes_out_as_before(llama3: Folder, tmp_path: Path) -> None:
    """Its folder has the ends alone."""
    folder, ids = llama3
    shutil.copytree(folder / "runs/g", tmp_path / "g")
    (tmp_path / "g/tokenizer_config.json").unlink()
    (tmp_path / "g/chat_template.jinja").unlink()
    text, eot, start = (ids[name] for name in ("<|end_of_text|>", "<|eot_id|>", "<|begin_of_text|>"))
    (tmp_path / "g/generation_config.json").write_text(json.dumps({"eos_token_id": [text, eot, start]}))
    assert ends_of(tmp_path / "g") == (text, eot, start)
    inside(tmp_path, "export", "g", "--to", "hf", "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (start, [text, eot, start], None)
    named = transformers.AutoTokenizer.from_pretrained(tmp_path / "out").special_tokens_map
    assert named == {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    inside(tmp_path, "export", "g", "--to", "gguf", "g.gguf")
    keys = contents(tmp_path / "g.gguf")[0]
    assert [keys[f"tokenizer.ggml.{key}_token_id"] for key in ("bos", "eos", "eot")] == [start, text, eot]
    assert Export(Run(tmp_path / "g").checkpoint()).tokenizer.ends == (text, eot, start)


# Model type -> the reason, for configurations as transformers makes them.
REASONS = {
    "gemma3n_text": "embeds its tokens anew in each layer", "gemma4_text": "embeds its tokens anew in each layer",
    "bamba": "has layers that are no attention", "falcon_h1": "has layers that are no attention",
    "zamba2": "has layers that are no attention", "lfm2": "has layers that are no attention",
    "recurrent_gemma": "has layers that are no attention", "mamba": "has layers that are no attention",
    "jamba": "mixes experts", "mixtral": "mixes experts", "dbrx": "mixes experts", "llama4_text": "mixes experts",
    "gemma": "lacks Gemma 3's norms", "gemma2": "caps its scores or logits",
    "phi3": "joins its matrices, as qkv_proj and gate_up_proj", "olmo2": "has other norms than these",
    "olmo3": "has other norms than these", "granite": "scales its embeddings, scores or logits",
    "cohere2": "scales its embeddings, scores or logits", "ministral3": "scales its queries by their positions",
    "gemma3n": "also has parts that read images or sound", "mistral3": "also has parts that read images or sound",
}  # fmt: skip


@pytest.mark.parametrize("kind", REASONS)
def test_model_types_of_transformers_are_refused_with_a_true_reason(kind: str) -> None:
    config = transformers.AutoConfig.for_model(kind).to_dict()
    with pytest.raises(CheckpointError) as refused:
        family_named(Path("config.json"), config)
    assert str(refused.value) == (
        f"config.json: model_type = {kind!r} is not supported; daybreak computes {', '.join(map(repr, FAMILIES))}, "
        f"and this one {REASONS[kind]}."
    )


@pytest.mark.parametrize(("kind", "key", "reason"), [
    ("qwen3moe", "expert_count", "mixes experts"), ("mamba", "ssm.state_size", "has layers that are no attention"),
    ("lfm2", "shortconv.l_cache", "has layers that are no attention"), ("gemma2", "final_logit_softcapping", "caps"),
    ("olmo2", "block_count", "has other norms"), ("falcon", "block_count", ""),
])  # fmt: skip
def test_a_gguf_file_is_refused_with_the_reason_too(kind: str, key: str, reason: str, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", kind)
    writer.add_uint32(f"{kind}.{key}", 8)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    with pytest.raises(CheckpointError) as refused:
        open_source(tmp_path / "m.gguf")
    said = str(refused.value)
    assert f"general.architecture = {kind!r} is not supported; daybreak computes gemma3, gpt2, " in said
    assert said.endswith("smollm3." if not reason else ".")
    assert (f"smollm3, and this one {reason}" in said) == bool(reason)
