"""The loss of a causal language model, as a sum, so that parts of a batch add up to the whole."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["IGNORED", "token_loss_sum"]

#: Label of a position that does not count towards the loss.
IGNORED = -100


def token_loss_sum(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """Sum of the cross entropies of all counted tokens, in float32 whatever the model computes in."""
    return F.cross_entropy(logits_BSV.float().flatten(0, 1), labels_BS.flatten(), ignore_index=IGNORED, reduction="sum")
