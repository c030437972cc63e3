"""Run the notebooks in order, with papermill: what `make figures` and `make notebooks` call.

Only the default profile on data/synthetic writes image/ (and keeps the rest in build/); every
other run writes results/<cohort>-<profile>/.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import nbformat
import papermill
import yaml

from brainsex import KEEP_MEMORY, replacing, runs

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


def execute(source: Path, target: Path, parameters: dict) -> None:
    """Run one notebook as it would run in its own folder; the copy holds its outputs.

    Its kernel is killed at the end: asked to finish first, it keeps Ctrl-C waiting for seconds.
    """
    print(f"\n{source.name}", flush=True)
    start = time.monotonic()
    papermill.execute_notebook(
        source,
        target,
        parameters,
        cwd=HERE,
        kernel_name="python3",
        log_output=False,
        shutdown_kernel="immediate",
    )
    print(f"{source.name}: {time.monotonic() - start:.0f} s", flush=True)


def tidy(path: Path) -> None:
    """Drop what differs from run to run or names this machine, so that git sees the science."""
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.pop("papermill", None)
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":  # progress bars were for the one who watched
            cell.outputs = [
                output
                for output in cell.outputs
                if output.get("name") != "stderr"
                and "application/vnd.jupyter.widget-view+json" not in output.get("data", {})
            ]
    notebook.metadata.pop("widgets", None)
    nbformat.write(notebook, path)


def from_here(path: Path) -> str:
    """A path as the notebooks' folder sees it; absolute where it lies on another drive."""
    try:
        return Path(os.path.relpath(path, HERE)).as_posix()
    except ValueError:
        return Path(os.path.abspath(path)).as_posix()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cohort", type=Path, default=ROOT / "data" / "synthetic")
    parser.add_argument("--profile", default="default", help="a file of notebooks/profiles")
    parser.add_argument("--out", type=Path, help="folder for everything the run leaves")
    parser.add_argument("--in-place", action="store_true", help="execute the notebooks themselves")
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
    own = cohort == ROOT / "data" / "synthetic" and arguments.profile == "default"
    out = arguments.out or (
        ROOT / "build" if own else ROOT / "results" / f"{cohort.name}-{arguments.profile}"
    )
    image = ROOT / "image" if own and not arguments.out else out / "image"
    out.mkdir(parents=True, exist_ok=True)
    folders = {"COHORT": cohort, "OUT": out, "IMAGE": image}
    folders = {name: from_here(path) for name, path in folders.items()}

    os.environ.update(KEEP_MEMORY | os.environ)
    try:
        with runs.alone(out):
            runs.record(out, "notebooks", profile=arguments.profile, settings=settings, **folders)
            run(out, folders, settings, arguments.in_place)
    except BlockingIOError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print(f"stopped: the same command goes on from what is in {out}", file=sys.stderr)
        sys.exit(130)
    print(f"figures in {image.name}/", flush=True)


def run(out: Path, folders: dict, settings: dict, in_place: bool) -> None:
    """All notebooks, in order."""
    start = time.monotonic()
    for source in sorted(HERE.glob("[0-9][0-9]_*.ipynb")):
        if in_place:  # with its own parameters, which are the default profile
            with replacing(source) as partial:
                execute(source, partial, {})
                tidy(partial)
        else:
            execute(source, out / source.name, folders | settings.get(source.stem, {}))
    print(f"\nall notebooks: {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
