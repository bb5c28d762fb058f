"""A GPU that does not exist, so that CUDA code runs on machines without one. null_gpu.c says what it does.

A child process gets it with `environment`, and reads what it counted with `Counters`.
"""

import ctypes
import os
import subprocess
import tempfile
from collections import Counter
from hashlib import sha256
from pathlib import Path

SOURCE = Path(__file__).with_name("null_gpu.c")
CACHE = Path(__file__).resolve().parents[2] / "build" / "null_gpu"
LIBRARY = "libcuda.so.1"  # Triton links its own code with a library of this name
GB = 10**9


def build() -> Path:
    """The folder of the library. It is compiled at the first call, and when the source has changed."""
    folder = CACHE / sha256(SOURCE.read_bytes()).hexdigest()[:12]
    if not (folder / LIBRARY).exists():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{os.getpid()}.so"
        flags = ["-O1", "-shared", "-fPIC", f"-Wl,-soname,{LIBRARY}"]
        subprocess.run(["gcc", *flags, "-o", temporary, SOURCE, "-ldl", "-lpthread"], check=True)
        temporary.rename(folder / LIBRARY)
    return folder


def environment(count: int = 1, memory: int = 85 * GB) -> dict[str, str]:
    """What a child process needs in its environment to see `count` null GPUs of `memory` bytes each.

    Compiled kernels get a cache of their own, because a real GPU must not use what was tuned on this one.
    """
    folder = build()
    return {
        "LD_PRELOAD": str(folder / LIBRARY),
        "TRITON_LIBCUDA_PATH": str(folder),
        "TORCHINDUCTOR_CACHE_DIR": str(CACHE / "inductor"),
        "TRITON_CACHE_DIR": str(CACHE / "triton"),
        "TORCH_CUDA_EXPANDABLE_SEGMENTS_IPC": "0",  # to share them, torch asks NVML, which is missing
        "TORCH_CUDNN_SDPA_DEPRIORITIZED": "1",  # attention must not run in cuDNN, which is missing
        "NULL_GPU_COUNT": str(count),
        "NULL_GPU_MEMORY": str(memory),
    }


def is_active() -> bool:
    """Whether this process runs on null GPUs."""
    return "NULL_GPU_COUNT" in os.environ


class Counters:
    """What the null GPU has counted in this process since the last reset."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(os.environ["LD_PRELOAD"])
        self.library.null_gpu_host_waits.restype = ctypes.c_long
        self.library.null_gpu_peak.restype = ctypes.c_size_t

    def reset(self) -> None:
        self.library.null_gpu_reset()

    def host_waits(self) -> int:
        """How often the host waited for the device."""
        return self.library.null_gpu_host_waits()

    def peak(self, device: int = 0) -> int:
        """The largest number of bytes of a device that were in use."""
        return self.library.null_gpu_peak(device)

    def launches(self) -> dict[str, int]:
        """Launches of each kernel by name. Compiled kernels of different graphs may share a name."""
        with tempfile.NamedTemporaryFile("r") as file:
            self.library.null_gpu_write_launches(file.name.encode())
            lines = [line.rstrip("\n").split(" ", 1) for line in file]
        launches: Counter[str] = Counter()
        for number, name in lines:
            launches[name] += int(number)
        return launches
