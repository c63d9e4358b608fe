"""The Bradley-Terry loss that every reward model of the family minimises (arXiv:2507.01352, Sec. 4 and App. E).

Shape legend: P pairs.
"""

import torch
from torch.nn import functional


def bradley_terry_loss(
    reward_chosen: torch.Tensor, reward_rejected: torch.Tensor, *, target_margin: torch.Tensor | float | None = None
) -> torch.Tensor:
    """Return the loss of each pair, shape (P,), float32 whatever the inputs: -log sigmoid(margin - target_margin).

    Paper: Sec. 4: no margin and no regulariser, hence `target_margin=None`. The caller sums, and divides by the number of pairs of the
    *global* batch, so that the result does not depend on how the batch was cut into micro-batches.
    """
    margin = reward_chosen.float() - reward_rejected.float()
    if target_margin is not None:
        margin = margin - target_margin
    return -functional.logsigmoid(margin)
