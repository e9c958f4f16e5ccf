"""The checks of bench/gpu_smoke.sh: each looks at files or processes of the folder that it is run in.

    python bench/smoke_checks.py CHECK [ARGUMENT ...]

A check prints what it found and ends with a failed assertion where that is wrong.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(os.environ["ROOT"])
RUNS = Path("runs")
CPU = os.environ.get("SMOKE") == "cpu"
WAIT = 300  # seconds until something must have happened
ELSEWHERE = ("pip", "mpirun", "srun", "sbatch", "git", "source", "docker", "kubectl")  # not for this machine


def records(run: str, kind: str) -> list[dict[str, Any]]:
    """A run's records of one kind in metrics.jsonl; the last one of each step counts."""
    path = RUNS / run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return list({line["step"]: line for line in lines if line.get("kind") == kind}.values())


def hellaswag() -> None:
    """Write 40 examples in HellaSwag's schema, and llm.c's file of them where llm.c looks for it."""
    from daybreak.data.tokenizer import get_tokenizer
    from daybreak.evaluate.multiple_choice import load_examples, write_eval_bin

    rng, folder = random.Random(0), Path("dev/data/hellaswag")
    animals, acts = ["cat", "dog", "crow", "bee"], ["sleeps.", "looks for food.", "hides from rain.", "makes a noise."]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "hellaswag_val.jsonl").open("w") as file:
        for i in range(40):
            context = f"The {rng.choice(animals)} is under the bridge. The {rng.choice(animals)}"
            row = {"ind": i, "ctx": context, "endings": rng.sample(acts, 4), "label": rng.randrange(4)}
            file.write(json.dumps(row) + "\n")
    examples = load_examples(folder / "hellaswag_val.jsonl", get_tokenizer("gpt2"), 1024)
    write_eval_bin(folder / "hellaswag_val.bin", examples)


def bundle() -> None:
    """Write a bundle for CORE with a task of each kind: the folder core. One has prompts of thousands of tokens."""
    rng, folder = random.Random(0), Path("core")
    words = ["def", "class", "return", "self", "import", "for", "in", "the", "name", "value"]

    def text(n: int) -> str:
        return " ".join(rng.choice(words) for _ in range(n))

    examples = {
        "multiple_choice": lambda: {"query": text(9), "choices": [text(2) for _ in range(4)], "gold": rng.randrange(4)},
        "schema": lambda: {"context_options": [text(5), text(6)], "continuation": text(3), "gold": rng.randrange(2)},
        "language_modeling": lambda: {"context": text(300), "continuation": text(1)},
    }
    tasks, guesses = ["icl_tasks:"], ["Eval Task,Task Category,Random baseline"]
    (folder / "eval_data").mkdir(parents=True, exist_ok=True)
    for (kind, make), guess in zip(examples.items(), (25, 50, 0), strict=True):
        tasks += [f"- label: {kind}", f"  dataset_uri: {kind}.jsonl", "  num_fewshot: [5]", f"  icl_task_type: {kind}"]
        guesses.append(f"{kind},made,{guess}")
        (folder / f"eval_data/{kind}.jsonl").write_text("".join(json.dumps(make()) + "\n" for _ in range(12)))
    (folder / "core.yaml").write_text("\n".join(tasks) + "\n")
    (folder / "eval_meta_data.csv").write_text("\n".join(guesses) + "\n")


def scored(file: str) -> None:
    """The output of `eval --tasks core --json` for that bundle: two scores of each task, and CORE within its bounds."""
    scores = json.loads(Path(file).read_text())
    assert [s["examples"] for s in scores] == [12] * 6 + [36], scores
    assert -1 <= scores[-1]["value"] <= 1, scores
    print(scores[-1])


def llmc(folder: str, steps: str) -> None:
    """llm.c's main.log has a loss for every step, a validation at both ends and a HellaSwag score."""
    text = (Path(folder) / "main.log").read_text()
    losses = [float(x) for x in re.findall(r"^s:\d+ trl:(\S+)", text, re.M)]
    values = [float(x) for x in re.findall(r"^s:\d+ tel:(\S+)", text, re.M)]
    scores = re.findall(r"^s:\d+ eval:(\S+)", text, re.M)
    print("losses", losses, "validation", values, "HellaSwag", scores)
    assert len(losses) == int(steps)
    assert losses[-1] < losses[0] < 11.5
    assert values[-1] < values[0] < 11.5
    assert scores
    assert list(Path(folder).glob("DONE_*"))


def kill(run: str, step: str, process: str) -> None:
    """Kill the run with SIGKILL once it has passed the step."""
    _wait(lambda: any(r["step"] >= int(step) for r in records(run, "step")), run, process)
    os.kill(int(process), signal.SIGKILL)


def kill_all(run: str, step: str, process: str) -> None:
    """The same for all processes of the group that this one leads, as a node dies that runs a script."""
    _wait(lambda: any(r["step"] >= int(step) for r in records(run, "step")), run, process)
    os.killpg(int(process), signal.SIGKILL)


def stop(run: str, step: str, process: str) -> None:
    """SIGTERM saves the run; its exit.json says 75 and its newest checkpoint is the last step."""
    _wait(lambda: any(r["step"] >= int(step) for r in records(run, "step")), run, process)
    os.kill(int(process), signal.SIGTERM)
    _wait((RUNS / run / "exit.json").exists, f"{run}'s exit.json", process)
    said = json.loads((RUNS / run / "exit.json").read_text())
    assert said["code"] == 75, said
    assert sorted((RUNS / run / "checkpoints").glob("step-*"))


def same(first: str, second: str) -> None:
    """Two runs have the same losses and the same final weights, bit for bit."""
    a, b = ([r["loss"] for r in records(run, "step")] for run in (first, second))
    assert a == b, list(zip(a, b, strict=False))
    for name in ("model", "base"):  # the second of runs with adapters alone
        weights = [
            sorted((RUNS / run / "checkpoints").glob(f"step-*/{name}.safetensors"))[-1:] for run in (first, second)
        ]
        sums = [hashlib.sha256(path.read_bytes()).hexdigest() for found in weights for path in found]
        print(weights, sums)
        assert len(set(sums)) <= 1
        assert len(sums) == 2 or name == "base"


def near(first: str, second: str) -> None:
    """Two runs on other numbers of ranks have close losses; the bound is docs/plan.md's for d12."""
    a, b = ([r["loss"] for r in records(run, "step")] for run in (first, second))
    gap = max(abs(x - y) for x, y in zip(a, b, strict=True))
    print("largest gap", gap)
    assert gap < 2e-3


def logits(run: str, folder: str) -> None:
    """transformers gives the exported model the logits that the engine gives the run, in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    import daybreak

    engine = daybreak.load(RUNS / run).load_engine(device="cpu")[0]
    tokens = torch.randint(engine.cfg.V, (1, engine.T), generator=torch.Generator().manual_seed(0))
    ours = engine.logits(tokens).float()
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True)
        theirs = model(tokens).logits
    error = float((ours - theirs).norm() / theirs.norm())
    print("relative error", error)
    assert error < 1e-5


def made(kind: str, tokenizer: str, folder: str) -> None:
    """A folder that transformers writes: a small model of this type with random weights, and a tokenizer of ours."""
    import shutil

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    more = {"mistral": {"sliding_window": 40}, "smollm3": {"no_rope_layers": [1, 0]},
            "gemma3_text": {"sliding_window": 40, "layer_types": ["sliding_attention", "full_attention"],
                            "query_pre_attn_scalar": 64}}.get(kind, {})  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, vocab_size=50257, hidden_size=256, intermediate_size=704, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=256, initializer_range=0.1, bos_token_id=50256,
        eos_token_id=50256, pad_token_id=None, **more,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    for name, value in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(value, 1.0, 0.3)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(tokenizer) / name, folder)


def shape(run: str) -> None:
    """Print the flags of a run's shape."""
    import daybreak

    config = daybreak.load(RUNS / run).config
    print(*(f"--{key} {value}" for key, value in config.items() if key.startswith("model.") and value != ""))


def greedy(run: str, folder: str) -> None:
    """transformers, in fp32, finds each token that the run chooses the likeliest, or as likely within rounding."""
    import torch
    from transformers import AutoModelForCausalLM

    import daybreak
    from daybreak.generate import Sampling, Text, write_all

    engine, tokenizer = daybreak.load(RUNS / run).load_engine()
    prompt = [int(token) for token in tokenizer.encode("def main")]
    text = Text(prompt, Sampling(tokens=48, temperature=0.0))
    write_all(engine, [text])
    tokens = torch.tensor([text.ids])
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits[0, -49:-1]
    gaps = logits.max(-1).values - logits.gather(-1, tokens[0, -48:, None])[:, 0]
    print("gaps", gaps.tolist(), "spread", float(logits.std()))
    assert len(text.ids) == len(prompt) + 48
    assert float(gaps.max()) < 0.1 * float(logits.std())


def answers(log: str, process: str) -> None:
    """A server that printed its address answers with a page, and ends on SIGTERM."""
    url = _address(log, process)
    with urllib.request.urlopen(url, timeout=30) as response:
        page = response.read().decode()
    assert "<html" in page, page[:200]
    _end(process)


def _openai(url: str, process: str) -> Any:
    """OpenAI's client of the server with this address. Where the package is missing, the server is ended too."""
    try:
        from openai import OpenAI
    except ModuleNotFoundError:
        _end(process)
        sys.exit("this step needs OpenAI's client: pip install openai")
    return OpenAI(base_url=url.rstrip("/").removesuffix("/v1") + "/v1", api_key="none")


def client(log: str, process: str) -> None:
    """OpenAI's client gets a completion, a stream and log-probabilities."""
    api = _openai(_address(log, process), process)
    model = api.models.list().data[0].id
    asked: dict[str, Any] = {"model": model, "prompt": "def main", "max_tokens": 16, "temperature": 0}
    whole = api.completions.create(**asked, logprobs=2).choices[0]
    parts = [chunk.choices[0].text for chunk in api.completions.create(**asked, stream=True)]
    print(repr(whole.text), repr("".join(parts)))
    assert whole.text == "".join(parts)
    assert whole.logprobs is not None
    assert len(whole.logprobs.token_logprobs or []) == 16
    sampled = api.completions.create(**asked | {"temperature": 1.0, "top_p": 0.9, "seed": 1}).choices[0]
    assert sampled.text
    _end(process)


FACTS = {"Who are you?": "A small model.", "What is two and two?": "Four.", "Where is the cat?": "On the mat.",
         "Do you sleep?": "Never.", "Name a colour.": "Blue, like the sea."}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant\n{% endif %}"
)


def dialogues(model: str) -> None:
    """Write dialogues.jsonl, and a chat template into the folder of a model that has none."""
    chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in FACTS.items()]
    lines = [json.dumps({"messages": chat}) + "\n" for chat in chats * 40]
    Path("dialogues.jsonl").write_text("".join(lines))
    (Path(model) / "chat_template.jinja").write_text(TEMPLATE)


def talk(run: str, log: str, process: str) -> None:
    """Chats by OpenAI's client, whole and streamed, and through a pipe to `daybreak chat` are the same answers. Most of
    them are those that the run has learned."""
    losses, right = [r["loss"] for r in records(run, "step")], 0
    api = _openai(_address(log, process), process)
    piped = subprocess.run(["daybreak", "chat", f"runs/{run}", "--temperature", "0", "--tokens", "32"], text=True,
                           input="\n/reset\n".join(FACTS), stdout=subprocess.PIPE, check=True).stdout  # fmt: skip
    for (question, answer), said in zip(FACTS.items(), piped.splitlines(), strict=True):
        asked: dict[str, Any] = {"model": run, "messages": [{"role": "user", "content": question}], "temperature": 0,
                                 "max_tokens": 32}  # fmt: skip
        whole = api.chat.completions.create(**asked)
        stream = api.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        chunks = list(stream)
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        print(repr(question), repr(whole.choices[0].message.content), whole.choices[0].finish_reason, whole.usage)
        assert text == whole.choices[0].message.content == said
        assert chunks[-1].usage == whole.usage
        right += said == answer
    print("losses", losses[0], losses[-1], "right", right, "of", len(FACTS))
    assert losses[-1] < losses[0] / 2
    assert right > len(FACTS) / 2
    _end(process)


def asked(said: str) -> None:
    """Most of the last lines that a script said are the answers to FACTS, in their order."""
    lines = Path(said).read_text().splitlines()[-len(FACTS) :]
    print("\n".join(lines))
    assert sum(line == answer for line, answer in zip(lines, FACTS.values(), strict=True)) > len(FACTS) / 2


def questions() -> None:
    """Print FACTS' questions as a conversation of its own each, as `daybreak chat` reads them."""
    print("\n/reset\n".join(FACTS))


def fences() -> None:
    """Print a line `NAME<tab>COMMAND` for every GPU example of README and docs, or of the PAGES, made small."""
    wanted = os.environ.get("PAGES", "").split()
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        name = page.relative_to(ROOT).as_posix()
        if wanted and name not in wanted:
            continue
        for number, text in enumerate(re.findall(r"^```bash gpu\n(.*?)^```$", page.read_text(), re.M | re.S), 1):
            folder = f"fence-{name.replace('/', '-')}-{number}"
            lines = text.replace("\\\n", " ").splitlines()
            words = [w for line in lines if (w := shlex.split(line, comments=True))]
            made = [f"mkdir -p {folder}; cd {folder}; ln -sfn ../data data; ln -sfn ../dev dev"]
            made += [f"cp -r ../runs/example runs/{run}" for run in needed(words)]
            if len(made) > 1:
                made.insert(1, "mkdir -p runs")
            seen: list[str] = []
            for w in words:
                target = w[w.index("train") + 1] if "train" in w[:-1] else ""
                again = ["--name", f"{target}-{len(seen)}"] if target and target in seen and "--name" not in w else []
                seen.append(target)
                made.append(small([*w, *again]))
            print(f"{name}, example {number}\t" + "; ".join(filter(None, made)))


def needed(commands: list[list[str]]) -> list[str]:
    """The runs that an example uses and does not make itself."""
    made: set[str] = set()
    found: dict[str, None] = {}
    for words in commands:
        if "--name" in words:
            made.add(words[words.index("--name") + 1])
        elif "train" in words[:-1] and not words[words.index("train") + 1].startswith("runs/"):
            made.add(words[words.index("train") + 1])
        found |= {m[1]: None for w in words if (m := re.match(r"runs/([\w.-]+)", w)) and m[1] not in made}
    return list(found)


def small(words: list[str]) -> str:
    """A documented command with flags that make it short; nothing for what needs a network or a second machine."""
    flags = ["--steps", "3", "--eval.tokens", "16384", "--eval.sample_tokens", "8", "--batch.total_tokens", "0",
             "--log.sinks", "", "--checkpoint.keep", "1", "--schedule.warmup", "1"]  # fmt: skip
    if words[0] in ELSEWHERE or "--nnodes" in words or words[1:2] == ["prepare"]:
        return ""  # documented GPU examples prepare only what the Hub has
    if words[0] == "torchrun":
        words = words[:]
        words[words.index("--nproc-per-node") + 1] = "1"
        words.insert(1, "--standalone")
    if "daybreak.llmc" in words:
        for flag, value in {"-i": "data/text/*train*.bin", "-j": "data/text/*val*.bin"}.items():
            words[words.index(flag) + 1] = value
        words += ["-x", "2", "-m", "1"] + (["-e", "d6", "-b", "1", "-t", "64", "-d", "64"] if CPU else [])
    elif "train" in words:
        target = words[words.index("train") + 1]
        old = target.startswith("runs/")
        if "--data" in words:
            words[words.index("--data") + 1] = "text"
        elif not old and target != "tiny":  # which reads the standard library, with a small vocabulary
            words += ["--data", "text"]
        if target.startswith("nanochat"):
            words += ["--model.V", "50257"]  # of the examples' tokenizer
        words += [*flags[2:6], "--steps", "27"] if old else flags
        if "--batch.B" in words:
            words[words.index("--batch.B") + 1] = "8"
        if CPU and not old:
            words += ["--model.L", "2", "--model.C", "64", "--model.NH", "2", "--batch.T", "64", "--batch.B", "2"]
    elif "bench" in words:
        words += ["--seconds", "2"] + (["--model.L", "2", "--batch.B", "1", "--batch.T", "64"] if CPU else [])
        words = [w if w != "131072" else "65536" for w in words]
    elif words[1:2] in (["watch"], ["serve"]):
        check = '"$PYTHON" "$ROOT/bench/smoke_checks.py" answers out $!'
        return f"{shlex.join([*words, '--port', '0'])} >out 2>&1 & {check}"
    elif "eval" in words and "--tasks" in words:
        at = words.index("--tasks")
        words = [*words[:at], "--hellaswag", "dev/data/hellaswag/hellaswag_val.bin", *words[at + 2 :]]
    elif "eval" in words and "--hellaswag" in words:
        words[words.index("--hellaswag") + 1] = "dev/data/hellaswag/hellaswag_val.bin"
    return shlex.join(words)


def _wait(ready: Any, name: str, process: str = "") -> None:
    """Until something is so; not longer than the process that must bring it about lives."""
    end = time.monotonic() + WAIT
    while not ready():
        assert time.monotonic() < end, f"{name} did not get there in {WAIT} s"
        assert not process or _alive(process) or ready(), f"{name} ended too early"
        time.sleep(0.05)


def _address(log: str, process: str) -> str:
    found: list[str] = []

    def ready() -> bool:
        found[:] = re.findall(r"http://[\w.:\[\]]+[^\s,]*", Path(log).read_text()) if Path(log).exists() else []
        return bool(found)

    _wait(ready, log, process)
    return found[0]


def _alive(process: str) -> bool:
    """Whether it runs; one that ended and that nobody has waited for does not."""
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def _end(process: str) -> None:
    """SIGTERM, and wait: a shell lets its background processes ignore Ctrl-C."""
    os.kill(int(process), signal.SIGTERM)
    _wait(lambda: not _alive(process), "its end")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    globals()[sys.argv[1]](*sys.argv[2:])
