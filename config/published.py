"""What the official runs of the MARS and MARS-M papers did, where that differs from what is right.

Read off AGI-Arena/MARS at 4831e28. Every line is an ordinary setting and can be given alone.
"""

from dataclasses import replace

from config.schema import RunConfig
from optimizers import MARSConfig, MARSMConfig, MuonConfig


def published(config: RunConfig) -> RunConfig:
    """A run with every published deviation switched on. Raises ValueError for a config that leaves micro_batch open."""
    if config.micro_batch is None:
        raise ValueError("--as_published sums gradients over micro-batches: the config file must give micro_batch")
    return replace(
        config,
        seed=5000,
        # gradients are summed over the micro-batches of a process, so the clip at 1.0 acts more often; on the 8 GPUs
        # of the official scripts there are 4 of them for small and medium and 12 for large and XL
        grad_multiple=max(1, config.sequences // (8 * config.micro_batch)),
        # attention logits are divided by layer + 1 in every size, and the softmax runs over the padding, too
        model=replace(config.model, scale_attn_by_inverse_layer_idx=True, vocab_size=config.model.padded_vocab_size),
        # windows are drawn with replacement, for training and anew for each evaluation: 200 micro-batches
        data=replace(config.data, sampling="replacement", val_sampling="random", val_windows=200 * config.micro_batch),
        schedule=replace(config.schedule, zero_first=True),  # the first update has learning rate 0
        optim=published_optimizer(config.optim),
    )


def published_optimizer(optim: object) -> object:
    """The conventions of the official optimizers beyond their numbers."""
    if isinstance(optim, MARSConfig):  # norms and biases are decayed
        return replace(optim, weight_decay_1d=0.1)
    if isinstance(optim, MARSMConfig):  # decay 0.01 in the config files, on embeddings and norms too
        optim = replace(optim, weight_decay=0.01)
    if isinstance(optim, MuonConfig) and optim.scale == "original":  # the tied embedding goes through Newton-Schulz
        return replace(optim, embeddings_as_matrices=True)
    if isinstance(optim, MARSMConfig | MuonConfig):  # AdamW at the matrices' numbers, eps before the bias correction
        return replace(optim, adamw_lr=None, adamw_weight_decay=optim.weight_decay, adamw_eps_first=True)
    return optim
