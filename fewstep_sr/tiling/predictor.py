"""InvSR's noise predictor on windows of a large picture: its attention is quadratic, and it was trained on windows of one size."""

from collections.abc import Callable, Sequence

import torch

from ..networks.noise_predictor import NoisePredictorConfig
from ..networks.posterior import Posterior
from .batching import Runtime, run_in_groups
from .tiles import Tile, TileLayout

WINDOW = 64
"""Side of a window in latent cells: 128 pixels of the low-quality picture, on which the published predictors were trained."""

OVERLAP = 8
"""Cells that windows share at least."""

MAX_WINDOWS = 8
"""Windows in one call of the predictor, so that memory does not grow with the picture or the batch."""


class NoiseCanvas:
    """The noise map's posterior for ``pictures`` pictures of ``height`` x ``width`` cells, blended from windows, float32, where the predictions are.

    What is blended besides the means is the standard deviation: with one draw over the whole canvas, a sample of the blend then is the blend
    of the windows' samples. (The variance of a mixture would add the windows' disagreement as noise.)
    """

    def __init__(self, pictures: int, height: int, width: int, channels: int = 4):
        self.layout = TileLayout(height, width, WINDOW, OVERLAP)
        self.mean = torch.zeros(pictures, channels, height, width)
        self.std = torch.zeros_like(self.mean)

    @property
    def windows(self) -> list[tuple[int, Tile]]:
        """Each picture's index with each of its windows."""
        return [(picture, tile) for picture in range(len(self.mean)) for tile in self.layout.tiles]

    def add(self, windows: Sequence[tuple[int, Tile]], predicted: Posterior) -> None:
        """Blend in the predictions (n, 4, h, w) for n windows."""
        mean, std = predicted.mean.float(), torch.exp(0.5 * predicted.logvar.float())
        self.mean, self.std = self.mean.to(mean.device), self.std.to(mean.device)
        for i, (picture, tile) in enumerate(windows):
            weight = self.layout.window(tile, device=mean.device)
            tile.cut(self.mean[picture]).add_(mean[i] * weight)
            tile.cut(self.std[picture]).add_(std[i] * weight)

    @property
    def posterior(self) -> Posterior:
        return Posterior(self.mean.cpu(), 2 * self.std.cpu().log())


def predict_noise_map(
    call: Callable[[torch.Tensor], Posterior],
    picture: torch.Tensor,
    config: NoisePredictorConfig,
    fitting: Callable[[int, int], int],
    runtime: Runtime,
    device: torch.device | None = None,
) -> Posterior:
    """The noise map's posterior (B, 4, h, w), window by window as the predictor was trained, float32 on the CPU.

    Args:
        call: what the predictor says of windows (n, 3, h, w) in [-1, 1], at the timestep that is asked for.
        picture: low-quality images (B, 3, H, W) in [-1, 1], at ``config.pixels_per_cell`` pixels for each latent pixel along a side.
        fitting: how many windows of (height, width) latent pixels go into one call.
        device: where ``call`` takes its windows to; the images are taken there at once.
    """
    scale = config.pixels_per_cell
    canvas = NoiseCanvas(picture.shape[0], picture.shape[-2] // scale, picture.shape[-1] // scale, config.latent_channels)
    windows = canvas.windows
    picture = picture.to(device)

    def predict(group: Sequence[tuple[int, Tile]]) -> None:
        canvas.add(group, call(torch.cat([tile.cut(picture[i : i + 1], scale) for i, tile in group])))

    group = max(1, min(MAX_WINDOWS, fitting(windows[0][1].height, windows[0][1].width)))
    run_in_groups(windows, group, predict, runtime, runtime.progress(len(windows)))
    return canvas.posterior
