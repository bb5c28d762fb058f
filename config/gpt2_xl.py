"""GPT-2 xl, 1558M parameters: what differs from config/gpt2_small.py, which names the sources [1], [2] and [3].

torchrun --nproc_per_node=8 train_gpt.py config/gpt2_xl.py --optimizer=mars_m
"""

from dataclasses import replace

from config import gpt2_small as small

config = replace(
    small.config,
    model=replace(small.config.model, n_layer=48, n_head=25, n_embd=1600),  # [1]
    schedule=replace(small.config.schedule, min_lr=1e-5),  # [1]
    micro_batch=5,  # [3]
)
rates = {
    "adamw": dict(lr=2e-4),  # [1]
    "muon": dict(lr=3e-3),  # [3]; from FineWeb-Edu: there is no OpenWebText run
    "muon_original": dict(lr=6.67e-3, adamw_lr=2e-4),  # [3], those of large
    "mars": dict(lr=2e-3, lr_1d=1e-3),  # [1]
    "mars_lion": dict(lr=2e-4, lr_1d=1e-3),  # [ours]
    "mars_shampoo": dict(lr=6.67e-3, lr_1d=1e-3),  # [ours]
    "mars_m": dict(lr=3e-3),  # [2, 3]; from FineWeb-Edu: there is no OpenWebText run
}
optimizers = {name: settings.changed(**rates.get(name, {})) for name, settings in small.optimizers.items()}
