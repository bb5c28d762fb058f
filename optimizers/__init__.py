"""Optimizers for pretraining: a gradient estimate times a direction. Needs nothing but torch."""

from torch import nn
from torch.optim import Optimizer

from optimizers.adamw import AdamWConfig
from optimizers.roles import claim

OptimizerConfig = AdamWConfig
OPTIMIZERS = {"adamw": AdamWConfig}


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """The optimizer a config describes, over a model that declares `parameter_roles()`.

    Raises ValueError if a parameter is claimed by no rule or by two.
    """
    return config.build(claim(model.named_parameters(), model.parameter_roles()))
