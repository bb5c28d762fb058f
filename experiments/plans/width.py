"""The learning rate and the width of the model: `python -m experiments.width` does the runs, and has the report."""

from experiments.plan import Arm, Plan, Scale

WIDTHS = 64, 128, 256, 512


def arm(options: str, lr: float) -> Arm:
    """An arm that tries the same rates at every width."""
    return Arm(options, {str(width): lr for width in WIDTHS})


def scale(width: int) -> Scale:
    return Scale(
        "config/quickstart.py",
        f"--n_layer=2 --n_embd={width} --n_head={width // 32} --steps=300 --warmup=30 --eval_every=300 "
        "--checkpoint.every=300",
        seeds=(1, 2),
        multiples=(0.25, 0.5, 1.0, 2.0, 4.0, 8.0),
    )


plan = Plan(
    question="How does the best learning rate of matrices change with the width of the model?",
    source="Moonlight (arXiv 2502.16982), scale of updates",
    arms={
        "AdamW": arm("--optimizer=adamw", 2e-3),
        "Muon": arm("--optimizer=muon", 5e-3),
        "MARS-M": arm("--optimizer=mars_m", 5e-3),
        "MARS-AdamW": arm("--optimizer=mars --lr_1d=3e-3", 2e-3),
        "Muon, original scale": arm("--optimizer=muon --scale=original", 2e-2),
        "SOAP": arm("--optimizer=soap", 4e-3),
    },
    reference="AdamW",
    scales={str(width): scale(width) for width in WIDTHS},
)
