"""What a pipeline would refuse is refused before anything is computed, in one clear error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import tiny_families
import torch
from pictures import make_picture
from tiny_families import FROM_PICTURES, MASKED
from tiny_models import ARGUMENTS, SIZE

from dfdask.arguments import check_argument_name
from dfdask.errors import DfdaskError, ModelError, SpecError
from dfdask.items import Item
from dfdask.spec import FakeStages, JobSpec
from dfdask.stages.check import Checked, Output, check_job
from dfdask.stages.model import ModelRef, check_parts, components, digest, locate, model_ref

FAMILIES = tuple(ARGUMENTS)
Tiny = Callable[[str], Path]


def check(folder: Path, *each: Mapping[str, Any]) -> Checked:
    """Check items that have these arguments."""
    ref = ModelRef(str(folder), digest(folder), "float32", "cpu", False)
    return check_job(ref, [Item(row, f"item-{row}", "a cat", 1, arguments) for row, arguments in enumerate(each)])


def message(folder: Path, *each: Mapping[str, Any]) -> str:
    with pytest.raises(SpecError) as caught:
        check(folder, *each)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def ref_of(model: str | Path, **fields: Any) -> ModelRef:
    return model_ref(JobSpec(model=str(model), prompts=["a"], **fields))


@pytest.fixture
def changed(tiny: Tiny, tmp_path: Path) -> Path:
    """A model of one's own to damage."""
    return Path(shutil.copytree(tiny("sd"), tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("family", FAMILIES)
def test_stages_and_size_are_known_before_any_weight_is_read(
    tiny: Tiny, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("nothing is to be computed yet")

    monkeypatch.setattr(torch.nn.Linear, "forward", refuse)
    monkeypatch.setattr("safetensors.torch.load_file", refuse)
    found = check(tiny(family), ARGUMENTS[family])
    assert found.stages == ("encode", "denoise", "decode")
    expected = (5, 16, 16, 3) if family == "wan" else (SIZE, SIZE, 3)
    assert found.output == Output("video" if family == "wan" else "image", expected)


@pytest.mark.parametrize("family", ["sd", "sd3", "flux", "pixart_alpha", "pixart_sigma"])
def test_the_size_is_the_pipelines_own_where_the_job_says_nothing(tiny: Tiny, family: str) -> None:
    binning = {"use_resolution_binning": False} if "pixart" in family else {}
    shape = check(tiny(family), binning).output.item_shape
    assert shape == ((1024, 1024, 3) if family == "flux" else (SIZE, SIZE, 3))


def test_items_may_have_sizes_of_their_own(tiny: Tiny) -> None:
    found = check(tiny("sd"), {"height": 32, "width": 64}, {"height": 64, "width": 32}, {"height": 32, "width": 64})
    assert found.output == Output("image", (64, 64, 3), ((32, 64), (64, 32), (32, 64)))


def test_items_must_have_the_same_number_of_frames(tiny: Tiny) -> None:
    said = message(tiny("wan"), ARGUMENTS["wan"], {**ARGUMENTS["wan"], "num_frames": 9})
    assert "same number of frames" in said and "5" in said and "9" in said


@pytest.mark.parametrize("family", FAMILIES)
def test_an_unknown_argument_names_the_nearest(tiny: Tiny, family: str) -> None:
    said = message(tiny(family), {**ARGUMENTS[family], "guidance_scal": 3.0})
    assert "has no argument 'guidance_scal'" in said
    assert "did you mean 'guidance_scale'?" in said


def test_an_unknown_argument_that_is_near_to_nothing_names_them_all(tiny: Tiny) -> None:
    said = message(tiny("sd"), {"xyz": 3.0})
    assert "has no argument 'xyz'" in said
    names = said.partition("; it takes ")[2].split(", ")
    assert {"height", "guidance_scale", "num_inference_steps", "negative_prompt", "timesteps"} <= {*names}
    for name in names:
        assert check_argument_name(name) and name != "kwargs", "a job may set it"


@pytest.mark.parametrize(
    ("argument", "meant"), [("steps", "num_inference_steps"), ("guidance", "guidance_scale"), ("timestep", "timesteps")]
)
def test_a_word_of_a_usual_argument_means_that_one(tiny: Tiny, argument: str, meant: str) -> None:
    assert f"has no argument {argument!r}; did you mean {meant!r}?" in message(tiny("sd"), {argument: 3})


@pytest.mark.parametrize(("name", "pixels", "advice"), [("height", 60, "56 or 64"), ("width", 33, "32 or 40")])
def test_a_size_that_the_pipeline_refuses(tiny: Tiny, name: str, pixels: int, advice: str) -> None:
    said = message(tiny("sd"), {"height": 32, "width": 32, name: pixels})
    assert str(pixels) in said and ("divisible by 8" in said or advice in said)


def test_a_size_that_the_pipeline_would_silently_change(tiny: Tiny) -> None:
    said = message(tiny("flux"), {"height": 40, "width": 32})
    assert "arguments.height: 40 pixels are not a multiple of 16" in said
    assert "use 32 or 48" in said


def test_a_size_below_the_smallest(tiny: Tiny) -> None:
    assert "use 16" in message(tiny("flux"), {"height": 8, "width": 16})


@pytest.mark.parametrize("steps", [0, -1, 2.5, "many", None, True])
def test_the_job_refuses_steps_that_no_pipeline_takes(steps: object) -> None:
    with pytest.raises(SpecError, match="num_inference_steps") as caught:
        JobSpec(model="bundled", prompts=["a"], arguments={"num_inference_steps": steps})
    assert "at least 1" in str(caught.value)


@pytest.mark.parametrize(
    ("family", "arguments", "part"),
    [
        ("flux", {"max_sequence_length": 1000}, "512"),
        ("sd", {"callback_on_step_end_tensor_inputs": ["nothing"]}, "nothing"),
        ("sd3", {"max_sequence_length": 1000}, "512"),
    ],
)
def test_what_the_pipeline_says_is_passed_on(tiny: Tiny, family: str, arguments: dict[str, Any], part: str) -> None:
    said = message(tiny(family), {**ARGUMENTS[family], **arguments})
    assert part in said and "item-0" in said


@pytest.mark.parametrize("family", sorted(FROM_PICTURES - {"flux_kontext"}))
def test_a_picture_that_is_missing_is_named(tiny: Tiny, family: str) -> None:
    arguments = tiny_families.ARGUMENTS[family]
    said = message(tiny(family), arguments)
    assert "arguments.image: is missing" in said and "item-0" in said
    picture = make_picture(1)
    if family in MASKED:
        pictured = {**arguments, "image": picture, "mask_image": picture}
        said = message(tiny(family), pictured, {**arguments, "image": picture})
        assert "arguments.mask_image: is missing" in said and "item-1" in said
    else:
        check(tiny(family), {**arguments, "image": picture})


def test_a_picture_that_is_an_option_may_be_missing(tiny: Tiny) -> None:
    check(tiny("flux_kontext"), tiny_families.ARGUMENTS["flux_kontext"])


def test_every_combination_is_checked_and_texts_make_none(tiny: Tiny) -> None:
    many = [{"height": 32, "negative_prompt": f"no {number}"} for number in range(1500)]
    assert check(tiny("sd"), *many).output.item_shape == (32, 32, 3)
    assert "item-1500" in message(tiny("sd"), *many, {"height": 32, "negative_prompt": "no", "eta": 0.0, "width": 12})
    assert "split the job" in message(tiny("sd"), *({"eta": number / 1001} for number in range(1001)))


def test_a_pipeline_without_cuts(tiny: Tiny) -> None:
    found = check(tiny("ddpm"), {})
    assert found == Checked(("generate",), Output("image", (16, 16, 3)), "it has no encode_prompt")
    assert "num_inference_step" in message(tiny("ddpm"), {"num_inference_step": 2})


def test_fake_stages_take_anything() -> None:
    fake = FakeStages(stages={"one": 0.0, "two": 0.0}, height=3, width=5)
    ref = ModelRef("fake", "fake", "float32", "cpu", False, fake=fake)
    item = Item(0, "a", "a", 0, {"anything": 1})
    assert check_job(ref, [item]) == Checked(("one", "two"), Output("image", (3, 5, 3)))


def test_a_model_is_what_its_files_say(tiny: Tiny, changed: Path) -> None:
    assert ref_of(changed).digest == ref_of(tiny("sd")).digest != ref_of(tiny("sd3")).digest
    edit(changed / "scheduler/scheduler_config.json", beta_end=0.013)
    assert ref_of(changed).digest != ref_of(tiny("sd")).digest


def test_a_relative_folder_is_the_same_model_from_anywhere(changed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(changed.parent)
    assert ref_of("model").source == ref_of("./model").source == str(changed.resolve())


def test_every_family_has_its_parts_in_their_stages(tiny: Tiny) -> None:
    _, parts = components(tiny("sd3"))
    assert {part.name: part.stage for part in parts} == {
        "scheduler": None,
        "text_encoder": "encode",
        "text_encoder_2": "encode",
        "text_encoder_3": "encode",
        "tokenizer": None,
        "tokenizer_2": None,
        "tokenizer_3": None,
        "transformer": "denoise",
        "vae": "decode",
    }


@pytest.mark.parametrize("name", ["bundeld", "./no/such/model", "a/b/c", "~nobody/model"])
def test_a_model_that_is_nowhere(name: str) -> None:
    with pytest.raises(ModelError, match="there is no model directory") as caught:
        ref_of(name)
    assert repr(name) in str(caught.value) and "`bundled`" in str(caught.value)


def test_a_hub_id_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "hf_not_for_your_eyes")
    with pytest.raises(ModelError, match="neither a directory here nor could it be fetched from the hub") as caught:
        locate("dfdask-tests/there-is-none", None)
    assert "\n" not in str(caught.value) and "hf_not" not in str(caught.value)


def test_a_folder_that_is_no_pipeline(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no model_index.json.*save_pretrained"):
        ref_of(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '"text"', "\ufeff{}", "null"])
def test_an_index_that_cannot_be_read(changed: Path, text: str) -> None:
    (changed / "model_index.json").write_text(text)
    with pytest.raises(ModelError, match=r"model_index.json cannot be read.*save the pipeline again"):
        ref_of(changed)


@pytest.mark.parametrize("part", ["vae", "unet", "text_encoder", "tokenizer", "scheduler"])
def test_a_part_that_is_not_there(changed: Path, part: str) -> None:
    shutil.rmtree(changed / part)
    with pytest.raises(ModelError, match=f"lacks its component '{part}'.*download or save the model again"):
        ref_of(changed)


@pytest.mark.parametrize("part", ["vae", "unet", "text_encoder"])
def test_a_part_without_configuration(changed: Path, part: str) -> None:
    (changed / part / "config.json").unlink()
    with pytest.raises(ModelError, match=f"{part} lacks config.json"):
        ref_of(changed)


def test_weights_that_are_pickles_are_refused(changed: Path) -> None:
    (changed / "unet/diffusion_pytorch_model.safetensors").unlink()
    torch.save({}, changed / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(ModelError, match=r"diffusion_pytorch_model.bin.*can run code.*safe_serialization=True"):
        ref_of(changed)


def test_weights_that_are_not_there_or_empty(changed: Path) -> None:
    weights = changed / "unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(b"")
    with pytest.raises(ModelError, match="is empty; download or save"):
        ref_of(changed)
    weights.unlink()
    with pytest.raises(ModelError, match="has no weights"):
        ref_of(changed)


def test_a_pipeline_with_code_of_its_own_is_refused(changed: Path) -> None:
    marker = changed.parent / "it-ran"
    (changed / "pipeline.py").write_text(f"open({str(marker)!r}, 'w')\nclass MyPipeline: pass\n")
    edit(changed / "model_index.json", _class_name=["pipeline", "MyPipeline"])
    with pytest.raises(ModelError, match="needs code of its own"):
        ref_of(changed)
    assert not marker.exists()


@pytest.mark.parametrize("library", ["mine", "os", "unet.mine", "..", "transformers.models"])
def test_a_component_with_code_of_its_own_is_refused(changed: Path, library: str) -> None:
    marker = changed.parent / "it-ran"
    for path in (changed / "mine.py", changed / "unet/mine.py"):
        path.write_text(f"open({str(marker)!r}, 'w')\nclass Mine: pass\n")
    edit(changed / "model_index.json", unet=[library, "Mine"])
    with pytest.raises(ModelError, match=r"unet \(Mine\) cannot be loaded"):
        check(changed, ARGUMENTS["sd"])
    assert not marker.exists()


@pytest.mark.parametrize("part", ["text_encoder", "tokenizer"])
def test_auto_classes_run_no_code_of_a_model(changed: Path, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would ask the terminal whether it may."""
    marker = changed.parent / "it-ran"
    (changed / part / "mine.py").write_text(f"open({str(marker)!r}, 'w')\nclass Mine: pass\nclass MineConfig: pass\n")
    kind = "AutoModel" if part == "text_encoder" else "AutoTokenizer"
    edit(changed / "model_index.json", **{part: ["transformers", kind]})
    own = {"AutoConfig": "mine.MineConfig", kind: "mine.Mine" if part == "text_encoder" else ["mine.Mine", None]}
    name = "config.json" if part == "text_encoder" else "tokenizer_config.json"
    edit(changed / part / name, auto_map=own, model_type="mine", tokenizer_class="Mine")
    asked: list[object] = []
    monkeypatch.setattr("builtins.input", lambda *text: asked.append(text) or "y")
    with pytest.raises(ModelError, match="cannot be loaded"):
        check(changed, ARGUMENTS["sd"])
    assert not asked and not marker.exists()


def test_a_pipeline_class_that_diffusers_does_not_have(changed: Path) -> None:
    edit(changed / "model_index.json", _class_name="StableDifusionPipeline")
    with pytest.raises(ModelError, match="has no pipeline class 'StableDifusionPipeline'.*update diffusers"):
        check(changed, ARGUMENTS["sd"])


def test_a_class_that_the_library_does_not_have(changed: Path) -> None:
    edit(changed / "model_index.json", unet=["diffusers", "UNet2DConditionModl"])
    with pytest.raises(ModelError, match=r"unet \(UNet2DConditionModl\) cannot be loaded"):
        check(changed, ARGUMENTS["sd"])


def test_a_configuration_that_is_damaged(changed: Path) -> None:
    (changed / "unet/config.json").write_text("{")
    with pytest.raises(ModelError, match=r"unet \(UNet2DConditionModel\) cannot be loaded") as caught:
        check(changed, ARGUMENTS["sd"])
    assert "\n" not in str(caught.value)


def test_nothing_but_our_own_errors_reaches_the_user(changed: Path) -> None:
    """Whatever entry of the index is damaged, in a few ways that downloads and editors have."""
    index = json.loads((changed / "model_index.json").read_text())
    wrong: Sequence[object] = (None, [], {}, "", 5, ["diffusers"], ["diffusers", None], ["diffusers", 5], [5, "x"])
    for name in ("vae", "unet", "scheduler", "_class_name", "requires_safety_checker"):
        for value in wrong:
            edit(changed / "model_index.json", **{**index, name: value})
            try:
                check_parts(changed)
                check(changed, ARGUMENTS["sd"])
            except DfdaskError as error:
                assert "\n" not in str(error)
