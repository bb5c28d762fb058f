"""Optimizers for pretraining: a gradient estimate times a direction. Needs nothing but torch.

from optimizers import MARS, MARSM, Muon, Lion, build_optimizer
"""

from torch import nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from optimizers.adamw import AdamWConfig
from optimizers.lion import Lion, LionConfig
from optimizers.mars import MARS, MARSConfig
from optimizers.mars_m import MARSM, MARSMConfig
from optimizers.muon import Muon, MuonConfig
from optimizers.roles import claim

__all__ = ["MARS", "MARSM", "OPTIMIZERS", "Lion", "Muon", "OptimizerConfig", "build_optimizer"]

OptimizerConfig = AdamWConfig | LionConfig | MuonConfig | MARSConfig | MARSMConfig
OPTIMIZERS = {  # what a run may name where its config file has no settings of its own
    "adamw": AdamWConfig(),
    "lion": LionConfig(),
    "muon": MuonConfig(),
    "muon_original": MuonConfig(scale="original", lr=2e-2, adamw_lr=6e-4, weight_decay=0.0),
    "mars": MARSConfig(),
    "mars_lion": MARSConfig(mars_type="mars-lion", lr=6e-4, weight_decay=0.1),
    "mars_shampoo": MARSConfig(mars_type="mars-shampoo", lr=2e-2),
    "mars_m": MARSMConfig(),
}


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, process_group: ProcessGroup | None = None, compiled: bool = False
) -> Optimizer:
    """The optimizer a config describes, over a model that declares `parameter_roles()`.

    process_group: ranks that hold equal gradients and share the work of Newton-Schulz.
    compiled: compile the elementwise rules.
    Raises ValueError if a parameter is claimed by no rule or by two.
    """
    return config.build(claim(model.named_parameters(), model.parameter_roles()), process_group, compiled)
