"""Options that other projects use: Muon with and without each one, at the size of the quickstart."""

from experiments.plan import Arm, Plan
from experiments.plans._scales import QUICKSTART


def muon(options: str = "") -> Arm:
    return Arm(f"--optimizer=muon {options}".strip(), dict(quickstart=1e-2))


plan = Plan(
    question="Do Polar Express's coefficients or cautious weight decay lower the loss of Muon?",
    source="arXiv 2505.16932; arXiv 2510.12402",
    arms={
        "Muon": muon(),
        "Muon polar_express": muon("--coefficients=polar_express"),
        "Muon cautious": muon("--weight_decay_kind=cautious"),
    },
    reference="Muon",
    scales=dict(quickstart=QUICKSTART),
)
