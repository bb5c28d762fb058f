"""The second moment of MARS-AdamW, from corrected gradients (as published) or from raw ones."""

from experiments.plan import Arm, Plan
from experiments.plans._scales import LAPTOP, PAPER_SMALL


def mars(gamma: float, v: str, clip: str) -> Arm:
    options = f"--optimizer=mars --gamma={gamma:g} --second_moment={v} --clip_c={clip}"
    return Arm(options, dict(laptop=1e-2 if v == "corrected" else 5e-3, paper=6e-3), lr_1d=0.5)


plan = Plan(
    question="Does it matter whether v averages the squares of corrected or of raw gradients?",
    source="MARS paper, remark 3.2",
    arms={
        f"gamma {gamma:g}, v from {v}, {'clipped' if clip == 'true' else 'unclipped'}": mars(gamma, v, clip)
        for gamma in (0.025, 0.1)
        for clip in ("true", "false")
        for v in ("corrected", "raw")
    },
    reference="gamma 0.025, v from corrected, clipped",
    scales=dict(laptop=LAPTOP, paper=PAPER_SMALL),
)
