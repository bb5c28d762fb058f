"""Speed on a CPU. In each group, several sides take turns, so that other load on the machine slows all of them alike.

python -m bench.cpu                           every group, many minutes
python -m bench.cpu optimizers generation     some of them
python -m bench.cpu --smoke                   tiny sizes, seconds

optimizers    a step on the parameters of GPT-2 small, one thread
matrices      the same for optimizers that orthogonalize
training      a training step against plain PyTorch
exact         a step of the exact form of MARS, which takes two gradients, against the approximate form
generation    512 new tokens of a model of 4 layers x 256 with and without the cache, greedy, one thread
loop          the trainer's loop around a step that sleeps for 200 ms
loader        batches of 480 windows of 1024 tokens, from the page cache
start         the command until its first logged step of the quickstart
tokenization  data.prepare against tiktoken alone; little text shows how long the workers take to start
memory        the peak memory of data.prepare with two workers, which is not timed

ratio is the time of a side as a multiple of that of the first side in its group.
"""

import json
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.peers import PlainGPT
from bench.report import ROOT, Report, bench_parser, interleaved, results_folder
from bench.runs import opened, split_parameters, step_function, write_tokens
from bench.timing import TINY
from data.loader import DataConfig, TrainLoader
from data.prepare import pydocs
from data.prepare.build import build
from data.prepare.sources import Files, local_files
from data.prepare.split import FirstShard
from data.prepare.workers import ShardSettings
from data.shards import open_dataset
from data.tokenizer import get_tokenizer
from eval.scoring import greedy
from model import GPT, GPTConfig
from optimizers import AdamWConfig, MARSConfig, MARSMConfig, MuonConfig, build_optimizer
from optimizers.standalone.mars import MARS
from runtime.command import at_least, one_line
from runtime.hardware import cores
from train_gpt import Trainer, train
from training.average import WeightAverage

QUICKSTART = GPTConfig(n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_size=50304)
PROMPT = [1, 2, 3, 4]


@dataclass(frozen=True)
class Group:
    """Functions that take turns for some rounds. amounts: what one call of a side does, in `unit`."""

    sides: dict[str, Callable[[], Any]]
    rounds: int
    amounts: Mapping[str, float] = field(default_factory=dict)
    unit: str = ""
    threads: int | None = None
    warmup: int = 1


def model_with_gradients(smoke: bool) -> GPT:
    """GPT-2 small with random gradients."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=64, vocab_size=500) if smoke else GPTConfig())
    for p in model.parameters():
        p.grad = torch.randn_like(p).mul_(1e-3)
    return model


def optimizers(args: Namespace, stack: ExitStack) -> Group:
    model = model_with_gradients(args.smoke)
    params: list[Tensor] = list(model.parameters())
    sides: dict[str, Callable[[], Any]] = {
        "AdamW foreach (torch)": torch.optim.AdamW(params, lr=1e-3, foreach=True).step,
        "AdamW fused (torch)": torch.optim.AdamW(params, lr=1e-3, fused=True).step,
        "MARS-AdamW as its formula reads": MARS(params).step,
        "MARS-AdamW": build_optimizer(model, MARSConfig()).step,
    }
    if args.compiled:
        sides["MARS-AdamW compiled"] = build_optimizer(model, MARSConfig(), compiled=True).step
    sides["average of the weights"] = partial(WeightAverage(model, 0.999, None).update, 10**6)
    return Group(sides, 6, threads=1)


def matrices(args: Namespace, stack: ExitStack) -> Group:
    model = model_with_gradients(args.smoke)
    of_layers, rest = split_parameters(model)
    muon = torch.optim.Muon(of_layers, lr=1e-3, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=1e-3, fused=True)

    def torch_muon() -> None:  # its Newton-Schulz uses float32 here, as ours does on a CPU
        with mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.float):
            muon.step()
        adamw.step()

    configs = {"Muon": MuonConfig(), "MARS-M": MARSMConfig(), "MARS-M one buffer": MARSMConfig(clip_c=False)}
    own = {name: build_optimizer(model, config).step for name, config in configs.items()}
    return Group({"Muon + AdamW (torch)": torch_muon} | own, 3, threads=1)


def training(args: Namespace, stack: ExitStack) -> Group:
    """Both with the exact GELU, which takes half the time of the tanh form on a CPU."""
    shape, batch = (TINY, 4) if args.smoke else (QUICKSTART, 16)
    tokens = torch.randint(shape.vocab_size, (batch, shape.block_size + 1))
    idx, targets = tokens[:, :-1], tokens[:, 1:]
    plain, ours = PlainGPT(shape), GPT(replace(shape, gelu="exact"))
    adamw = torch.optim.AdamW(plain.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)

    def plain_step() -> None:
        plain(idx, targets).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad(set_to_none=True)

    our_step = step_function(ours, build_optimizer(ours, AdamWConfig(lr=1e-3)), idx, targets)
    return Group({"plain PyTorch": plain_step, "the trainer's model": our_step}, 9)


def exact(args: Namespace, stack: ExitStack) -> Group:
    shape, batch = (TINY, 4) if args.smoke else (QUICKSTART, 16)
    tokens, sides = torch.randint(shape.vocab_size, (batch, shape.block_size + 1)), {}
    for name, config in {"approximate": MARSConfig(), "exact": MARSConfig(is_approx=False)}.items():
        model = GPT(shape)
        sides[name] = step_function(model, build_optimizer(model, config), tokens[:, :-1], tokens[:, 1:])
    return Group(sides, 3)


@torch.inference_mode()
def without_cache(model: GPT, tokens: int) -> list[int]:
    """The same ids as `greedy` finds, from a forward pass over the whole text for each of them."""
    ids = list(PROMPT)
    for _ in range(tokens):
        ids.append(int(model.logits(model.hidden(torch.tensor([ids]))[:, -1]).argmax()))
    return ids[len(PROMPT) :]


def generation(args: Namespace, stack: ExitStack) -> Group:
    torch.manual_seed(0)
    tokens = 16 if args.smoke else 512
    model = GPT(TINY if args.smoke else GPTConfig(n_layer=4, n_head=4, n_embd=256)).eval()
    assert greedy(model, [PROMPT], tokens) == [without_cache(model, tokens)]
    sides: dict[str, Callable[[], Any]] = {"no cache": partial(without_cache, model, tokens)}
    sides["cache"] = partial(greedy, model, [PROMPT], tokens)
    sides["cache, 8 prompts in a batch"] = partial(greedy, model, [PROMPT] * 8, tokens)
    amounts = dict(zip(sides, (tokens, tokens, 8 * tokens), strict=True))
    return Group(sides, 1, amounts, "tokens", threads=1, warmup=0)


class SleepingTrainer(Trainer):
    """Sleeps for 200 ms a step instead of computing, evaluating and saving."""

    def accumulate(self, batch: Tensor, step: int) -> Tensor:
        time.sleep(0.2)
        return torch.zeros(())

    def update(self) -> None:
        self.step += 1

    def evaluate_if_due(self, stop: object) -> bool:
        return True

    def save(self) -> None:
        pass


def folder_in(stack: ExitStack) -> Path:
    """A folder that is deleted when the stack is closed."""
    return Path(stack.enter_context(tempfile.TemporaryDirectory()))


def loop(args: Namespace, stack: ExitStack) -> Group:
    steps, folder = 4 if args.smoke else 40, folder_in(stack)
    settings = [f"--data.path={write_tokens(folder / 'tokens', 257, 500_000)}", f"--log.folder={folder}"]
    settings += ["--data.val_windows=1", f"--steps={steps}", "--warmup=0", "--log.every=1", "--device=cpu"]
    trainer = stack.enter_context(opened([str(ROOT / "config/quickstart.py"), *settings], SleepingTrainer))
    return Group({"sleep": lambda: time.sleep(0.2 * steps), "loop": partial(train, trainer)}, 1, warmup=0)


def loader(args: Namespace, stack: ExitStack) -> Group:
    batches = 2 if args.smoke else 200
    dataset = open_dataset(write_tokens(folder_in(stack) / "tokens", 50257, 60_000_000), 50257)
    source = TrainLoader(dataset, DataConfig(), block_size=1024, batch_size=480, vocab_size=50257, seed=0)

    def read() -> None:
        for step in range(batches):
            source.batch(step)

    return Group({"loader": read}, 1, {"loader": batches * 480 * 1024}, "tokens")


def start(args: Namespace, stack: ExitStack) -> Group:
    folder = folder_in(stack)
    command = [sys.executable, "-u", str(ROOT / "train_gpt.py"), "config/quickstart.py", "--steps=50", "--log.every=1"]
    command += [f"--data.path={write_tokens(folder / 'tokens', 257, 500_000)}", f"--log.folder={folder}"]

    def first_step() -> None:
        pipes: dict[str, Any] = dict(text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        with subprocess.Popen([*command, "--fresh"], cwd=ROOT, **pipes) as process:
            assert any(line.startswith("step ") for line in process.stdout or ())
            process.kill()

    return Group({"start": first_step}, 1, warmup=0)


def write_parquet(path: Path, documents: Sequence[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir()
    pq.write_table(pa.table({"text": documents}), path, row_group_size=250)


def prose(megabytes: float) -> list[str]:
    """This much English prose from the installed packages, in documents of about 4 kB."""
    text = "".join(text for _, text, _ in islice(pydocs.documents(), None if megabytes > 1 else 40))
    documents = [text[i : i + 4000] for i in range(0, len(text), 4000)]
    mean = len(text.encode()) / len(documents)
    return list(islice(cycle(documents), max(1, round(1e6 * megabytes / mean))))


def tokenization(args: Namespace, stack: ExitStack) -> Group:
    megabytes, many, folder = args.megabytes or (0.2 if args.smoke else 50), cores(), folder_in(stack)
    name, documents = "byte" if args.smoke else "gpt2", prose(megabytes)
    encode = get_tokenizer(name, args.ranks).encode
    write_parquet(folder / "whole/corpus.parquet", documents)
    write_parquet(folder / "little/corpus.parquet", documents[: -(-len(documents) // 100)])

    def pipeline(source: str, workers: int, size: float) -> None:
        tokens = max(1, round(1e6 * size / 15))  # of a shard, so that either text has several
        shards = ShardSettings(name, args.ranks, "before", FirstShard(), tokens, workers)
        out = Path(tempfile.mkdtemp(dir=folder), "out")
        build(out, Files(local_files(folder / source)), {"name": "bench"}, shards)

    sides: dict[str, Callable[[], Any]] = {
        "the tokenizer alone, 1 process": lambda: [encode(document) for document in documents],
        "pipeline, 1 process": partial(pipeline, "whole", 1, megabytes),
        f"pipeline, {many} workers": partial(pipeline, "whole", many, megabytes),
        f"pipeline, {many} workers, 1/100 of the text": partial(pipeline, "little", many, megabytes / 100),
    }
    amounts = dict(zip(sides, (megabytes, megabytes, megabytes, megabytes / 100), strict=True))
    return Group(sides, 1 if args.smoke else 3, amounts, "MB", warmup=0)


def memory(report: Report, args: Namespace, folder: Path) -> None:
    """Peak memory of the parent and of its largest worker, for ordinary documents and for a long one; needs /proc."""
    megabytes = args.megabytes or (1 if args.smoke else 1000)
    documents = prose(megabytes)
    part = documents[: len(documents) // 5]
    write_parquet(folder / "ordinary/corpus.parquet", documents)
    (folder / "long").mkdir()
    lines = (json.dumps({"text": text}) + "\n" for text in ("".join(part), *part))
    (folder / "long/corpus.jsonl").write_text("".join(lines))
    program = "import re, resource, sys; from data.prepare.command import main; main(sys.argv[1:]); "
    program += "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1], "
    program += "resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    for source, side in (("ordinary", "documents of 4 kB"), ("long", "one document is half of the text")):
        words = ["fineweb_edu", f"--source={folder / source}", f"--out={folder / source}-out", "--workers=2"]
        words += [
            f"--shard-tokens={int(1e5 * megabytes)}",
            f"--ranks={args.ranks}" if args.ranks else "--tokenizer=byte",
        ]
        done = subprocess.run([sys.executable, "-c", program, *words], cwd=ROOT, check=True, stdout=subprocess.PIPE)
        parent, worker = (int(kib) / 1e6 for kib in done.stdout.split()[-2:])
        report.add(group="memory", side=side, parent_GB=parent, worker_GB=worker)


GROUPS: dict[str, Callable[[Namespace, ExitStack], Group]] = {
    f.__name__: f for f in (optimizers, matrices, training, exact, generation, loop, loader, start, tokenization)
}


def measure(report: Report, name: str, group: Group, rounds: int | None) -> None:
    """Report a row for each side of a group."""
    before = torch.get_num_threads()
    torch.set_num_threads(group.threads or before)
    seconds = interleaved(group.sides, group.rounds if group.rounds == 1 else rounds or group.rounds, group.warmup)
    torch.set_num_threads(before)
    first = next(iter(seconds.values()))
    for side, s in seconds.items():
        rate = {f"{group.unit}_per_s": group.amounts[side] / s} if group.amounts else {}
        report.add(group=name, side=side, seconds=s, ratio=s / first, **rate)


@one_line("bench.cpu")
def main(argv: list[str] | None = None) -> None:
    parser = bench_parser("cpu", __doc__)
    parser.add_argument("groups", nargs="*", help="default: all")
    parser.add_argument("--rounds", type=at_least(1), help="of the groups that have several; default: their own")
    parser.add_argument("--compiled", action="store_true", help="also the compiled MARS-AdamW; compiling takes minutes")
    parser.add_argument("--ranks", help="GPT-2 ranks file for the last two groups, for machines without a network")
    parser.add_argument("--megabytes", type=float, help="text for the last two groups; default: 50 and 1000")
    args = parser.parse_args(argv)
    names = [*GROUPS, "memory"]
    if unknown := set(args.groups) - set(names):
        parser.error(f"{', '.join(sorted(unknown))}: unknown; the groups are {', '.join(names)}")
    report = Report("_".join(["cpu", *args.groups]), results_folder(args))
    for name in args.groups or names:
        with ExitStack() as stack:
            if name == "memory":
                memory(report, args, folder_in(stack))
            else:
                measure(report, name, GROUPS[name](args, stack), 1 if args.smoke else args.rounds)
    report.table(by="group")


if __name__ == "__main__":
    main()
