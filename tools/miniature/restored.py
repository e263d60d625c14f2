"""The latents that the miniature's own methods make of low-quality pictures: what its decoder gets to see in use."""

import torch
from diffusers import AutoencoderKL

from fewstep_sr.methods import INVSR
from pipelines.demo import load_demo
from pipelines.training.records import fingerprint


class RestoredLatents:
    """Latents by OSEDiff and by InvSR, in turns, of the miniature in this checkout. Those of samples that come again (``--crops``) are kept.

    Args:
        vae: whose decoder shall learn from them; its encoder is the miniature's.

    Raises:
        ValueError: it is another one.
    """

    def __init__(self, vae: AutoencoderKL):
        self._pipelines = [load_demo("osediff"), load_demo("invsr")]
        own = self._pipelines[1][0].vae
        if fingerprint(vae.encoder, vae.quant_conv) != fingerprint(own.encoder, own.quant_conv):
            raise ValueError(
                "--init: found a VAE with another encoder than the miniature's, expected the same one, of which restored latents are: give miniature/vae."
            )
        self._start = INVSR.demo.call["timesteps"][0] - 1
        for pipeline, _ in self._pipelines:
            pipeline.set_progress_bar_config(disable=True)
        self._kept: dict[int, torch.Tensor] = {}

    @torch.no_grad()
    def __call__(self, lq: torch.Tensor, numbers: torch.Tensor | None, generator: torch.Generator) -> torch.Tensor:
        """
        Args:
            lq: low-quality pictures (B, 3, h, w) in [0, 1], of whose sides four times are multiples of 64.
            numbers: of the samples (B,), where they come again.
            generator: of InvSR's noise map.

        Returns:
            Latents (B, 4, h / 2, w / 2), times the scaling factor.
        """
        rows: list[torch.Tensor] = []
        for row, number in enumerate(range(len(lq)) if numbers is None else numbers.tolist()):
            latents = None if numbers is None else self._kept.get(number)
            if latents is None:
                latents = self._restore(number % 2, lq[row : row + 1], generator)
                if numbers is not None:
                    self._kept[number] = latents
            rows.append(latents.to(lq.device))
        return torch.cat(rows)

    def _restore(self, which: int, lq: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        pipeline, embeds = self._pipelines[which]
        low_quality, enlarged = pipeline.preprocess(lq, 4)
        latents = pipeline.encode(enlarged)
        if which == 0:
            return pipeline.one_step(latents, embeds)
        state, _ = pipeline.start_state(low_quality, latents, enlarged.shape[-2:], self._start, generator=generator)
        return pipeline.denoise(state, [self._start], embeds)
