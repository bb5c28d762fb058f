"""A short comparison of optimizers for the first minutes on a GPU: real text, and eight runs at a time on one card."""

from experiments.plan import Arm, Plan, Scale

# 10.8 million parameters on the embedded corpus, about one epoch of it. A step takes as long as its launches, so that
# compiling gains little, and several runs fit on a card at once (--workers 8).
GPU = Scale(
    "config/quickstart.py",
    "--n_layer=6 --n_head=6 --n_embd=384 --block_size=256 --batch_size=64 --micro_batch=64 --steps=700 "
    "--checkpoint.every=700 --eval_every=100 --compile=false",
    seeds=(1, 2, 3, 4),
)
SMOKE = Scale(
    "config/quickstart.py",
    "--n_layer=1 --n_head=1 --n_embd=16 --block_size=16 --batch_size=4 --micro_batch=4 --steps=4 --warmup=1 "
    "--eval_every=2 --val_windows=8 --device=cpu",
    seeds=(1, 2, 3),
    multiples=(0.5, 1.0),
)
SCALES = dict(gpu=GPU, smoke=SMOKE)


def arm(options: str, lr: float, lr_1d: float | None = None, gamma: float | None = None) -> Arm:
    return Arm(options, dict.fromkeys(SCALES, lr), lr_1d=lr_1d, gamma=gamma)


def mars_m(gamma: float) -> Arm:
    return arm(f"--optimizer=mars_m --clip_c=false --gamma={gamma:g} --adamw_lr=3e-3", 1e-2, gamma=gamma)


plan = Plan(
    question="Do the optimizers train on this GPU, and in which order do short runs put them?",
    source="a first look; the papers' settings are in the other plans",
    arms={
        "AdamW": arm("--optimizer=adamw", 3e-3),
        "MARS-AdamW": arm("--optimizer=mars", 6e-3, lr_1d=0.5),
        "Muon": arm("--optimizer=muon --adamw_lr=3e-3", 1e-2),
        **{f"MARS-M gamma {gamma:g}": mars_m(gamma) for gamma in (0.0, 0.025, 0.1)},
    },
    reference="Muon",
    scales=SCALES,
)
