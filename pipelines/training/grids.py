"""Pictures for people to look at while a training runs."""

import torch
import torch.nn.functional as F


def sample_grid(lq: torch.Tensor, restored: torch.Tensor, hq: torch.Tensor) -> torch.Tensor:
    """A row for each picture, (3, height, width) in [0, 1]: low quality enlarged (bicubic), restored, high quality."""
    enlarged = F.interpolate(lq, size=hq.shape[-2:], mode="bicubic", align_corners=False)
    return torch.cat(list(torch.cat([enlarged, restored.to(hq), hq], dim=-1)), dim=-2)
