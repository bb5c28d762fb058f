"""The optimizers at the size of the quickstart: 80 times the parameters of the plans `optimizers` and `gamma`."""

from experiments.plan import Arm, Plan
from experiments.plans._scales import QUICKSTART


def arm(options: str, lr: float, gamma: float | None = None, lr_1d: float | None = None) -> Arm:
    return Arm(options, dict(quickstart=lr), gamma=gamma, lr_1d=lr_1d)


def mars_m(gamma: float, clipped: bool) -> Arm:
    return arm(f"--optimizer=mars_m --gamma={gamma:g} --clip_c={str(clipped).lower()}", 5e-3, gamma)


plan = Plan(
    question="Which optimizer is best at 1.9 million parameters, and which gamma?",
    source="MARS paper, figures 1 to 3; MARS-M paper",
    arms={
        "AdamW (0.9, 0.95)": arm("--optimizer=adamw", 3e-3),
        "Muon without Nesterov": arm("--optimizer=muon --nesterov=false", 5e-3, 0.0),  # equals MARS-M at gamma 0
        "MARS-M gamma 0.025 clipped": mars_m(0.025, True),  # as published
        "MARS-AdamW (0.95, 0.99) gamma 0.025": arm("--optimizer=mars", 3e-3, lr_1d=0.5),  # as published
        "Muon": arm("--optimizer=muon", 5e-3, 0.05),  # equals MARS-M at gamma 0.05, not clipped
        "MARS-M gamma 0.1": mars_m(0.1, False),
        "AdamW (0.95, 0.99)": arm("--optimizer=adamw --optim.betas=0.95,0.99", 3e-3),
        "MARS-AdamW (0.9, 0.95) gamma 0.05": arm(
            "--optimizer=mars --optim.betas=0.9,0.95 --gamma=0.05", 3e-3, lr_1d=0.5
        ),
        "SOAP": arm("--optimizer=soap", 3e-3),
        "NorMuon": arm("--optimizer=normuon", 5e-3),
        "MARS-M gamma 0.2": mars_m(0.2, False),
        "Lion": arm("--optimizer=lion", 2e-4),
        "MARS-Lion": arm("--optimizer=mars_lion", 3e-4, lr_1d=0.5),
        "Shampoo": arm("--optimizer=shampoo", 2e-2),
        "MARS-Shampoo": arm("--optimizer=mars_shampoo", 3e-2, lr_1d=0.25),
        "AdEMAMix": arm("--optimizer=ademamix --slow_warmup=700", 1e-3),
    },
    reference="AdamW (0.9, 0.95)",
    scales=dict(quickstart=QUICKSTART),
)
