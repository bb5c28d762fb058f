"""Checkpoints: which are kept, which are read, and errors."""

import errno
import json
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import change_state, finish
from forked import Forked
from safetensors.torch import load_file, save_file

from optimizers import AdamWConfig, build_optimizer
from optimizers.state import load_named_state, named_state
from runtime.distributed import ALONE, start_world
from runtime.files import sha256_of
from training import checkpoint
from training.checkpoint import CheckpointConfig, Checkpointer, CheckpointError, find_damage, open_checkpoint


class Small(torch.nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.matrix = torch.nn.Parameter(torch.randn(width, 4))
        self.gain = torch.nn.Parameter(torch.ones(4))

    def parameter_roles(self):
        return {"matrix": "matrix", "gain": "vector"}


def stepped(model, steps=3):
    optimizer = build_optimizer(model, AdamWConfig())
    for _ in range(steps):
        (model.matrix.sum() ** 2 + (model.gain**3).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def state_of(step, **more):
    return dict(step=step, steps=100, tokens=10 * step, sequences=step, config={}) | more


def save(checkpointer, step, val_loss=None, model=None):
    model = model or Small()
    state = state_of(step, val_loss=val_loss)
    checkpointer.save(dict(model.named_parameters()), named_state(stepped(model), model), state)


CHANGED = "state.json was changed: it does not match its own sha256"
NO_FILES = "state.json does not name the files of a checkpoint"
NO_NUMBERS = (
    "state.json holds something else than numbers under step, tokens, sequences, val_loss, best_val_loss, train_seconds"
)


def edit(folder, old, new):
    """Change the text of a state.json, as somebody with an editor would."""
    path = folder / "state.json"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def link(path, target):
    path.unlink()
    path.symlink_to(target)


def steps_in(folder):
    return sorted(int(p.name[5:]) for p in folder.iterdir())


def test_the_latest_the_best_and_milestones_are_kept(tmp_path):
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(keep=2, milestone_every=30), ALONE)
    for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0), (40, None), (50, 2.5), (60, 2.4), (70, 2.2), (80, 2.6)):
        save(checkpointer, step, loss)
    assert steps_in(tmp_path) == [20, 30, 60, 70, 80]
    assert checkpointer.latest().state["step"] == 80


def test_state_is_restored_by_name(tmp_path):
    model = Small()
    optimizer = stepped(model)
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(), ALONE)
    checkpointer.save(dict(model.named_parameters()), named_state(optimizer, model), state_of(3))
    found = checkpointer.latest()
    assert set(found.optimizer()) == {f"{n}/{k}" for n in ("matrix", "gain") for k in ("step", "exp_avg", "exp_avg_sq")}
    other = Small()
    other.load_state_dict(found.model())
    continued = build_optimizer(other, AdamWConfig())
    load_named_state(continued, other, found.optimizer())
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        for key, value in optimizer.state[a].items():
            assert torch.equal(value, continued.state[b][key])


def test_state_of_other_shapes_or_parameters_is_an_error(tmp_path):
    model, wider = Small(), Small(width=5)
    saved = named_state(stepped(model), model)
    with pytest.raises(ValueError, match=r"matrix/exp_avg: shape \(3, 4\), not \(5, 4\)"):
        load_named_state(build_optimizer(wider, AdamWConfig()), wider, saved)
    del saved["gain/step"], saved["gain/exp_avg"], saved["gain/exp_avg_sq"]
    with pytest.raises(ValueError, match=r"optimizer state of gain: saved nothing, .* it belongs to another optimizer"):
        load_named_state(build_optimizer(model, AdamWConfig()), model, saved)


@pytest.mark.parametrize(
    "break_it, reason",
    [
        (lambda f: os.truncate(f / "model.safetensors", 50), "model.safetensors does not match its sha256"),
        (lambda f: (f / "optimizer-0.safetensors").unlink(), "optimizer-0.safetensors is missing"),
        (lambda f: link(f / "model.safetensors", "/dev/zero"), "model.safetensors is missing"),
        (lambda f: (f / "state.json").write_text('{"step":'), "state.json cannot be read: not one of this program's"),
        (lambda f: (f / "state.json").unlink(), "state.json cannot be read: No such file or directory"),
        (lambda f: edit(f, '"step": 2', '"step": 1'), CHANGED),
        (lambda f: edit(f, '"val_loss": null', '"val_loss": 0.1'), CHANGED),
        (lambda f: edit(f, "optimizer-0", "optimizer-1"), CHANGED),
        (lambda f: change_state(f, step=3), "state.json is that of step 3"),
        (lambda f: change_state(f, sha256={"model.safetensors": "", "../x": ""}), NO_FILES),
        (lambda f: change_state(f, sha256={"/dev/zero": ""}), NO_FILES),
        (lambda f: change_state(f, sha256=[]), NO_FILES),
        (lambda f: change_state(f, tokens="20"), NO_NUMBERS),
        (lambda f: change_state(f, sequences=-1), NO_NUMBERS),
        (lambda f: change_state(f, best_val_loss="low"), NO_NUMBERS),
        (lambda f: change_state(f, format=1), "state.json has format 1, and this version reads 2"),
    ],
)
def test_damage_is_named_and_the_checkpoint_before_is_used(tmp_path, capsys, break_it, reason):
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(), ALONE)
    save(checkpointer, 1)
    save(checkpointer, 2)
    break_it(tmp_path / "step_0000002")
    assert find_damage(tmp_path / "step_0000002") == reason
    assert checkpointer.latest().state["step"] == 1
    assert f"step_0000002 is damaged ({reason}); trying the one before it" in capsys.readouterr().err


def test_damaged_checkpoints_of_later_steps_do_not_replace_a_new_one(tmp_path):
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(keep=1), ALONE)
    save(checkpointer, 10)
    save(checkpointer, 20)
    os.truncate(tmp_path / "step_0000020" / "model.safetensors", 50)
    (tmp_path / "step_0000030").mkdir()
    save(checkpointer, 12)
    save(checkpointer, 14)
    assert steps_in(tmp_path) == [14, 20, 30]
    assert checkpointer.latest().state["step"] == 14


def test_only_losses_that_were_measured_on_the_same_are_compared(tmp_path):
    """Step 1 has the lowest loss, but on other validation data than the newest step."""
    checkpointer, model = Checkpointer(tmp_path, CheckpointConfig(keep=1), ALONE), Small()
    for step, loss, data in ((1, 0.5, "a"), (2, 3.0, "b"), (3, 4.0, "b"), (4, 5.0, "b")):
        state = state_of(step, val_loss=loss, measured_on={"data": data})
        checkpointer.save(dict(model.named_parameters()), {}, state)
    assert steps_in(tmp_path) == [2, 4]


def test_a_reader_of_the_weights_reads_no_other_file(tmp_path):
    save(Checkpointer(tmp_path / "checkpoints", CheckpointConfig(), ALONE), 1)
    folder = tmp_path / "checkpoints" / "step_0000001"
    (folder / "optimizer-0.safetensors").write_bytes(b"of no interest")
    for path in (tmp_path, folder):
        assert open_checkpoint(path, {"model.safetensors"}).model().keys() == {"matrix", "gain"}
        with pytest.raises(CheckpointError, match="is damaged"):
            open_checkpoint(path)


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_the_permissions_of_all_files_follow_the_umask(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        save(Checkpointer(tmp_path, CheckpointConfig(), ALONE), 1)
    finally:
        os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "step_0000001").iterdir()} == {mode}


def test_a_file_of_tensors_is_what_its_library_writes(tmp_path):
    """Every dtype, 0-d and empty tensors, and one that is not contiguous."""
    numbers = torch.arange(-6, 6).view(3, 4)
    tensors = {str(t): numbers.to(t) for t in checkpoint.DTYPES}
    tensors |= {"0-d": torch.tensor(2.5), "empty": torch.empty(0, 3), "turned": numbers.t()}
    digest = checkpoint.write_tensors(tmp_path / "ours", tensors)
    assert digest == sha256_of(tmp_path / "ours")
    found = load_file(tmp_path / "ours")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[k], t) and found[k].dtype == t.dtype for k, t in tensors.items())
    save_file({k: t.contiguous() for k, t in tensors.items()}, tmp_path / "theirs")
    assert (tmp_path / "ours").stat().st_size == (tmp_path / "theirs").stat().st_size


def test_a_folder_that_the_file_system_cannot_flush_is_saved_all_the_same(tmp_path, monkeypatch):
    """Folders on CIFS give EINVAL, on some FUSE systems ENOTSUP or ENOSYS; EIO and a full disk remain errors."""
    sync, code = os.fsync, errno.EINVAL

    def fsync(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(code, os.strerror(code))
        sync(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    for step, code in enumerate((errno.EINVAL, errno.ENOTSUP, errno.ENOSYS), 1):  # noqa: B007  fsync reads it
        save(Checkpointer(tmp_path, CheckpointConfig(), ALONE), step)
    assert steps_in(tmp_path) == [2, 3]
    for code in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
        with pytest.raises(CheckpointError, match=os.strerror(code)):
            save(Checkpointer(tmp_path, CheckpointConfig(), ALONE), 4)


def test_if_every_checkpoint_is_damaged_it_is_an_error(tmp_path):
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(), ALONE)
    save(checkpointer, 1)
    os.truncate(tmp_path / "step_0000001" / "state.json", 10)
    with pytest.raises(CheckpointError, match="every checkpoint in .* is damaged; repair one, or start .*--fresh"):
        checkpointer.latest()


def test_the_folder_of_a_killed_save_is_ignored_and_replaced(tmp_path):
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(), ALONE)
    (tmp_path / "tmp-step_0000002").mkdir()
    (tmp_path / "tmp-step_0000002" / "model.safetensors").write_bytes(b"half")
    assert checkpointer.latest() is None
    save(checkpointer, 2)
    assert steps_in(tmp_path) == [2]


def test_a_folder_without_a_checkpoint_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="neither a checkpoint"):
        open_checkpoint(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    (other / "state.json").write_text(json.dumps({"iter_num": 3}))
    with pytest.raises(CheckpointError, match="is damaged"):
        open_checkpoint(other)


def test_a_write_that_fails_is_an_error(tmp_path):
    checkpointer = Checkpointer(tmp_path / "file", CheckpointConfig(), ALONE)
    (tmp_path / "file").write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match="checkpoint of step 5 could not be written"):
        save(checkpointer, 5)


def test_errors_are_named():
    assert len(CheckpointConfig(every=0, keep=0, milestone_every=-1).errors()) == 3


# ---- in the background


@pytest.fixture
def gate(monkeypatch):
    """An event that every write of a file waits for."""
    opened, write = threading.Event(), checkpoint.write_tensors

    def waiting_write(path, tensors):
        assert opened.wait(60)
        return write(path, tensors)

    monkeypatch.setattr(checkpoint, "write_tensors", waiting_write)
    yield opened
    opened.set()


def in_background(folder, **settings) -> Checkpointer:
    return Checkpointer(folder, CheckpointConfig(background=True, **settings), ALONE)


def poll_until_saved(checkpointer) -> Path:
    """Poll, as training does once a step, until the checkpoint is complete."""
    deadline = time.monotonic() + 60
    while (folder := checkpointer.poll()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return folder


def test_a_background_save_writes_the_tensors_as_they_were_at_the_save(tmp_path, gate):
    model = Small()
    optimizer, state = stepped(model), state_of(3, val_loss=0.1)
    background = in_background(tmp_path / "b")
    tensors = dict(model.named_parameters()), named_state(optimizer, model)
    assert background.save(*tensors, state) is None
    expected = Checkpointer(tmp_path / "a", CheckpointConfig(), ALONE)
    gate.set()
    assert expected.save(*tensors, state) == tmp_path / "a" / "step_0000003"
    gate.clear()
    assert poll_until_saved(background) == tmp_path / "b" / "step_0000003"
    background.save(*tensors, state | {"step": 4})
    assert background.poll() is None
    with torch.no_grad():  # training goes on
        for t in (*model.parameters(), *(t for s in optimizer.state.values() for t in s.values())):
            t.add_(1)
    gate.set()
    assert background.finish() == tmp_path / "b" / "step_0000004"
    assert background.finish() is background.poll() is None
    for file in (tmp_path / "a" / "step_0000003").iterdir():
        written = [tmp_path / "b" / step / file.name for step in ("step_0000003", "step_0000004")]
        assert written[0].read_bytes() == file.read_bytes()
        assert file.suffix == ".json" or written[1].read_bytes() == file.read_bytes()


def test_a_second_save_waits_for_the_first_and_reuses_its_memory(tmp_path, gate):
    background, model = in_background(tmp_path), Small()
    save(background, 1, model=model)
    first = model.matrix.detach().clone()
    addresses = [t.data_ptr() for tensors in background.copies.values() for t in tensors.values()]
    second = threading.Thread(target=save, args=(background, 2), kwargs=dict(model=model))
    second.start()  # steps the model, then waits
    second.join(0.3)
    assert second.is_alive()
    assert [p.name for p in tmp_path.iterdir()] == ["tmp-step_0000001"]
    gate.set()
    second.join(60)
    background.finish()
    assert steps_in(tmp_path) == [1, 2]
    assert torch.equal(open_checkpoint(tmp_path / "step_0000001").model()["matrix"], first)
    assert torch.equal(open_checkpoint(tmp_path / "step_0000002").model()["matrix"], model.matrix)
    assert addresses == [t.data_ptr() for tensors in background.copies.values() for t in tensors.values()]


def test_a_background_write_that_fails_raises_once_and_the_next_one_succeeds(tmp_path, monkeypatch):
    background = in_background(tmp_path)
    save(background, 1)
    background.finish()
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "write_tensors", disk_full)
        save(background, 2)
        with pytest.raises(CheckpointError, match="checkpoint of step 2 could not be written: .*No space left"):
            poll_until_saved(background)
    assert background.finish() is None
    save(background, 3)
    poll_until_saved(background)
    assert steps_in(tmp_path) == [1, 3]


def disk_full(path, tensors):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def main(folder: str) -> None:
    """The program of each of two processes: rank 1's disk is full at step 1, and its write is slow at step 2."""
    with start_world("cpu") as world:
        write = checkpoint.write_tensors
        background, parameter = Checkpointer(Path(folder), CheckpointConfig(background=True), world), torch.ones(2)
        for step in (1, 2):
            if world.rank == 1:
                slow = lambda path, tensors: (time.sleep(0.2), write(path, tensors))[1]  # noqa: E731
                checkpoint.write_tensors = disk_full if step == 1 else slow
            background.save({"p": parameter}, {f"p{world.rank}/m": parameter + step}, state_of(step))
            polls, outcome = 0, None
            while outcome is None:
                world.sum(torch.ones(1))  # communication of the training
                time.sleep(0.01)
                polls += 1
                try:
                    outcome = background.poll()
                except CheckpointError as error:
                    outcome = str(error)
            if step == 1:
                assert "checkpoint of step 1 could not be written" in outcome
                assert "No space left" in outcome
                assert not any(Path(folder).iterdir())
            assert len(set(world.gather(polls))) == 1  # all ranks finish at the same poll
        assert outcome == Path(folder, "step_0000002")
        assert polls > 10
        found = background.latest()
        assert {k: v.tolist() for k, v in found.optimizer().items()} == {"p0/m": [3, 3], "p1/m": [3, 3]}


def test_ranks_finish_together_and_a_failure_of_one_is_raised_on_all(tmp_path):
    finish(Forked(main, tmp_path, processes=2))


def test_a_start_deletes_no_folder_of_the_user(tmp_path):
    mine = {"tmp-before-surgery", "best", ".step_0000004.replaced.mine", "old-step_0000004"}
    for name in ("tmp-step_0000004", "tmp-.step_0000004.replaced", *mine):
        (tmp_path / name).mkdir()
    Checkpointer(tmp_path, CheckpointConfig(), ALONE).repair()
    assert {p.name for p in tmp_path.iterdir()} == mine


def test_json_nested_without_end_is_damage(tmp_path):
    (tmp_path / "state.json").write_text("[" * 100_000)
    assert find_damage(tmp_path) == "state.json cannot be read: not one of this program's"
