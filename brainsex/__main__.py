"""The commands for what runs for hours: ``python -m brainsex COMMAND -h``."""

import argparse
import os
import sys
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

import pandas as pd

from brainsex import (
    KEEP_MEMORY,
    archives,
    checks,
    cohort,
    networks,
    prediction,
    ranks,
    runs,
    sources,
    synthetic,
    tables,
    training,
    volumes,
    write,
)
from brainsex import masks as held_out

CHOICE = ("kind", "session", "match")
"""Options of `convert` that `sources.choose` takes."""

FINISHED = {
    "extract": "[!.]*.nii*",
    "fa": "*.nii.gz",
    "convert": ".convert-*/*.npz",
    "train": "fold-*.json",
    "masks": "persistence/*.nii.gz",
    "synthesize": "archives/*.zip",
}
"""Where a command's finished subjects or folds lie in the folder that it writes."""


def synthesize(arguments) -> None:
    synthetic.write_cohort(**vars(arguments))


def extract(arguments) -> None:
    archives.extract(**vars(arguments))


def fa(arguments) -> None:
    from brainsex import diffusion  # the one command that needs DIPY

    diffusion.fit(**vars(arguments))


def survey(arguments) -> pd.DataFrame:
    found = sources.find(arguments.cohort)
    try:
        table = arguments.table or tables.find(arguments.cohort)
    except FileNotFoundError as error:
        print(f"no table of people: {error}")
        table = None
    people = None if table is None else tables.read(table)
    print(sources.summary(found, people).to_string())
    return found


def convert(arguments) -> None:
    folder, out = arguments.cohort, arguments.out or arguments.cohort
    table = arguments.table or tables.find(folder)
    found, choice = arguments.fa, {name: getattr(arguments, name) for name in CHOICE}
    if found is None:
        found = sources.choose(survey(arguments), out / "all_FA", **choice)
    elif any(choice.values()):
        raise ValueError(
            "--kind, --session and --match choose from COHORT; --fa names another folder."
        )
    options = {name: getattr(arguments, name) for name in ("regrid", "normalised", "leave_out_qc")}
    volumes.convert(found, table, out, **options)
    if (folder / "SYNTHETIC").is_file():
        (out / "SYNTHETIC").touch()


def check(arguments) -> None:
    data, out = cohort.load(arguments.cohort), arguments.out
    with runs.alone(out):
        digest = cohort.fingerprint(data.subjects, data.sex, data.volumes)
        found = checks.table(data)
        checks.montage(data, found, out / "montage.html")
        write(out / "checks.csv", found.to_csv(index=False))
        runs.record(out, "check", cohort=digest)
    flagged = found.loc[found["flags"] != "", ["Subject", "flags"]]
    print(f"{len(flagged)} of {len(found)} flagged; all are in {out / 'montage.html'}")
    for subject, flags in flagged.itertuples(index=False):
        print(f"{subject}: {flags}")


def train(arguments) -> None:
    settings = vars(arguments)
    data, channels = cohort.load(settings.pop("cohort")), settings.pop("channels")

    def make_network() -> networks.MriNet3d:
        return networks.MriNet3d(channels, data.volumes.shape[1:])

    table = training.cross_validate(data, make_network, **settings)
    correct = (table["probability"] > 0.5) == table["sex"]
    print(correct.groupby(table["fold"]).mean().to_string())
    print(f"accuracy {correct.mean():.4f} over {len(table)} subjects")


def predict(arguments) -> None:
    found, rejected = prediction.predict(
        arguments.network, arguments.volumes, orientation=arguments.orientation
    )
    found.to_csv(sys.stdout, index=False)
    for subject, reason in rejected.itertuples(index=False):
        print(f"{subject}: left out: {reason}", file=sys.stderr)
    if found.empty:
        raise ValueError(f"not one of {len(rejected)} volumes could be used.")


def masks(arguments) -> None:
    data = cohort.load(arguments.cohort)
    table = held_out.explain(data, arguments.networks, arguments.out, seed=arguments.seed)
    print(table[["before", "after", "volume"]].describe().loc[["mean", "min", "max"]].to_string())


SHARED = (train, masks)
"""Commands whose work the processes of torchrun share."""


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m brainsex", description=__doc__)
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(function, about: str, example: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            function.__name__,
            help=about,
            description=about,
            epilog=f"Example: {top.prog} {function.__name__} {example}",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        sub.set_defaults(function=function)
        return sub

    sub = command(
        synthesize, "write a synthetic cohort, as HCP's would lie on disk", "data/synthetic"
    )
    sub.add_argument("folder", type=Path)
    sub.add_argument("--subjects", type=int, default=200)
    sub.add_argument("--spacing", type=float, default=2.5, help="mm; 1.25 is HCP's grid")
    sub.add_argument(
        "--head-size",
        type=float,
        default=synthetic.HEAD_SIZE,
        help="men's mean head volume over women's, minus one",
    )
    sub.add_argument(
        "--effect", type=float, default=1.0, help="multiplies the planted local differences"
    )
    sub.add_argument("--template", type=Path, help="a real FA map to start from")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--workers", type=int)

    about = "take each subject's FA map out of its archives"
    sub = command(extract, about, "data/hcp data/hcp/fa")
    sub.add_argument("source", type=Path)
    sub.add_argument("target", type=Path)
    sub.add_argument("--member", nargs="+", default=archives.FA_MEMBERS, help="patterns of names")
    sub.add_argument("--workers", type=int)
    sub.add_argument("--overwrite", action="store_true")

    about = "fit each subject's FA map to its diffusion series, by DIPY"
    sub = command(fa, about, "data/hcp data/hcp/fa --workers 4")
    sub.add_argument(
        "source", type=Path, help="folder of packages or <ID>/T1w/Diffusion, at any depth"
    )
    sub.add_argument("target", type=Path)
    sub.add_argument("--bmax", type=float, default=1500, help="largest shell, s/mm²")
    sub.add_argument("--b0", type=float, default=50, help="no diffusion weighting up to it, s/mm²")
    sub.add_argument("--workers", type=int, help="subjects at once; 1.1 GB each")
    sub.add_argument("--overwrite", action="store_true")

    about = "how many subjects of what kind a folder holds, and what is missing"
    sub = command(survey, about, "data/hcp")
    sub.add_argument("cohort", type=Path, help="a layout that DATA_ACCESS.md lists")
    sub.add_argument("--table", type=Path, help="of people; the one in COHORT by default")

    about = "turn a folder's volumes and its table of people into tensors.npy"
    sub = command(convert, about, "data/hcp --normalised --out data/hcp-one-size")
    sub.add_argument("cohort", type=Path, help="a layout that DATA_ACCESS.md lists")
    sub.add_argument("--out", type=Path, help="where tensors.npy goes; COHORT by default")
    sub.add_argument("--fa", type=Path, help="folder of <ID>.nii.gz, instead of what is in COHORT")
    sub.add_argument("--table", type=Path, help="of people; the one in COHORT by default")
    sub.add_argument("--kind", choices=sources.VOLUMES, help="of volumes, where there are several")
    sub.add_argument("--session", help="BIDS's, where subjects came twice")
    sub.add_argument("--match", metavar="GLOB", help="of file names, where there are several")
    sub.add_argument("--regrid", action="store_true", help="resample volumes on other grids")
    sub.add_argument("--normalised", action="store_true", help="bring all brains to one size")
    sub.add_argument("--leave-out-qc", action="store_true", help="subjects with a QC_Issue")

    about = "outliers and a page of all subjects: checks.csv, montage.html in OUT"
    sub = command(check, about, "data/hcp results/hcp/check")
    sub.add_argument("cohort", type=Path, help="as convert wrote it")
    sub.add_argument("out", type=Path)

    about = "cross-validate the 3D CNN; fold-K.pt and folds.csv go to OUT"
    sub = command(train, about, "data/hcp results/hcp/cnn3d --epochs 20 --workers 2")
    sub.add_argument("cohort", type=Path)
    sub.add_argument("out", type=Path)
    sub.add_argument("--channels", type=int, default=32)
    sub.add_argument("--folds", type=int, default=10)
    sub.add_argument("--epochs", type=int, default=20)
    sub.add_argument("--batch-size", type=int, default=45)
    sub.add_argument("--lr", type=float, default=3e-4)
    sub.add_argument("--milestones", type=int, nargs="*", default=(5, 15))
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--workers", type=int, help="folds at once; 3 GB each at these sizes")

    about = "the probability of man for new volumes, as CSV"
    sub = command(predict, about, "results/hcp/cnn3d/fold-0.pt some_FA.nii.gz")
    sub.add_argument("network", type=Path, help="fold-K.pt, or a published state dict")
    sub.add_argument(
        "--orientation",
        default="RAS",
        help="of the arrays the network was trained on; LAS for HCP's files read without affine",
    )
    sub.add_argument("volumes", type=Path, nargs="+", help="<ID>.nii.gz")

    about = "perturbation masks of held-out subjects, as NIfTI"
    sub = command(masks, about, "data/hcp results/hcp/cnn3d results/hcp/masks")
    sub.add_argument("cohort", type=Path)
    sub.add_argument("networks", type=Path, help="folder that train wrote")
    sub.add_argument("out", type=Path)
    sub.add_argument("--seed", type=int, default=0)
    return top


def main(arguments: list[str] | None = None) -> None:
    parsed = parser().parse_args(arguments)
    os.environ.update(KEEP_MEMORY | os.environ)
    function, given = parsed.function, dict(vars(parsed))
    del parsed.function
    try:
        if ranks.launched() and function not in SHARED:
            raise ValueError(
                f"{function.__name__} is work for one process: torchrun shares train and masks."
            )
        with ranks.joined() if ranks.launched() else nullcontext():
            with redirect_stdout(sys.stdout if ranks.first() else None):
                function(parsed)
    except KeyboardInterrupt:
        names = (given.get(name) for name in ("target", "out", "folder", "cohort"))
        print(stopped(function.__name__, next(filter(None, names), None)), file=sys.stderr)
        sys.exit(130)  # as of any program that Ctrl-C ends
    except (ValueError, OSError, FloatingPointError, ImportError, BrokenProcessPool) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


def stopped(command: str, folder: Path | None) -> str:
    """What an interrupted command left finished, and how to go on."""
    if command not in FINISHED:
        return "stopped: nothing is left half-written. Run the same command again."
    count, what = (
        len(list(folder.glob(FINISHED[command]))),
        "folds" if command == "train" else "subjects",
    )
    return f"stopped: {folder} holds {count} finished {what}. The same command goes on from there."


if __name__ == "__main__":
    main()
