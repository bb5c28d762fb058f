"""The exact correction, which takes two gradients per step, against the approximate one."""

from experiments.plan import Arm, Plan
from experiments.plans._scales import LAPTOP, PAPER_SMALL


def mars(options: str, laptop: float = 1e-2) -> Arm:
    return Arm(f"--optimizer=mars {options}", dict(laptop=laptop, paper=6e-3), lr_1d=0.5)


def mars_m(options: str) -> Arm:
    return Arm(f"--optimizer=mars_m {options}", dict(laptop=2e-2, paper=6e-3), dict(laptop="--adamw_lr=0.01"))


plan = Plan(
    question="Is the exact correction better than the approximate one, per step and per gradient evaluation?",
    source="MARS paper, figure 5",
    arms={
        "MARS-AdamW": mars(""),
        "MARS-AdamW exact": mars("--is_approx=false", laptop=2.5e-3),
        "MARS-M": mars_m(""),
        "MARS-M exact": mars_m("--is_approx=false"),
    },
    reference="MARS-AdamW",
    scales=dict(laptop=LAPTOP, paper=PAPER_SMALL),
)
