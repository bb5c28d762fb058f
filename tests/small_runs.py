"""Small untrained byte-level runs with everything a real one has, for the tests of eval/."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from conftest import ROOT

from data.shards import write_manifest, write_shard
from model import GPT, GPTConfig
from runtime.distributed import ALONE
from training.checkpoint import CheckpointConfig, Checkpointer

SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=64, vocab_size=257, scale_attn_by_inverse_layer_idx=True)
WORDS = ["river", "stone", "light", "green", "house", "water", "small", "bread", "cloud", "seven", "horse", "music"]


def byte_dataset(folder: Path) -> Path:
    """The licence as byte tokens, in both splits."""
    folder.mkdir(parents=True)
    text = (ROOT / "LICENSE").read_bytes()
    tokens = np.array([256, *text], dtype=np.uint16)
    splits = {s: [write_shard(folder / f"{s}_000000.bin", tokens, len(text))] for s in ("train", "val")}
    write_manifest(folder, {"name": "byte", "vocab_size": 257, "eot": 256}, {"name": "test"}, splits)
    return folder


def small_model(seed: int = 0, config: GPTConfig = SHAPE, poison: bool = True) -> GPT:
    """A model far from uniform predictions, whose padded rows would win every comparison."""
    torch.manual_seed(seed)
    model = GPT(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() >= 2:
                p *= 8
        if poison:
            model.transformer.wte.weight[config.vocab_size :] = 50.0
    return model


def byte_run(folder: Path, dataset: Path, seed: int = 0, name: str = "run", **changes) -> Path:
    """A run folder with one checkpoint of step 30; returns it."""
    config = replace(SHAPE, **changes)
    run = {"model": asdict(config), "data": {"path": str(dataset), "val_windows": 50}, "seed": 1, "name": name}
    run |= {"log": {"wandb": "off", "project": "gpt2"}, "optimizer": "adamw"}
    state = dict(
        step=30, tokens=3000, sequences=50, steps=30, val_loss=5.5, best_val_loss=5.5, train_seconds=1.0, config=run
    )
    checkpointer = Checkpointer(folder / name / "checkpoints", CheckpointConfig(), ALONE)
    checkpointer.save(dict(small_model(seed, config).named_parameters()), {}, state)
    (folder / name / "config.json").write_text(json.dumps(run))
    return folder / name


def phrase(*numbers):
    """Words by their numbers."""
    return " ".join(WORDS[n % len(WORDS)] for n in numbers)


def hellaswag(n):
    """n rows in HellaSwag's format."""
    return [
        dict(
            activity_label=phrase(i),
            ctx_a=f"The {phrase(i + 1)} is [substeps] here.",
            ctx_b=f"then {phrase(i + 2)}",
            endings=[phrase(i, i + 3) + " goes.", phrase(i + 5), phrase(i + 7, i, i + 1) + ".", phrase(2 * i) + "?"],
            label=str(i % 4),
        )
        for i in range(n)
    ]
