"""Losses of a whole training run with every registered optimizer, so that a change of the numerics is seen.

A change that is meant writes them again: python tests/test_golden_losses.py
"""

import json
import tempfile
from pathlib import Path

import pytest
from conftest import CONFIG, make_dataset

import train_gpt
from optimizers import OPTIMIZERS
from training.logger import read_metrics

GOLDEN = Path(__file__).parent / "golden" / "trainer_losses.json"
STEPS = (1, 10, 40)


def losses(optimizer: str, dataset: Path, folder: Path) -> dict[str, float]:
    """Training losses at some steps of a run with an optimizer's default settings."""
    settings = ["--steps=40", "--eval_every=40", "--checkpoint.every=40", "--dropout=0", f"--optimizer={optimizer}"]
    train_gpt.main([str(CONFIG), f"--data.path={dataset}", f"--log.folder={folder}", f"--name={optimizer}", *settings])
    found = {r["step"]: r["loss"] for r in read_metrics(folder / optimizer / "metrics.jsonl") if "loss" in r}
    return {str(step): found[step] for step in STEPS}


def test_every_registered_optimizer_has_its_losses():
    assert json.loads(GOLDEN.read_text()).keys() == OPTIMIZERS.keys()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_losses_are_those_of_earlier_versions(dataset, tmp_path, optimizer):
    """Another kind of processor may round differently."""
    expected = json.loads(GOLDEN.read_text())[optimizer]
    assert losses(optimizer, dataset, tmp_path) == pytest.approx(expected, abs=2e-4)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        data = make_dataset(Path(place) / "counting")
        found = {name: losses(name, data, Path(place) / "runs") for name in OPTIMIZERS}
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
