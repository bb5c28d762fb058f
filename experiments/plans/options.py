"""Options that other projects use: Muon with and without each one, at the size of the quickstart."""

from experiments.plan import Arm, Plan
from experiments.plans._scales import QUICKSTART


def muon(options: str = "") -> Arm:
    return Arm(f"--optimizer=muon {options}".strip(), dict(quickstart=5e-3))


plan = Plan(
    question="Which options of other projects lower the loss of Muon?",
    source="arXiv 2505.16932 and 2510.12402; modded-nanogpt; dion",
    arms={
        "Muon": muon(),
        "Muon polar_express": muon("--coefficients=polar_express"),
        "Muon cautious": muon("--weight_decay_kind=cautious"),
        "Muon decay follows lr": muon("--moves=weight_decay:lr"),
        "Muon split_qkv": muon("--split_qkv=true"),
        "Muon split_heads": muon("--split_heads=4"),
    },
    reference="Muon",
    scales=dict(quickstart=QUICKSTART),
)
