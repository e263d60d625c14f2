"""Cut-outs: what lies under full transparency never colours what is seen, and the result is a cut-out again."""

import pytest
import torch
import toys
from toys import picture

HIDDEN = torch.tensor([0.0, 1.0, 0.0])
"""A colour that the file hides under alpha 0."""


def cutout(height=40, width=56):
    """IMAGE and MASK as Load Image gives them: an orange ellipse on a hidden green."""
    y, x = torch.linspace(-1, 1, height)[:, None], torch.linspace(-1, 1, width)
    alpha = ((0.8 - (x**2 + y**2).sqrt()) * 12).clamp(0, 1)
    visible = torch.tensor([1.0, 0.5, 0.1])
    image = torch.where(alpha[..., None] > 0, visible, HIDDEN)
    return image[None], 1 - alpha[None]


def fill(comfy, image, mask=None):
    return comfy.run("FewStepSRFillTransparent", image=image, mask=mask)[0]


@pytest.mark.parametrize("method", ["bicubic", "lanczos", "bilinear", "area"])
def test_hidden_colours_do_not_bleed(comfy, method):
    image, mask = cutout()
    enlarge = lambda image: comfy.run("ImageScaleBy", image=image, upscale_method=method, scale_by=4.0)[0]  # noqa: E731
    filled = fill(comfy, image, mask)
    assert torch.equal(filled[mask < 1], image[mask < 1])
    joined = comfy.run("JoinImageWithAlpha", image=enlarge(filled), alpha=mask)[0]
    assert joined.shape == (1, 160, 224, 4)
    seen = joined[..., 3] > 0.02
    assert (joined[..., :3][seen] - image[mask == 0][0]).abs().max() < 0.02
    assert (enlarge(image)[seen] - image[mask == 0][0]).abs().max() > 0.3  # without the node


def test_four_channels_need_no_mask(comfy):
    image, mask = cutout()
    assert torch.equal(fill(comfy, torch.cat([image, 1 - mask[..., None]], -1)), fill(comfy, image, mask))


def test_what_has_no_transparency_stays(comfy):
    image = picture(1, 20, 30, batch=2)
    for mask in (None, torch.zeros(1, 64, 64), torch.zeros(2, 20, 30)):  # Load Image's mask of an opaque file is 64 x 64
        assert torch.equal(fill(comfy, image, mask), image)
    hidden = torch.ones(1, 20, 30)
    assert torch.equal(fill(comfy, image, hidden), image)  # nothing is seen


def test_batches(comfy):
    image, mask = cutout()
    images, masks = torch.cat([image, image.flip(2) * 0.5]), torch.cat([mask, mask * 0.5])
    together = fill(comfy, images, masks)
    for i in range(2):
        assert torch.equal(together[i : i + 1], fill(comfy, images[i : i + 1], masks[i : i + 1]))
    assert torch.equal(fill(comfy, images, mask)[:1], together[:1])


def test_masks_that_do_not_belong_are_refused(comfy):
    image, mask = cutout()
    with pytest.raises(ValueError, match="mask: found 1 of 28 x 40 pixels, expected 1 or 1 of 56 x 40"):
        fill(comfy, image, mask[..., ::2])
    with pytest.raises(ValueError, match="mask: found 3 of 56 x 40"):
        fill(comfy, image, mask.expand(3, -1, -1))
    with pytest.raises(ValueError, match="mask: found values that are not numbers"):
        fill(comfy, image, mask * float("nan"))


def test_the_edge_after_a_restoration_is_the_visible_colour(comfy):
    """The template's graph on the miniature, with what a hidden colour does without the node."""
    image, mask = cutout(48, 48)
    model, vae, positive, _, _ = comfy.run("FewStepSRDemoLoader", method="OSEDiff").args

    def restore(image):
        enlarged = comfy.run("ImageScaleBy", image=image, upscale_method="bicubic", scale_by=2.0)[0]
        latent = comfy.run("FewStepSRVAEEncode", pixels=enlarged, vae=vae)[0]
        step = comfy.run("OSEDiffOneStep", model=model, positive=positive, latent=latent, timestep=249)[0]
        fixed = comfy.run("FewStepSRColorFix", image=comfy.run("FewStepSRVAEDecode", samples=step, vae=vae)[0], reference=image)[0]
        return comfy.run("JoinImageWithAlpha", image=fixed, alpha=mask)[0]

    with_node, without = restore(fill(comfy, image, mask)), restore(image)
    green = [(r[..., 1] - r[..., 0])[(r[..., 3] > 0.1) & (r[..., 3] < 0.9)].mean() for r in (with_node, without)]
    assert green[0] < -0.25 < green[1] - 0.1  # orange has half as much green as red
    assert toys.relative_error(with_node[..., 3], without[..., 3]) == 0
