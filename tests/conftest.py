"""What several test files share: a small dataset, a small config, and ways to run the trainer."""

import fcntl
import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):  # read when the libraries are imported; no test needs a network
    os.environ[name] = "1"

# A shell starts background jobs with SIGINT ignored, and nohup ignores SIGHUP. The processes that the tests start would
# inherit that, but not a handler.
signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)

from forked import Forked  # noqa: E402

import train_gpt  # noqa: E402
from data.shards import write_manifest, write_shard  # noqa: E402
from training.checkpoint import state_sha256  # noqa: E402
from training.plot import CURVES  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPUs of the machine: only the tests that scripts/test_cuda.sh selects use them."""
    if "not cuda" in config.option.markexpr:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


gc.freeze()  # else the collection at the start of each run takes 0.25 s to look at what was imported

CONFIG = ROOT / "tests" / "tiny_config.py"
draw_curves = train_gpt.plot_run
train_gpt.plot_run = lambda folder: folder / CURVES  # a picture takes longer than a short run; one test draws it
VOCAB = 60


def make_tokens(n: int, seed: int = 0) -> np.ndarray:
    """A token stream a small model can learn: noisy counting."""
    rng = np.random.default_rng(seed)
    return ((np.arange(n) * 7 + rng.integers(0, 3, n)) % VOCAB).astype(np.uint16)


def make_dataset(folder: Path, tokens: int = 20_000, shards: int = 2) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    parts = np.array_split(make_tokens(tokens), shards)
    train = [write_shard(folder / f"train_{i:06d}.bin", part, len(part)) for i, part in enumerate(parts)]
    val = [write_shard(folder / "val_000000.bin", make_tokens(3000, seed=1), 3000)]
    write_manifest(
        folder, {"name": "byte", "vocab_size": VOCAB, "eot": 0}, {"name": "test"}, dict(train=train, val=val)
    )
    return folder


def made_once(tmp_path_factory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that `make` fills. The test processes of pytest-xdist share it: the first makes it, the others wait."""
    folder = tmp_path_factory.mktemp(name)
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = tmp_path_factory.getbasetemp().parent / name
        folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "made").exists():
            make(folder)
            (folder / "made").touch()
    return folder


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("tokens") / "counting")


@pytest.fixture
def arguments(dataset, tmp_path) -> list[str]:
    """Arguments of a tiny run of 12 steps in a folder of its own."""
    return [str(CONFIG), f"--data.path={dataset}", f"--log.folder={tmp_path / 'runs'}", "--name=run"]


def change_state(folder: Path, **changes) -> None:
    """Change what the state.json of a checkpoint folder says, as if the program had written it."""
    state = json.loads((folder / "state.json").read_text()) | changes
    (folder / "state.json").write_text(json.dumps(state | {"state_sha256": state_sha256(state)}))


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def launch(arguments: list[str], processes: int = 1) -> Forked:
    """Start the trainer in processes of its own."""
    return Forked(train_gpt.main, arguments, processes=processes)


def finish(process: Forked | subprocess.Popen) -> str:
    """Wait for a process that has to succeed; returns what it printed."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output
