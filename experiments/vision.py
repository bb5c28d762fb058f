"""Train a ResNet-18 on images: python -m experiments.vision DATASET --optimizer=NAME

    python -m experiments.vision digits --optimizer=muon --lr=0.01 --width=8 --epochs=6          takes seconds
    python -m experiments.vision fashion --data=FOLDER --optimizer=mars_m --gamma=0.05 --weight_decay=0.01
    python -m experiments.sweep vision --scale cifar10                                 all optimizers, on a GPU

A run holds a part of the training images out. Learning rates are selected by the error on these; the test images are
for the report alone. A seed gives all optimizers equal weights, batches and augmentation. The optimizers have the
settings of train_gpt.py. A run that ends early starts again; a finished one is not repeated.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.runs import optimizer_step
from config.load import optimizer_settings
from experiments.images import DATASETS, Images, load_images
from experiments.resnet import ResNet18
from optimizers import OPTIMIZERS, Settings, build_optimizer
from runtime.command import Parser, at_least, one_line
from runtime.errors import UserError
from runtime.files import write_json
from training.folder import CONFIG, differences
from training.logger import METRICS, read_metrics

BATCH = 128
DROPS = (0.5, 0.75)  # parts of the run after which the learning rate falls to a tenth: epochs 100 and 150 of 200


@dataclass(frozen=True)
class VisionConfig:
    """Everything that decides the result of a run."""

    dataset: str
    width: int  # channels of the first stage
    epochs: int
    limit: int  # images of each split; 0: all
    seed: int
    optimizer: str
    optim: Settings


def train(config: VisionConfig, images: Images) -> Iterator[dict[str, float]]:
    """Train, and yield a record after each epoch: losses in nats per image, and errors in %.

    The images are on the device of the run. Raises UserError if the loss is no longer finite.
    """
    torch.manual_seed(config.seed)
    pixels, labels = images.train
    model = ResNet18(images.kind.classes, config.width, images.channels).to(pixels.device)
    optimizer: Any = build_optimizer(model, config.optim)
    rates = [group["lr"] for group in optimizer.param_groups]
    if len(labels) % BATCH == 1:
        raise UserError(f"{len(labels)} images: the last batch has a single one, which cannot be normalized")
    stream = batches(images, config.seed, config.epochs)
    batch, steps, seconds, gradients = next(stream), math.ceil(len(labels) / BATCH), 0.0, 0

    def gradient(batch: tuple[Tensor, Tensor]) -> None:
        pixels, labels = batch
        F.cross_entropy(model(pixels), labels).backward()

    for epoch in range(config.epochs):
        start = time.perf_counter()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * 0.1 ** sum(epoch >= part * config.epochs for part in DROPS)
        model.train()
        for _ in range(steps):
            upcoming = next(stream, batch)
            gradients += optimizer_step(optimizer, gradient, batch, upcoming)
            batch = upcoming
        val_loss, val_error = score(model, images, *images.validation)  # which waits for the device
        seconds += time.perf_counter() - start
        if not math.isfinite(val_loss):
            raise UserError(f"epoch {epoch + 1}: the validation loss is not finite")
        test_loss, test_error = score(model, images, *images.test)
        done = dict(step=(epoch + 1) * steps, epoch=epoch + 1, images=(epoch + 1) * len(labels), train_s=seconds)
        scores = dict(val_loss=val_loss, val_error=val_error, test_loss=test_loss, test_error=test_error)
        yield done | dict(gradient_evaluations=gradients) | scores


def batches(images: Images, seed: int, epochs: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The augmented batches of all epochs, each in an order of its own."""
    random = torch.Generator().manual_seed(seed)
    pixels, labels = images.train
    for _ in range(epochs):
        for chosen in torch.randperm(len(labels), generator=random).split(BATCH):
            chosen = chosen.to(labels.device)
            yield images.augmented(pixels[chosen], random), labels[chosen]


@torch.no_grad()
def score(model: nn.Module, images: Images, pixels: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean loss and error in %."""
    model.eval()
    loss, wrong = 0.0, 0
    for x, y in zip(pixels.split(1024), labels.split(1024), strict=True):
        logits = model(images.normalized(x))
        loss += float(F.cross_entropy(logits, y, reduction="sum"))
        wrong += int((logits.argmax(1) != y).sum())
    return loss / len(labels), 100 * wrong / len(labels)


def parse(argv: Sequence[str] | None) -> tuple[VisionConfig, argparse.Namespace]:
    """The configuration of a run, and the options that do not change its result."""
    parser = Parser(prog="experiments.vision", description=__doc__)
    parser.add_argument("dataset", choices=DATASETS)
    parser.add_argument("--data", default=".", help="folder of the image files (default: this folder)")
    parser.add_argument("--optimizer", default="adamw", choices=OPTIMIZERS, metavar="NAME", help=", ".join(OPTIMIZERS))
    parser.add_argument("--width", type=at_least(1), default=64, help="channels of the first stage")
    parser.add_argument("--epochs", type=at_least(1), default=200, help="passes over the training images")
    parser.add_argument("--limit", type=at_least(0), default=0, help="images of each split; 0: all")
    parser.add_argument("--seed", type=at_least(0, 2**62 - 1), default=1, help="random seed")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--name", help="run folder (default: dataset, optimizer and seed)")
    parser.add_argument("--log.folder", default="runs/vision", help="folder of run folders")
    parser.epilog = "Every setting of the optimizer is an option, too: --lr, --weight_decay, --gamma, ..."
    args, settings = parser.parse_with_settings(argv)
    args.name = args.name or f"{args.dataset}-{args.optimizer}-seed{args.seed}"
    optim = optimizer_settings(args.optimizer, settings)
    return VisionConfig(args.dataset, args.width, args.epochs, args.limit, args.seed, args.optimizer, optim), args


def changed(before: dict[str, Any], config: VisionConfig) -> dict[str, tuple]:
    """The settings of a config.json that differ from a configuration, as key: (before, now)."""
    defaults = {f"optim.{key}": value for key, value in asdict(OPTIMIZERS[config.optimizer]).items()}  # type: ignore[call-overload]
    return differences(before, asdict(config), defaults)


def is_last(record: dict[str, Any], config: VisionConfig) -> bool:
    """Whether a record is that of the last epoch."""
    return record["epoch"] == config.epochs


def is_finished(folder: Path, config: VisionConfig) -> bool:
    """Whether a folder holds this run, finished. Raises UserError if it holds a run with other settings."""
    if not (folder / CONFIG).exists():
        return False
    if found := changed(json.loads((folder / CONFIG).read_text(encoding="utf-8")), config):
        settings = ", ".join(f"{key}: {before} -> {now}" for key, (before, now) in found.items())
        raise UserError(f"{folder}: holds a run with other settings ({settings}); give another --name")
    records = read_metrics(folder / METRICS) if (folder / METRICS).exists() else []
    return bool(records) and is_last(records[-1], config)


def main(argv: Sequence[str] | None = None) -> None:
    with one_line("experiments.vision"):
        config, args = parse(argv)
        if args.device == "cpu":
            torch.set_num_threads(1)  # on small images, more threads wait for each other
        folder = Path(getattr(args, "log.folder"), args.name)
        if is_finished(folder, config):
            print(f"{folder}: this run is finished")
            return
        images = load_images(config.dataset, args.data).limited(config.limit).to(args.device)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / CONFIG, asdict(config))
        with open(folder / METRICS, "w", encoding="utf-8") as file:
            for record in train(config, images):
                file.write(json.dumps(record) + "\n")
                file.flush()
                errors = f"error {record['val_error']:.2f} % (validation), {record['test_error']:.2f} % (test)"
                print(f"epoch {record['epoch']:3}/{config.epochs}  {errors}", flush=True)


if __name__ == "__main__":
    main()
