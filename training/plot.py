"""Curves of a run folder: python -m training.plot runs/NAME

Everything that draws makes its figures here, without pyplot: nothing depends on MPLBACKEND, which in a notebook names a
module that other programs may not find.
"""

import io
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from runtime.command import Parser, one_line
from runtime.errors import UserError
from runtime.files import write_durably
from training.logger import METRICS, read_metrics

CURVES = "curves.png"


def new_figure(width: float, height: float) -> Any:
    """A matplotlib Figure, in inches, that is drawn without a screen. Raises UserError without matplotlib."""
    backend = os.environ.pop("MPLBACKEND", "")  # with a name that it does not know, matplotlib cannot be imported
    is_first = "matplotlib" not in sys.modules
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("drawing curves needs: pip install matplotlib") from None
    finally:
        if backend:
            os.environ["MPLBACKEND"] = backend
    if backend and is_first:  # a notebook goes on to draw with it
        with suppress(ValueError):
            matplotlib.rcParams["backend"] = backend
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG. The former image or the new one is complete at every moment."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110)
    write_durably(path, image.getvalue())


def plot_run(folder: Path) -> Path:
    """Draw loss, learning rate and gradient norm over tokens into curves.png and return its path.

    Raises UserError without matplotlib, and if there is nothing to draw.
    """
    figure = new_figure(9, 6)
    if not (folder / METRICS).exists():
        raise UserError(f"{folder}: no {METRICS} in it")
    records = read_metrics(folder / METRICS)
    train = [r for r in records if r.keys() >= {"tokens", "loss", "grad_norm", "lr"}]
    val = [r for r in records if r.keys() >= {"tokens", "val_loss"}]
    if not train:
        raise UserError(f"{folder / METRICS}: nothing logged yet")

    def series(rows: list[dict], key: str) -> tuple[list, list]:
        return [r["tokens"] / 1e6 for r in rows], [r[key] for r in rows]

    losses, norms = figure.subplots(2, 1, height_ratios=(2.5, 1), sharex=True)
    losses.plot(*series(train, "loss"), color="#9ab8d9", linewidth=1, label="training (one batch)")
    if val:
        tokens, values = series(val, "val_loss")
        losses.plot(tokens, values, "o-", color="#1f4e79", markersize=3, label="validation")
        last = (tokens[-1], values[-1])
        losses.annotate(f"{values[-1]:.3f}", last, textcoords="offset points", xytext=(-8, 10))
    losses.set(ylabel="loss, nats per token", title=folder.name)
    losses.legend()
    norms.plot(*series(train, "grad_norm"), color="#c0504d", linewidth=1, label="gradient norm")
    norms.set(xlabel="tokens, millions", ylabel="gradient norm", yscale="log")
    rates = norms.twinx()
    rates.plot(*series(train, "lr"), color="#777777", label="learning rate")
    rates.set(ylabel="learning rate", ylim=(0, None))
    for axes in (losses, norms):
        axes.grid(alpha=0.25)
    save(figure, folder / CURVES)
    return folder / CURVES


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="training.plot", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of a run")
    args = parser.parse_args(argv)
    with one_line("training.plot"):
        print(plot_run(args.folder))


if __name__ == "__main__":
    main()
