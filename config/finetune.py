"""Fine-tune OpenAI's GPT-2 small on your own text.

    python -m data.prepare text --root FOLDER --tokenizer gpt2 --out data/tokens/own
    python train_gpt.py config/finetune.py

--init_from=gpt2-medium needs the shape of that size as well: --n_layer=24 --n_head=16 --n_embd=1024.
"""

from dataclasses import replace

from config import gpt2_small as small
from data.loader import DataConfig
from optimizers import AdamWConfig
from training.checkpoint import CheckpointConfig
from training.logger import LogConfig
from training.schedule import ScheduleConfig

config = replace(
    small.config,
    model=replace(small.config.model, bias=True, dropout=0.1),  # OpenAI's weights have biases
    data=DataConfig(path="data/tokens/own"),
    schedule=ScheduleConfig(shape="constant", warmup=0),
    checkpoint=CheckpointConfig(every=50),
    log=LogConfig(every=1),
    optimizer="adamw",
    init_from="gpt2",
    batch_size=32,
    micro_batch=4,
    steps=200,
    eval_every=20,
)
optimizers = {"adamw": AdamWConfig(lr=3e-5)}
