"""The setting of an independent benchmark of optimizers, on our GPT-2."""

from experiments.plan import Arm, Plan, Scale

plan = Plan(
    question="How do the optimizers compare in the setting of an independent benchmark?",
    source="Semenov, Pagliardini and Jaggi 2025 (arXiv 2509.01440), 124M on FineWeb",
    arms={
        "AdamW": Arm("--optimizer=adamw --optim.betas=0.8,0.999", dict(paper=1e-3)),
        "AdEMAMix": Arm("--optimizer=ademamix --beta3=0.999 --slow_warmup=128000", dict(paper=1e-3)),
        "Muon (Moonlight)": Arm("--optimizer=muon --adamw_betas=0.8,0.999", dict(paper=1e-3)),
        "SOAP": Arm("--optimizer=soap --optim.betas=0.9,0.999", dict(paper=1e-3)),
        "Lion": Arm("--optimizer=lion --optim.betas=0.9,0.99 --optim.weight_decay=0.1", dict(paper=1e-3)),
        "MARS-AdamW": Arm("--optimizer=mars --betas_1d=0.8,0.999", dict(paper=3e-3), lr_1d=1 / 3),
        "MARS-M": Arm("--optimizer=mars_m --adamw_betas=0.8,0.999", dict(paper=1e-3)),
    },
    reference="AdamW",
    scales=dict(
        paper=Scale(
            "config/gpt2_small.py",
            "--data.path=data/tokens/fineweb_10B --block_size=512 --batch_size=256 --micro_batch=32 --steps=128000 "
            "--grad_clip=0.5 --schedule.min_lr=none --schedule.min_lr_ratio=0.01",
            seeds=(1, 2, 3, 4),
            processes=8,
        )
    ),
)
