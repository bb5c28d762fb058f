"""GPT-2 medium, 355M parameters: what differs from config/gpt2_small.py, which names the sources [1], [2] and [3].

torchrun --nproc_per_node=8 train_gpt.py config/gpt2_medium.py --optimizer=mars_m
"""

from dataclasses import replace

from config import gpt2_small as small

config = replace(
    small.config,
    model=replace(small.config.model, n_layer=24, n_head=16, n_embd=1024),  # [1]
    schedule=replace(small.config.schedule, min_lr=6e-5),  # [1]
)
rates = {
    "adamw": dict(lr=3e-4),  # [1]
    "muon": dict(lr=5e-3),  # [3]; the same on FineWeb-Edu
    "muon_original": dict(lr=1e-2, adamw_lr=3e-4),  # [3]
    "mars": dict(lr=3e-3, lr_1d=1.5e-3),  # [1]
    "mars_lion": dict(lr=3e-4, lr_1d=1.5e-3),  # [ours]
    "mars_shampoo": dict(lr=1e-2, lr_1d=1.5e-3),  # [ours]
    "mars_m": dict(lr=5e-3),  # [2, 3]; the same on FineWeb-Edu
}
optimizers = {name: settings.changed(**rates.get(name, {})) for name, settings in small.optimizers.items()}
