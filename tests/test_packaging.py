"""The project's own files agree with each other and with the layers of the design."""

from __future__ import annotations

import ast
import importlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import dfdask

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dfdask"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())
CONDA_NAMES = {"torch": "pytorch", "dask": "dask-core", "prometheus-client": "prometheus_client"}

# Imports point down, from a later layer to an earlier one or within one. A name stands for a module, or for
# a package with all that is in it.
LAYERS: dict[str, set[str]] = {
    "values": {
        *("spec", "spec_parts", "scale_spec", "speed", "items", "images", "events", "errors", "arguments"),
        *("problems", "job_file", "tags"),
    },
    "pure": {
        *("seeds", "batching", "words", "markup", "item_table", "history", "charts"),
        *("cost", "fluid", "capacity", "placement", "blocks", "profit", "dispatch", "controller", "fleets", "scaling"),
        *("four", "linear", "flow", "ledger", "newcomers", "quarantine", "stragglers", "views"),
    },
    "storage": {
        *("store", "store_check", "store_create", "store_events", "store_layout", "store_objects"),
        *("targets", "target_files", "prompts", "prompt_files"),
    },
    "models": {"stages", "bundled"},
    "dask": {
        *(
            "run",
            "prepare",
            "job_cluster",
            "leaving",
            "driver",
            "graph",
            "worker",
            "cluster",
            "machine",
            "wire",
            "quiet",
        ),
        *("gate", "roles", "warm_up", "first_costs", "stage_tasks", "telemetry", "cost_file"),
        *("elastic", "backends", "plugins", "meters"),
    },
    "tools": {"simulate", "evaluate", "plan"},
    "face": {
        *("cli", "cli_check", "cli_options", "dashboard", "progress", "terminal", "watch", "notebook", "summary"),
        *("explain", "report"),
        *("report_page", "inspection", "video", "sheet", "export", "export_formats"),
    },
    "top": {"__init__", "__main__"},
}
# What a layer must never know about, whatever else it imports.
FOREIGN = {
    "values": {"dask", "distributed", "torch", "diffusers", "zarr", "xarray", "obstore", "rich", "click"},
    "pure": {
        "dask",
        "distributed",
        "torch",
        "diffusers",
        "zarr",
        "xarray",
        "obstore",
        "rich",
        "click",
        "time",
    },
    "storage": {"dask", "distributed", "torch", "diffusers", "rich", "click"},
    "models": {"dask", "distributed", "zarr", "obstore", "rich", "click"},
    "dask": {"rich", "click"},
}
HEAVY = (
    "torch",
    "distributed",
    "dask",
    "xarray",
    "zarr",
    "diffusers",
    "numpy",
    "pydantic",
    "rich",
    "pyarrow",
)


def modules() -> dict[str, Path]:
    """Dotted names below ``dfdask``, with their files."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


def layer_of(module: str) -> int:
    names = list(LAYERS.values())
    places = [place for place, layer in enumerate(names) if module.split(".")[0] in layer]
    assert len(places) == 1, f"dfdask.{module} must be in exactly one layer of LAYERS, is in {len(places)}"
    return places[0]


def imports(module: str, path: Path, types: bool = True) -> set[str]:
    """Full dotted names of all that a module imports, in functions too, and where ``types`` for type checks."""
    package = ["dfdask", *module.split(".")]
    if path.name != "__init__.py":
        package.pop()
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    if not types:  # before the walk, which takes up a node's children before it yields the node
        for node in tree.body:
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            found.update(f"{origin}.{alias.name}" for alias in node.names)
    return found


def inner_imports(module: str, path: Path, types: bool = True) -> set[str]:
    """The modules of dfdask among a module's imports; ``from dfdask import __version__`` is free for all."""
    known = modules()
    found = set()
    for name in imports(module, path, types):
        parts = name.split(".")
        if parts[0] != "dfdask" or name == "dfdask.__version__":
            continue
        while len(parts) > 1 and ".".join(parts[1:]) not in known:
            parts.pop()
        found.add(".".join(parts[1:]) or "__init__")
    return found - {module}


def test_every_module_is_in_one_layer() -> None:
    for module in modules():
        layer_of(module)


@pytest.mark.parametrize("module", modules())
def test_imports_point_down(module: str) -> None:
    path = modules()[module]
    for other in inner_imports(module, path):
        assert layer_of(other) <= layer_of(module), f"dfdask.{module} imports dfdask.{other}, of a higher layer"
    layer = list(LAYERS)[layer_of(module)]
    foreign = {name.split(".")[0] for name in imports(module, path)} & FOREIGN.get(layer, set())
    assert not foreign, f"dfdask.{module} is of the layer {layer!r} and imports {sorted(foreign)}"


def test_no_import_cycles() -> None:
    graph = {module: inner_imports(module, path, types=False) for module, path in modules().items()}
    del graph["__init__"]
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"import cycle: {' -> '.join((*trail, module))}"
        if module not in done:
            for other in sorted(graph.get(module, ())):
                visit(other, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("module", modules())
def test_modules_stay_small(module: str) -> None:
    assert len(modules()[module].read_text().splitlines()) <= 400


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from dfdask.cli import main; main(['--help'], standalone_mode=False); import dfdask; "
        f"print('loaded:', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "Usage:" in result.stdout
    assert result.stdout.splitlines()[-1] == "loaded: []"


@pytest.mark.parametrize("name", dfdask.__all__)
def test_public_names_exist(name: str) -> None:
    assert getattr(dfdask, name) is not None
    assert name in dir(dfdask)


def test_public_names_are_what_the_type_checker_sees() -> None:
    names = {name.split(".")[-1] for name in imports("__init__", PACKAGE / "__init__.py")}
    assert names - {"annotations", "TYPE_CHECKING", "Any"} >= set(dfdask.__all__) - {"__version__"}
    with pytest.raises(AttributeError, match="nonsense"):
        dfdask.nonsense  # noqa: B018


def test_every_error_is_public() -> None:
    errors = importlib.import_module("dfdask.errors")
    classes = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert classes <= set(dfdask.__all__)


def wanted() -> list[Requirement]:
    return [Requirement(text) for text in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]]


def test_environment_has_the_same_ranges() -> None:
    conda = [entry for entry in ENVIRONMENT["dependencies"] if isinstance(entry, str) and entry != "pip"]
    (pip,) = [entry["pip"] for entry in ENVIRONMENT["dependencies"] if isinstance(entry, dict)]
    assert "-e ." in pip
    texts = [*conda, *(entry for entry in pip if entry != "-e .")]
    here = {requirement.name: requirement.specifier for requirement in map(Requirement, texts)}
    there = {CONDA_NAMES.get(entry.name, entry.name): entry.specifier for entry in wanted()}
    assert here == {"python": Requirement(f"python{PROJECT['requires-python']}").specifier, **there}


def test_constraints_pin_every_dependency_within_its_range() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    versions = {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in pins}
    assert len(versions) == len(pins)
    for pin in pins:
        assert str(pin.specifier).startswith("==") and "+" not in str(pin.specifier), pin
    for entry in wanted():
        assert entry.specifier.contains(versions[canonicalize_name(entry.name)]), entry
    assert versions["torch"] == "2.13.0"


def test_extras() -> None:
    assert set(PROJECT["optional-dependencies"]) == {
        *("test", "notebooks", "jobqueue", "kubernetes", "cloud", "gateway", "video"),
    }


def test_changelog_names_the_version() -> None:
    assert f"## {dfdask.__version__}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize(
    ("name", "end"), [("run", "run jobs/quickstart.yaml"), ("test", "/pytest -n 2 --dist loadfile")]
)
def test_readme_has_its_two_commands(name: str, end: str) -> None:
    blocks = re.findall(rf"<!-- {name} -->\n```bash\n(.*?)\n```\n", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 1, f"README.md needs one code block after <!-- {name} -->"
    assert "-c constraints.txt" in blocks[0]
    assert blocks[0].endswith(end)


def test_ci_runs_the_command_of_the_readme() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert "<!-- test -->" in script.read_text()
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"  # building leaves files behind
    shutil.copytree(PACKAGE, source / "dfdask", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"dfdask", f"dfdask-{dfdask.__version__}.dist-info"}
    inside = {name for name in names if name.startswith("dfdask/")}
    sources = {str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*.py")}
    data = {str(path.relative_to(ROOT)) for path in (PACKAGE / "bundled" / "model").rglob("*") if path.is_file()}
    data |= {f"dfdask/dashboard/page.{kind}" for kind in ("html", "css")}
    assert inside == sources | data | {"dfdask/py.typed", "dfdask/device_rates.json"}
