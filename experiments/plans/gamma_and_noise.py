"""Whether the best gamma of MARS-M depends on the batch size and on the number of steps."""

from experiments.plan import Arm, Plan
from experiments.plans._scales import LAPTOP_LARGE_BATCH, LAPTOP_LONG

UNCLIPPED = "--optimizer=mars_m --clip_c=false"
GAMMAS = (0.0, 0.025, 0.05, 0.1, 0.2, 0.4)
LR = dict(large_batch=2e-2, long=2e-2)
HIGHER = dict(large_batch=4e-2, long=2e-2)  # for gammas whose best rate is higher
MORE = dict.fromkeys(LR, "--adamw_lr=0.01")

plan = Plan(
    question="Does the best gamma of MARS-M depend on the batch size and the number of steps?",
    source="MARS paper, table of gamma; Semenov et al. 2025: MARS leads at large batches",
    arms={f"gamma {g:g}": Arm(f"{UNCLIPPED} --gamma={g:g}", HIGHER if g > 0.1 else LR, MORE, gamma=g) for g in GAMMAS},
    reference="gamma 0.05",  # equals Muon with Nesterov momentum 0.95
    scales=dict(large_batch=LAPTOP_LARGE_BATCH, long=LAPTOP_LONG),
)
