"""The commands for what runs for hours: ``python -m brainsex COMMAND -h``.

``torchrun … -m brainsex train`` (or ``masks``) shares whole folds (subjects) among its processes.
This module alone knows of it: each process works on its share, and what is finished lies in files.
"""

import argparse
import errno
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext, redirect_stdout
from datetime import timedelta
from pathlib import Path

import joblib
import pandas as pd
import torch
from torch import distributed

from brainsex import (
    archives,
    checks,
    cohort,
    diffusion,
    explain,
    layouts,
    networks,
    speed,
    storage,
    synthetic,
    tables,
    training,
    volumes,
)

PROCESS_TIMEOUT = timedelta(days=14)
"""How long torchrun's processes wait for the slowest, whose last fold may take hours."""


@contextmanager
def process_group() -> Iterator[bool]:
    """Join torchrun's other processes, with a GPU and a share of the cores; yield if this is first.

    This has to be entered before CUDA is used.
    """
    local_processes = int(os.environ["LOCAL_WORLD_SIZE"])
    if gpus := torch.cuda.device_count():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        local_rank = int(os.environ["LOCAL_RANK"])
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[local_rank % gpus]
    torch.set_num_threads(max(1, joblib.cpu_count() // local_processes))
    try:
        distributed.init_process_group("gloo", timeout=PROCESS_TIMEOUT)
    except RuntimeError as error:
        raise ConnectionError(f"the processes do not find each other ({error})") from error
    try:
        yield distributed.get_rank() == 0
    finally:
        distributed.destroy_process_group()


def share_work(
    work: Callable[[Sequence[int] | None, bool], pd.DataFrame],
    items: Sequence[int],
    overwrite: bool,
) -> pd.DataFrame:
    """Call `work(items, overwrite)` so that torchrun's processes divide the items among them.

    The first process prepares the folder, all of them work on their shares, and the call for all
    items (None) then only reads what is finished.
    """
    if not distributed.is_initialized():
        return work(None, overwrite)
    rank = distributed.get_rank()
    try:
        if rank == 0:
            work([], overwrite)
        distributed.barrier()
        work(items[rank :: distributed.get_world_size()], False)
        distributed.barrier()
    except RuntimeError as error:
        advice = "start again: what is finished is kept"
        raise ConnectionError(f"another process has stopped, and said why; {advice}") from error
    return work(None, False)


def _synthesize(arguments: argparse.Namespace) -> None:
    """Write a synthetic cohort, as HCP's would lie on disk."""
    synthetic.write_cohort(**vars(arguments))


def _extract(arguments: argparse.Namespace) -> None:
    """Take each subject's FA map out of its archives."""
    archives.extract(**vars(arguments))


def _fa(arguments: argparse.Namespace) -> None:
    """Fit each subject's FA map to its diffusion series, by DIPY."""
    diffusion.fit_folder(**vars(arguments))


def _survey(arguments: argparse.Namespace) -> pd.DataFrame:
    """Say how many subjects of what kind a folder holds, and what is missing."""
    files = layouts.find_volumes(arguments.cohort)
    try:
        people = tables.read_people(arguments.table or tables.find_people(arguments.cohort))
    except FileNotFoundError as error:
        print(f"no table of people: {error}")
        people = None
    print(layouts.summarise_layout(files, people).to_string())
    return files


def _convert(arguments: argparse.Namespace) -> None:
    """Turn a folder's volumes and its table of people into tensors.npy."""
    folder, out = arguments.cohort, arguments.out or arguments.cohort
    settings = vars(arguments)
    table = arguments.table or tables.find_people(folder)
    choice = {name: settings[name] for name in ("kind", "session", "match")}
    source = arguments.fa
    if source is None:
        source = layouts.choose_volumes(_survey(arguments), out / "all_FA", **choice)
    elif any(choice.values()):
        raise ValueError(
            "--kind, --session and --match choose from COHORT; --fa names another folder."
        )
    names = ("regrid", "normalised", "leave_out_qc", "overwrite")
    volumes.convert(source, table, out, **{name: settings[name] for name in names})
    if (folder / "SYNTHETIC").is_file():
        (out / "SYNTHETIC").touch()


def _check(arguments: argparse.Namespace) -> None:
    """Look for outliers, and show all subjects: checks.csv, montage.html in OUT."""
    data, out = cohort.load_cohort(arguments.cohort), arguments.out
    storage.start_run(out, "check", {"cohort": cohort.digest(data)}, overwrite=True)
    table = checks.check_table(data)
    checks.write_montage(data, table, out / "montage.html")
    storage.write_text(out / "checks.csv", table.to_csv(index=False))
    flagged = table.loc[table["flags"] != "", ["Subject", "flags"]]
    print(f"{len(flagged)} of {len(table)} flagged; all are in {out / 'montage.html'}")
    for subject, flags in flagged.itertuples(index=False):
        print(f"{subject}: {flags}")


def _train(arguments: argparse.Namespace) -> None:
    """Cross-validate the 3D CNN; fold-K.pt and folds.csv go to OUT."""
    settings = vars(arguments)
    data, channels = cohort.load_cohort(settings.pop("cohort")), settings.pop("channels")
    overwrite = settings.pop("overwrite")
    if distributed.is_initialized() and settings["workers"] is None:
        settings["workers"] = torch.get_num_threads()

    def make_network() -> networks.MriNet3d:
        return networks.MriNet3d(channels, data.volumes.shape[1:])

    def fit_folds(only: Sequence[int] | None, overwrite: bool) -> pd.DataFrame:
        return training.cross_validate(
            data, make_network, only=only, overwrite=overwrite, **settings
        )

    table = share_work(fit_folds, range(settings["folds"]), overwrite)
    correct = (table["probability"] > 0.5) == table["sex"]
    print(correct.groupby(table["fold"]).mean().to_string())
    print(f"accuracy {correct.mean():.4f} over {len(table)} subjects")


def _predict(arguments: argparse.Namespace) -> None:
    """Print the probability of man for new volumes, as CSV."""
    options = {"orientation": arguments.orientation}
    table, rejected = training.predict_files(arguments.network, arguments.volumes, **options)
    table.to_csv(sys.stdout, index=False)
    for subject, reason in rejected.itertuples(index=False):
        print(f"{subject}: left out: {reason}", file=sys.stderr)
    if table.empty:
        raise ValueError(f"not one of {len(rejected)} volumes could be used.")


def _masks(arguments: argparse.Namespace) -> None:
    """Learn perturbation masks of held-out subjects, saved as NIfTI."""
    data = cohort.load_cohort(arguments.cohort)

    def explain_rows(rows: Sequence[int] | None, overwrite: bool) -> pd.DataFrame:
        options = {"rows": rows, "seed": arguments.seed, "overwrite": overwrite}
        return explain.explain(data, arguments.networks, arguments.out, **options)

    table = share_work(explain_rows, range(len(data)), arguments.overwrite)
    print(table[["before", "after", "volume"]].describe().loc[["mean", "min", "max"]].to_string())


OPTIONS = {
    "folder": {"type": Path},
    "source": {"type": Path, "help": "a folder, searched at any depth"},
    "target": {"type": Path, "help": "gets <ID>.nii.gz, and rejected.csv"},
    "cohort": {
        "type": Path,
        "help": "a layout that DATA_ACCESS.md lists; once converted, its cohort",
    },
    "network": {"type": Path, "help": "fold-K.pt, or a published state dict"},
    "networks": {"type": Path, "help": "folder that train wrote"},
    "volumes": {"type": Path, "nargs": "+", "help": "<ID>.nii.gz"},
    "out": {"type": Path},
    "--out": {"type": Path, "help": "where tensors.npy goes; COHORT by default"},
    "--subjects": {"type": int, "default": 200, "help": "how many have a volume"},
    "--spacing": {"type": float, "default": 2.5, "help": "mm; 1.25 is HCP's grid"},
    "--head-size": {"type": float, "default": 0.12, "help": "men's over women's, minus one"},
    "--effect": {"type": float, "default": 1.0, "help": "multiplies planted local differences"},
    "--template": {"type": Path, "help": "a real FA map to start from"},
    "--seed": {"type": int, "default": 0, "help": "of all random draws"},
    "--workers": {"type": int, "help": "at once; as many as cores by default (memory: README)"},
    "--overwrite": {"action": "store_true", "help": "start anew, also with other settings"},
    "--member": {"nargs": "+", "default": archives.FA_MEMBERS, "help": "patterns of names"},
    "--bmax": {"type": float, "default": 1500, "help": "largest shell, s/mm²"},
    "--b0": {"type": float, "default": 50, "help": "no diffusion weighting up to it, s/mm²"},
    "--table": {"type": Path, "help": "of people; the one in COHORT by default"},
    "--fa": {"type": Path, "help": "folder of <ID>.nii.gz, instead of what is in COHORT"},
    "--kind": {"choices": layouts.VOLUME_KINDS, "help": "of volumes, where there are several"},
    "--session": {"help": "BIDS's, where subjects came twice"},
    "--match": {"metavar": "GLOB", "help": "of file names, where there are several"},
    "--regrid": {"action": "store_true", "help": "resample volumes on other grids"},
    "--normalised": {"action": "store_true", "help": "bring all brains to one size"},
    "--leave-out-qc": {"action": "store_true", "help": "leave out subjects with a QC_Issue"},
    "--channels": {"type": int, "default": 32, "help": "of the first hidden layer"},
    "--folds": {"type": int, "default": 10, "help": "of the cross-validation"},
    "--epochs": {"type": int, "default": 20, "help": "a fold"},
    "--batch-size": {"type": int, "default": 45, "help": "subjects"},
    "--lr": {"type": float, "default": 3e-4, "help": "Adam's learning rate"},
    "--milestones": {"type": int, "nargs": "*", "default": (5, 15), "help": "a tenth of it after"},
    "--orientation": {"default": "RAS", "help": "of the arrays the network was trained on"},
}
COMMANDS = {  # an example, and the arguments
    _synthesize: (
        "data/synthetic",
        "folder --subjects --spacing --head-size --effect --template --seed --workers",
    ),
    _extract: ("data/hcp data/hcp/fa", "source target --member --workers --overwrite"),
    _fa: ("data/hcp data/hcp/fa --workers 4", "source target --bmax --b0 --workers --overwrite"),
    _survey: ("data/hcp", "cohort --table"),
    _convert: (
        "data/hcp --normalised --out data/hcp-one-size",
        "cohort --out --fa --table --kind --session --match --regrid --normalised --leave-out-qc "
        "--overwrite",
    ),
    _check: ("data/hcp results/hcp/check", "cohort out"),
    _train: (
        "data/hcp results/hcp/cnn3d --epochs 20 --workers 2",
        "cohort out --channels --folds --epochs --batch-size --lr --milestones --seed --workers "
        "--overwrite",
    ),
    _predict: ("results/hcp/cnn3d/fold-0.pt some_FA.nii.gz", "network volumes --orientation"),
    _masks: (
        "data/hcp results/hcp/cnn3d results/hcp/masks",
        "cohort networks out --seed --overwrite",
    ),
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; a command's help is its docstring."""
    top = argparse.ArgumentParser(prog="python -m brainsex", description=__doc__)
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for function, (example, names) in COMMANDS.items():
        sub = commands.add_parser(
            function.__name__[1:],
            help=function.__doc__,
            description=function.__doc__,
            epilog=f"Example: {top.prog} {function.__name__[1:]} {example}",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        sub.set_defaults(function=function)
        for name in names.split():
            sub.add_argument(name, **OPTIONS[name])
    return top


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; whatever stops it ends with one line and an exit code other than 0."""
    parsed = build_parser().parse_args(arguments)
    os.environ.update(speed.MALLOC_ENVIRONMENT | os.environ)
    function = parsed.function
    del parsed.function
    folders = (getattr(parsed, name, None) for name in ("target", "out", "folder"))
    folder = next(filter(None, folders), parsed.cohort if function is _convert else None)
    try:
        launched = "TORCHELASTIC_RUN_ID" in os.environ
        if launched and function not in (_train, _masks):
            raise ValueError(
                f"{function.__name__[1:]} is work for one process: torchrun shares train and masks."
            )
        with process_group() if launched else nullcontext(True) as is_first:
            lock = storage.folder_lock(folder) if is_first and folder else nullcontext()
            with lock, redirect_stdout(sys.stdout if is_first else None):
                function(parsed)
    except KeyboardInterrupt:
        print(
            "stopped: nothing is left half-written; the same command goes on from what is finished",
            file=sys.stderr,
        )
        sys.exit(130)  # as of any program that Ctrl-C ends
    except (ValueError, OSError, FloatingPointError, ImportError, BrokenProcessPool) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "; make room and run again: what is finished is kept" if full else ""
        sys.exit(f"error: {' '.join(str(error).split())}{advice}")


if __name__ == "__main__":
    main()
