"""The notebooks themselves: all of them in their smoke size, and as they are committed."""

import ast
import contextlib
import io
import os
import re
import runpy
import sys
from pathlib import Path
from unittest import mock

import matplotlib
import nbformat
import pytest
from matplotlib import pyplot

from brainsex import synthetic

matplotlib.use("Agg")
ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
FIGURES = {
    "tabular_accuracy.png", "xgb_importance_20.png", "log_reg_importance_20.png", "overlap.png",
    "volumes_controlled.png", "table_controlled.png", "fa_volumes.png", "brain_volume.png",
    "cnn2d_curves.png", "slab_positions.png", "feature_effects.png", "feature_maps.png",
    "CNN_arch.png", "training_curves.png", "fold_accuracies.png", "both.png", "regions.png",
    "mask.html", "mask.png", "explore.html", "explanations_subject.png", "explanations_groups.png",
    "explanations_curves.png", "explanations_regions.png", "ranking.png", "dose.png",
    "person.png", "person.gif",
}  # fmt: skip


def texts(notebook) -> str:
    """Everything the code cells printed or displayed as text."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    parts = [output.get("text", "") for output in outputs]
    parts += [v for o in outputs for k, v in o.get("data", {}).items() if k.startswith("text/")]
    return "\n".join(parts)


def execute_here(source: Path, target: Path, parameters: dict) -> None:
    """Run a notebook's cells in this process, which has imported all; what is shown is printed."""
    notebook = nbformat.read(source, as_version=4)
    names = {"__name__": "__main__", "display": print}
    with contextlib.chdir(source.parent), pyplot.rc_context():
        for cell in notebook.cells:
            if cell.cell_type == "code":
                code = compile(ast.Interactive(ast.parse(cell.source).body), source, "single")
                with contextlib.redirect_stdout(io.StringIO()) as printed:
                    exec(code, names)
                cell.outputs = [nbformat.v4.new_output("stream", text=printed.getvalue())]
                names |= parameters if "parameters" in cell.metadata.get("tags", ()) else {}
    nbformat.write(notebook, target)


def test_smoke_profile_runs_every_notebook_and_writes_every_figure(tmp_path, monkeypatch):
    cohort = synthetic.write_cohort(tmp_path / "synthetic-small", subjects=16, spacing=5)
    measures = cohort / "unrestricted_hcp_freesurfer.csv"
    rows = [line.split(",") for line in measures.read_text().splitlines()]
    measures.write_text("".join(",".join(row[:100]) + "\n" for row in rows))  # of 938 columns
    images = {path: path.stat().st_mtime_ns for path in (ROOT / "image").glob("*")}
    options = ["--profile", "smoke", "--cohort", str(cohort), "--out", str(tmp_path / "out")]
    main = runpy.run_path(str(ROOT / "notebooks" / "run.py"))["main"]
    monkeypatch.setitem(main.__globals__, "execute", execute_here)
    monkeypatch.setattr(sys, "argv", ["run.py", *options])
    with mock.patch.dict(os.environ), pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert {path.name for path in (tmp_path / "out" / "image").iterdir()} == FIGURES
    for source in NOTEBOOKS[1:]:  # the tour has people of its own
        copy = nbformat.read(tmp_path / "out" / source.name, as_version=4)
        assert "synthetic-small" in texts(copy), source.name
    masks = list((tmp_path / "out" / "masks" / "mask").glob("*.nii.gz"))
    assert len(masks) == 4, "one a fold and sex"
    assert images == {path: path.stat().st_mtime_ns for path in (ROOT / "image").glob("*")}


def test_a_failed_notebook_stops_no_other_and_the_end_lists_all(tmp_path, monkeypatch, capsys):
    run = runpy.run_path(str(ROOT / "notebooks" / "run.py"))["run"]
    monkeypatch.setitem(run.__globals__, "HERE", tmp_path)
    monkeypatch.setitem(run.__globals__, "READS", {"01": "", "03": "01"})
    early = "import time; time.sleep(3); open('1', 'w'); print('left out: a'); raise SystemExit(0)"
    last = "import os; print('left out:', OUT, +os.path.isfile('1'), os.getcwd())"
    for name, source in {"01_a": early, "01_b": "1 / 0", "03_c": "OUT = 0"}.items():
        cells = [nbformat.v4.new_code_cell(code) for code in (source, last)]
        cells[0].metadata.tags, kind = ["parameters"], {"language_info": {"name": "python"}}
        notebook = nbformat.v4.new_notebook(cells=cells, metadata=kind)
        nbformat.write(notebook, tmp_path / f"{name}.ipynb")
    (out := tmp_path / "out").mkdir()
    assert run(out, {"OUT": "x"}, {}, False, at_once=2) == 1
    first = r"01_a: done in \d+ s\n  left out: a\n01_b: failed in \d+ s\n  ZeroDivisionError: "
    last = rf"division by zero\n03_c: done in \d+ s\n  left out: x 1 {tmp_path}\n$"
    assert re.search(first + last, capsys.readouterr().out)


def test_a_run_says_how_far_its_tables_are_from_the_committed_ones(tmp_path, monkeypatch):
    compare = runpy.run_path(str(ROOT / "notebooks" / "run.py"))["compare_tables"]
    monkeypatch.setitem(compare.__globals__, "HERE", tmp_path)
    monkeypatch.setitem(compare.__globals__, "TABLES", ["t"])
    (tmp_path / "tables").mkdir()
    rows = 'CNN,0.9,0.8,0.95,"0.5 [0.4, 0.6]"', "SVM,0.7,0.6,0.8,"
    moved = 'CNN,0.79,0.7,0.9,"0.55 [0.4, 0.6]"', "SVM,0.703,0.6,0.8,"
    for path, lines in (("tables/t.csv", rows), ("t.csv", moved)):
        (tmp_path / path).write_text("\n".join(["classifier,accuracy,low,high,AP", *lines]))
    expected = (
        "2 of 3 numbers moved, at most by 0.11 (CNN, accuracy); 1 left the committed interval"
    )
    assert compare(tmp_path)[1:] == [f"  t: {expected}"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_notebook_is_executed_and_clean(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("parameters" in cell.metadata.get("tags", ()) for cell in code) == 1
    assert "synthetic" in texts(notebook), "the cohort's name is shown"
    assert path.stat().st_size < 1.5e6
    text = "\n".join(cell.source for cell in notebook.cells) + texts(notebook)
    assert not re.search(r"(^|[\s'\"(=])(/[a-z]+/[a-z]|[A-Z]:\\)", text, re.M), "an absolute path"
    assert not re.search(r"^\s*class \w+\(.*nn\.Module", text, re.M), "models live in the package"
    assert max(len(cell.source.splitlines()) for cell in code) <= 25, "a cell is too long"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--cohort", "absent"], "DATA_ACCESS.md"), (["--profile", "absent"], "smoke")],
)
def test_runner_names_a_missing_cohort_or_profile(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "notebooks" / "run.py"), run_name="__main__")
    assert message in capsys.readouterr().err
