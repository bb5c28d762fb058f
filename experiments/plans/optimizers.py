"""All optimizers, each with its best learning rate."""

from experiments.plan import Arm, Plan
from experiments.plans._scales import LAPTOP, PAPER_SMALL

ORTHOGONAL = dict(laptop="--adamw_lr=0.01")


def mars(betas: str, gamma: float, laptop: float = 1e-2) -> Arm:
    options = f"--optimizer=mars --optim.betas={betas} --gamma={gamma:g}"
    return Arm(options, dict(laptop=laptop, paper=6e-3), lr_1d=0.5)


plan = Plan(
    question="Which optimizer is best, and does the correction of MARS help each direction?",
    source="MARS paper, figures 1 to 3; MARS-M paper; AdEMAMix, SOAP and NorMuon beside them",
    arms={
        "AdamW (0.9, 0.95)": Arm("--optimizer=adamw", dict(laptop=1e-2, paper=6e-4)),
        "AdamW (0.95, 0.99)": Arm("--optimizer=adamw --optim.betas=0.95,0.99", dict(laptop=5e-3, paper=6e-4)),
        **{f"MARS-AdamW (0.9, 0.95) gamma {g:g}": mars("0.9,0.95", g) for g in (0.025, 0.05, 0.1)},
        **{f"MARS-AdamW (0.95, 0.99) gamma {g:g}": mars("0.95,0.99", g) for g in (0.025, 0.05)},
        "MARS-AdamW (0.95, 0.99) gamma 0.1": mars("0.95,0.99", 0.1, laptop=2e-2),
        "Lion": Arm("--optimizer=lion", dict(laptop=1e-3, paper=1e-4)),
        "MARS-Lion": Arm("--optimizer=mars_lion", dict(laptop=2e-3, paper=6e-4), lr_1d=0.5),
        "Shampoo": Arm("--optimizer=shampoo", dict(laptop=2e-2, paper=2e-2), ORTHOGONAL),
        "MARS-Shampoo": Arm("--optimizer=mars_shampoo", dict(laptop=4e-2, paper=2e-2), lr_1d=0.25),
        "Muon": Arm("--optimizer=muon", dict(laptop=2e-2, paper=6e-3), ORTHOGONAL),
        "MARS-M": Arm("--optimizer=mars_m", dict(laptop=2e-2, paper=6e-3), ORTHOGONAL),
        "NorMuon": Arm("--optimizer=normuon", dict(laptop=2e-2, paper=6e-3), ORTHOGONAL),
        "SOAP": Arm("--optimizer=soap", dict(laptop=1e-2, paper=3e-3)),
        "AdEMAMix": Arm("--optimizer=ademamix", dict(laptop=6.4e-4, paper=6e-4), dict(laptop="--slow_warmup=1200")),
    },
    reference="AdamW (0.9, 0.95)",
    scales=dict(laptop=LAPTOP, paper=PAPER_SMALL),
)
