"""The settings of the official runs of the MARS and MARS-M papers that differ from our recommended ones.

Source: AGI-Arena/MARS at 4831e28. Every line is an ordinary setting and can be given alone.
"""

from dataclasses import replace

from optimizers import MARSConfig, MARSMConfig, MuonConfig, Settings
from runtime.errors import UserError
from training.run_config import RunConfig


def published(config: RunConfig) -> RunConfig:
    """A run with all settings of the official runs. Raises UserError if the config has no micro_batch."""
    if config.micro_batch is None:
        raise UserError("--as_published sums gradients over micro-batches: the config file must give micro_batch")
    return replace(
        config,
        seed=5000,
        # Gradients are summed over the micro-batches of a process, so clipping at 1.0 acts more often. On the 8 GPUs
        # of the official scripts, a process has 4 micro-batches for small and medium, and 12 for large and XL.
        grad_multiple=max(1, config.sequences // (8 * config.micro_batch)),
        # attention logits are divided by layer + 1 in every size, and the softmax includes the padding
        model=replace(config.model, scale_attn_by_inverse_layer_idx=True, vocab_size=config.model.padded_vocab_size),
        # windows are drawn with replacement, also for each evaluation: 200 micro-batches
        data=replace(config.data, sampling="replacement", val_sampling="random", val_windows=200 * config.micro_batch),
        schedule=replace(config.schedule, zero_first=True),  # the first update has learning rate 0
        optim=published_optimizer(config.optim),
    )


def published_optimizer(optim: Settings) -> Settings:
    """The settings of an official optimizer beyond the hyperparameters in the config files."""
    if isinstance(optim, MARSConfig):  # weight decay on norms and biases
        return replace(optim, weight_decay_1d=0.1)
    if isinstance(optim, MARSMConfig):  # weight decay 0.01 in the official config files
        optim = replace(optim, weight_decay=0.01)
    if isinstance(optim, MuonConfig) and optim.scale == "original":  # Newton-Schulz on the tied embedding, too
        return replace(optim, embeddings_as_matrices=True)
    if isinstance(optim, MARSMConfig | MuonConfig):  # AdamW with the lr and decay of matrices; eps first
        return replace(optim, adamw_lr=None, adamw_weight_decay=optim.weight_decay, adamw_eps_first=True)
    return optim
