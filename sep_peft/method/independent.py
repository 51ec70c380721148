"""Independent deep prompts: learned before each chosen layer by themselves, the same for every input.

Sources: Jia et al., "Visual Prompt Tuning", arXiv 2203.12119 (VPT-deep); Rasheed et al., "Fine-tuned CLIP Models are
Efficient Video Learners", arXiv 2212.03640, whose prompts in both towers (IVLP) Khattak et al., "Self-regulating
Prompts", arXiv 2307.06948 (PromptSRC) build on.
"""

from __future__ import annotations

import torch
from torch import nn


#: Standard deviation of fresh prompts.
PROMPT_STD = 0.02


class LearnedPrompts(nn.Module):
    """Prompts (n, D) of one layer, which take the place of those that the layer before gives out.

    Args:
        count: n.
        hidden_size: D, width of the tower.
    """

    def __init__(self, count: int, hidden_size: int, device=None, dtype=None):
        super().__init__()
        self.prompts = nn.Parameter(torch.empty(count, hidden_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.prompts, std=PROMPT_STD)

    def forward(self, batch_size: int) -> torch.Tensor:
        """The prompts for each of B inputs, (n, D) -> (B, n, D)."""
        return self.prompts.expand(batch_size, -1, -1)
