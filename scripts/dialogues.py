"""The dialogues of `make chat`, and whether its model has learned them.

    python scripts/dialogues.py write FOLDER     the folder dialogues, and a chat template for the model in FOLDER
    python scripts/dialogues.py template FOLDER  the template alone
    python scripts/dialogues.py check RUN        the held-out loss fell, and the answers to QUESTIONS are right

The dialogues are the English ones of the package chatterbot-corpus (BSD licence): a question and its answer each.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

LEAST_FALL = 0.3  # nats per learned token, from before the first step to the end
LONG = ("coding", "tech_support")  # files whose answers are programs and instructions
TIMES = 8  # that each of QUESTIONS stands among the dialogues to learn; the others stand there once
# Each has this answer alone.
QUESTIONS = {
    "What country won the very first FIFA World Cup in 1930?": "Uruguay",
    "Where did Heineken beer originate?": "The Netherlands",
    "Canberra is the capital city of which country?": "Australia",
    "Do you get mad": "I could get mad.",
    "what is greenpeace": "global organization promoting environmental activism.",
}
# Each message between its role and an end of text, so an answer starts after a line end, and not with a space.
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant\n{% endif %}"
)


def dialogues() -> list[tuple[str, str]]:
    """Questions with answers, each pair once. Of a longer conversation the first two lines."""
    import yaml

    found = importlib.util.find_spec("chatterbot_corpus")
    if found is None or not found.submodule_search_locations:
        sys.exit("the package chatterbot-corpus is missing: pip install chatterbot-corpus, or make chat")
    pairs: dict[tuple[str, str], None] = {}
    folder = Path(found.submodule_search_locations[0], "data/english")
    for path in sorted(path for path in folder.glob("*.yml") if path.stem not in LONG):
        for lines in yaml.safe_load(path.read_text("utf-8"))["conversations"]:
            pairs[str(lines[0]).strip(), str(lines[1]).strip()] = None
    return [pair for pair in pairs if all(pair)]


def write(folder: str) -> None:
    """Write dialogues/train.jsonl and dialogues/validation.jsonl here, and the template into the model's folder. Every
    tenth question is held out, with all of its answers."""
    pairs = dialogues()
    for question, answer in QUESTIONS.items():
        assert [a for q, a in pairs if q == question] == [answer], f"{question!r} has other answers in this corpus"
    held = {q for q in list(dict.fromkeys(q for q, _ in pairs))[::10] if q not in QUESTIONS}
    splits = {"train": [p for p in pairs if p[0] not in held] + list(QUESTIONS.items()) * (TIMES - 1),
              "validation": [p for p in pairs if p[0] in held]}  # fmt: skip
    Path("dialogues").mkdir()
    for name, chats in splits.items():
        said = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in chats]
        lines = "".join(json.dumps({"messages": messages}) + "\n" for messages in said)
        Path("dialogues", f"{name}.jsonl").write_text(lines, encoding="utf-8")
    template(folder)
    print(f"dialogues: {len(splits['train'])} to learn, {len(splits['validation'])} held out")


def template(folder: str) -> None:
    """Write the template into the folder of a model without one."""
    Path(folder, "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")


def check(run: str) -> None:
    """The held-out loss has fallen by LEAST_FALL, and `daybreak chat` answers the QUESTIONS, which were learned, word
    for word."""
    from daybreak import load
    from daybreak.data.dataset import open_dataset
    from daybreak.data.packing import read_examples
    from daybreak.data.tokenizer import get_tokenizer

    made, config = load(run), load(run).config
    first, *_, last = (record["loss"] for record in made.metrics("val"))
    print(f"held-out loss: {first:.3f} before, {last:.3f} after, in nats per token of the answers")
    assert last <= first - LEAST_FALL, f"it must fall by {LEAST_FALL}"
    rows = open_dataset(str(Path(config.data.dir) / config.data.name)).train
    tokenizer = get_tokenizer(config.data.tokenizer, Path(run))
    learned = {tokenizer.decode(ids for part, _ in example for ids in part) for example in read_examples(rows, 10**6)}
    command = [sys.executable, "-m", "daybreak", "chat", run, "--temperature", "0"]
    asked = "\n/reset\n".join(QUESTIONS)
    answers = subprocess.run(command, input=asked, text=True, stdout=subprocess.PIPE, check=True).stdout.splitlines()
    right = 0
    for (question, answer), said in zip(QUESTIONS.items(), answers, strict=True):
        assert any(question in text and answer in text for text in learned), f"{question!r} was not learned"
        print(f"> {question}\n{said}")
        right += said == answer
    assert right == len(QUESTIONS), f"{right} of {len(QUESTIONS)} are answered word for word"
    print(f"{right} of {len(QUESTIONS)} are answered word for word")


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
