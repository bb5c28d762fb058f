"""Files that are complete or absent, locks, and what programs print."""

import errno
import fcntl
import os
import subprocess
import sys

import pytest
from conftest import ROOT, environment

from runtime.command import one_line
from runtime.errors import UserError
from runtime.files import lock_of, locked, replace_folder, restore_folder, was_replaced, write_durably
from runtime.streams import printable

# ---- files


def test_a_lock_file_that_its_owner_deletes_meanwhile_is_not_locked_twice(tmp_path, monkeypatch):
    """Between opening and locking the file, its owner ends and deletes it, and another process starts."""
    path, flock = tmp_path / "lock", fcntl.flock
    path.touch()

    def replaced(f, how):
        path.unlink()
        path.touch()
        flock(f, how)

    monkeypatch.setattr(fcntl, "flock", replaced)
    with pytest.raises(BlockingIOError), locked(path):
        raise AssertionError("two processes would be inside")
    assert path.exists()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EIO])
def test_a_file_system_that_cannot_lock_is_used_with_one_warning(tmp_path, monkeypatch, capsys, code):
    """Lustre without flock gives ENOSYS, and some FUSE systems EINVAL: no list of numbers can be complete."""

    def refuse(f, how):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    for name in ("results.json", "results.json", "other.json"):
        with lock_of(tmp_path / name):
            pass
    said = capsys.readouterr().err
    assert said.startswith(f"{tmp_path}: this file system cannot lock files ({os.strerror(code)}); do not start")
    assert said.count("\n") == 1


def test_a_lock_file_that_cannot_be_deleted_does_not_hide_an_error(tmp_path):
    with (
        pytest.raises(KeyError, match="the error"),
        locked(tmp_path / "a" if os.mkdir(tmp_path / "x") else tmp_path / "lock"),
    ):
        (tmp_path / "lock").unlink()
        (tmp_path / "lock").mkdir()
        raise KeyError("the error")


@pytest.mark.parametrize("name", ["lock", "file.tmp"])
def test_links_that_somebody_put_there_are_not_followed(tmp_path, name):
    thesis = tmp_path / "thesis.txt"
    thesis.write_text("years of work")
    (tmp_path / name).symlink_to(thesis)
    if name == "lock":
        with pytest.raises(OSError, match="symbolic links"), locked(tmp_path / name):
            raise AssertionError("locked")
    else:
        write_durably(tmp_path / "file", b"new")
        assert (tmp_path / "file").read_bytes() == b"new"
    assert thesis.read_text() == "years of work"


def folder_with(folder, text, **hidden):
    folder.mkdir()
    for name, content in (("x", text), *((f".{key}", value) for key, value in hidden.items())):
        (folder / name).write_text(content)
    return folder


def contents(folder):
    return {p.name: p.read_text() for p in folder.iterdir()}


def test_an_interrupted_replacement_is_finished_or_undone(tmp_path):
    final = folder_with(tmp_path / "data", "old")
    final.rename(tmp_path / ".data.replaced")  # killed before the new folder got the name
    assert was_replaced(final)
    restore_folder(final)
    assert contents(final) == {"x": "old"}
    replace_folder(folder_with(tmp_path / "new", "new"), final)
    assert contents(final) == {"x": "new"}
    for left in (".data.replaced", "tmp-.data.replaced"):  # killed before, or while, the old folder was deleted
        folder_with(tmp_path / left, "old")
        assert was_replaced(final)
        restore_folder(final)
        assert [p.name for p in tmp_path.iterdir()] == ["data"]
        assert contents(final) == {"x": "new"}
    assert not was_replaced(final)


def test_a_replacement_succeeds_whatever_earlier_ones_left(tmp_path):
    final = folder_with(tmp_path / "data", "old")
    for left in (".data.replaced", "tmp-.data.replaced"):
        folder_with(tmp_path / left, "older")
    replace_folder(folder_with(tmp_path / "new", "new"), final)
    assert [p.name for p in tmp_path.iterdir()] == ["data"]
    assert contents(final) == {"x": "new"}


def test_hidden_files_move_to_the_new_folder_and_replace_nothing(tmp_path):
    final = folder_with(tmp_path / "data", "old", notes="of the user", both="old")
    (final / ".git").mkdir()
    replace_folder(folder_with(tmp_path / "new", "new", both="new"), final)
    assert (final / ".git").is_dir()
    (final / ".git").rmdir()
    assert contents(final) == {"x": "new", ".notes": "of the user", ".both": "new"}


# ---- streams


PROGRAM = """
import sys
from runtime.command import Parser, one_line
parser = Parser(prog="program", description="help")
parser.parse_args()
with one_line("program"):
    for i in range(3000):
        print("result", i)
        print("note", i, file=sys.stderr)
    open(sys.argv[1] if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else {path!r}, "w").write("done")
"""


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "redirection", [">&-", "2>&-", ">&- 2>&-", ">/dev/full", "2>/dev/full", "| true", "2>&1 | true"]
)
def test_no_state_of_the_streams_changes_what_a_program_does(tmp_path, redirection, unbuffered):
    (tmp_path / "program.py").write_text(PROGRAM.format(path=str(tmp_path / "out")))
    command = f"set -o pipefail; {sys.executable} {tmp_path}/program.py"
    environ = environment() | {"PYTHONUNBUFFERED": unbuffered}
    for flag in ("", "--help"):
        done = subprocess.run(
            ["bash", "-c", f"{command} {flag} {redirection}"], cwd=ROOT, env=environ, capture_output=True
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "out").read_text() == "done"


@pytest.mark.parametrize(
    "text, shown",
    [
        ("plain \u00fc\n\tline", "plain \u00fc\n\tline"),
        ("\x1b[31mred\x07\x9b", "\\x1b[31mred\\x07\\x9b"),
        ("one\rtwo\r\n", "one\\x0dtwo\n"),
        ("https://me:secret@hub.org/x", "https://***@hub.org/x"),
        ("https://hub.org/x?a=1&token=hf_123&b=2", "https://hub.org/x?a=1&token=***&b=2"),
        ("me@hub.org: 1", "me@hub.org: 1"),
    ],
)
def test_control_characters_and_secrets_of_addresses_are_not_printed(text, shown):
    assert printable(text) == shown
    with pytest.raises(SystemExit) as caught, one_line("program"):
        raise UserError(text)
    assert caught.value.code == f"program: {shown}"


def test_stdout_shows_control_characters_as_codes():
    program = "from runtime.command import Parser; Parser(prog='p'); print('a\\x1b[2Jb')"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.stdout == "a\\x1b[2Jb\n"


# ---- errors


@pytest.mark.parametrize("error", [ValueError("too many values"), ImportError("x"), OSError("no file"), KeyError("k")])
def test_an_error_that_may_be_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error)), one_line("program"):
        raise error


def test_every_error_keeps_its_traceback_if_the_environment_asks_for_it(monkeypatch):
    monkeypatch.setenv("TRACEBACK", "1")
    with pytest.raises(UserError), one_line("program"):
        raise UserError("wrong setting")


def test_an_error_of_the_system_names_its_file(tmp_path):
    with pytest.raises(SystemExit, match="program: .*nowhere: No such file or directory"), one_line("program"):
        (tmp_path / "nowhere").read_text()
