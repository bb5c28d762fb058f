"""Predicted training speed on one GPU: what a step computes and moves, divided by assumed rates."""

import torch

from bench.parts import BYTES, newton_schulz_flops
from bench.timing import shape_of
from model import GPT

STEP, MICRO, CONTEXT = 480, 40, 1024  # sequences of a step and of a micro-batch, and tokens of a sequence
PRODUCTS = {"124M": 620e12, "355M": 660e12, "774M": 690e12, "1558M": 700e12}  # FLOP/s; wider products run faster
ATTENTION = {"best": 280e12, "default": 200e12, "nanogpt": 200e12}  # FLOP/s of cuDNN's and of flash attention
NEWTON_SCHULZ = 500e12  # FLOP/s
MEMORY = {"H200": 3.95e12, "H100": 2.76e12}  # bytes/s, 82 % of the data sheet
GAPS = 0.03  # fraction of a step between kernels
# Bytes that the kernels other than products and attention move: for each token, layer and element of the width, as
# counted in the compiled graph; for each logit; for each weight and micro-batch, to cast it and to add its gradient
PER_WIDTH = {"best": 84, "default": 121, "nanogpt": 121}
PER_LOGIT = {"best": 6, "default": 6, "nanogpt": 10}
PER_WEIGHT = {"best": 12, "default": 18, "nanogpt": 18}
OPTIMIZER = {"best": "MARS-M", "default": "MARS-M", "nanogpt": "AdamW fused (torch)"}


def predicted(size: str, side: str, card: str) -> dict[str, float]:
    """tokens_per_s and optimizer_share of a side of bench.gpu, and mfu, at the dense bf16 peak of 989 TFLOP/s."""
    c, memory = shape_of(size), MEMORY[card]
    width, layers, vocabulary = c.n_embd, c.n_layer, c.padded_vocab_size
    matrices, table = 12 * layers * width**2, vocabulary * width
    products = 6 * (matrices + table) / PRODUCTS[size]
    attention = 7 * CONTEXT * width * layers / ATTENTION[side]  # of masked attention, whose scores are computed twice
    weights = (matrices + table) / (MICRO * CONTEXT)  # of a micro-batch, for each token
    moved = PER_WIDTH[side] * width * layers + PER_LOGIT[side] * vocabulary + PER_WEIGHT[side] * weights
    per_token = (products + attention + moved / memory) / (1 - GAPS)
    of_matrix, of_rest = BYTES[OPTIMIZER[side]]
    update = (of_matrix * matrices + of_rest * table) / memory
    update += newton_schulz_flops(c) / NEWTON_SCHULZ if OPTIMIZER[side] == "MARS-M" else 0
    step = STEP * CONTEXT * per_token + update
    with torch.device("meta"):
        flops = GPT(c).flops_per_token()
    rate = STEP * CONTEXT / step
    return dict(tokens_per_s=rate, mfu=rate * flops / 989e12, optimizer_share=update / step)
