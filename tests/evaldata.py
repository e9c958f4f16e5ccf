"""Small evaluation sets: our own sentences in the schemas of the original ones, laid out as repositories of the Hub."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

ANIMALS = ["cat", "dog", "horse", "crow", "carp", "bee", "goat", "mole"]
PLACES = ["in the barn", "by the river", "under the old bridge", "on the roof", "in a wet garden"]
ACTS = ["sleeps until noon.", "looks for food.", "hides from the rain.", "waits for the miller.", "makes a loud noise."]


def hellaswag(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """HellaSwag's records; every fourth has a WikiHow title in it, as there."""
    rng, records = random.Random(seed), []
    for i in range(n):
        a, b = f"The {rng.choice(ANIMALS)} is {rng.choice(PLACES)}.", f"the {rng.choice(ANIMALS)}"
        title = " [title] How to feed it [step] Slowly." if i % 4 == 0 else ""
        endings = [f"{act}{title}" for act in rng.sample(ACTS, 4)]
        records.append({
            "ind": i, "activity_label": "Animals at home", "ctx_a": a, "ctx_b": b, "ctx": f"{a} {b}", "split": "val",
            "split_type": "indomain", "endings": endings, "source_id": f"own~{i}", "label": str(rng.randrange(4)),
        })  # fmt: skip
    return records


def _question(rng: random.Random) -> tuple[str, list[str], int]:
    choices = rng.sample(ANIMALS, 4)
    return f"Which animal lives {rng.choice(PLACES)}?", choices, rng.randrange(4)


def arc(n: int, seed: int) -> list[dict[str, Any]]:
    rng, records = random.Random(seed), []
    for i in range(n):
        question, choices, answer = _question(rng)
        labels = list("1234") if i % 3 == 0 else list("ABCD")
        records.append({"id": f"own_{i}", "question": question, "choices": {"text": choices, "label": labels},
                        "answerKey": labels[answer]})  # fmt: skip
    return records


def mmlu(n: int, seed: int, subject: str) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    asked = [_question(rng) for _ in range(n)]
    return [{"question": q, "subject": subject, "choices": c, "answer": a} for q, c, a in asked]


def piqa(n: int, seed: int) -> list[dict[str, Any]]:
    rng, records = random.Random(seed), []
    for _ in range(n):
        goal, look = f"To find the {rng.choice(ANIMALS)},", f"look {rng.choice(PLACES)}."
        records.append({"goal": goal, "sol1": look, "sol2": "close your eyes.", "label": rng.randrange(2)})
    return records


def winogrande(n: int, seed: int) -> list[dict[str, Any]]:
    rng, records = random.Random(seed), []
    for _ in range(n):
        one, two = rng.sample(ANIMALS, 2)
        sentence = f"The {one} ran from the {two} because the _ was {rng.choice(['afraid', 'angry'])}."
        records.append({"sentence": sentence, "option1": one, "option2": two, "answer": rng.choice("12")})
    return records


def truthful(n: int, seed: int) -> list[dict[str, Any]]:
    rng, records = random.Random(seed), []
    for _ in range(n):
        question, choices, _ = _question(rng)
        targets = {"choices": choices, "labels": [1, 1, 0, 0]}
        records.append({"question": question, "mc1_targets": {"choices": choices, "labels": [1, 0, 0, 0]},
                        "mc2_targets": targets})  # fmt: skip
    return records


def gsm8k(n: int, seed: int) -> list[dict[str, Any]]:
    rng, records = random.Random(seed), []
    for _ in range(n):
        a, b = rng.randrange(2, 9), rng.randrange(2, 9)
        records.append({"question": f"A barn has {a} cats and {b} crows. How many animals is that?",
                        "answer": f"{a} and {b} is <<{a}+{b}={a + b}>>{a + b}.\n#### {a + b}"})  # fmt: skip
    return records


def lambada(n: int, seed: int) -> list[dict[str, Any]]:
    rng, texts = random.Random(seed), []
    for _ in range(n):
        animal = rng.choice(ANIMALS)
        texts.append({"text": f"The {animal} was {rng.choice(PLACES)}, and no one had ever seen that {animal}"})
    return texts


def write_sets(folder: Path, n: int, subjects: list[str]) -> None:
    """Every set with n test examples, as folder/owner/name with a card; MMLU with these subjects."""
    train = max(n, 26)
    sets: dict[str, dict[str, dict[str, list[dict[str, Any]]]]] = {
        "Rowan/hellaswag": {"default": {"train": hellaswag(train, 1), "validation": hellaswag(n)}},
        "EleutherAI/lambada_openai": {"default": {"test": lambada(n, 2)}},
        "allenai/ai2_arc": {
            f"ARC-{c}": {"train": arc(train, 3), "validation": arc(n, 4), "test": arc(n, 5)}
            for c in ("Easy", "Challenge")
        },
        "baber/piqa": {"default": {"train": piqa(train, 6), "validation": piqa(n, 7)}},
        "allenai/winogrande": {"winogrande_xl": {"train": winogrande(train, 8), "validation": winogrande(n, 9)}},
        "truthfulqa/truthful_qa": {"multiple_choice": {"validation": truthful(n, 10)}},
        "openai/gsm8k": {"main": {"train": gsm8k(train, 11), "test": gsm8k(n, 12)}},
        "cais/mmlu": {s: {"dev": mmlu(5, 13, s), "test": mmlu(n, 14, s)} for s in subjects},
    }
    for name, configs in sets.items():
        card = ["---", "configs:"]
        for config, splits in configs.items():
            card += [f"- config_name: {config}", "  data_files:"]
            for split, records in splits.items():
                path = folder / name / config / f"{split}.jsonl"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("".join(json.dumps(record) + "\n" for record in records))
                card += [f"  - split: {split}", f"    path: {config}/{split}.jsonl"]
        (folder / name / "README.md").write_text("\n".join([*card, "---", ""]))
