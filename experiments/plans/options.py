"""Options that other projects use, each with and without, for Muon at the size of the quickstart."""

from experiments.plan import Arm, Plan
from experiments.plans._scales import QUICKSTART


def muon(options: str = "") -> Arm:
    return Arm(f"--optimizer=muon {options}".strip(), dict(quickstart=1e-2))


plan = Plan(
    question="Do Polar Express's coefficients lower the loss of Muon?",
    source="arXiv 2505.16932",
    arms={
        "Muon": muon(),
        "Muon polar_express": muon("--coefficients=polar_express"),
    },
    reference="Muon",
    scales=dict(quickstart=QUICKSTART),
)
