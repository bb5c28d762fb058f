"""The house: who may import whom, and what training may need."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT, environment

ROOMS = ("model", "data", "optimizers", "runtime", "config", "eval", "bench", "scripts", "train_gpt")
GROUND = {"optimizers.options", *(f"runtime.{m}" for m in ("command", "distributed", "errors", "files", "streams"))}
ALLOWED = {  # a name allows itself and everything in it
    "model": set(),
    "data": {"runtime.files"},
    "optimizers": set(),
    "runtime": {"optimizers.settings"},
    "config": {
        "model",
        *("data.loader", "data.shards", "data.tokenizer"),
        "optimizers",
        *(f"runtime.{m}" for m in ("checkpoint", "compute", "logger", "memory", "schedule")),
    },
    "train_gpt": {"model", "data", "optimizers", "runtime", "config", "eval.checkpoint"},
    "eval": {"model", "data", "optimizers", "runtime", "config"},
    "bench": {"model", "data", "optimizers", "runtime", "config", "eval", "train_gpt"},
    "scripts": {"model", "eval", "runtime", "config"},
}
ON_TOP = {  # parts of a room that stand above the others
    "data/prepare/command.py": {"config", "runtime.hardware"},
    "runtime/evaluation.py": {"data", "train_gpt"},
    "runtime/preflight.py": {"config", "data", "model", "optimizers", "train_gpt"},
    "runtime/console.py": {"config", "data.tokenizer", "optimizers", "train_gpt"},
}
FILES = sorted(p for room in ROOMS for p in [*ROOT.glob(f"{room}.py"), *ROOT.glob(f"{room}/**/*.py")])


def imports(path):
    """Modules of ours that a file imports, anywhere in it, as dotted names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] in ROOMS)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_import_only_what_they_may(path):
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    allowed_here = ALLOWED[room] | ON_TOP.get(path.relative_to(ROOT).as_posix(), set())
    allowed_here |= set() if room == "optimizers" else GROUND  # optimizers/ can be installed alone
    for name in imports(path):
        if name.split(".")[0] != room:
            assert any(f"{name}.".startswith(f"{allowed}.") for allowed in allowed_here), name


def test_training_imports_nothing_heavy(dataset, tmp_path):
    """A run works where only torch, numpy, safetensors and tqdm can be imported."""
    blocked = ("wandb", "datasets", "transformers", "tiktoken", "lm_eval", "matplotlib", "pytest")
    script = f"""
import sys
for name in {blocked!r}:
    sys.modules[name] = None
import train_gpt
train_gpt.main(["tests/tiny_config.py", "--data.path={dataset}", "--log.folder={tmp_path}", "--wandb=online"])
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "wandb is not installed (pip install wandb)" in done.stdout
    assert "no curves: drawing curves needs: pip install matplotlib" in done.stdout
    assert "final   validation loss" in done.stdout


def test_importing_does_no_work():
    modules = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in FILES if p.name != "__init__.py"]
    script = f"import importlib\nfor m in {modules!r}: importlib.import_module(m)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.parametrize("command", ["train_gpt", "data.prepare", "eval.sample"])
def test_without_the_file_locks_of_unix_every_command_is_one_clear_line(command):
    script = f"import runpy, sys; sys.modules['fcntl'] = None; runpy.run_module('{command}', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("this program needs Linux or macOS; on Windows, run it in WSL")
    assert done.stderr.count("\n") == 1
