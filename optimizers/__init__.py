"""Optimizers for pretraining. Each turns a raw or variance-reduced gradient into an update by one rule.

They need nothing but torch. `pip install .` installs this folder as `mars_optimizers`:

from mars_optimizers import MARS, MARSM, Muon, Lion, param_groups
"""

from collections.abc import Callable

from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from .adamw import AdamWConfig, fused_adamw
from .ademamix import AdEMAMix, AdEMAMixConfig
from .groups import param_groups
from .lion import Lion, LionConfig
from .mars import MARS, MARSConfig
from .mars_m import MARSM, MARSMConfig
from .muon import Muon, MuonConfig
from .normuon import NorMuon, NorMuonConfig
from .roles import ModelWithRoles, assign_roles
from .settings import Settings, register
from .shampoo import Shampoo, ShampooConfig
from .soap import SOAP, SOAPConfig

__all__ = [
    "MARS",
    "MARSM",
    "OPTIMIZERS",
    "REGISTRY",
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
    "param_groups",
    "register",
]

# every name that a run can use: the class, and the settings that a config file need not repeat
REGISTRY: dict[str, tuple[Callable[..., Optimizer], Settings]] = {
    "adamw": (fused_adamw, AdamWConfig()),
    "lion": (Lion, LionConfig()),
    "muon": (Muon, MuonConfig()),
    "muon_original": (Muon, MuonConfig(scale="original", lr=2e-2, adamw_lr=6e-4, weight_decay=0.0)),
    "mars": (MARS, MARSConfig()),
    "mars_lion": (MARS, MARSConfig(mars_type="mars-lion", lr=6e-4, weight_decay=0.1)),
    "mars_shampoo": (MARS, MARSConfig(mars_type="mars-shampoo", lr=2e-2)),
    "mars_m": (MARSM, MARSMConfig()),
    "shampoo": (Shampoo, ShampooConfig()),
    "ademamix": (AdEMAMix, AdEMAMixConfig()),
    "soap": (SOAP, SOAPConfig()),
    "normuon": (NorMuon, NorMuonConfig()),
}
OPTIMIZERS: dict[str, Settings] = {name: register(make, settings) for name, (make, settings) in REGISTRY.items()}


def build_optimizer(
    model: ModelWithRoles, config: Settings, process_group: ProcessGroup | None = None, compiled: bool = False
) -> Optimizer:
    """The optimizer that some settings describe, over a model that declares the roles of its parameters.

    process_group: ranks that hold equal gradients and share the work on matrices.
    compiled: compile the elementwise updates.
    Raises ValueError if a parameter has no role or an unknown one.
    """
    return config.build(assign_roles(model.named_parameters(), model.parameter_roles()), process_group, compiled)
