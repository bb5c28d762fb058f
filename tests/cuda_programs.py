"""Programs that test_cuda.py runs in processes of their own: cuda_programs.py NAME [ARGUMENT ...]

The last line that a program prints is its result in JSON. `train` is the trainer itself.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import null_gpu
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode

import train_gpt
from bench.correctness import compilations, synchronizations
from bench.runs import batch_of, opened, take_step
from bench.timing import SIZES
from config.load import load_config
from model import GPT
from optimizers import REGISTRY, build_optimizer
from optimizers.owners import Sharded
from runtime.distributed import World
from training.clipping import GradientClipper
from training.compute import ComputeConfig, attention_kernel, torch_settings
from training.preflight import memory_estimate

WARM_UP = 3  # steps


def ignore_numbers() -> None:
    """Let a run go on whatever its gradients are. The null GPU computes nothing, so their norm has no meaning.

    Waiting for a norm waits for the device, as in a real run.
    """
    check = GradientClipper.check

    def wait(self: GradientClipper) -> None:
        self._norms = [(step, lambda norm=norm: (norm(), torch.ones(()))[1]) for step, norm in self._norms]
        check(self)

    GradientClipper.check = wait
    Sharded._check_counts = lambda *_: None


def train(*arguments: str) -> None:
    train_gpt.main(list(arguments))


def batches_after_start(t: train_gpt.Trainer) -> list[Tensor]:
    """Do eleven steps, and return the batches of the next two.

    DistributedDataParallel times its first ten steps, and later every hundredth one. It waits for the device then.
    """
    batches = [batch_of(t, step) for step in range(13)]
    for batch in batches[:11]:
        take_step(t, batch)
    return batches[11:]


def waits(*arguments: str) -> int:
    """How often the host waits for the device in two steps; torch raises an error if it notices a wait itself."""
    with opened(list(arguments)) as t:
        batches = batches_after_start(t)
        counters = null_gpu.Counters() if null_gpu.is_active() else None
        if counters:
            counters.reset()
        torch.cuda.set_sync_debug_mode("error")
        for batch in batches:
            take_step(t, batch)
        found = counters.host_waits() if counters else 0
        torch.cuda.set_sync_debug_mode("default")
        return found


def waits_found(*arguments: str) -> int | str:
    """What bench.correctness finds in steps that do not wait."""
    with opened(list(arguments)) as t:
        return synchronizations(t, batches_after_start(t))


def compiled_later(*arguments: str) -> float:
    """Graphs compiled in two steps after the first ones, while the learning rate and gamma change."""
    with opened(list(arguments)) as t:
        batches = [batch_of(t, step) for step in range(WARM_UP + 2)]
        for batch in batches[:WARM_UP]:
            take_step(t, batch)
        return compilations(t, batches[WARM_UP:])


def attention(setting: str) -> list[str]:
    """The backends that torch selects for the first and the second call of attention under a setting."""
    with torch_settings(ComputeConfig(attention=setting)):
        device = torch.device("cuda")
        return [attention_kernel(12, 768, 1024, 0.0, "bfloat16", device) for _ in range(2)]


def memory(*arguments: str) -> dict:
    """Bytes at the allocator's peak in a step after the first ones, and as the trainer estimates them."""
    with opened(list(arguments)) as t:
        for step in range(WARM_UP):
            batch = batch_of(t, step)
            torch.cuda.reset_peak_memory_stats()
            take_step(t, batch)
        peak = torch.cuda.max_memory_allocated()
        estimate = memory_estimate(t.run, t.model, t.optimizer, t.world).total(t.micro_batch)
        return dict(peak=peak, estimate=estimate, total=torch.cuda.mem_get_info()[1], micro_batch=t.micro_batch)


def memory_of_one(processes: str, *arguments: str) -> dict:
    """As `memory`, of the first process of many on one machine. The others do not exist; nothing is sent."""
    start, size = dist.init_process_group, int(processes)
    os.environ |= dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE=processes, LOCAL_WORLD_SIZE=processes)
    dist.init_process_group = lambda *_, **__: start("fake", rank=0, world_size=size, store=dist.HashStore())
    dist.new_group = lambda *_, **__: dist.group.WORLD
    dist.all_to_all_single = lambda *_, **__: SimpleNamespace(wait=lambda: None)
    World.gather = lambda self, item: [item] * size
    return memory(*arguments)


def launches(size: str, optimizer: str, compiled: str) -> dict:
    """What one step of an optimizer launches for all parameters of a GPT-2, by kernel, and the bytes that it needs."""
    run = load_config(f"config/{SIZES[size]}.py", [f"--optimizer={optimizer}"])
    with torch.device("meta"):
        model = GPT(run.model)
    model.to_empty(device="cuda")
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    step = build_optimizer(model, run.optim, compiled=compiled == "true").step
    for _ in range(WARM_UP):
        step()
    counters = null_gpu.Counters()
    counters.reset()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return dict(kernels=counters.launches(), scratch=torch.cuda.max_memory_allocated() - before)


def sharded(optimizer: str, compiled: str) -> dict:
    """What two steps over matrices sharded by fully_shard call and wait for, and the bytes that a step needs."""
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    mesh = init_device_mesh("cuda", (dist.get_world_size(),))
    matrices = [torch.nn.Parameter(torch.zeros(512, 2048, device="cuda")) for _ in range(8)]
    model = fully_shard(torch.nn.ParameterList(matrices), mesh=mesh)
    step = REGISTRY[optimizer][0](list(model), compiled=compiled == "true").step
    for p in model:
        p.grad = torch.zeros_like(p)
    for _ in range(WARM_UP):
        step()
    counters = null_gpu.Counters() if null_gpu.is_active() else None
    if counters:
        counters.reset()
    torch.cuda.set_sync_debug_mode("error")
    with CommDebugMode() as calls:
        for _ in range(2):
            step()
    torch.cuda.set_sync_debug_mode("default")
    waited = counters.host_waits() if counters else 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    scratch = torch.cuda.max_memory_allocated() - before
    dist.destroy_process_group()
    return dict(waits=waited, calls=calls.get_total_counts(), scratch=scratch)


if __name__ == "__main__":
    if null_gpu.is_active():
        ignore_numbers()
    programs = [train, waits, waits_found, compiled_later, attention, memory, memory_of_one, launches, sharded]
    result = {f.__name__: f for f in programs}[sys.argv[1]](*sys.argv[2:])
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(result))
