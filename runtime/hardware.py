"""Facts about devices: peak rates, memory, versions."""

import os
import platform
import re
import resource
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import distributions
from pathlib import Path

import torch
from torch import Tensor

from runtime.errors import UserError

# Peak in TFLOP/s of bf16 products that are summed in float32, without sparsity. The longest key that occurs in the
# device's name counts. Sources: NVIDIA's and AMD's data sheets of each product, whose figures with sparsity are halved.
# For GeForce cards it is twice the float32 peak, which is cores x boost clock x 2. This is the ratio in NVIDIA's
# whitepapers "Ampere GA102 GPU Architecture", "Ada GPU Architecture" and "RTX Blackwell GPU Architecture".
PEAK_TFLOPS = {
    "GB300": 2500.0,
    "GB200": 2500.0,
    "B300": 2250.0,
    "B200": 2250.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "H800": 989.0,
    "GH200": 989.0,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "A30": 165.0,
    "A40": 149.7,
    "A10G": 70.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "RTX 6000 Ada": 364.2,
    "RTX 5000 Ada": 261.1,
    "RTX A6000": 154.8,
    "RTX A5000": 111.1,
    "RTX 5090": 209.5,
    "RTX 5080": 112.6,
    "RTX 5070 Ti": 87.9,
    "RTX 5070": 61.7,
    "RTX 4090": 165.2,
    "RTX 4080 SUPER": 104.4,
    "RTX 4080": 97.5,
    "RTX 4070 Ti SUPER": 88.2,
    "RTX 4070 Ti": 80.2,
    "RTX 4070 SUPER": 71.0,
    "RTX 4070": 58.3,
    "RTX 3090 Ti": 80.0,
    "RTX 3090": 71.0,
    "RTX 3080 Ti": 68.2,
    "RTX 3080": 59.5,
    "RTX 3070 Ti": 43.5,
    "RTX 3070": 40.6,
    "MI355X": 2516.6,
    "MI350X": 2309.6,
    "MI325X": 1307.4,
    "MI300X": 1307.4,
}
# Memory in GB of 10^9 bytes, from the same data sheets, of the cards that somebody may plan for. A name that stands for
# several products has its smallest memory.
MEMORY_GB = {
    **{"B300": 288, "GB300": 288, "B200": 180, "GB200": 186, "GH200": 96},
    **{"H200": 141, "H200 NVL": 141, "H100": 80, "H100 PCIe": 80, "H100 NVL": 94, "H800": 80, "H20": 96},
    **{"A100": 40, "A100-40GB": 40, "A100-80GB": 80, "A800": 80, "A40": 48, "A30": 24, "A10G": 24, "A10": 24},
    **{"L40S": 48, "L40": 48, "L4": 24, "RTX A6000": 48, "RTX A5000": 24, "RTX 6000 Ada": 48, "RTX 5000 Ada": 32},
    **{"RTX 5090": 32, "RTX 5080": 16, "RTX 4090": 24, "RTX 4080": 16, "RTX 3090": 24, "RTX 3080": 10},
    **{"MI300X": 192, "MI325X": 256, "MI350X": 288, "MI355X": 288},
}
OTHER_PRODUCTS = re.compile(r"\b(MIG|Laptop|Max-Q|D)\b")  # MIG parts of a GPU, and slower GPUs with the same name
PACKAGES = ("torch", "numpy", "safetensors", "transformers", "datasets", "tiktoken", "wandb", "lm_eval")


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of a device in FLOP/s; None for a CPU, an unknown GPU, a part of a GPU, and GPUs of laptops."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return None if OTHER_PRODUCTS.search(name) else peak_of_card(name)


def peak_of_card(name: str) -> float | None:
    """Dense bf16 peak in FLOP/s of a card whose name contains a known one; None for others."""
    found = [key for key in PEAK_TFLOPS if re.search(rf"\b{key}\b", name)]
    return 1e12 * PEAK_TFLOPS[max(found, key=len)] if found else None


@dataclass(frozen=True)
class Machines:
    """GPUs to plan for: machines of equally many cards of one kind."""

    count: int
    gpus: int  # per machine
    card: str  # a key of MEMORY_GB

    @property
    def processes(self) -> int:
        return self.count * self.gpus

    @property
    def memory(self) -> int:
        """Bytes of a card."""
        return round(1e9 * MEMORY_GB[self.card])

    def __str__(self) -> str:
        return f"{self.count} x {self.gpus} x {self.card}" if self.count > 1 else f"{self.gpus} x {self.card}"


def parse_machines(text: str) -> Machines:
    """The text "2x8xH100" (machines x GPUs x card), "8xH100" or "H100". Raises UserError with the nearest cards."""

    def plain(name: str) -> str:
        return re.sub(r"[^a-z0-9]", "", name.lower())

    match = re.fullmatch(r"((?:\d+\s*[x*]\s*){0,2})(.*)", text.strip(), re.IGNORECASE | re.DOTALL)
    numbers, card = (re.findall(r"\d+", match[1]), match[2]) if match else ([], text)
    known = {plain(key): key for key in MEMORY_GB}
    if "0" in numbers or re.match(r"\d+\s*[x*]", card):
        raise UserError(f"--as={text}: must be MACHINESxGPUSxCARD, for example 2x8xH100, or 8xA100-80GB")
    if plain(card) not in known:
        joined = None if numbers else re.fullmatch(r"(\d+)(\D.*)", card)  # "8H100"
        name, numbers = (joined[2], [joined[1]]) if joined else (card, numbers)
        near = [known[k] for k in get_close_matches(plain(name), known, n=3, cutoff=0.4)] or ["H100", "A100-80GB"]
        count = "".join(f"{n}x" for n in numbers)
        raise UserError(f"--as={text}: unknown card; nearest: {', '.join(count + name for name in near)}")
    machines, gpus = [1, 1, *map(int, numbers)][-2:]
    return Machines(machines, gpus, known[plain(card)])


def memory_gb(device: torch.device) -> float:
    """Peak memory in GB: allocated on a GPU, resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def cores() -> int:
    """CPU cores that this process may use: a part of the machine in a SLURM job, in a container or under taskset."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory(device: torch.device) -> tuple[int, int]:
    """Bytes that this process can use, and bytes that the device has. What torch has reserved on a GPU is usable."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device), total
    try:
        rows = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        kib = {row[0]: int(row[1]) for row in rows}
        return 1024 * kib["MemAvailable:"], 1024 * kib["MemTotal:"]
    except (OSError, KeyError):  # not Linux
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return total, total


def to_host(x: Tensor) -> Callable[[], Tensor]:
    """Start to copy a tensor to page-locked host memory. Returns a function that waits for the copy and returns it."""
    copied = x.to("cpu", non_blocking=True)
    event = torch.cuda.current_stream(x.device).record_event() if x.is_cuda else None

    def wait() -> Tensor:
        if event is not None and not event.query():
            event.synchronize()
        return copied

    return wait


def environment(device: torch.device, world_size: int) -> dict:
    """Facts that are needed to judge or repeat a run: command, commit, versions, machine."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": _git("rev-parse", "HEAD") or os.environ.get("SOURCE_COMMIT"),  # a copy of the files has no .git
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        # torch's own version names its build, as in 2.13.0+cu130; its package's version may not
        "packages": {d.name: d.version for d in distributions() if d.name in PACKAGES} | {"torch": torch.__version__},
        "device": name,
        "processes": world_size,
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "host": platform.node(),
    }


def _git(*args: str) -> str | None:
    root = Path(__file__).resolve().parent.parent
    try:
        done = subprocess.run(["git", "-C", root, *args], capture_output=True, text=True)
    except OSError:  # git is not installed
        return None
    return done.stdout.strip() if done.returncode == 0 else None
