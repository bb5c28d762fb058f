"""A gamma that changes over the run, for MARS-AdamW."""

from experiments.plan import Arm, Plan
from experiments.plans._scales import LAPTOP, PAPER_SMALL


def mars(first: float, last: float | None = None) -> Arm:
    moving = "" if last is None else f" --gamma_end={last:g}"
    # the middle of the rates, so that the best one lies inside the grid
    laptop = 1e-2 if last is None and first in (0.025, 0.05) else 2e-2
    return Arm(f"--optimizer=mars --gamma={first:g}{moving}", dict(laptop=laptop, paper=6e-3), lr_1d=0.5)


plan = Plan(
    question="Does MARS-AdamW gain from a gamma that rises or falls over the run?",
    source="MARS paper, table 1 (appendix B.3), with gamma 0, 0.01 and 0.1 added",
    arms={
        **{f"gamma {g:g}": mars(g) for g in (0.0, 0.01, 0.025, 0.05, 0.1)},
        **{f"gamma {a:g} to {b:g}": mars(a, b) for a, b in ((0.025, 0.05), (0.1, 0.0), (0.0, 0.1), (0.0, 0.2))},
    },
    reference="gamma 0.025",
    scales=dict(laptop=LAPTOP, paper=PAPER_SMALL),
)
