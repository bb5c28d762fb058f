"""Nothing is lost when a file operation fails, or when the program is killed before it."""

import json
import os
import shutil
import sys
import traceback
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import made_once
from faults import DONE, every_fault, run_preloaded
from small_runs import byte_dataset, byte_run

from data.prepare import command as prepare
from data.prepare import output
from eval import export, run
from runtime.distributed import ALONE
from runtime.files import restore_folder
from training.checkpoint import CheckpointConfig, Checkpointer
from training.logger import MetricsFile, read_metrics
from weights import open_trained


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
    """A first save, one of the next step, which deletes the former one, and a second one of the same step.

    Then the second one again, after another was killed between its two renames.
    """

    def reset(*before: tuple[int, float], killed: bool = False) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        for step, value in before:
            save(folder, step, value)
            if killed:
                (folder / f"step_{step:07d}").rename(folder / f".step_{step:07d}.replaced")

    def check(before: tuple[int, float] | None, after: tuple[int, float], outcome: str) -> None:
        found = newest(folder)
        assert found == after if outcome == DONE else found in (before, after), found
        save(folder, *after)  # the next start repeats the step
        assert newest(folder) == after
        assert [p.name for p in folder.iterdir()] == [f"step_{after[0]:07d}"]

    cases = (
        (None, (1, 1.0), False),
        ((1, 1.0), (2, 2.0), False),
        ((2, 2.0), (2, 3.0), False),
        ((2, 2.0), (2, 3.0), True),
    )
    for before, after, killed in cases:
        first = partial(reset, before, killed=killed) if before else reset
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


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def prepare_in_process(arguments: list[str]) -> None:
    """Prepare a dataset. An error must be one line; a traceback ends the process with another exit code."""
    try:
        prepare.main(arguments)
    except SystemExit as stop:
        if not isinstance(stop.code, str) or "\n" in stop.code:
            os._exit(2)
        raise OSError(stop.code) from None
    except Exception:
        os._exit(2)


def preparations(folder: Path, replaces: bool) -> None:
    """At every moment, the old or the new dataset is under its name, or the next start puts it back first of all."""
    root, out, kept = folder / "root", folder / "work" / "owt", folder / "kept"
    root.mkdir(parents=True)
    (root / "a.txt").write_text("to be or not to be\n" * 600)
    arguments = ["text", "--root", str(root), "--out", str(out), "--workers", "1", "--val-fraction", "0.4"]
    prepare.main([*arguments, "--shard-tokens", "9000"])
    (out / ".notes").write_text("of the user")
    old = contents(out)
    out.rename(kept)
    arguments += ["--fresh"] * replaces
    prepare.main(arguments)
    new = contents(out) | ({".notes": b"of the user"} if replaces else {})

    def reset() -> None:
        shutil.rmtree(out.parent)
        out.parent.mkdir()
        if replaces:
            shutil.copytree(kept, out)

    def check(outcome: str) -> None:
        with output.locked(out):
            restore_folder(out)
        if replaces or out.exists():
            assert contents(out) in (old, new)
        prepare.main(arguments)
        assert contents(out) == new
        assert [p.name for p in out.parent.iterdir()] == ["owt"]

    assert every_fault(out.parent, reset, partial(prepare_in_process, arguments), check) > 30


def results(folder: Path) -> None:
    """results.json and the tables are old or new, each of them."""
    facts = dict(checkpoint="x", sha256="a", tokenizer="byte", prefix_token=256, shots=0, metric="acc", stderr=None)
    old, new = (facts | dict(task=task, score=0.5, all_metrics={}) for task in ("boolq", "piqa"))
    out, made = folder / "work", [folder / "old", folder / "new"]

    def write(place: Path, record: dict) -> None:
        run.add_record(place / "results.json", record, dict(task=record["task"]))
        run.write_tables(place, [record], [])

    for place in made:
        place.mkdir(parents=True)
        write(place, old)
    write(made[1], new)

    def reset() -> None:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(made[0], out)

    def check(outcome: str) -> None:
        allowed = [contents(place) for place in made]
        found = contents(out)
        assert all(found[name] in (a[name] for a in allowed) for name in allowed[0])
        write(out, new)
        assert contents(out) == allowed[1]

    assert every_fault(out, reset, partial(write, out, new), check) > 15


def exports(folder: Path) -> None:
    """The folder of an export is complete or absent."""
    made = byte_run(folder / "runs", byte_dataset(folder / "licence"))
    trained, out = open_trained(made, torch.device("cpu")), folder / "work" / "hf"
    export.logits_difference = lambda *_: (0.0, 1.0)  # these two only read
    export.tokenizers_agree = lambda *_: True
    export.export(trained, out)
    complete = contents(out)

    def reset() -> None:
        shutil.rmtree(out.parent)
        out.parent.mkdir()

    def check(outcome: str) -> None:
        if outcome == DONE:
            assert out.exists()
        if not out.exists():
            export.export(trained, out)
        assert contents(out) == complete
        assert [p.name for p in out.parent.iterdir() if not p.name.startswith("tmp-")] == ["hf"]

    assert every_fault(out.parent, reset, lambda: export.export(trained, out), check) > 15


SCENARIOS = {
    "checkpoints": partial(checkpoints, background=False),
    "checkpoints in the background": partial(checkpoints, background=True),
    "metrics": metrics,
    "a preparation": partial(preparations, replaces=False),
    "a preparation that replaces a dataset": partial(preparations, replaces=True),
    "results of an evaluation": results,
    "an export": exports,
}


@pytest.fixture(scope="module")
def failures(tmp_path_factory) -> Path:
    """A file for each scenario, with the error that ended it. One process has the library preloaded and forks."""
    return made_once(tmp_path_factory, "faults", lambda folder: run_preloaded(__file__, str(folder), folder=folder))


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("gcc"), reason="needs gcc and LD_PRELOAD")
@pytest.mark.parametrize("name", SCENARIOS)
def test_an_error_or_a_kill_before_every_file_operation_loses_nothing(failures, name):
    assert (failures / f"{name}.txt").read_text() == "done"


def main(folder: Path) -> None:
    """Do every scenario in a child of its own."""
    for name, scenario in SCENARIOS.items():
        if not os.fork():
            outcome = "done"
            try:
                scenario(folder / name)
            except BaseException:
                outcome = traceback.format_exc()
            (folder / f"{name}.txt").write_text(outcome)
            os._exit(0)
        os.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
