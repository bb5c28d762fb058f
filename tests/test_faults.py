"""Nothing is lost when a file operation fails, or when the program is killed before it."""

import json
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from faults import DONE, every_fault, run_preloaded

from runtime.distributed import ALONE
from training.checkpoint import CheckpointConfig, Checkpointer
from training.logger import MetricsFile, read_metrics


def save(folder: Path, step: int, value: float, background: bool = False) -> None:
    """Save a checkpoint whose weights and state are `value`."""
    checkpointer = Checkpointer(folder, CheckpointConfig(keep=1, background=background), ALONE)
    tensors = {"p": torch.full((5,), value)}, {"p/m": torch.full((5,), value)}
    state = dict(step=step, steps=100, tokens=step, sequences=step, config={}, value=value)
    checkpointer.save(*tensors, state)
    checkpointer.finish()


def newest(folder: Path) -> tuple[int, float] | None:
    """Step and value of the checkpoint that the next start finds; all its parts must belong together."""
    checkpointer = Checkpointer(folder, CheckpointConfig(), ALONE)
    readers = checkpointer.latest()  # a program that only reads does not repair
    checkpointer.repair()
    found = checkpointer.latest()
    assert (found and found.state) == (readers and readers.state)
    if found is None:
        return None
    value = found.state["value"]
    assert all((t == value).all() for t in (found.model()["p"], found.optimizer()["p/m"]))
    return found.state["step"], value


def checkpoints(folder: Path, background: bool) -> None:
    """A first save, one of the next step, which deletes the former one, and a second one of the same step."""

    def reset(*before: tuple[int, float]) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        for step, value in before:
            save(folder, step, value)

    def check(before: tuple[int, float] | None, after: tuple[int, float], outcome: str) -> None:
        found = newest(folder)
        assert found == after if outcome == DONE else found in (before, after), found
        save(folder, *after)  # the next start repeats the step
        assert newest(folder) == after
        assert [p.name for p in folder.iterdir()] == [f"step_{after[0]:07d}"]

    for before, after in ((None, (1, 1.0)), ((1, 1.0), (2, 2.0)), ((2, 2.0), (2, 3.0))):
        first = partial(reset, before) if before else reset
        every_fault(folder, first, partial(save, folder, *after, background), partial(check, before, after))


def metrics(folder: Path) -> None:
    """Each record is in the file at the end, whatever happens to one write; a kill loses at most the last ones."""
    path = folder / "metrics.jsonl"

    def reset() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        path.write_text(json.dumps(dict(step=1)) + "\n" + '{"step": 9}\n{"ste')

    def record() -> None:
        file = MetricsFile(path, resume_step=1)
        for step in (2, 3, 4):
            file.record(dict(step=step))
        if lost := file.close():
            raise OSError(lost)

    def check(outcome: str) -> None:
        steps = [r["step"] for r in read_metrics(path)]
        if outcome == DONE:
            assert steps == [1, 2, 3, 4]
        else:
            assert steps[0] == 1
            record()  # the next start resumes at step 1 again
            assert [r["step"] for r in read_metrics(path)] == [1, 2, 3, 4]

    every_fault(folder, reset, record, check)


SCENARIOS = {
    "checkpoints": partial(checkpoints, background=False),
    "checkpoints in the background": partial(checkpoints, background=True),
    "metrics": metrics,
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_an_error_or_a_kill_before_every_file_operation_loses_nothing(tmp_path, name):
    run_preloaded(__file__, name, str(tmp_path / "work"), folder=tmp_path)


if __name__ == "__main__":
    SCENARIOS[sys.argv[1]](Path(sys.argv[2]))
