"""MARS-M against Muon on FineWeb-Edu, small and xl."""

from experiments.plan import Arm, Plan
from experiments.plans._scales import PAPER_SMALL_FINEWEB, PAPER_XL_FINEWEB

LR = dict(paper=1e-2, paper_xl=3e-3)
plan = Plan(
    question="Is MARS-M better than Muon on FineWeb-Edu?",
    source="MARS-M paper, FineWeb-Edu: small and xl, gamma 0.01 and 0.025; without correction added",
    arms={
        "AdamW": Arm("--optimizer=adamw", dict(paper=6e-4, paper_xl=2e-4)),
        "Muon": Arm("--optimizer=muon", LR),
        "Muon without Nesterov": Arm("--optimizer=muon --nesterov=false", LR),
        "MARS-M gamma 0.01": Arm("--optimizer=mars_m --gamma=0.01", LR),
        "MARS-M gamma 0.025": Arm("--optimizer=mars_m --gamma=0.025", LR),
    },
    reference="Muon",
    scales=dict(paper=PAPER_SMALL_FINEWEB, paper_xl=PAPER_XL_FINEWEB),
)
