"""A start state's NOISE after core's nodes that take batches apart and put them together: each picture keeps its own, or it is refused."""

import pytest
import torch
import toys
from toys import conditioning, relative_error

SEED = 5
PICTURES = 4


@pytest.fixture(scope="module")
def model(comfy):
    return toys.comfy_model(SEED)


@pytest.fixture(scope="module")
def latent():
    return {"samples": torch.randn(PICTURES, 4, 6, 5, generator=torch.Generator().manual_seed(1))}


@pytest.fixture(scope="module")
def predictor(comfy):
    torch.save(toys.predictor_state_dict(SEED), comfy.folder("invsr") / "batches.pth")
    return comfy.run("InvSRNoisePredictorLoader", noise_predictor_name="batches.pth")[0]


@pytest.fixture(scope="module", params=["OSEDiff", "InvSR"])
def start(request, comfy, model, latent, predictor):
    """The NOISE of a batch of four, and the LATENT that goes beside it."""
    if request.param == "OSEDiff":
        return comfy.run("OSEDiffStartState", model=model, latent=latent).args
    sigmas = comfy.run("FewStepScheduler", model=model)[0]
    images = toys.picture(3, 12, 10, batch=PICTURES)
    return comfy.run("InvSRStartState", noise_predictor=predictor, image=images, latent=latent, sigmas=sigmas)[0], latent


def pick(comfy, latent, index, length=1):
    return comfy.run("LatentFromBatch", samples=latent, batch_index=index, length=length)[0]


def noise_of(start, latent):
    return start[0].generate_noise(latent)


def test_pictures_taken_out_of_the_batch(comfy, start):
    noise, latent = start
    full = noise.generate_noise(latent)
    assert full.shape[0] == PICTURES and len({n.sum().item() for n in full}) == PICTURES
    for index in range(PICTURES):
        assert torch.equal(noise_of(start, pick(comfy, latent, index)), full[index : index + 1])
    assert torch.equal(noise_of(start, pick(comfy, pick(comfy, latent, 1, 3), 1, 2)), full[2:4])


@pytest.mark.parametrize(("index", "length", "expected"), [(2, 1, [2, 2, 2]), (1, 2, [1, 2, 1, 2, 1, 2]), (0, 4, [0, 1, 2, 3] * 3)])
def test_repeated_pictures(comfy, start, index, length, expected):
    repeated = comfy.run("RepeatLatentBatch", samples=pick(comfy, start[1], index, length), amount=3)[0]
    assert torch.equal(noise_of(start, repeated), noise_of(start, start[1])[expected])
    if length == PICTURES:  # the whole batch, which has no numbers where none were given
        assert torch.equal(noise_of(start, comfy.run("RepeatLatentBatch", samples=start[1], amount=3)[0]), noise_of(start, start[1])[expected])


def test_rebatched_pictures(comfy, start):
    parts = comfy.run("RebatchLatents", latents=[start[1]], batch_size=[3])[0]
    assert [len(part["samples"]) for part in parts] == [3, 1]
    assert torch.equal(torch.cat([noise_of(start, part) for part in parts]), noise_of(start, start[1]))


def test_numbers_of_a_batch_that_was_itself_taken_out(comfy, model, latent):
    """The start state of pictures 2 and 3 knows them as such."""
    part = pick(comfy, latent, 2, 2)
    noise, blank = comfy.run("OSEDiffStartState", model=model, latent=part).args
    whole = comfy.run("OSEDiffStartState", model=model, latent=latent)[0].generate_noise({**latent, "samples": torch.zeros_like(latent["samples"])})
    assert torch.equal(noise.generate_noise({"samples": torch.zeros(1, 4, 6, 5), "batch_index": [3]}), whole[3:4])
    assert torch.equal(noise.generate_noise(pick(comfy, blank, 1)), whole[3:4])
    with pytest.raises(ValueError, match="pictures numbered 2, 3 and met number 0 of another batch"):
        noise.generate_noise({"samples": torch.zeros(1, 4, 6, 5), "batch_index": [0]})


def test_pictures_that_cannot_be_told_are_refused(comfy, model, latent):
    noise, blank = comfy.run("OSEDiffStartState", model=model, latent=latent).args
    zeros = torch.zeros(3, 4, 6, 5)
    with pytest.raises(ValueError, match="made for 4 pictures and met a latent of 3 without their numbers"):
        noise.generate_noise({"samples": zeros})
    fixed = comfy.run("LatentBatchSeedBehavior", samples=blank, seed_behavior="fixed")[0]
    with pytest.raises(ValueError, match="4 pictures of the latent have the number 0 in batch_index"):
        noise.generate_noise(fixed)
    single = comfy.run("OSEDiffStartState", model=model, latent=pick(comfy, latent, 1))[0]
    with pytest.raises(ValueError, match="pictures numbered 1 and met number 2 of another batch"):
        single.generate_noise({"samples": zeros[:1], "batch_index": [2]})


def test_pictures_known_by_content(comfy, predictor, model, latent):
    """InvSR's sampler is given the pictures, so that any order of them is right, with wrong numbers too."""
    images, sigmas = toys.picture(3, 12, 10, batch=PICTURES), comfy.run("FewStepScheduler", model=model)[0]
    noise, state = comfy.run("InvSRStartState", noise_predictor=predictor, image=images, latent=latent, sigmas=sigmas).args
    full = noise.generate_noise(latent)
    mixed = {"samples": latent["samples"][[3, 0, 3]], "batch_index": [0, 1, 2]}
    assert torch.equal(noise.generate_noise(mixed), full[[3, 0, 3]])
    with pytest.raises(ValueError, match="start state, which holds this noise already"):
        noise.generate_noise(pick(comfy, state, 2))


def test_pictures_that_are_not_alike_are_refused(comfy, predictor, latent):
    """Edited, a latent has the noise by its number; another picture, or this one turned, has none."""
    images, sigmas = toys.picture(3, 12, 10, batch=PICTURES), comfy.run("FewStepScheduler", model=toys.comfy_model(SEED))[0]
    noise = comfy.run("InvSRStartState", noise_predictor=predictor, image=images, latent=latent, sigmas=sigmas)[0]
    full, samples = noise.generate_noise(latent), latent["samples"]
    edited = samples.clone()
    edited[..., :2] = 0  # a third painted over
    for changed in (edited, samples * 0.9 + 0.2, samples + 0.3 * torch.randn(samples.shape, generator=torch.Generator().manual_seed(2))):
        assert torch.equal(noise.generate_noise({"samples": changed}), full)
        assert torch.equal(noise.generate_noise(pick(comfy, {"samples": changed}, 2)), full[2:3])
    flipped = comfy.run("LatentFlip", samples=latent, flip_method="y-axis: horizontally")[0]
    for other in (flipped, {"samples": edited[[1, 0, 2, 3]]}, {"samples": edited[:1], "batch_index": [1]}):
        with pytest.raises(ValueError, match="a picture that the sampler's latent is not like: another one, or this one before it was flipped"):
            noise.generate_noise(other)


def test_numbers_as_a_tensor(comfy, model, latent):
    noise, blank = comfy.run("OSEDiffStartState", model=model, latent={**latent, "batch_index": torch.arange(4)}).args
    assert torch.equal(noise.generate_noise({**blank, "batch_index": torch.tensor([3, 1, 0, 2])}), noise.generate_noise(blank)[[3, 1, 0, 2]])


def test_sampled_pictures_are_the_batchs(comfy, model, latent):
    noise, blank = comfy.run("OSEDiffStartState", model=model, latent=latent).args
    sigmas = comfy.run("FewStepScheduler", model=model, method="OSEDiff")[0]
    guider = comfy.run("BasicGuider", model=model, conditioning=conditioning(SEED))[0]
    sampler = comfy.run("KSamplerSelect", sampler_name="euler")[0]

    def sample(latent):
        return comfy.run("SamplerCustomAdvanced", noise=noise, guider=guider, sampler=sampler, sigmas=sigmas, latent_image=latent)[0]["samples"]

    assert relative_error(sample(pick(comfy, blank, 2)), sample(blank)[2:3]) < 1e-4


def test_context_windows_that_shuffle_noise_are_refused(comfy, model, latent):
    """FreeNoise gives a picture the noise of another, which here is another picture."""
    from comfy_extras.nodes_context_windows import ContextWindowsManualNode as Windows

    def windows(freenoise):
        options = {"context_length": 1, "context_overlap": 0, "context_schedule": "standard_static", "context_stride": 1}
        return Windows.execute(model=model, **options, closed_loop=False, fuse_method="flat", dim=0, freenoise=freenoise)[0]

    def step(model, latent):
        return comfy.run("OSEDiffOneStep", model=model, positive=conditioning(SEED), latent=latent)[0]["samples"]

    for node, inputs in (("OSEDiffOneStep", {"positive": conditioning(SEED)}), ("OSEDiffStartState", {})):
        with pytest.raises(
            ValueError, match="model: found context windows with freenoise.* expected each of the 4 pictures' own. Turn freenoise off"
        ):
            comfy.run(node, model=windows(True), latent=latent, **inputs)
    assert relative_error(step(windows(False), latent), step(model, latent)) < 1e-4
    one = pick(comfy, latent, 1)
    assert relative_error(step(windows(True), one), step(model, one)) < 1e-4


def test_numbers_are_numbers_to_others(comfy, model, latent):
    import copy
    import json
    import pickle

    numbers = comfy.run("OSEDiffStartState", model=model, latent=latent)[1]["batch_index"]
    assert numbers == [0, 1, 2, 3] and json.dumps(numbers) == "[0, 1, 2, 3]"
    for kept in (copy.deepcopy(numbers), pickle.loads(pickle.dumps(numbers))):
        assert kept == numbers and (kept[2] + 8).picture == 2
