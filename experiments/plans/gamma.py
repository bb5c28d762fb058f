"""Loss against gamma, the strength of the correction, for orthogonalized momentum."""

from experiments.plan import Arm, Plan
from experiments.plans._scales import LAPTOP, PAPER_SMALL


def arm(options: str, gamma: float | None = None) -> Arm:
    return Arm(options, dict(laptop=2e-2, paper=6e-3), dict(laptop="--adamw_lr=0.01"), gamma=gamma)


unclipped = {
    f"MARS-M gamma {g:g}": arm(f"--optimizer=mars_m --clip_c=false --gamma={g:g}", g)
    for g in (0.0, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4)
}
clipped = {f"MARS-M gamma {g:g} clipped": arm(f"--optimizer=mars_m --gamma={g:g}") for g in (0.025, 0.05, 0.1)}
plan = Plan(
    question="Which gamma is best for MARS-M, and how does it compare with Muon?",
    source="MARS-M paper: gamma 0.01 and 0.025 against Muon; MARS paper, table of gamma",
    arms={
        "Muon": arm("--optimizer=muon"),  # equals MARS-M at gamma 0.05, approximate and not clipped
        "Muon without Nesterov": arm("--optimizer=muon --nesterov=false"),  # equals gamma 0
        **unclipped,
        **clipped,
        "MARS-M gamma 0.025 exact": arm("--optimizer=mars_m --is_approx=false"),
    },
    reference="Muon",
    scales=dict(laptop=LAPTOP, paper=PAPER_SMALL),
)
