"""How the loss depends on the learning rate."""

from dataclasses import replace

from experiments.plan import Arm, Plan
from experiments.plans._scales import LAPTOP, PAPER_SMALL

RATES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
plan = Plan(
    question="How sensitive are AdamW and MARS-AdamW to the learning rate?",
    source="MARS paper, figure 6 (appendix B.1): AdamW at 6e-4 and 3e-3, MARS at 3e-3 and 6e-3",
    arms={
        "AdamW": Arm("--optimizer=adamw", dict(laptop=1e-2, paper=1.5e-3)),
        "MARS-AdamW": Arm("--optimizer=mars", dict(laptop=2e-2, paper=3e-3), lr_1d=0.5),
    },
    reference="AdamW",
    scales=dict(laptop=replace(LAPTOP, multiples=RATES), paper=replace(PAPER_SMALL, multiples=RATES)),
)
