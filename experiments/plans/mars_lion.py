"""The sign direction under MARS with the hyperparameters of MARS-AdamW."""

from experiments.plan import Arm, Plan
from experiments.plans._scales import LAPTOP, PAPER_SMALL

plan = Plan(
    question="How does MARS-Lion compare with Lion and with MARS-AdamW?",
    source="MARS paper, figure 7 (appendix B.2)",
    arms={
        "MARS-AdamW": Arm("--optimizer=mars", dict(laptop=1e-2, paper=6e-3), lr_1d=0.5),
        "Lion": Arm("--optimizer=lion", dict(laptop=1e-3, paper=1e-4)),
        "MARS-Lion": Arm("--optimizer=mars_lion", dict(laptop=2e-3, paper=6e-4), lr_1d=0.5),
        "MARS-Lion, gamma 0": Arm("--optimizer=mars_lion --gamma=0", dict(laptop=2e-3, paper=6e-4), lr_1d=0.5),
    },
    reference="MARS-AdamW",
    scales=dict(laptop=LAPTOP, paper=PAPER_SMALL),
)
