"""A GPT of 1.9 million parameters on the embedded corpus: minutes on two CPU cores."""

from data.loader import DataConfig
from model import GPTConfig
from optimizers import AdamWConfig, LionConfig, MARSConfig, MARSMConfig, MuonConfig
from training.checkpoint import CheckpointConfig
from training.logger import LogConfig
from training.run_config import RunConfig
from training.schedule import ScheduleConfig

config = RunConfig(
    model=GPTConfig(n_layer=4, n_head=4, n_embd=192, block_size=128, vocab_size=257),  # 256 bytes and end-of-text
    data=DataConfig(path="data/tokens/pydocs", val_windows=1024),
    schedule=ScheduleConfig(shape="cosine", warmup=50, min_lr_ratio=0.03),
    checkpoint=CheckpointConfig(every=200),
    log=LogConfig(every=20),
    optimizer="mars_m",
    batch_size=16,
    micro_batch=16,
    steps=700,
    eval_every=200,
)
# learning rates: the best of four a factor of 3 apart
optimizers = {
    "adamw": AdamWConfig(lr=3e-3),
    "lion": LionConfig(lr=1e-4, weight_decay=0.1),
    "muon": MuonConfig(lr=1e-2, adamw_lr=3e-3),
    "mars": MARSConfig(lr=3e-3),
    "mars_lion": MARSConfig(mars_type="mars-lion", lr=3e-4, weight_decay=0.1),
    "mars_shampoo": MARSConfig(mars_type="mars-shampoo", lr=3e-2),
    "mars_m": MARSMConfig(lr=1e-2, adamw_lr=3e-3),
}
