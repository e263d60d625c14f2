"""The tagger's nodes in a real ComfyUI: golden tags, the batch as a list, files, memory management, half precision."""

import shutil

import pytest
import torch
from tagger_toys import DAPE, NAMES, golden_picture, golden_tags, write_ram
from toys import golden, picture, relative_error

from fewstep_sr.weights.tagger import convert_tagger

RAM = "ram_swin_large_14m.pth"


@pytest.fixture(scope="module")
def folder(comfy):
    return comfy.folder("dape")


@pytest.fixture
def files(folder):
    """models/dape as after downloading everything."""
    write_ram(folder)
    shutil.copy(DAPE, folder / "DAPE.pth")
    yield folder
    for file in folder.iterdir():
        file.unlink()


@pytest.fixture
def tagger(comfy, files):
    return comfy.run("DAPETaggerLoader", tagger_name=RAM)[0]


@pytest.mark.parametrize(("case", "dape"), [("ram", "none"), ("dape", "auto"), ("dape", "DAPE.pth")])
def test_golden(comfy, files, case, dape):
    tagger = comfy.run("DAPETaggerLoader", tagger_name=RAM, dape_name=dape)[0]
    with torch.inference_mode():
        logits = comfy.module(".nodes.tagger").tag_logits(tagger, golden_picture().movedim(-1, 1))
    assert relative_error(logits, golden("tagger")[1][f"{case}_logits"]) < 1e-4
    output = comfy.run("DAPETagger", tagger=tagger, image=golden_picture())
    assert output[0] == [", ".join(golden_tags(case))]
    assert output.ui.as_dict() == {"text": (output[0][0],)}


def test_without_dape(comfy, files):
    (files / "DAPE.pth").unlink()
    tagger = comfy.run("DAPETaggerLoader", tagger_name=RAM)[0]
    assert comfy.run("DAPETagger", tagger=tagger, image=golden_picture())[0] == [", ".join(golden_tags("ram"))]


def test_one_compact_file_is_enough_and_comes_first(comfy, files):
    convert_tagger(files / RAM, files / "tagger.safetensors", DAPE, dtype=torch.float32)
    options = comfy.nodes["DAPETaggerLoader"].define_schema().inputs[0].options
    assert options == ["tagger.safetensors", RAM, "DAPE.pth"]
    tagger = comfy.run("DAPETaggerLoader", tagger_name="tagger.safetensors")[0]  # DAPE.pth lies beside it and is not added again
    assert comfy.run("DAPETagger", tagger=tagger, image=golden_picture())[0] == [", ".join(golden_tags("dape"))]
    for name in ("ram_tag_list.txt", "ram_tag_list_threshold.txt", RAM):
        (files / name).unlink()
    comfy.run("DAPETaggerLoader", tagger_name="tagger.safetensors")
    with pytest.raises(ValueError, match=r"already holds tagger_dape\.pth"):
        comfy.run("DAPETaggerLoader", tagger_name="tagger.safetensors", dape_name="DAPE.pth")


def test_batch_gives_a_list(comfy, tagger):
    batch = picture(1, 50, 70, batch=3)
    together = comfy.run("DAPETagger", tagger=tagger, image=batch)
    alone = [comfy.run("DAPETagger", tagger=tagger, image=one[None])[0][0] for one in batch]
    assert together[0] == alone and len(set(alone)) > 1
    assert together.ui.as_dict()["text"] == ("\n\n".join(alone),)
    assert comfy.nodes["DAPETagger"].define_schema().outputs[0].is_output_list


def test_text_options(comfy, tagger):
    tags = golden_tags("dape")

    def run(**options):
        return comfy.run("DAPETagger", tagger=tagger, image=golden_picture(), **options)[0][0]

    assert run(exclude=f"{tags[0].upper()}, {tags[2]}") == ", ".join([tags[1], *tags[3:]])
    assert run(prefix="photo, ", suffix=" sharp,") == f"photo, {', '.join(tags)}, sharp,"
    assert run(suffix=",") == f"{', '.join(tags)}, ,"  # the authors' prompt with no text of one's own
    assert run(threshold=1.0, prefix="photo") == "photo" and run(threshold=1.0) == ""
    assert run(threshold=-1.0) == ", ".join(NAMES)
    few = run(max_tags=5).split(", ")
    assert len(few) == 5 and set(few) <= set(tags)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_any_picture(comfy, tagger, channels):
    grey = picture(1, 33, 250)[..., :1]
    alpha = torch.rand(1, 33, 250, 1)
    image = {1: grey, 3: grey.expand(-1, -1, -1, 3), 4: torch.cat([grey.expand(-1, -1, -1, 3), alpha], dim=-1)}[channels]
    expected = comfy.run("DAPETagger", tagger=tagger, image=grey.expand(-1, -1, -1, 3))[0]
    assert comfy.run("DAPETagger", tagger=tagger, image=image)[0] == expected


def test_unloads_and_comes_back(comfy, tagger):
    from comfy import model_management

    before = comfy.run("DAPETagger", tagger=tagger, image=golden_picture())[0]
    assert any(loaded.model is tagger.managed.patcher for loaded in model_management.current_loaded_models)
    model_management.unload_all_models()
    assert not any(loaded.model is tagger.managed.patcher for loaded in model_management.current_loaded_models)
    assert comfy.run("DAPETagger", tagger=tagger, image=golden_picture())[0] == before


def test_interrupts(comfy, tagger):
    from comfy import model_management

    model_management.interrupt_current_processing(True)
    with pytest.raises(model_management.InterruptProcessingException):
        comfy.run("DAPETagger", tagger=tagger, image=golden_picture())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(comfy, files, dtype, monkeypatch):
    """In the dtype that ComfyUI's flags choose; a NaN is said."""
    from comfy.cli_args import args

    monkeypatch.setattr(args, "fp16_unet" if dtype == torch.float16 else "bf16_unet", True)
    half = comfy.run("DAPETaggerLoader", tagger_name=RAM)[0]
    assert {w.dtype for w in half.managed.network.state_dict().values()} == {dtype}
    with torch.inference_mode():
        logits = comfy.module(".nodes.tagger").tag_logits(half, golden_picture().movedim(-1, 1))
        assert logits.dtype == torch.float32 and relative_error(logits, golden("tagger")[1]["dape_logits"]) < 0.05
        half.managed.network.fc.bias[0] = float("nan")
    with pytest.raises(RuntimeError, match=r"DAPE Tagger gave values that are not numbers .*Restart ComfyUI with --fp32-unet"):
        comfy.run("DAPETagger", tagger=half, image=golden_picture())


def test_missing_text_file_is_said(comfy, files):
    (files / "ram_tag_list.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"ram_tag_list\.txt is missing: put it next to the weights"):
        comfy.run("DAPETaggerLoader", tagger_name=RAM)


def test_says_what_it_is(comfy):
    for name in ("DAPETaggerLoader", "DAPETagger"):
        schema = comfy.nodes[name].define_schema()
        assert schema.description and schema.search_aliases and schema.category == "FewStepSR/OSEDiff"
        assert all(entry.tooltip for entry in [*schema.inputs, *schema.outputs])
