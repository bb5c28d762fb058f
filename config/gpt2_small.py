"""GPT-2 small, 124M parameters, on OpenWebText: the settings of the MARS and MARS-M papers.

    torchrun --nproc_per_node=8 train_gpt.py config/gpt2_small.py --optimizer=mars_m

Sources: [1] MARS paper (arXiv 2411.10438) tables 10 to 12; [2] MARS-M README; [3] config files of
AGI-Arena/MARS at 4831e28; [ours] if nothing was published. --as_published sets what the runs did beyond
these numbers (config/published.py). The config files of the other sizes say what they change in this one.
"""

from data.loader import DataConfig
from model import GPTConfig
from optimizers import AdamWConfig, LionConfig, MARSConfig, MARSMConfig, MuonConfig
from training.checkpoint import CheckpointConfig
from training.run_config import RunConfig
from training.schedule import ScheduleConfig

config = RunConfig(
    model=GPTConfig(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50257, bias=False),  # [1]
    data=DataConfig(path="data/tokens/openwebtext"),
    schedule=ScheduleConfig(shape="cosine", warmup=2000, min_lr=3e-5),  # [1]
    checkpoint=CheckpointConfig(every=1000, milestone_every=25_000),
    batch_size=480,  # [1] x 1024 = 491,520 tokens a step
    steps=100_000,  # [1] 49.15 billion tokens
    micro_batch=15,  # [3] divides 480 on 1, 2, 4, 8, 16 and 32 processes; auto: the most that fits
    grad_clip=1.0,  # [1]
)
optimizers = {
    "adamw": AdamWConfig(lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1),  # [1]
    "lion": LionConfig(lr=1e-4, betas=(0.95, 0.98), weight_decay=1.0),  # [ours]
    # Moonlight's scale, the baseline of the MARS-M paper: lr and decay [3]
    # FineWeb-Edu: --lr=1e-2 [2], but the script's config has 6e-3 [3]
    "muon": MuonConfig(lr=6e-3, weight_decay=0.1, momentum=0.95, scale="moonlight"),
    # K. Jordan's scale, the baseline of the MARS paper: lr [3]; embeddings under AdamW at AdamW's lr [ours]
    "muon_original": MuonConfig(lr=2e-2, adamw_lr=6e-4, weight_decay=0.0, momentum=0.95, scale="original"),
    # lr, lr_1d, decay, gamma [1]; no decay on norms [ours], 0.1 as published
    "mars": MARSConfig(lr=6e-3, lr_1d=3e-3, betas=(0.95, 0.99), weight_decay=0.01, gamma=0.025),
    "mars_lion": MARSConfig(mars_type="mars-lion", lr=0.0006, lr_1d=3e-3, weight_decay=0.1),  # [ours]
    "mars_shampoo": MARSConfig(mars_type="mars-shampoo", lr=2e-2, lr_1d=3e-3, weight_decay=0.01),  # [ours]
    # lr, momentum, gamma [2, 3]; FineWeb-Edu: README --lr=1e-2, its script's config 6e-3
    # decay 0.1 [2], as its Muon baseline has; the config files say 0.01 [3]: --weight_decay=0.01
    "mars_m": MARSMConfig(lr=6e-3, weight_decay=0.1, momentum=0.95, gamma=0.025),
}
