"""A model of 8 thousand parameters for tests."""

from data.loader import DataConfig
from model import GPTConfig
from optimizers import AdamWConfig
from training.checkpoint import CheckpointConfig
from training.logger import LogConfig
from training.run_config import RunConfig
from training.schedule import ScheduleConfig

config = RunConfig(
    model=GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=60, dropout=0.1),
    data=DataConfig(path="missing", val_windows=50),
    schedule=ScheduleConfig(warmup=3, min_lr=1e-4),
    checkpoint=CheckpointConfig(every=4),
    log=LogConfig(every=1),
    batch_size=12,
    micro_batch=3,
    steps=12,
    eval_every=4,
    device="cpu",
    optimizer="adamw",
)
optimizers = {"adamw": AdamWConfig(lr=1e-2)}
