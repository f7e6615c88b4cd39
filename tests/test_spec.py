"""Jobs: what is accepted, what is refused, and that the refusal helps."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfdask.errors import SpecError
from dfdask.spec import FakeModel, JobSpec, PromptFile, diff_specs, fingerprint

JOBS = Path(__file__).parent.parent / "jobs"
MINIMAL = {"model": "bundled", "prompts": ["red apple"]}


def yaml_job(folder: Path, text: str) -> Path:
    path = folder / "my job.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults() -> None:
    spec = JobSpec.from_mapping(MINIMAL)
    assert (spec.batch, spec.shard, spec.seed, spec.images_per_prompt) == (8, None, 0, 1)
    assert (spec.dtype, spec.device, spec.strict, spec.workers, spec.output) == (
        "float32",
        "auto",
        False,
        None,
        None,
    )
    assert spec.base_dir == Path.cwd() and spec.prompt_path() is None
    assert pickle.loads(pickle.dumps(spec)) == spec


@pytest.mark.parametrize("name", ["quickstart", "partiprompts"])
def test_the_jobs_that_we_ship(name: str) -> None:
    spec = JobSpec.from_yaml(JOBS / f"{name}.yaml")
    assert spec.output == f"local/{name}" and spec.model == "bundled"


def test_everything_in_yaml(tmp_path: Path) -> None:
    spec = JobSpec.from_yaml(
        yaml_job(
            tmp_path,
            """
model: {fake: {stages: {a: 0, b: 1e-3}, fail: [x], fail_stage: b}}
prompts: {file: p.csv, columns: {prompt: caption, id: null, height: h}, limit: 3}
arguments: {original_size: [64, 64], guidance_scale: 5e-1, note: 2024-01-01}
workers: [{count: 2, stages: [a]}, {count: 1}]
strict: true
""",
        )
    )
    assert isinstance(spec.model, FakeModel) and list(spec.model.fake.stages.items()) == [
        ("a", 0),
        ("b", 0.001),
    ]
    assert isinstance(spec.prompts, PromptFile) and spec.prompts.limit == 3
    assert spec.prompt_path() == tmp_path.resolve() / "p.csv"
    assert spec.arguments == {"original_size": [64, 64], "guidance_scale": 0.5, "note": "2024-01-01"}
    assert spec.output == "local/my-job"


def test_python_sources_become_lists() -> None:
    np = pytest.importorskip("numpy")
    spec = JobSpec(model="m", prompts=(f"p{n}" for n in range(3)), arguments={"size": (np.int64(3), np.float32(0.5))})
    assert spec.prompts == ["p0", "p1", "p2"]
    assert spec.arguments == {"size": [3, 0.5]}
    assert JobSpec(model="m", prompts=Path("a.txt")).prompt_path() == Path.cwd() / "a.txt"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"promts": ["a"]}, "promts: unknown key.*did you mean 'prompts'"),
        ({"guidance_scale": 3}, "guidance_scale: is no key of a job, got 3; move it below `arguments`"),
        ({"batch": 0}, "batch: must be greater than or equal to 1, got 0"),
        ({"batch": "8"}, "batch: must be a whole number, got '8'; write e.g. batch: 8"),
        ({"batch": True}, "batch: must be a whole number, got True"),
        ({"shard": 0}, "shard: .*got 0"),
        ({"seed": -1}, "seed: .*got -1"),
        ({"seed": 2**32}, "seed: .*got 4294967296"),
        ({"images_per_prompt": 0}, "images_per_prompt: .*got 0"),
        ({"dtype": "fp16"}, "dtype: must be 'float32', 'bfloat16' or 'float16', got 'fp16'"),
        ({"device": "gpu"}, "device: .*got 'gpu'"),
        ({"strict": "yes"}, "strict: must be true or false, got 'yes'"),
        ({"output": ""}, "output: must not be empty"),
        ({"model": None}, "model: must be text, got None"),
        ({"model": {"fake": {"stages": {}}}}, "model.fake.stages: must not be empty"),
        ({"model": {"fake": {"stages": {"a": -1}}}}, "model.fake.stages.a: .*got -1"),
        ({"model": {"fake": {"stages": {"a": float("inf")}}}}, "model.fake.stages.a: .*finite"),
        ({"model": {"fake": {"stages": {"a b": 1}}}}, "model.fake.stages.a b: must be a plain name"),
        (
            {"scheduler": {"class": "NoSuch"}},
            "scheduler.class: must end in Scheduler, got 'NoSuch'; write e.g. class: EulerDiscreteScheduler",
        ),
        ({"scheduler": {"class": "a.DDIMScheduler"}}, "scheduler.class: must be a plain name, got 'a.DDIMScheduler'"),
        ({"adapters": [{"path": "a", "weight_name": "b.bin"}]}, r"weight_name: must end in \.safetensors, got 'b.bin'"),
        ({"model": {"fake": {"fail": ["x"], "fail_stage": "no"}}}, "`fail_stage` must be one of"),
        ({"model": {"fake": {"wdth": 1}}}, "model.fake.wdth: .*did you mean 'width'"),
        ({"workers": 0}, "workers: .*got 0"),
        ({"workers": []}, "workers: must not be empty"),
        ({"workers": [{"count": 0}]}, r"workers\[0\].count: .*got 0"),
        ({"workers": [{"stages": []}]}, r"workers\[0\].stages: must not be empty"),
        ({"workers": [{"stages": ["a", "a"]}]}, r"workers\[0\].stages: must name each stage once"),
        ({"prompts": None}, "prompts: must be a file or a list"),
        ({"prompts": b"x"}, "prompts: must be a file or a list"),
        ({"prompts": {"a", "b"}}, "prompts: must have an order"),
        ({"prompts": ["a", 3]}, r"prompts\[1\]: must be text or a mapping, got 3; put it in quotes"),
        ({"prompts": ["a", {"id": "x"}]}, r"prompts\[1\]: must have a `prompt`"),
        ({"prompts": {"file": "x", "colums": {}}}, "prompts.colums: unknown key.*did you mean 'columns'"),
        ({"prompts": {"file": "x", "limit": 0}}, "prompts.limit: .*got 0"),
        ({"prompts": {"file": "x", "columns": {"prompt": None}}}, "must name the column of the prompts"),
        ({"prompts": {"file": "x", "columns": {"latents": "y"}}}, "prompts.columns.latents: cannot be set"),
        ({"prompts": {}}, "prompts.file: is missing"),
        ({"arguments": []}, "arguments: must be a mapping"),
        ({"arguments": {"num_inference_steps": 0}}, "at least 1, got 0; write e.g. 30"),
        ({"arguments": {"num_inference_steps": 8.0}}, "whole number"),
        ({"arguments": {"num_inference_steps": None}}, "whole number"),
        ({"arguments": {"height": True}}, "arguments.height: must be a whole number"),
        ({"arguments": {"guidance_scale": "high"}}, "arguments.guidance_scale: must be a number, got 'high'"),
        ({"arguments": {"guidance_scale": float("nan")}}, "must be a finite number, got nan"),
        ({"arguments": {"sizes": [1, float("inf")]}}, "must be a finite number, got inf"),
        ({"arguments": {"generator": 1}}, "arguments.generator: cannot be set here: .*`seed`"),
        ({"arguments": {"num_images_per_prompt": 2}}, "set the job's `images_per_prompt`"),
        ({"arguments": {"callback_on_step_end": "f"}}, "callbacks are code"),
        ({"arguments": {"negative_prompt_embeds": []}}, "arguments.negative_prompt_embeds: cannot be set"),
        ({"arguments": {"a-b": 1}}, "is not the name of a pipeline argument"),
        ({"arguments": {3: 1}}, "is not the name of a pipeline argument"),
        ({"arguments": {"image": object()}}, "give it as plain data"),
        ({"arguments": {"x": "\ud800"}}, "lone surrogate"),
    ],
)
def test_problems(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message) as found:
        JobSpec.from_mapping({**MINIMAL, **fields})
    assert "pydantic" not in str(found.value) and "Traceback" not in str(found.value)
    assert len(str(found.value).splitlines()) == 1


def test_all_problems_come_together() -> None:
    with pytest.raises(SpecError) as found:
        JobSpec(prompts=["a"], batch=0, arguments={"height": 0, "latents": 1}, colour="red")
    text = str(found.value)
    assert "5 problems" in text
    for key in ("model:", "batch:", "arguments.height:", "arguments.latents:", "colour:"):
        assert key in text


def test_a_data_frame_is_refused() -> None:
    pandas = pytest.importorskip("pandas")
    with pytest.raises(SpecError, match="pass table"):
        JobSpec(model="m", prompts=pandas.DataFrame({"prompt": ["a"]}))


def test_endless_nesting_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(SpecError, match="nested too deeply"):
        JobSpec(model="m", prompts=["a"], arguments={"x": loop})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "got nothing"),
        ("- a", "got a sequence"),
        ("model: m\nprompts: [a\n", "line 3: not valid YAML"),
        ("model: m\nmodel: n\nprompts: [a]", "line 2: the key 'model' is there twice, first in line 1"),
        ("model: m\nprompts: [a]\narguments:\n  x: 1\n  x: 2", "line 5: the key 'x' is there twice"),
        ("model: !!python/name:os.system\nprompts: [a]", "line 1: .*tags are not allowed"),
        ("model: m\nprompts: [!!binary aGk=]", "line 2: .*tags are not allowed"),
        ("model: &a m\nprompts: [*a]", "line 1: .*anchors and aliases are not allowed"),
        ("model: m\nprompts:\n- a\n- 3", r"line 4: prompts\[1\]: must be text or a mapping, got 3"),
        ("model: m\nprompts: [no]", "put it in quotes"),
        (
            "model: m\nprompts: [a]\narguments:\n  guidance_scale: .nan",
            "line 4: arguments.guidance_scale: .*nan",
        ),
        ("model: m\nprompts: [a]\nbatch: 0", "line 3: batch: .*got 0"),
        ("model: m\nprompts: [a]\n3: 0", "the key 3 is not text"),
        ("model: m\nprompts: [a]\n? [a]\n: 1", "line 3: a key must be plain text"),
        ("model: m\nprompts: [a]\nseed: " + "9" * 5000, "cannot be read"),
        ("[" * 3000, "nested too deeply|not valid YAML"),
        ("model: m\n--- \nprompts: [a]", "not valid YAML"),
        ("model: m\x01", "not valid YAML"),
    ],
)
def test_yaml_problems_name_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    path = yaml_job(tmp_path, text)
    with pytest.raises(SpecError, match=message) as found:
        JobSpec.from_yaml(path)
    assert str(found.value).startswith(str(path))


def test_files_that_are_no_jobs(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no such job file"):
        JobSpec.from_yaml(tmp_path / "none.yaml")
    with pytest.raises(SpecError, match="is a directory"):
        JobSpec.from_yaml(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"model: m\nprompts: [caf\xe9]\n")
    with pytest.raises(SpecError, match="line 2: not UTF-8"):
        JobSpec.from_yaml(tmp_path / "latin.yaml")
    (tmp_path / "big.yaml").write_bytes(b"#" * 2_000_001)
    with pytest.raises(SpecError, match="put the prompts in a file"):
        JobSpec.from_yaml(tmp_path / "big.yaml")


def test_nothing_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "x")
    spec = JobSpec.from_yaml(yaml_job(tmp_path, "model: $SECRET\nprompts: ['${SECRET}', '{{1+1}}', '~/a']"))
    assert spec.model == "$SECRET" and spec.prompts == ["${SECRET}", "{{1+1}}", "~/a"]


def test_prompt_files_stay_near_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job_dir, elsewhere, here = (tmp_path / name for name in ("jobs", "elsewhere", "here"))
    for folder in (job_dir, elsewhere, here):
        folder.mkdir()
    monkeypatch.chdir(here)
    (elsewhere / "p.txt").write_text("a")
    (job_dir / "link.txt").symlink_to(elsewhere / "p.txt")
    for outside in ("../elsewhere/p.txt", elsewhere / "p.txt", "link.txt", "/etc/passwd"):
        path = yaml_job(job_dir, f"model: m\nprompts: {outside}")
        with pytest.raises(SpecError, match="line 2: prompts: the file must lie in the folder"):
            JobSpec.from_yaml(path)
        spec = JobSpec.from_yaml(path, {"prompts": str(outside)})
        assert spec.base_dir == here
    for inside in ("p.txt", "sub/p.txt", here / "p.txt", "../jobs/p.txt"):
        assert JobSpec.from_yaml(yaml_job(job_dir, f"model: m\nprompts: {inside}")).base_dir == job_dir
    assert JobSpec(model="m", prompts=str(elsewhere / "p.txt")).prompt_path() == elsewhere / "p.txt"


def test_replace_and_limit(tmp_path: Path) -> None:
    path = yaml_job(tmp_path, "model: m\nprompts: p.txt\nbatch: 2")
    spec = JobSpec.from_yaml(path)
    changed = spec.replace(workers=2).limited(5).limited(9)
    assert changed.workers == 2 and changed.batch == 2 and changed.base_dir == tmp_path.resolve()
    assert isinstance(changed.prompts, PromptFile) and changed.prompts.limit == 5
    assert JobSpec(model="m", prompts=["a", "b"]).limited(1).prompts == ["a"]
    assert JobSpec.from_yaml(path, {"output": "local/x", "workers": 3}).output == "local/x"
    with pytest.raises(SpecError, match="limit"):
        spec.limited(0)
    with pytest.raises(SpecError, match="batch"):
        spec.replace(batch=0)


def test_canonical_holds_what_decides_the_pixels() -> None:
    spec = JobSpec.from_mapping(MINIMAL)
    same = spec.replace(workers=3, device="cpu", output="local/other", prompts=["b"])
    assert same.canonical() == spec.canonical() and diff_specs(spec.canonical(), same.canonical()) == []
    other = spec.replace(arguments={"guidance_scale": 4.5}, dtype="bfloat16")
    assert sorted(diff_specs(spec.canonical(), other.canonical())) == [
        "arguments.guidance_scale: not set in the stored run, 4.5 now",
        "dtype: 'float32' in the stored run, 'bfloat16' now",
    ]
    assert diff_specs({"a": True, "b": 3}, {"a": 1, "b": 3.0}) == ["a: True in the stored run, 1 now"]
    assert fingerprint(spec.canonical(), "x") != fingerprint(other.canonical(), "x")
    assert fingerprint(spec.canonical(), "x") != fingerprint(spec.canonical(), "y")


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(["alpha", "beta", "gamma"]), plain, max_size=3))
@settings(max_examples=50)
def test_any_plain_arguments_survive(arguments: dict[str, Any]) -> None:
    import json

    spec = JobSpec(model="m", prompts=["a"], arguments=arguments)
    assert spec.arguments == arguments
    stored = json.loads(json.dumps(spec.canonical()))
    assert diff_specs(stored, spec.canonical()) == []
    assert fingerprint(stored, "d") == fingerprint(spec.canonical(), "d")


@given(plain | st.dictionaries(st.sampled_from([*JobSpec.model_fields, "x"]), plain))
@settings(max_examples=150)
def test_nothing_but_spec_errors(fields: Any) -> None:
    """Whatever JSON comes, the answer is a job or a SpecError."""
    if not isinstance(fields, dict):
        fields = {"model": "m", "prompts": fields}
    try:
        JobSpec.from_mapping(fields)
    except SpecError as error:
        assert re.match("job: ", str(error))


def test_import_is_light() -> None:
    heavy = {"torch", "numpy", "yaml", "distributed"}
    code = f"import sys, dfdask.spec; print({heavy} & set(sys.modules) or [])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_scale_by_class_or_for_all_alike() -> None:
    job = JobSpec.from_mapping(
        {
            **MINIMAL,
            "scale": {"max": {"h100": 8, "l4": 20}, "min": {"h100": 1}, "price": 2.5, "deadline": 3600, "budget": 40},
        }
    )
    assert job.scale is not None
    assert job.scale.classes("max") == {"h100": 8, "l4": 20}
    assert job.scale.classes("min") == {"h100": 1, "l4": 0}
    assert job.scale.classes("price") == {"h100": 2.5, "l4": 2.5}
    alike = JobSpec.from_mapping({**MINIMAL, "scale": {"max": 3, "min": 1}}).scale
    assert alike is not None and alike.classes("max") == {"worker": 3} and alike.classes("min") == {"worker": 1}
    assert (
        JobSpec.from_mapping({**MINIMAL, "scale": {"max": 3}}).canonical() == JobSpec.from_mapping(MINIMAL).canonical()
    ), "who computes it changes no pixel"


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        ({}, "scale.max: is missing"),
        ({"max": 0}, "scale.max: must be greater than or equal to 1, got 0"),
        ({"max": {}}, "scale.max"),
        ({"max": 2, "min": 3}, "needs min <= max, got min 3 and max 2"),
        ({"max": {"h100": 2}, "min": {"l4": 1}}, "`min` names l4, but the classes of `max` are h100"),
        ({"max": 2, "budget": 4}, "`budget` needs a `price`"),
        ({"max": 2, "deadline": -1}, "scale.deadline: must be"),
        ({"max": 2, "deadlin": 1}, "scale.deadlin: unknown key"),
    ],
)
def test_scale_mistakes_are_named(scale: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=re.escape(message)):
        JobSpec.from_mapping({**MINIMAL, "scale": scale})


def test_scale_and_workers_exclude_each_other() -> None:
    with pytest.raises(SpecError, match="workers: cannot be fixed beside `scale`, got 2; leave one out"):
        JobSpec.from_mapping({**MINIMAL, "scale": {"max": 2}, "workers": 2})
