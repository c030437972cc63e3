"""The notebooks themselves: all of them in their smoke size, and as they are committed."""

import ast
import contextlib
import io
import itertools
import os
import re
import runpy
import shutil
import sys
from pathlib import Path
from unittest import mock

import matplotlib
import nbformat
import pytest
from matplotlib import pyplot

from brainsex import synthetic
from brainsex.synthetic import writing

matplotlib.use("Agg")
ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
FIGURES = {  # in the order of READS
    "02": "fa_volumes.png brain_volume.png", "00": "", "03": "cnn2d_curves.png slab_positions.png",
    "01": "tabular_accuracy.png xgb_importance_20.png log_reg_importance_20.png",
    "04": "CNN_arch.png training_curves.png fold_accuracies.png",
    "05": "feature_effects.png feature_maps.png",
    "06": "both.png regions.png mask.html mask.png person.png person.gif",
    "08": "overlap.png volumes_controlled.png table_controlled.png",
    "07": """explore.html explanations_subject.png explanations_groups.png explanations_curves.png
        explanations_regions.png ranking.png""", "09": "dose.png",
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


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A small cohort, whose tables have 300 people; a folder; the notebooks that have run there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "ROWS", 300)
        patch.setattr(writing, "MEN", 137)
        cohort = tmp_path_factory.mktemp("smoke") / "synthetic-small"
        synthetic.write_cohort(cohort, subjects=16, spacing=5)
        measures = cohort / "unrestricted_hcp_freesurfer.csv"
        rows = [line.split(",")[:100] for line in measures.read_text().splitlines()]  # of 938
        measures.write_text("".join(",".join(row) + "\n" for row in rows))
        yield cohort, tmp_path_factory.mktemp("smoke-out"), set()


@pytest.mark.parametrize("number", FIGURES)
def test_smoke_profile_runs_a_notebook_and_writes_its_figures(number, smoke, monkeypatch):
    """Earlier notebooks run first, where they have not run in this process."""
    cohort, out, executed = smoke
    main = runpy.run_path(str(ROOT / "notebooks" / "run.py"))["main"]
    assert list(main.__globals__["READS"]) == list(FIGURES)
    assert sorted(FIGURES) == [path.name[:2] for path in NOTEBOOKS]

    def execute(source, target, parameters):
        shutil.copy(source, target)
        if source.name[:2] in numbers:
            execute_here(source, target, parameters)
            executed.add(source.name[:2])

    earlier = {*itertools.takewhile(lambda name: name != number, FIGURES)}
    numbers = earlier - executed | {number}
    monkeypatch.setitem(main.__globals__, "execute", execute)
    command = ["run.py", "--profile", "smoke", "--cohort", str(cohort), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    images = {path: path.stat().st_mtime_ns for path in (ROOT / "image").glob("*")}
    with mock.patch.dict(os.environ), pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    written = {file.name for file in (out / "image").glob("*")}
    assert written == {name for done in executed for name in FIGURES[done].split()}
    text = texts(nbformat.read(next(out.glob(f"{number}_*")), as_version=4))
    assert number == "00" or "synthetic-small" in text  # the tour has people of its own
    masks = 4 * ("06" in executed)  # one a fold and sex
    assert len(list(out.glob("masks/mask/*.nii.gz"))) == masks
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
