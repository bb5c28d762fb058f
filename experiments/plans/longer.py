"""Five arms of the plan `larger` over four times the steps: does the order hold, and where is the best gamma?"""

from experiments.plan import Plan
from experiments.plans._scales import QUICKSTART_LONG
from experiments.plans.larger import plan as larger

ARMS = "AdamW (0.9, 0.95)", "Muon without Nesterov", "Muon", "MARS-M gamma 0.025 clipped", "MARS-M gamma 0.1"
plan = Plan(
    question="Which optimizer is best at 1.9 million parameters over four times the steps, and which gamma?",
    source=larger.source,
    arms={name: larger.arms[name] for name in ARMS},
    reference=larger.reference,
    scales=dict(quickstart=QUICKSTART_LONG),
)
