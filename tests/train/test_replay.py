"""Replay and the KL term do what they are for: the signs of the effects, on a toy whose base has learned something."""

from __future__ import annotations

import json
import random

import pytest

from adapt.config import resolve
from adapt.train.fit import fit
from tests import tiny
from tests.recipes import WORDS
from tests.train.test_teacher import logged

DOMAIN = [
    "packet",
    "probes",
    "a",
    "port",
    "and",
    "breaks",
    "into",
    "the",
    "root",
    "shell",
    "of",
    "every",
    "old",
    "server",
    "while",
    "keys",
    "leak",
]


def text(folder, name, words, documents, seed):
    """Sentences in which each word mostly has the same successor: there is something to learn, and to forget."""
    rng, lines = random.Random(seed), []
    for _ in range(documents):
        place, found = rng.randrange(len(words)), []
        for _ in range(rng.randint(20, 60)):
            found.append(words[place])
            place = (place * 3 + 1 + (rng.random() < 0.25) * rng.randrange(len(words))) % len(words)
        lines.append(json.dumps({"text": " ".join(found)}))
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(lines))
    return {"source": {"name": "jsonl", "path": str(path)}, "name": name}


@pytest.mark.slow
def test_replay_and_kl_forget_less_for_a_little_gain(tmp_path):
    """No replay gains most and forgets most; 25 % of replay forgets far less; holding
    on to the base's distribution besides forgets less still."""
    old, new = text(tmp_path, "old", WORDS, 500, 0), text(tmp_path, "new", DOMAIN, 300, 1)
    held_out = [text(tmp_path, "domain", DOMAIN, 40, 2), text(tmp_path, "general", WORDS, 40, 3) | {"guard": True}]

    def run(name, base, train, steps, lr, **over):
        recipe = {
            "run": {"name": name, "dir": str(tmp_path / "runs")},
            "model": {"base": str(base)},
            "data": {"seq_len": 128, "train": train, "eval": held_out},
            "objective": "next_token",
            "optimizer": {"name": "adamw", "lr": lr},
            "schedule": {"name": "rewarm_cosine", "warmup": 0.03},
            "trainer": {"steps": steps, "batch_tokens": 1024, "microbatch": 8},
            "evaluation": {"suites": ["bpb"], "limit": 16},
            "logging": {"tensorboard": False},
            "export": {"dtype": "float32"},
        }
        fit(resolve(recipe | over))
        folder = tmp_path / "runs" / name
        bits = logged(folder, "eval/bpb/domain")
        return folder / "export", bits[0] - bits[steps], logged(folder, "eval/forgetting/general")[steps]

    tiny.save_tiny(tmp_path / "base", hidden_size=64, intermediate_size=128)
    base, *_ = run("base-run", tmp_path / "base", [old], 200, 3e-3)
    replay = [new | {"weight": 0.75}, old | {"weight": 0.25, "replay": True}]
    held = {"objective": {"name": "next_token", "kl_to_base": 3.0}, "teacher": {"base": "self"}}
    _, gain, forgotten = run("none", base, [new], 48, 1e-3)
    _, gain_replay, forgotten_replay = run("replay", base, replay, 48, 1e-3)
    _, gain_held, forgotten_held = run("held", base, replay, 48, 1e-3, **held)
    assert gain > gain_replay > 0.5 * gain
    assert gain_held > 0.5 * gain
    assert forgotten > 2 * forgotten_replay > 0
    assert forgotten_held < forgotten_replay
