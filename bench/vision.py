"""Compare the optimizers on images, with a ResNet-18: python -m bench.vision DATASET

    python -m bench.vision digits                                   seconds; scikit-learn brings the images
    python -m bench.vision fashion --data FOLDER --width 8 --epochs 3
    python -m bench.vision cifar10 --data FOLDER --seeds 4          the setting of the MARS paper; needs a GPU
    python -m bench.vision cifar100 --data FOLDER --arms AdamW MARS

Each arm tries every learning rate and weight decay on the first seed. The ones with the best accuracy on validation
images, which are held out from training, run on the other seeds. Those report the test images, after the last epoch.
The best test accuracy of any epoch and of any try stands beside it only because published tables report it.
A seed gives all arms equal weights, batches and augmentation, so differences are taken seed by seed.
Finished runs are kept in runs/vision; the same command continues.
"""

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.images import DATASETS, Images, load_images
from bench.report import ROOT, Report, bench_parser, in_processes, results_folder
from bench.resnet import ResNet18
from bench.sweep import interval
from optimizers import OPTIMIZERS, Settings, build_optimizer
from runtime.command import one_line

RUNS = ROOT / "runs/vision"  # finished runs
BATCH = 128
VECTOR_LR = 3e-3  # of gains and biases, where an optimizer treats them by AdamW with a rate of its own
DROPS = (0.5, 0.75)  # parts of the run after which the learning rate falls to a tenth: epochs 100 and 150 of 200


@dataclass(frozen=True)
class Arm:
    """An optimizer with the middle of the learning rates that are tried."""

    settings: Settings
    lr: float


def _arm(name: str, lr: float, **changes: Any) -> Arm:
    settings = OPTIMIZERS[name]
    own = {key: VECTOR_LR for key in ("lr_1d", "adamw_lr") if hasattr(settings, key)}
    return Arm(settings.changed(**own, **changes), lr)


ARMS = {
    "AdamW": _arm("adamw", 1e-3),
    "Lion": _arm("lion", 2e-4),
    "Shampoo": _arm("shampoo", 1e-2),
    "Muon": _arm("muon", 1e-2),
    "MARS": _arm("mars", 3e-3),
    "MARS exact": _arm("mars", 3e-3, is_approx=False),
    "MARS-Lion": _arm("mars_lion", 2e-4),
    "MARS-Lion exact": _arm("mars_lion", 2e-4, is_approx=False),
    "MARS-Shampoo": _arm("mars_shampoo", 1e-2),
    "MARS-Shampoo exact": _arm("mars_shampoo", 1e-2, is_approx=False),
    "MARS-M": _arm("mars_m", 1e-2),
    "MARS-M exact": _arm("mars_m", 1e-2, is_approx=False),
    "AdEMAMix": _arm("ademamix", 1e-3),
    "SOAP": _arm("soap", 1e-3),
    "NorMuon": _arm("normuon", 1e-2),
}
# MARS paper (arXiv 2411.10438, table of its ICML version): best test loss and test accuracy in % over epochs, rates and
# decays. MARS-M's numbers are claimed in the abstract of its paper; they were not seen.
PUBLISHED = {
    "cifar10": {
        "AdamW": (0.230, 94.81),
        "Lion": (0.245, 94.68),
        "Shampoo": (0.354, 94.65),
        "Muon": (0.306, 95.08),
        "MARS": (0.199, 95.29),
        "MARS exact": (0.193, 95.26),
        "MARS-Lion": (0.202, 95.05),
        "MARS-Lion exact": (0.219, 94.98),
        "MARS-Shampoo": (0.202, 94.92),
        "MARS-Shampoo exact": (0.194, 94.98),
    },
    "cifar100": {
        "AdamW": (1.726, 73.70),
        "Lion": (1.351, 74.28),
        "Shampoo": (2.426, 74.27),
        "Muon": (2.608, 74.64),
        "MARS": (0.971, 76.97),
        "MARS exact": (0.888, 77.38),
        "MARS-Lion": (0.985, 75.97),
        "MARS-Lion exact": (0.991, 76.15),
        "MARS-Shampoo": (1.256, 74.80),
        "MARS-Shampoo exact": (0.982, 75.83),
    },
}


@dataclass(frozen=True)
class Run:
    """One training run. Everything that decides its result."""

    dataset: str
    width: int
    epochs: int
    limit: int  # images of each split; 0: all
    arm: str
    lr: float
    weight_decay: float
    seed: int


@dataclass(frozen=True)
class Result:
    """Loss and accuracy in % after the last epoch, and the best test values of any epoch."""

    validation_loss: float
    validation: float
    test_loss: float
    test: float
    best_test_loss: float
    best_test: float


def train(data: str, device: str, run: Run) -> Result:
    """Do a run on the images in the folder `data`. A run that diverges has an infinite validation loss."""
    if device == "cpu":
        torch.set_num_threads(1)
    images = load_images(run.dataset, data).limited(run.limit).to(device)
    torch.manual_seed(run.seed)
    model = ResNet18(images.kind.classes, run.width, images.channels).to(device)
    settings = ARMS[run.arm].settings.changed(lr=run.lr, weight_decay=run.weight_decay)
    optimizer: Any = build_optimizer(model, settings)
    rates = [group["lr"] for group in optimizer.param_groups]
    stream = batches(images, run.seed, run.epochs)
    batch, scores, steps = next(stream), [], math.ceil(len(images.train[1]) / BATCH)
    for epoch in range(run.epochs):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * 0.1 ** sum(epoch >= part * run.epochs for part in DROPS)
        model.train()
        for _ in range(steps):
            upcoming = next(stream, batch)
            train_step(model, optimizer, batch, upcoming)
            batch = upcoming
        scores.append(score(model, images, *images.test))
    losses, accuracies = zip(*scores, strict=True)
    return Result(*score(model, images, *images.validation), *scores[-1], min(losses), max(accuracies))


def batches(images: Images, seed: int, epochs: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The augmented batches of all epochs, each in an order of its own."""
    random = torch.Generator().manual_seed(seed)
    pixels, labels = images.train
    for _ in range(epochs):
        for chosen in torch.randperm(len(labels), generator=random).split(BATCH):
            chosen = chosen.to(labels.device)
            yield images.augmented(pixels[chosen], random), labels[chosen]


def train_step(model: nn.Module, optimizer: Any, batch: tuple[Tensor, Tensor], upcoming: tuple[Tensor, Tensor]) -> None:
    """One step. The exact form first takes the gradient of the upcoming batch."""
    exact = getattr(optimizer, "needs_lookahead", False)

    def gradient(pixels: Tensor, labels: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(pixels), labels).backward()

    if exact:
        gradient(*upcoming)
        optimizer.update_previous_grad()
    gradient(*batch)
    optimizer.step()
    if exact:
        optimizer.update_last_grad()


@torch.no_grad()
def score(model: nn.Module, images: Images, pixels: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean loss (infinite if it is no number) and accuracy in %."""
    model.eval()
    loss, correct = 0.0, 0
    for x, y in zip(pixels.split(1024), labels.split(1024), strict=True):
        logits = model(images.normalized(x))
        loss += float(F.cross_entropy(logits, y, reduction="sum"))
        correct += int((logits.argmax(1) == y).sum())
    return loss / len(labels) if math.isfinite(loss) else math.inf, 100 * correct / len(labels)


class Comparison:
    """The runs of one command, and the file that keeps the finished ones."""

    def __init__(self, args: argparse.Namespace, kept: Path) -> None:
        self.args, self.kept = args, kept
        self.results: dict[Run, Result] = {}
        for line in kept.read_text().splitlines() if kept.exists() else ():
            row = json.loads(line)
            self.results[Run(**row["run"])] = Result(**row["result"])

    def run(self, arm: str, lr: float, decay: float, seed: int) -> Run:
        a = self.args
        return Run(a.dataset, a.width, a.epochs, a.limit, arm, lr, decay, seed)

    def rates(self, arm: str) -> list[float]:
        """The learning rates of an arm."""
        return [float(f"{ARMS[arm].lr * multiple:.3g}") for multiple in self.args.multiples]

    def tries(self, arm: str) -> list[Run]:
        """The runs that select learning rate and weight decay."""
        return [self.run(arm, lr, decay, 1) for lr, decay in itertools.product(self.rates(arm), self.args.decays)]

    def reported(self, arm: str) -> list[Run]:
        """The runs that are reported: the other seeds of the try with the best validation accuracy."""

        def quality(run: Run) -> tuple[float, float]:
            return self.results[run].validation, -self.results[run].validation_loss

        best = max(self.tries(arm), key=quality)
        return [self.run(arm, best.lr, best.weight_decay, seed) for seed in range(2, 2 + self.args.seeds)]

    def train(self) -> None:
        """Do all runs that are not finished: first all tries, then the other seeds."""
        for stage in (self.tries, self.reported):
            runs = [run for arm in self.args.arms for run in stage(arm) if run not in self.results]
            found = in_processes(partial(train, self.args.data, self.args.device), runs, self.args.workers)
            for number, (run, result) in enumerate(zip(runs, found, strict=True), start=1):
                self.results[run] = result
                self.kept.parent.mkdir(parents=True, exist_ok=True)
                with open(self.kept, "a") as f:
                    f.write(json.dumps(dict(run=asdict(run), result=asdict(result))) + "\n")
                what = f"{run.arm} lr {run.lr:g} decay {run.weight_decay:g} seed {run.seed}"
                print(f"{number}/{len(runs)}  {what}: validation {result.validation:.2f} %", flush=True)

    def test(self, arm: str) -> float:
        """Mean test accuracy of the reported runs."""
        return statistics.mean(self.results[run].test for run in self.reported(arm))

    def row(self, arm: str, reference: str) -> dict[str, Any]:
        """The row of an arm in the table of results."""
        runs, rates, published = self.reported(arm), self.rates(arm), PUBLISHED.get(self.args.dataset)
        found = [self.results[run] for run in runs]
        pairs = [r.test - self.results[base].test for r, base in zip(found, self.reported(reference), strict=True)]
        difference = f"{statistics.mean(pairs):+.2f} ± {interval(pairs):.2f}" if arm != reference else "reference"
        edge = " (edge)" if len(rates) > 1 and runs[0].lr in (min(rates), max(rates)) else ""
        everything = [self.results[run] for run in (*self.tries(arm), *runs)]
        row: dict[str, Any] = {"arm": arm, "lr": f"{runs[0].lr:g}{edge}", "decay": f"{runs[0].weight_decay:g}"}
        row |= {"validation %": _mean(found, "validation"), "test %": _mean(found, "test")}
        row |= {f"difference to {reference}": difference, "test loss": _mean(found, "test_loss")}
        best_loss, best = min(r.best_test_loss for r in everything), max(r.best_test for r in everything)
        row |= {"best-of-test, loss and %": f"{best_loss:.3f}, {best:.2f}"}
        if published:
            row["the same in the MARS paper"] = "{:.3f}, {:.2f}".format(*published[arm]) if arm in published else ""
        return row


def _mean(results: list[Result], key: str) -> str:
    values, digits = [getattr(r, key) for r in results], 3 if key.endswith("loss") else 2
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def report(comparison: Comparison, folder: Path) -> None:
    """Print the table, best arm first, and write it to the folder."""
    args = comparison.args
    reference = "Muon" if "Muon" in args.arms else args.arms[0]
    sizes = {key: getattr(args, key) for key in ("width", "epochs", "limit", "seeds")}
    file = Report(f"vision_{args.dataset}", folder, args.device, **sizes)
    for arm in sorted(args.arms, key=comparison.test, reverse=True):
        file.add(**comparison.row(arm, reference))
    file.table()


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options of the command, checked."""
    parser = bench_parser("vision", __doc__ or "")
    parser.add_argument("dataset", nargs="?", choices=DATASETS, default="digits", help="default: %(default)s")
    parser.add_argument("--data", default=".", help="folder of the image files (default: this folder)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--width", type=int, help="channels of the first stage; default: 64, digits: 8")
    parser.add_argument("--epochs", type=int, help="default: 200, digits: 6")
    parser.add_argument("--limit", type=int, default=0, help="images of each split; 0: all (default)")
    parser.add_argument("--multiples", nargs="+", type=float, default=[0.5, 1, 2], help="of each arm's learning rate")
    parser.add_argument("--decays", nargs="+", type=float, default=[0.1], help="weight decays that are tried")
    parser.add_argument("--seeds", type=int, default=3, help="seeds that are reported (default: %(default)s)")
    parser.add_argument("--workers", type=int, help="processes; default: 2, on a GPU 1")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    small = args.dataset == "digits"
    defaults = dict(width=8 if small else 64, epochs=6 if small else 200, workers=2 if args.device == "cpu" else 1)
    for key, value in defaults.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    for key, least in dict(width=1, epochs=1, limit=0, seeds=1, workers=1).items():
        if getattr(args, key) < least:
            parser.error(f"--{key}={getattr(args, key)}: must be at least {least}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    folder = results_folder(args)
    if args.smoke:
        args.width, args.epochs, args.multiples, args.seeds = 2, 1, [1.0], 1
    with one_line("bench.vision", "interrupted; the same command continues"):
        load_images(args.dataset, args.data)  # a missing file or package is reported before the first run
        comparison = Comparison(args, (folder if args.smoke else RUNS) / f"{args.dataset}.jsonl")
        comparison.train()
        report(comparison, folder)


if __name__ == "__main__":
    main()
