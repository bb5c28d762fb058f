"""scripts/gpu_quarter_hour.sh: it calls what exists, and leaves an archive of what it has done, however it ends."""

import importlib
import os
import re
import shlex
import signal
import subprocess
import tarfile
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import ROOT, environment

from config.load import load_config

SCRIPT = ROOT / "scripts/gpu_quarter_hour.sh"


def begin(folder: Path, program: str, *parts: str) -> subprocess.Popen:
    """Start the script with a shell program in the place of Python; archives go to the folder."""
    python = folder / "python"
    python.write_text(f"#!/bin/bash\n{program}\n")
    python.chmod(0o755)
    env = environment() | {"PYTHON": str(python), "OUT": str(folder), "TMPDIR": str(folder)}
    command = ["bash", str(SCRIPT), *parts]
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def names_in(archive: Path) -> list[str]:
    """The files of an archive in their order."""
    with tarfile.open(archive) as tar:
        return [member.name for member in tar if member.isfile()]


@pytest.fixture(scope="module", params="ABCD")
def part(request, tmp_path_factory):
    """A part and its calls of Python, which end at once."""
    folder = tmp_path_factory.mktemp(f"part_{request.param}")
    program = f'line=$(printf \'%q \' "$@"); echo "$line" >> {folder}/calls'  # one write, as some calls run at once
    output, _ = begin(folder, program, request.param).communicate(timeout=60)
    assert f"part {request.param} took" in output
    return request.param, [shlex.split(line) for line in (folder / "calls").read_text().splitlines()], folder


def test_every_call_exists_with_its_options(part, capsys):
    for words in part[1]:
        if words[0] == "train_gpt.py":
            run = load_config(ROOT / words[1], words[2:])
            assert run.per_process(1) % (run.micro_batch or 1) == 0
            continue
        module = words[1] + (".command" if words[1] == "data.prepare" else "")
        with suppress(SystemExit):
            importlib.import_module(module).main([*words[2:], "--help"])
        text = capsys.readouterr().out
        assert text.startswith("usage: "), words
        assert set(re.findall(r"--[a-z_]+", " ".join(words))) <= set(re.findall(r"--[a-z_]+", text)), words


def test_the_card_comes_first_and_every_call_leaves_its_output(part):
    name, calls, folder = part
    assert calls[0][:2] == ["-m", "bench.facts"]
    names = names_in(folder / f"gpu-{name}.tgz")
    assert names[0] == "results/facts.log"
    assert len(names) == len(calls)
    assert [p.name for p in folder.iterdir() if p.name.startswith(".gpu")] == []


@pytest.mark.parametrize("word, ends", [("A", 400), ("B", 290), ("C", 575), ("D", 575)])
def test_no_part_plans_beyond_its_end(word, ends):
    """Each call is limited by what is left of the part; killing a call takes five seconds."""
    text = SCRIPT.read_text()
    end = int(re.search(rf"^    {word}\)\n        END=(\d+)$", text, re.MULTILINE)[1])
    assert end + 5 <= ends
    assert "((seconds <= left)) || seconds=$left" in text


@pytest.mark.parametrize("status, again", [(1, True), (124, False)])
def test_a_part_goes_on_where_the_side_best_fails(tmp_path, status, again):
    """Its error is in the archive. The side is measured with flash attention unless its time was over."""
    program = f'echo "$@"; [[ "$*" != *"--sides best --"* ]] || {{ echo cuDNN error; exit {status}; }}'
    output, _ = begin(tmp_path, program, "A").communicate(timeout=60)
    assert f"== best: status {status}" in output
    with tarfile.open(tmp_path / "gpu-A.tgz") as tar:
        logs = {Path(m.name).stem: tar.extractfile(m).read().decode() for m in tar if m.name.endswith(".log")}
    assert [*logs][-3 - again :] == ["correctness", "best", *["best_flash"] * again, "nanogpt"]
    assert logs["best"].endswith("cuDNN error\n")
    if again:
        assert logs["best_flash"].split() == logs["best"].replace("best", "best_flash").split()[:-2]


@pytest.mark.parametrize("scale", ["1", "4"])
def test_one_number_scales_every_limit_of_time(tmp_path, scale, monkeypatch):
    (tmp_path / "timeout").write_text(f'#!/bin/bash\necho "$2" >> {tmp_path}/limits\nexec "${{@:3}}"\n')
    (tmp_path / "timeout").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("TIME_SCALE", scale)
    output, _ = begin(tmp_path, "echo limit of the benches: $TIME_SCALE", "C").communicate(timeout=60)
    assert f"limit of the benches: {scale}\n" in output
    limits = [int(line) for line in (tmp_path / "limits").read_text().split()]
    assert limits[:2] == [25 * int(scale), (180 if (ROOT / "data/tokens/pydocs").exists() else 90) * int(scale)]


def test_weights_stay_on_the_machine(tmp_path):
    program = (
        'for word in "$@"; do [ -d "$word" ] && echo x | tee "$word/model.safetensors" > "$word/rows.jsonl"; done; true'
    )
    begin(tmp_path, program, "C").communicate(timeout=60)
    names = names_in(tmp_path / "gpu-C.tgz")
    assert "results/rows.jsonl" in names
    assert "results/model.safetensors" not in names


def test_ctrl_c_ends_the_part_and_its_bench(tmp_path):
    with begin(tmp_path, f"echo $$ > {tmp_path}/pid; echo measured; exec sleep 60", "A") as script:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.05)
        script.send_signal(signal.SIGINT)
        assert script.stdout.read().endswith(f"stopped; the results so far are in {tmp_path}/gpu-A.tgz\n")
    assert script.returncode == 130
    assert names_in(tmp_path / "gpu-A.tgz") == ["results/facts.log"]
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_part_that_is_killed_leaves_the_archive_of_the_last_seconds(tmp_path):
    with begin(tmp_path, f"echo $$ >> {tmp_path}/pids; echo measured; exec sleep 25", "A") as script:
        deadline = time.monotonic() + 60
        while not (tmp_path / "gpu-A.tgz").exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        script.kill()
        for pid in (tmp_path / "pids").read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
    assert names_in(tmp_path / "gpu-A.tgz") == ["results/facts.log"]


@pytest.mark.parametrize("parts", [[], ["E"], ["A", "x"], ["AB"]])
def test_unknown_parts_are_refused(parts, tmp_path):
    script = begin(tmp_path, "true", *parts)
    output, _ = script.communicate(timeout=60)
    assert (script.returncode, output) == (2, "gpu_quarter_hour: name one or more of the parts A, B, C and D\n")
