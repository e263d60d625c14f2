"""S3Diff's two files: what is read of them, what is written, and what is refused in words."""

import copy
import dataclasses

import pytest
import safetensors.torch
import torch
from toys import GOLDEN

from fewstep_sr.methods import HYPIR, METHODS, OSEDIFF, S3DIFF, identify, load_weights, record_of, records, s3diff
from pipelines.files import convert, describe_file
from pipelines.find import find_companions, find_weights

ADAPTER, ESTIMATOR = GOLDEN / "s3diff_square.pkl", GOLDEN / "s3diff_square_de_net.pth"


@pytest.fixture
def published() -> dict:
    return copy.deepcopy(torch.load(ADAPTER, weights_only=True))


def load(state: dict, tmp_path, record=S3DIFF):
    torch.save(state, tmp_path / "file.pkl")
    return load_weights(record, tmp_path / "file.pkl")


def same(found, expected) -> bool:
    """Whether two loaded files hold the same tensors."""
    if isinstance(expected, torch.Tensor):
        return torch.equal(found, expected)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[key], value) for key, value in expected.items())
    return same(vars(found), vars(expected)) if hasattr(expected, "__dict__") else found == expected


def test_what_is_read(published):
    adapter = load_weights(S3DIFF, ADAPTER)
    assert (adapter.rank_unet, adapter.rank_vae, len(adapter.unet), len(adapter.vae)) == (6, 4, 164, 22)
    assert torch.equal(adapter.unet_replaced["conv_in.weight"], published["state_dict_unet"]["conv_in.weight"])
    assert torch.equal(adapter.frequencies, published["w"].data) and type(adapter.frequencies) is torch.Tensor
    assert adapter.unet["conv_out"].scale == pytest.approx(8 / 6) and adapter.estimator is None
    assert {kind: identify(torch.load(path, weights_only=True)).id for kind, path in (("a", ADAPTER), ("e", ESTIMATOR))} == {
        "a": "s3diff",
        "e": "s3diff-estimator",
    }
    assert record_of(s3diff.ESTIMATOR.kind) is s3diff.ESTIMATOR and s3diff.ESTIMATOR in records()


def test_converted_and_described(tmp_path):
    for path, record in ((ADAPTER, S3DIFF), (ESTIMATOR, s3diff.ESTIMATOR)):
        target = tmp_path / f"{path.stem}.safetensors"
        assert record.kind.phrase in convert(path, target)
        assert same(load_weights(record, target), load_weights(record, path))
        for file in (path, target):
            assert record.kind.phrase in describe_file(file).splitlines()[0] and "licence of the authors' file: Apache-2.0" in describe_file(file)
    assert "rank: 6 on the UNet (164 layers), 4 on the VAE's encoder (22 layers); scale 1.33333 and 2" in describe_file(ADAPTER)
    assert "degradation estimator: a file of its own" in describe_file(ADAPTER)
    assert "network: 8 and 16 channels (not the published dimensions)" in describe_file(ESTIMATOR)


def test_one_file_of_both(tmp_path):
    both = dataclasses.replace(load_weights(S3DIFF, ADAPTER), estimator=load_weights(s3diff.ESTIMATOR, ESTIMATOR))
    S3DIFF.save(both, tmp_path / "both.safetensors")
    assert same(load_weights(S3DIFF, tmp_path / "both.safetensors"), both)
    assert "degradation estimator: in this file" in describe_file(tmp_path / "both.safetensors")
    state = safetensors.torch.load_file(tmp_path / "both.safetensors")
    del state["estimator.fc_degree.1.2.bias"]
    with pytest.raises(ValueError, match=r"fc_degree\.1\.2\.bias has no tensor"):
        load(state, tmp_path)


def drop(*place):
    def change(state: dict) -> None:
        for key in place[:-1]:
            state = state[key]
        del state[place[-1]]

    return change


def put(value, *place):
    def change(state: dict) -> None:
        for key in place[:-1]:
            state = state[key]
        state[place[-1]] = value

    return change


LAYER = "conv_out.lora_A.default.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop("w"), "the tensor w is missing"),
        (put(torch.zeros(2, 2), "w"), r"found w of \(2, 2\)"),
        (drop("state_dict_unet", "conv_in.weight"), r"the tensor unet\.conv_in\.weight is missing"),
        (put(torch.zeros(7), "state_dict_unet", "conv_in.bias"), r"unet\.conv_in\.bias of \(7,\)"),
        (drop("state_dict_vae"), "its part vae is no dictionary"),
        (put({}, "state_dict_vae"), "VAE: no LoRA weights"),
        (drop("state_dict_unet_fuse_mlp"), "its part unet_fuse_mlp is no dictionary"),
        (drop("state_embeddings"), "its part unet_block_embeddings is no dictionary"),
        (drop("state_dict_vae_block_mlp", "0.bias"), r"the tensor vae_block_mlp\.0\.bias is missing"),
        (put(torch.zeros(9, 64), "state_embeddings", "state_dict_unet_block", "weight"), r"unet_block_embeddings.*expected \(10, 64\)"),
        (put(torch.zeros(16, 320), "state_dict_unet_fuse_mlp", "weight"), r"shape \(16, 320\), expected \(36, 320\) beside a LoRA of rank 6"),
        (put(torch.zeros(()), "state_dict_unet_de_mlp", "0.weight"), r"unet_de_mlp\.0\.weight has shape \(\)"),
        (put(torch.full((256,), float("nan")), "state_dict_unet_de_mlp", "0.bias"), "not finite"),
        (drop("state_dict_unet", LAYER), "conv_out has lora_B but not its other half"),
        (
            lambda state: state["state_dict_unet"].update(
                {LAYER: torch.zeros(3, 32, 3, 3), LAYER.replace("lora_A", "lora_B"): torch.zeros(4, 3, 1, 1)}
            ),
            r"layers of ranks \[3, 6\], expected one",
        ),
        (
            lambda state: state["state_dict_vae"].update(
                {"quant_conv.lora_A.vae_skip.weight": torch.zeros(4, 8, 1, 1), "quant_conv.lora_B.vae_skip.weight": torch.zeros(8, 4, 1, 1)}
            ),
            "layer quant_conv of the vae is in none of the 6 blocks",
        ),
    ],
)
def test_damaged_adapters(published, tmp_path, change, words):
    change(published)
    with pytest.raises(ValueError, match=words) as refused:
        load(published, tmp_path)
    assert str(refused.value).startswith("file.pkl") and len(str(refused.value)) < 400


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop("body.0.6.weight"), r"'body\.0\.6\.weight' is missing"),
        (drop("body.1.8.conv2.bias"), r"body\.1\.8\.conv2\.bias has no tensor"),
        (put(torch.zeros(3), "conv_first.0.weight"), "expected 4 axes"),
        (put(torch.zeros(8, 8, 5, 5), "body.0.0.conv1.weight"), r"shape \(8, 8, 5, 5\), expected \(8, 8, 3, 3\)"),
        (put(torch.zeros(2), "fc_degree.2.0.bias"), "is no part of the network"),
        (put(torch.full((512,), float("inf")), "fc_degree.0.0.bias"), "not finite"),
    ],
)
def test_damaged_estimators(tmp_path, change, words):
    state = torch.load(ESTIMATOR, weights_only=True)
    change(state)
    with pytest.raises(ValueError, match=words):
        load(state, tmp_path, s3diff.ESTIMATOR)


def test_the_wrong_one_of_the_two():
    with pytest.raises(ValueError, match=r"found S3Diff's degradation estimator; expected an S3Diff adapter.*huggingface\.co/zhangap/S3Diff"):
        load_weights(S3DIFF, ESTIMATOR)
    with pytest.raises(ValueError, match=r"found an S3Diff adapter; expected S3Diff's degradation estimator.*assets/mm-realsr"):
        load_weights(s3diff.ESTIMATOR, ADAPTER)
    for method in (OSEDIFF, HYPIR):
        with pytest.raises(ValueError, match="found an S3Diff adapter; expected"):
            load_weights(method, ADAPTER)
    for other in ("osediff_square.pkl", "pisasr_square.pkl", "hypir_square.pth"):
        with pytest.raises(ValueError, match="expected an S3Diff adapter"):
            load_weights(S3DIFF, GOLDEN / other)


def test_finding_both_files(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))
    folder = tmp_path / "models" / "s3diff"
    folder.mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"degradation estimator \(de_net.safetensors\) was not found.*--estimator.*Apache-2.0"):
        find_companions(S3DIFF, {}, tmp_path, download=False)
    assert find_companions(S3DIFF, {"blur": 0.0, "noise": 1.0}, tmp_path, download=False) == {"estimator": None}
    for name in ("de_net.pth", "s3diff.pkl"):
        (folder / name).touch()
    assert find_companions(S3DIFF, {"blur": 0.5, "noise": None}, tmp_path, download=False) == {"estimator": folder / "de_net.pth"}
    assert find_weights(S3DIFF, None, tmp_path, download=False) == str(folder / "s3diff.pkl")
    (folder / "mine.pth").touch()
    assert find_companions(S3DIFF, {"estimator": "mine.pth"}, tmp_path, download=False) == {"estimator": folder / "mine.pth"}
    assert find_companions(OSEDIFF, {}, tmp_path, download=False) == {}


def test_what_is_published():
    assert METHODS["s3diff"] is S3DIFF and S3DIFF.base.what == "SD-Turbo" and S3DIFF.published_name == "s3diff.pkl"
    assert (S3DIFF.cfg, S3DIFF.color_fix, S3DIFF.pipeline) == (1.07, "wavelet", "S3DiffPipeline")
    assert S3DIFF.weights.page == "https://huggingface.co/zhangap/S3Diff"
    assert s3diff.ESTIMATOR.weights.page.startswith("https://github.com/ArcticHare105/S3Diff/") and s3diff.ESTIMATOR.weights.names[-1] == "de_net.pth"
    assert all(method.cfg == 1 for method in METHODS.values() if method is not S3DIFF)
    parse = next(option.parse for option in S3DIFF.options if option.name == "blur")
    assert parse("0.25") == 0.25
    for text in ("1.5", "-0.1", "nan", "much"):
        with pytest.raises(ValueError, match=r"."):
            parse(text)
