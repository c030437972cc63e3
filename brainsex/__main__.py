"""The commands for what runs for hours: ``python -m brainsex COMMAND -h``."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from functools import partial
from glob import glob
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from brainsex import (
    SHAPE,
    archives,
    diffusion,
    explain,
    layouts,
    networks,
    participants,
    storage,
    synthetic,
    training,
    volumes,
)
from brainsex.cohort import check_grid, load_cohort


def _read_layout(
    cohort: Path, table: Path | None, optional: bool, id: str | None, **names: str | None
) -> tuple[pd.DataFrame, pd.DataFrame | None]:
    """Say what a folder holds; return its volumes, and its people: None if `optional` and none."""
    people, columns = None, {name: names[name] for name in ("subject", "sex")}
    paths = layouts.find_files(cohort, *layouts.VOLUME_ENDINGS, ".zip")
    known = layouts.split_paths(path.relative_to(cohort).as_posix() for path in paths)
    try:
        parts = [table] if table else participants.find_people(cohort, **columns, known=known)
        people = participants.read_people(parts, **names, known=known, folder=cohort)
        families = people["group"].notna().sum() if "group" in people else 0
        print(*parts, f"{len(people)} people, {families} with a known family", sep=", ")
    except FileNotFoundError as error:
        if table is not None or not optional:
            raise
        print(f"no table of people: {error}")
    files = layouts.find_volumes(cohort, pattern=id, known=() if people is None else people.index)
    print(layouts.summarise_layout(files, people).to_string())
    if len(ignored := files.loc[files["modality"] == "", "path"]):
        print(f"ignored: {len(ignored)} volumes, as {ignored.iloc[0]} (--match would take them)")
    return files, people


def _survey(cohort: Path, table: Path | None, **names: str | None) -> None:
    """Say what a folder holds, what is missing, what to run next, and what it will take."""
    files, _ = _read_layout(cohort, table, True, **names)
    print(f"morphometry: {participants.find_morphometry(cohort) or 'none'}")
    print("next, and what it takes here without a GPU, roughly:")
    settings = ({"table": table} | names).items()
    options = "".join(f" --{name} {shlex.quote(str(value))}" for name, value in settings if value)
    print(*layouts.next_commands(files, joblib.cpu_count(), options), sep="\n")


def _convert(cohort: Path, out: Path | None, table: Path | None, **settings: object) -> None:
    """Turn a folder's volumes and its table of people into tensors.npy."""
    choice = {name: settings.pop(name) for name in ("kind", "session", "match")}
    names = {name: settings.pop(name) for name in ("subject", "sex", "id")}
    files, people = _read_layout(cohort, table, False, session=choice["session"], **names)
    if settings["mask"]:  # masks are no volumes
        masks = glob(settings["mask"], root_dir=cohort, recursive=True)
        files = files[~files["path"].isin([cohort / mask for mask in masks])]
    source, out = layouts.choose_volumes(files, **choice), out or cohort
    print(f"taken: {', '.join(source['kind'].value_counts().index[:3])}")
    if settings["mask"]:
        subjects = source["Subject"], source["session"]
        source["mask"] = layouts.match_masks(cohort, settings["mask"], *subjects)
    volumes.convert(source, people, out, **settings)
    if (cohort / "SYNTHETIC").is_file():
        storage.write_text(out / "SYNTHETIC", (cohort / "SYNTHETIC").read_text())


def _train(cohort: Path, channels: int, **settings: object) -> None:
    """Cross-validate the 3D CNN; fold-K.pt and folds.csv go to OUT."""
    data = load_cohort(cohort)
    make_network = partial(networks.MriNet3d, channels, data.volumes.shape[1:])
    table = training.cross_validate(data, make_network, **settings)
    print("accuracy", ((table["probability"] > 0.5) == table["sex"]).mean(), "of", len(table))


def _masks(cohort: Path, networks: Path, out: Path, **settings: object) -> None:
    """Learn perturbation masks of held-out subjects, saved as NIfTI."""
    table = explain.explain(load_cohort(cohort), networks, out, **settings)
    print(table[["before", "after", "volume"]].describe().loc[["mean", "min", "max"]].to_string())


def _predict(network: Path, volumes: Sequence[Path], **options: str | None) -> None:
    """Print the probability of man for new volumes, as CSV."""
    table = predict_files(network, volumes, **options)
    table.to_csv(sys.stdout, index=False)
    if table["probability_of_man"].isna().all():
        raise ValueError(f"not one of {len(table)} volumes could be used; see their reasons")


def predict_files(
    checkpoint: str | Path, paths: Sequence[Path], mask: str | None = None, id: str | None = None
) -> pd.DataFrame:
    """Predict the sex of volumes at native resolution, prepared as the training cohort was.

    ``run.json`` beside the checkpoint (``fold-K.pt``) says how that was; without it they are FA of
    any field of view. Folders and unexpanded wildcards among the paths stand for what they hold;
    `mask` is a glob pattern of masks, and `id` one of `layouts.name_subjects`.

    Returns a row a volume: path, Subject, and probability_of_man, or the reason why it has none.
    Raises ValueError for a network that was trained on volumes less their confounds.
    """
    record = Path(checkpoint).with_name(storage.RUN_RECORD)
    trained = storage.read_json(record).get("train", {}) if record.is_file() else {}
    if trained.get("confounds"):
        problem = "expected a network on volumes as they are, found confounds regressed out"
        raise ValueError(f"{record}: {problem}; train one without")
    grid = check_grid(trained.get("grid", {"shape": SHAPE}), record)
    network, rows, files = networks.load(checkpoint, grid["shape"]), [], []
    for path in paths:
        if path.is_dir():
            present = layouts.find_volumes(path, pattern=id)
            files += list(layouts.choose_volumes(present, kind=grid["modality"])["path"])
        else:
            files += sorted(map(Path, glob(str(path), recursive=True))) or [path]
    subjects = layouts.name_subjects(files, pattern=id)
    masks = layouts.match_masks(".", mask, subjects) if mask else [None] * len(files)
    for path, subject, mask_paths in zip(tqdm(files, "predict", unit="volume"), subjects, masks):
        row = {"path": path, "Subject": subject, "probability_of_man": np.nan}
        try:
            small, *_ = volumes.prepare_like(path, grid | grid["preparation"], mask_paths)
            row["probability_of_man"] = training.predict(network, small[None])[0, 1]
        except (ValueError, OSError) as error:
            row["reason"] = str(error)
        rows.append(row)
    return pd.DataFrame(rows, columns=["path", "Subject", "probability_of_man", "reason"])


OPTIONS = {  # the default of --effect is the function's own: 1 for synthesize, 1.5 for plant
    "folder": {"type": Path},
    "source": {"type": Path, "help": "a folder, searched at any depth"},
    "target": {"type": Path, "help": "gets <ID>.nii.gz, and rejected.csv"},
    "cohort": {"type": Path, "help": "a layout of DATA_ACCESS.md; once converted, its cohort"},
    "network": {"type": Path, "help": "fold-K.pt, or a published state dict"},
    "networks": {"type": Path, "help": "folder that train wrote"},
    "volumes": {"type": Path, "nargs": "+", "help": "files, folders or wildcards"},
    "out": {"type": Path},
    "--out": {"type": Path, "help": "where tensors.npy goes; COHORT by default"},
    "--subjects": {"type": int, "default": 200, "help": "how many have a volume"},
    "--spacing": {"type": float, "default": 2.5, "help": "mm; 1.25 is HCP's grid"},
    "--head-size": {"type": float, "default": 0.12, "help": "men's over women's, minus one"},
    "--effect": {"type": float, "default": argparse.SUPPRESS, "help": "a factor; plant: Cohen's d"},
    "--diffusion": {"type": int, "default": 0, "help": "how many have a diffusion series"},
    "--seed": {"type": int, "default": 0, "help": "of all random draws"},
    "--workers": {"type": int, "help": "at once; as many as cores by default (docs/scaling.md)"},
    "--overwrite": {"action": "store_true", "help": "start anew, also with other settings"},
    "--member": {"nargs": "+", "default": archives.FA_MEMBERS, "help": "patterns of names"},
    "--bmax": {"type": float, "default": 1500, "help": "largest shell, s/mm²"},
    "--table": {"type": Path, "help": "of people, CSV or Excel; by default the one in COHORT"},
    "--subject": {"help": "column of IDs, where its name does not tell"},
    "--sex": {"help": "column of sex, likewise; with codes: 'Sex (0=male, 1=female)'"},
    "--id": {"metavar": "REGEX", "help": "that finds a subject's ID in a path"},
    "--kind": {"choices": tuple(layouts.NAMES), "help": "of volumes, where there are both"},
    "--session": {"help": "of volumes and rows, where subjects came twice; or first, last"},
    "--match": {"metavar": "GLOB", "help": "of names or paths, where there are several"},
    "--regrid": {"action": "store_true", "help": "resample volumes on other grids"},
    "--mask": {"metavar": "GLOB", "help": "of brain masks or labels below COHORT, IDs in the path"},
    "--align": {"choices": ("rigid", "affine"), "help": "register to MNI152 (DIPY)"},
    "--channels": {"type": int, "default": 32, "help": "of the first hidden layer"},
    "--folds": {"type": int, "default": 10, "help": "of the cross-validation"},
    "--epochs": {"type": int, "default": 14, "help": "a fold"},
    "--batch-size": {"type": int, "default": 10, "help": "subjects"},
    "--lr": {"type": float, "default": 2e-3, "help": "Adam's learning rate"},
    "--milestones": {"type": int, "nargs": "*", "default": (10,), "help": "a tenth of it after"},
    "--weight-decay": {"type": float, "default": 0.01, "help": "of Adam, decoupled"},
    "--no-neutral": {"action": "store_false", "dest": "neutral", "help": "a blur may tell sex"},
}
COMMANDS = {  # name: the function, and its arguments
    "synthesize": (
        synthetic.write_cohort,
        "folder --subjects --spacing --head-size --effect --diffusion --seed --workers --overwrite",
    ),
    "plant": (synthetic.plant, "cohort out --effect --seed --overwrite"),
    "extract": (archives.extract, "source target --member --workers --overwrite"),
    "fa": (diffusion.fit_folder, "source target --bmax --workers --overwrite"),
    "survey": (_survey, "cohort --table --subject --sex --id --session"),
    "convert": (
        _convert,
        "cohort --out --table --subject --sex --id --kind --session --match --mask --align "
        "--regrid --workers --overwrite",
    ),
    "train": (
        _train,
        "cohort out --channels --folds --epochs --batch-size --lr --milestones "
        "--weight-decay --no-neutral --seed --workers --overwrite",
    ),
    "masks": (_masks, "cohort networks out --seed --overwrite"),
    "predict": (_predict, "network volumes --mask --id"),
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; a command's help is the first line of its docstring."""
    about = f"{__doc__} Start with survey, which says what to run; without data, with synthesize."
    top = argparse.ArgumentParser(prog="python -m brainsex", description=about)
    commands = top.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for command, (function, names) in COMMANDS.items():
        line, look = function.__doc__.partition("\n")[0], argparse.ArgumentDefaultsHelpFormatter
        parser = commands.add_parser(command, help=line, description=line, formatter_class=look)
        for name in names.split():
            parser.add_argument(name, **OPTIONS[name])
    return top


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; whatever stops it ends with one line and an exit code other than 0."""
    options = vars(build_parser().parse_args(arguments))
    command = options.pop("command")
    folders = (options.get(name) for name in ("target", "out", "folder"))
    folder = next(filter(None, folders), options["cohort"] if command == "convert" else None)
    try:
        if command == "convert" and not folder.is_dir() and folder == options["cohort"]:
            raise FileNotFoundError(f"{folder}: no such folder; DATA_ACCESS.md says how to start")
        with storage.folder_lock(folder) if folder else nullcontext():
            table = COMMANDS[command][0](**options)
        if isinstance(table, pd.DataFrame) and (table["status"] == "rejected").all():
            reason = table["reason"].iloc[0]
            raise ValueError(f"nobody could be used (see rejected.csv); the first as: {reason}")
    except KeyboardInterrupt:
        print("stopped: the same command goes on from what is finished", file=sys.stderr)
        sys.exit(130)  # as of any program that Ctrl-C ends
    except (ValueError, OSError, FloatingPointError, ImportError, BrokenProcessPool) as error:
        full = getattr(error, "errno", None) in archives.DISK_FULL
        advice = "; make room and run again: what is finished is kept" if full else ""
        sys.exit(f"error: {' '.join(str(error).split())}{advice}")
    except RuntimeError as error:  # of CUDA: a GPU that is too old, too full, or broken
        if networks.device().type == "cpu":
            raise
        sys.exit(f"error: the GPU failed ({error!s:.200}); BRAINSEX_DEVICE=cpu does without it")


if __name__ == "__main__":
    main()
