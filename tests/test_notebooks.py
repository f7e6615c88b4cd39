"""The notebooks, run from top to bottom in a kernel of their own, and what they show."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "notebooks"


class Shown:
    """The outputs of a notebook that has been run."""

    def __init__(self, book: Any) -> None:
        self.cells = [cell for cell in book.cells if cell.cell_type == "code"]

    def of(self, part: str) -> list[Any]:
        """The outputs of the only cell whose source has ``part``."""
        (cell,) = [cell for cell in self.cells if part in cell.source]
        return list(cell.outputs)

    def text(self, part: str) -> str:
        return "".join(str(o.get("text") or o.get("data", {}).get("text/plain", "")) for o in self.of(part))

    def data(self, part: str, kind: str) -> str:
        (found,) = [o["data"][kind] for o in self.of(part) if kind in o.get("data", {})]
        return str(found)


def executed(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Shown:
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    book = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    NotebookClient(book, kernel_name="python3", timeout=100, resources={"metadata": {"path": str(folder)}}).execute()
    for cell in book.cells:
        for output in cell.get("outputs", []):
            assert output.get("name") != "stderr", output["text"]
    return Shown(book)


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_stored_without_outputs_and_places(path: Path) -> None:
    book = json.loads(path.read_text(encoding="utf-8"))
    assert book["nbformat"] == 4 and book["metadata"]["kernelspec"]["name"] == "python3"
    for cell in book["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None
        assert not re.search(r"/(work|home|tmp|root|Users)/", "".join(cell["source"]))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = executed("1-quickstart", tmp_path, monkeypatch)
    assert shown.text("run.wait()") == "12"
    assert "finished" in shown.data("dfdask.submit(**job)\nrun", "text/html"), (
        "the view has followed the job to its end"
    )
    assert "xarray.Dataset" in shown.text("ds = run.dataset()")
    assert "(3, 128, 128, 3)" in shown.text("apples.image.shape")
    assert shown.data("plt.subplots", "image/png") and shown.data("contact_sheet(run.store)", "image/png")
    assert shown.text("again = ") == "12 of 12 were there already\n"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_bulk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = executed("2-bulk", tmp_path, monkeypatch)
    assert shown.text("LocalCluster(") == "3 workers\n"
    assert "widget-view" in str(shown.of("panel = controls"))
    assert shown.text("panel.pause.click()").startswith("paused: True and the other one goes on:")
    assert shown.text("panel.resume.click()") == "'running'"
    assert "400 of 400 items" in shown.text("SIGKILL") and "2 failed" in shown.text("SIGKILL")
    failures = shown.text("pd.DataFrame(first.failures())")
    assert "apple-3" in failures and "apple-70" in failures and "fake failure" in failures
    assert shown.text("retry_failed()") == "0 failed; 384 of 400 were left as they were\n"
    assert shown.text("third.stop()") == "stopped True\n"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_elasticity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = executed("3-elasticity", tmp_path, monkeypatch)
    assert "480 of 480 items" in shown.text("workers=4")
    events = {kind: int(n) for kind, n in re.findall(r"'(\w+)': (\d+)", shown.text("Counter(event"))}
    assert events["JobStarted"] == events["JobEnded"] == 1 and events["RolesChanged"] > 4 and events["TaskDone"] >= 100
    explained = shown.text("print_history(")
    assert "encode" in explained and "decisions" in explained
    for part in ("charts.timeline", "charts.predictions"):
        html = shown.data(part, "text/html")
        assert len(ET.fromstring(html[html.index("<svg") :])) > 5
    first, last = map(int, re.findall(r"(\d+)%", shown.text("np.mean(first)")))
    assert last > first + 20, "the fleet has followed the work"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = executed("4-reading", tmp_path, monkeypatch)
    assert "4,000 of 4,000 items" in shown.text("open_run") and "2 failed" in shown.text("open_run")
    counts = shown.text("value_counts()")
    assert re.search(r"panda +999 +1", counts) and re.search(r"red apple +999 +1", counts)
    assert "fake failure of 000002-500" in shown.text("run.failures()")
    assert shown.text(".sample(12") == "uint8 (12, 16, 16, 3) from 3072 kB\n"
    assert shown.data("rows=chosen", "image/png")
    assert re.search(r"panda +999.0 +127", shown.text("describe()"))
    assert shown.text("export_run") == "3998 exported, 2 failed ones left out, 3998 rows\n"
    assert (tmp_path / "runs/nb-reading/report" / shown.text("write_report").strip()).stat().st_size > 10_000
