"""Optimizers for pretraining: a gradient, raw or variance-reduced, times a direction. Needs nothing but torch.

from optimizers import MARS, MARSM, Muon, Lion, build_optimizer
"""

from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from optimizers.adamw import AdamWConfig
from optimizers.ademamix import AdEMAMix, AdEMAMixConfig
from optimizers.lion import Lion, LionConfig
from optimizers.mars import MARS, MARSConfig
from optimizers.mars_m import MARSM, MARSMConfig
from optimizers.muon import Muon, MuonConfig
from optimizers.normuon import NorMuon, NorMuonConfig
from optimizers.roles import ModelWithRoles, assign_roles
from optimizers.settings import Settings
from optimizers.shampoo import Shampoo, ShampooConfig
from optimizers.soap import SOAP, SOAPConfig

__all__ = [
    "MARS",
    "MARSM",
    "OPTIMIZERS",
    "SOAP",
    "AdEMAMix",
    "AdEMAMixConfig",
    "AdamWConfig",
    "Lion",
    "LionConfig",
    "MARSConfig",
    "MARSMConfig",
    "Muon",
    "MuonConfig",
    "NorMuon",
    "NorMuonConfig",
    "SOAPConfig",
    "Settings",
    "Shampoo",
    "ShampooConfig",
    "build_optimizer",
]

OPTIMIZERS: dict[str, Settings] = {  # names that every run can use, with the settings a config file need not repeat
    "adamw": AdamWConfig(),
    "lion": LionConfig(),
    "muon": MuonConfig(),
    "muon_original": MuonConfig(scale="original", lr=2e-2, adamw_lr=6e-4, weight_decay=0.0),
    "mars": MARSConfig(),
    "mars_lion": MARSConfig(mars_type="mars-lion", lr=6e-4, weight_decay=0.1),
    "mars_shampoo": MARSConfig(mars_type="mars-shampoo", lr=2e-2),
    "mars_m": MARSMConfig(),
    "shampoo": ShampooConfig(),
    "ademamix": AdEMAMixConfig(),
    "soap": SOAPConfig(),
    "normuon": NorMuonConfig(),
}


def build_optimizer(
    model: ModelWithRoles, config: Settings, process_group: ProcessGroup | None = None, compiled: bool = False
) -> Optimizer:
    """The optimizer that some settings describe, over a model that declares the roles of its parameters.

    process_group: ranks that hold equal gradients and share the work on matrices.
    compiled: compile the elementwise updates.
    Raises ValueError if a parameter has no role or an unknown one.
    """
    return config.build(assign_roles(model.named_parameters(), model.parameter_roles()), process_group, compiled)
