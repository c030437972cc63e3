"""Run the notebooks, two at a time, with papermill: what `make figures` and `make notebooks` call.

A notebook starts when those whose results it reads have ended (`READS`). Only the default profile
on data/synthetic writes image/ (and keeps the rest in build/), and is compared with the tables in
notebooks/tables; every other run writes results/<cohort>-<profile>/. A notebook that fails does not
stop the others; at the end stands a list of what was done, what was left out and why. The exit code
is 1 if one failed. A profile's WORKERS bounds joblib's workers and the notebooks at a time.
"""

import argparse
import contextlib
import os
import re
import shutil
import sys
import time
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path

import joblib
import nbformat
import numpy as np
import pandas as pd
import papermill
import psutil
import yaml
from nbclient.exceptions import DeadKernelError

from brainsex import storage

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TABLE_NOTEBOOKS = ("01_tabular_baselines", "08_confounds_and_families")
# The notebooks in the order in which they begin, and those whose results each reads.
READS = {"02": "", "00": "", "03": "02", "01": "", "04": "03", "05": "04", "06": "04"}
READS |= {"08": "04", "07": "06", "09": "05"}
OF_THE_USER = ("MPLBACKEND", "MATPLOTLIBRC", "JUPYTER_PATH", "PYTHONPATH")  # not for kernels
TABLES = "tabular accuracy localisation explanations table_controlled volumes_controlled".split()
INTERVALS = {"accuracy": ("low", "high"), "value": ("low", "high"), "auc": ("auc_low", "auc_high")}
ESTIMATE = re.compile(r"(-?\d[\d.e-]*)(?: \[(-?[\d.]+), (-?[\d.]+)\])?")  # and its interval
MOVED = 0.005  # differences below are not worth a word
LEFT_OUT = "left out: "  # how a line of output begins that says what a notebook skips, and why


def execute(source: Path, target: Path, parameters: dict) -> None:
    """Run one notebook, by absolute paths; the copy at `target` holds its outputs.

    Its kernel is killed at the end: asked to finish first, it keeps Ctrl-C waiting for seconds.
    """
    papermill.execute_notebook(
        source,
        target,
        parameters,
        kernel_name="python3",
        log_output=False,
        shutdown_kernel="immediate",
    )


def left_out(path: Path) -> list[str]:
    """Return the lines of an executed notebook that say what it left out."""
    cells = nbformat.read(path, as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    lines = "".join(output.get("text", "") + "\n" for output in outputs).splitlines()
    return [line for line in lines if line.startswith(LEFT_OUT)]


def tidy(path: Path) -> None:
    """Drop what differs from run to run or names the machine, so that git sees the science."""
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.pop("papermill", None)
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":  # progress bars served whoever watched
            cell.outputs = [
                output
                for output in cell.outputs
                if output.get("name") != "stderr"
                and "application/vnd.jupyter.widget-view+json" not in output.get("data", {})
            ]
    notebook.metadata.pop("widgets", None)
    nbformat.write(notebook, path)


def read_estimates(table: Path) -> pd.DataFrame:
    """Read a table's numbers, with low and high where it gives an interval, by row and column."""
    cells = pd.read_csv(table, dtype=str).fillna("")
    words = cells.map(lambda cell: "" if ESTIMATE.fullmatch(cell) else cell)
    rows = {}
    for (_, row), label in zip(cells.iterrows(), words.agg(" ".join, axis=1)):
        label = f"{label} {row.get('d', '')}"
        for column in cells.columns.drop(
            ["n", "d", "low", "high", "auc_low", "auc_high"], "ignore"
        ):
            if hit := ESTIMATE.fullmatch(row[column]):
                low, high = (row.get(name) for name in INTERVALS.get(column, ("", "")))
                limits = (hit[2] or low or np.nan, hit[3] or high or np.nan)
                rows[f"{' '.join(label.split())}, {column}"] = (hit[1], *limits)
    return pd.DataFrame(rows, index=["value", "low", "high"], dtype=float).T


def compare_tables(out: Path) -> list[str]:
    """Say, a line a table, how far this run's numbers are from the committed ones."""
    lines = ["\nbeside the committed tables (another processor moves numbers, mostly by little):"]
    for name in TABLES:
        known, ours = (read_estimates(folder / f"{name}.csv") for folder in (HERE / "tables", out))
        values = ours["value"].reindex(known.index)
        change, outside = (
            (values - known["value"]).abs(),
            (values < known["low"]) | (values > known["high"]),
        )
        moved = change > MOVED
        line = f"  {name}: {moved.sum()} of {len(known)} numbers moved"
        if moved.any():
            line += f", at most by {change.max():.2f} ({change.idxmax()})"
            line += f"; {(moved & outside).sum()} left the committed interval"
        missing = values.isna().sum()
        lines.append(line + (f"; {missing} are missing" if missing else ""))
    return lines


def relative_to_notebooks(path: Path) -> str:
    """Return a path relative to the notebooks' folder; absolute where it is on another drive."""
    try:
        return Path(os.path.relpath(path, HERE)).as_posix()
    except ValueError:
        return Path(os.path.abspath(path)).as_posix()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cohort", type=Path, default=ROOT / "data" / "synthetic")
    parser.add_argument(
        "--table", type=Path, help="morphometry table, if not in the cohort's folder"
    )
    parser.add_argument("--profile", default="default", help="a file of notebooks/profiles")
    parser.add_argument("--out", type=Path, help="folder for everything the run leaves")
    parser.add_argument("--in-place", action="store_true", help="execute the notebooks themselves")
    parser.add_argument(
        "--overwrite", action="store_true", help="start anew: delete an earlier run"
    )
    arguments = parser.parse_args()

    if arguments.in_place and len(sys.argv) > 2:
        parser.error("--in-place runs the notebooks as they are: no other option goes with it")
    profile = HERE / "profiles" / f"{arguments.profile}.yaml"
    if not profile.is_file():
        parser.error(f"no such profile: {sorted(p.stem for p in profile.parent.glob('*.yaml'))}")
    settings = yaml.safe_load(profile.read_text(encoding="utf-8")) or {}
    cohort = Path(os.path.abspath(arguments.cohort))  # a link keeps its own name
    if not cohort.is_dir():
        parser.error(f"{arguments.cohort}: no such cohort. DATA_ACCESS.md says how to get the data")
    if arguments.table and not arguments.table.is_file():
        parser.error(f"{arguments.table}: no such table")
    is_default = cohort == ROOT / "data" / "synthetic" and arguments.profile == "default"
    results = ROOT / "results" / f"{cohort.name}-{arguments.profile}"
    out = Path(os.path.abspath(arguments.out or (ROOT / "build" if is_default else results)))
    image = ROOT / "image" if is_default and not arguments.out else out / "image"
    if arguments.overwrite and (out / storage.RUN_RECORD).is_file():
        shutil.rmtree(out)
    folders = {"COHORT": cohort, "OUT": out, "IMAGE": image}
    folders = {name: relative_to_notebooks(path) for name, path in folders.items()}
    table = {"TABLE": relative_to_notebooks(arguments.table)} if arguments.table else {}
    settings |= {name: settings.get(name, {}) | table for name in TABLE_NOTEBOOKS}

    for name in OF_THE_USER:
        os.environ.pop(name, None)
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
    if workers := settings.pop("WORKERS", None):
        os.environ["LOKY_MAX_CPU_COUNT"] = str(workers)
    at_once = min(2, joblib.cpu_count())
    if joblib.cpu_count() <= 3:  # where there are more, each of joblib's workers would get as many
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    record = {"profile": arguments.profile, "settings": settings, **folders}
    try:
        with storage.folder_lock(out):
            storage.start_run(out, "notebooks", record, overwrite=True)
            failures = run(out, folders, settings, arguments.in_place, at_once)
            if arguments.in_place:
                for name in TABLES:
                    shutil.copy(out / f"{name}.csv", HERE / "tables")
            elif is_default and not failures:
                print(*compare_tables(out), sep="\n")
    except OSError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        for process in psutil.Process().children(recursive=True):  # kernels, and their workers
            with contextlib.suppress(psutil.Error):
                process.kill()
        note = f"stopped: the same command goes on from what is in {out}"
        print(note, file=sys.stderr, flush=True)
        os._exit(130)  # threads would wait for their notebooks
    print(f"figures in {image.name}/", flush=True)
    sys.exit(int(failures > 0))


def run(out: Path, folders: dict, settings: dict, in_place: bool, at_once: int) -> int:
    """Run all notebooks, list what was done and what was not; return how many failed."""
    start, futures, pool = time.monotonic(), {}, ThreadPoolExecutor(at_once)
    sources, places = sorted(HERE.glob("[0-9][0-9]_*.ipynb")), dict(zip(READS, range(len(READS))))
    with contextlib.ExitStack() as at_end:
        at_end.enter_context(contextlib.chdir(HERE))  # once for all: it holds for every thread
        at_end.callback(pool.shutdown, wait=False, cancel_futures=True)  # after an error
        for source in sorted(sources, key=lambda path: places.get(path.name[:2], len(places))):
            read = READS.get(source.name[:2], "").split()
            prerequisites = [futures[path] for path in futures if path.name[:2] in read]
            parameters = None if in_place else folders | settings.get(source.stem, {})
            futures[source] = pool.submit(run_one, source, out, parameters, prerequisites)
        pending = set(futures.values())
        while pending:
            ended, pending = wait(pending, 1, FIRST_EXCEPTION)  # Ctrl-C is heard between two waits
            for future in ended:
                future.result()  # raises at once what ended a notebook in place
        failed, reports = zip(*(futures[source].result() for source in sources))
    lines = [line for report in reports for line in report]
    print(f"\nall notebooks: {time.monotonic() - start:.0f} s", *lines, sep="\n", flush=True)
    return sum(failed)


def run_one(
    source: Path, out: Path, parameters: dict | None, prerequisites: list[Future]
) -> tuple[bool, list[str]]:
    """Run a notebook after others; return whether it failed, and lines that say what it did.

    Without parameters it has its own, which are the default profile, and is executed in place.
    """
    for future in prerequisites:
        future.result()  # raises what ended it: nothing is built on half of the results
    print(f"{source.name} begins", flush=True)
    begin, target, problems = time.monotonic(), out / source.name, []
    try:
        if parameters is None:
            target = source
            with storage.atomic_path(source) as partial:
                execute(source, partial, {})
                tidy(partial)
        else:
            execute(source, target, parameters)
    except (papermill.PapermillExecutionError, DeadKernelError) as error:
        if parameters is None:
            raise
        print(error, file=sys.stderr, flush=True)
        problems = [str(error).strip().splitlines()[-1]]
    outcome = f"{'failed' if problems else 'done'} in {time.monotonic() - begin:.0f} s"
    print(f"{source.name}: {outcome}", flush=True)
    lines = [f"  {line}" for line in problems + left_out(target)]
    return bool(problems), [f"{source.stem}: {outcome}", *lines]


if __name__ == "__main__":
    main()
