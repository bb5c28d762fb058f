"""Which folder may import which, and which packages training may need."""

import ast
import subprocess
import sys
from importlib.util import find_spec

import pytest
from conftest import ROOT, environment

# From the ground up. Each may import those before it, and no other.
FLOORS = (
    *("runtime", "optimizers", "model", "data", "training", "weights", "config", "data.prepare"),
    *("train_gpt", "eval", "bench", "experiments", "scripts"),
)
FILES = sorted(p for f in FLOORS for p in [*ROOT.glob(f"{f}.py"), *ROOT.glob(f"{f}/**/*.py")])


def floor_of(name):
    """The number of the floor of a dotted name, the longest that fits; None for other people's modules."""
    fitting = [floor for floor in FLOORS if f"{name}.".startswith(f"{floor}.")]
    return FLOORS.index(max(fitting, key=len)) if fitting else None


def imports(path):
    """Modules that a file imports, anywhere in it, as dotted names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).parts[: -node.level] if node.level else ()
            module = ".".join([*package, *filter(None, [node.module])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_floor_imports_only_lower_floors(path):
    floor = floor_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for name in imports(path):
        other = floor_of(name)
        assert other is None or other <= floor, name
        assert FLOORS[floor] != "optimizers" or other in (None, floor), f"{name}: optimizers/ can be installed alone"


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
    without = set() if find_spec("triton") else {"fused_loss.py"}
    paths = [p for p in FILES if p.name not in {"__init__.py", *without}]
    modules = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in paths]
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
