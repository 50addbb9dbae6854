"""What a validation measures."""

import math

import torch
from torch import Tensor
from torchmetrics import Metric


class TokenMetrics(Metric):
    """Loss per token, perplexity and bits per byte over all counted tokens, for any batch size and number of processes."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nats", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("bytes", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, nats: Tensor, tokens: Tensor, text_bytes: Tensor) -> None:
        self.nats += nats
        self.tokens += tokens
        self.bytes += text_bytes

    def compute(self) -> dict[str, float]:
        nats, tokens, text_bytes = self.nats.item(), self.tokens.item(), self.bytes.item()
        loss = nats / tokens
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),  # beyond that a float overflows
            "bits_per_byte": nats / math.log(2) / text_bytes if text_bytes else math.inf,
        }
