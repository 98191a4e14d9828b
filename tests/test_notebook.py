"""The notebook: its cells run, one after the other, and show what they promise."""

import contextlib
import io
import json
import re

import matplotlib
import pytest
from conftest import ROOT


@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
def test_the_notebook_runs(monkeypatch, few_synth):
    """With a hundredth of the source and a few steps, in another folder than the repository's."""
    monkeypatch.chdir(ROOT / "docs")
    matplotlib.use("agg")
    notebook = json.loads((ROOT / "docs" / "dann.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    names, said = {}, io.StringIO()
    with contextlib.redirect_stdout(said):
        for cell in cells:
            exec(compile(cell.replace("steps=300", "steps=3").replace(":300]", ":20]"), "dann.ipynb", "exec"), names)
    assert "backwards: [-1.0, -2.0, -3.0]" in said.getvalue()
    accuracies = re.findall(r"(source only|reversal) +(synth|optdigits) +\d+\.\d+%  \d+ / (\d+)", said.getvalue())
    assert accuracies == [(method, domain, count) for method in ("source only", "reversal")
                          for domain, count in (("synth", "20"), ("optdigits", "500"))]  # fmt: skip
    assert len(names["figure"].axes) == 4


def test_the_notebook_is_kept_as_it_came_out():
    """Each cell of code has been run, in order, without an error, and there are two pictures in it."""
    cells = json.loads((ROOT / "docs" / "dann.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
    outputs = [output for cell in code for output in cell["outputs"]]
    assert all(output["output_type"] != "error" and output.get("name") != "stderr" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
