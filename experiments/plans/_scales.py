"""Scales that several experiments share."""

from dataclasses import replace

from experiments.plan import Scale

# One layer of width 32, bytes, 16 tokens of context: a run takes half a minute of a CPU core and leaves the plateau of
# byte-pair frequencies early, so that 1,200 steps can rank optimizers.
TINY = (
    "--n_layer=1 --n_head=2 --n_embd=32 --block_size=16 --val_windows=4096 --eval_every=150 --log.every=50 "
    "--schedule.min_lr_ratio=0.03"
)
LAPTOP = Scale(
    "config/quickstart.py",
    f"{TINY} --batch_size=16 --micro_batch=16 --steps=1200 --warmup=60 --checkpoint.every=1200",
    seeds=(1, 2, 3, 4, 5, 6),
    multiples=(0.25, 0.5, 1.0, 2.0, 4.0),
)
# One has a quarter of the noise at the same number of steps, the other four times the steps at the same noise.
LAPTOP_LARGE_BATCH = replace(
    LAPTOP,
    options=f"{TINY} --batch_size=64 --micro_batch=64 --steps=1200 --warmup=60 --checkpoint.every=1200",
    multiples=(0.25, 0.5, 1.0, 2.0),
)
LAPTOP_LONG = replace(
    LAPTOP,
    options=f"{TINY} --batch_size=16 --micro_batch=16 --steps=4800 --warmup=240 --checkpoint.every=4800",
    multiples=(0.25, 0.5, 1.0, 2.0),
)
PAPER_SMALL = Scale("config/gpt2_small.py", "", seeds=(1, 2, 3, 4), processes=8)
PAPER_SMALL_FINEWEB = Scale("config/gpt2_small.py", "--data.path=data/tokens/fineweb_edu_100B", (1, 2, 3, 4), 8)
PAPER_XL_FINEWEB = Scale("config/gpt2_xl.py", "--data.path=data/tokens/fineweb_edu_100B", (1, 2, 3, 4), 8)
# The quickstart itself: 1.9 million parameters, 1.4 million bytes. A run takes six minutes of a CPU core.
QUICKSTART = Scale(
    "config/quickstart.py",
    "--eval_every=175 --checkpoint.every=700",
    seeds=(1, 2, 3, 4, 5),
    multiples=(0.5, 1.0, 2.0, 4.0),
)
QUICKSTART_LONG = replace(
    QUICKSTART,
    options="--steps=2800 --warmup=200 --eval_every=700 --checkpoint.every=2800",
    seeds=(1, 2, 3, 4),
    multiples=(0.5, 1.0, 2.0),
)
