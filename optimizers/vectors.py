"""Test vectors for implementations elsewhere: ten steps of every optimizer on three small tensors, as JSON.

python -m optimizers.vectors tests/golden/vectors.json

Parameters are float64; Newton-Schulz runs in float32, as on every CPU.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import OPTIMIZERS, Settings, build_optimizer

ROLES = {"matrix": "matrix", "table": "embedding", "gain": "vector"}
SHAPES = {"matrix": (4, 3), "table": (3, 2), "gain": (3,)}  # 4 - 3 = 1: SOAP's first eigenvectors are unique
STEPS = 10
Numbers = dict[str, Any]  # nested lists by tensor


class Three(nn.ParameterDict):
    """A matrix, an embedding and a vector."""

    def parameter_roles(self) -> dict[str, str]:
        """Roles by name."""
        return ROLES


def steps_of(settings: Settings, start: Numbers, gradients: list[Numbers]) -> list[Numbers]:
    """The weights after each step of the optimizer that some settings describe."""
    model = Three({name: nn.Parameter(torch.tensor(x, dtype=torch.float64)) for name, x in start.items()})
    optimizer, weights = build_optimizer(model, settings), []
    for gradient in gradients:
        for name, p in model.items():
            p.grad = torch.tensor(gradient[name], dtype=torch.float64)
        optimizer.step()
        weights.append({name: as_list(p.detach(), 9) for name, p in model.items()})
    return weights


def as_list(x: Tensor, digits: int) -> Any:
    """A tensor as nested lists of rounded numbers."""
    return [as_list(row, digits) for row in x] if x.dim() else round(x.item(), digits)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=f"{__package__}.vectors", description=__doc__)
    parser.add_argument("file", type=Path, help="file to write")
    args = parser.parse_args(argv)
    generator = torch.Generator().manual_seed(0)

    def draw() -> Numbers:
        return {name: as_list(torch.randn(shape, generator=generator), 3) for name, shape in SHAPES.items()}

    start, gradients = draw(), [draw() for _ in range(STEPS)]
    found: dict[str, Any] = dict(roles=ROLES, start=start, gradients=gradients, optimizers={})
    for name, settings in OPTIMIZERS.items():
        weights = steps_of(settings, start, gradients)
        found["optimizers"][name] = dict(settings=asdict(settings), weights=weights)  # type: ignore[call-overload]
    args.file.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
