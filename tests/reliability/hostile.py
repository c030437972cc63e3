"""Hostile and broken files: each through the commands that read it, in a process of its own.

``python -m tests.reliability.hostile [EVERY] [PLACE]`` prints what went wrong, and the figures;
with EVERY only each such case is tried. A case is a small study that is whole but for one file.
"""

import io
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import NamedTuple

import dipy.reconst.dti  # noqa: F401  once, not in each process
import numpy as np
import pandas as pd
import torch

from brainsex import cohort, explain, metrics, networks, storage, tables, tabular
from brainsex.__main__ import main
from tests.reliability import damage
from tests.reliability.damage import save_bytes
from tests.test_archives import zipped
from tests.test_diffusion import SHAPE as SERIES_SHAPE
from tests.test_diffusion import image, series

MAX_SECONDS, MAX_MEGABYTES = 10, 1 << 10
"""Processor time that a case may take, and memory beyond that of the warm process."""
DAMAGED = 12
"""Cases of seeded damage of each file."""
PEOPLE = [f"00000{number}" for number in range(1, 10)]
BAD = PEOPLE[-1]
"""The subject whose file is hostile, where it is one subject's."""
SHAPE, AFFINE = (22, 23, 24), np.diag([8.0, 8, 8, 1])


def make_table(header: str, row: str) -> bytes:
    """Make a table of all people; in `row` stand {who}, {sex}, {label} and a number {n}."""
    rows = [row.format(who=w, sex="FM"[n % 2], label=n % 2, n=n) for n, w in enumerate(PEOPLE)]
    return "\n".join([header, *rows, ""]).encode()


def make_files() -> dict[str, bytes]:
    """Make a study of nine subjects, with files of every kind, all whole."""
    values = np.random.default_rng(0).uniform(0.1, 0.9, (9, *SHAPE)).astype(np.float32)
    measures = "Subject,Release,Gender,FS_IntraCranial_Vol,FS_L_Thalamus_Vol"
    subjects = "Subject,Gender,label,brain_volume_ml,group"
    grid = {"shape": SHAPE, "affine": AFFINE.tolist(), "modality": "fa", "normalised": False}
    files = {
        "study/unrestricted_behavioral.csv": make_table("Subject,Gender,Age", "{who},{sex},22-25"),
        "study/restricted.csv": make_table("Subject,Family_ID,Age_in_Yrs", "{who},F{n},3{n}"),
        "study/unrestricted_hcp_freesurfer.csv": make_table(measures, "{who},S9,{sex},15{n},{n}.5"),
        "bids/participants.tsv": make_table("participant_id\tsex\tage", "sub-{who}\t{sex}\t30"),
        "tbss/participants.tsv": make_table("participant_id\tsex", "{who}\t{sex}"),
        "tbss/stats/all_FA.nii.gz": image(np.moveaxis(values, 0, -1), affine=AFFINE),
        "tbss/stats/all_FA.txt": "\n".join(PEOPLE).encode(),
        "atlas/labels.nii.gz": image(np.arange(24).reshape(2, 3, 4) % 3, np.int16, AFFINE),
        "atlas/labels.csv": b"index,name\n1,left one\n2,right two\n",
        "cohort/tensors.npy": save_bytes(np.save, values),
        "cohort/labels.npy": save_bytes(np.save, np.arange(9) % 2),
        "cohort/subjects.csv": make_table(subjects, "{who},{sex},{label},1500.5,F{n}"),
        "cohort/grid.json": json.dumps(grid).encode(),
        "networks/fold-0.pt": save_bytes(torch.save, networks.MriNet3d(1, SHAPE).state_dict()),
        "networks/run.json": json.dumps({"train": {"grid": grid}}).encode(),
        "networks/folds.csv": make_table("Subject,fold", "{who},0"),
    }
    for who, volume in zip(PEOPLE, values):
        files[f"study/fa/{who}.nii.gz"] = fa = image(volume, affine=AFFINE)
        files[f"bids/sub-{who}/dwi/sub-{who}_FA.nii.gz"] = fa
    for who in (PEOPLE[0], BAD):
        content = series(int(who), dev=image(np.full((*SERIES_SHAPE, 9), 0.01)))
        content = {f"{who}/T1w/Diffusion/{name}": file for name, file in content.items()}
        files |= {f"series/{name}": file for name, file in content.items()}
        files[f"packages/{who}_3T_Diffusion_preproc.zip"] = zipped(content.items())
        files[f"archives/{who}.zip"] = zipped([("in.zip", zipped([(f"{who}_FA.nii", fa)]))])
    return files


def load_and_explain() -> None:
    data = cohort.load_cohort("in/cohort")
    explain.explain(data, "in/networks", "out/masks", rows=[0], iterations=1)


def sum_regions() -> None:
    brain, atlas = np.ones((2, 3, 4), bool), ("in/atlas/labels.nii.gz", "in/atlas/labels.csv")
    metrics.region_shares({"men": 1.0 * brain}, AFFINE, *atlas, brain)


COMMANDS = {
    "extract": "extract in/archives out/archives",
    "unpack": "fa in/packages out/packages --workers 1",
    "fit": "fa in/series out/series --workers 1",
    "survey": "survey in/study",
    "convert": "convert in/study --out out/study",
    "convert-bids": "convert in/bids --out out/bids",
    "convert-tbss": "convert in/tbss --out out/tbss",
    "check": "check in/cohort out/check",
    "train": "train in/cohort out/networks --channels 1 --folds 2 --epochs 1 --workers 1",
    "predict": "predict in/networks/fold-0.pt "
    f"in/study/fa/{PEOPLE[0]}.nii.gz in/study/fa/{BAD}.nii.gz",
    "explain": load_and_explain,
    "people": lambda: tables.read_people("in/study/unrestricted_behavioral.csv"),
    "measures": lambda: tabular.load_table("in/study/unrestricted_hcp_freesurfer.csv"),
    "regions": sum_regions,
}
"""The arguments of a command, or a call as of a notebook."""


class Kind(NamedTuple):
    hostile: Callable[[bytes], damage.Cases]
    commands: str  # that read it
    result: str = ""  # of the others, which must be what it is without the bad subject


SERIES, FIT = f"series/{BAD}/T1w/Diffusion", ("fit", f"series/{PEOPLE[0]}.nii.gz")
UNPACK, COHORT = ("unpack", f"packages/{PEOPLE[0]}.nii.gz"), "check train explain"
KINDS = {  # by the place of the file
    f"archives/{BAD}.zip": Kind(damage.zips, "extract", f"archives/{PEOPLE[0]}.nii"),
    f"packages/{BAD}_3T_Diffusion_preproc.zip": Kind(damage.zips, *UNPACK),
    f"study/fa/{BAD}.nii.gz": Kind(damage.niftis, "convert predict", "study/tensors.npy"),
    f"{SERIES}/data.nii.gz": Kind(damage.niftis, *FIT),
    f"{SERIES}/nodif_brain_mask.nii.gz": Kind(damage.niftis, *FIT),
    f"{SERIES}/grad_dev.nii.gz": Kind(damage.niftis, *FIT),
    f"{SERIES}/bvals": Kind(damage.texts, *FIT),
    f"{SERIES}/bvecs": Kind(damage.texts, *FIT),
    "study/unrestricted_behavioral.csv": Kind(damage.tables, "survey convert people"),
    "study/restricted.csv": Kind(damage.tables, "survey measures"),
    "study/unrestricted_hcp_freesurfer.csv": Kind(damage.tables, "survey measures"),
    "bids/participants.tsv": Kind(damage.tables, "convert-bids"),
    "tbss/stats/all_FA.nii.gz": Kind(damage.niftis, "convert-tbss"),
    "tbss/stats/all_FA.txt": Kind(damage.texts, "convert-tbss"),
    "cohort/tensors.npy": Kind(damage.arrays, COHORT),
    "cohort/labels.npy": Kind(damage.arrays, COHORT),
    "cohort/subjects.csv": Kind(damage.tables, COHORT),
    "networks/fold-0.pt": Kind(damage.weights, "predict explain"),
    "atlas/labels.nii.gz": Kind(damage.niftis, "regions"),
    "atlas/labels.csv": Kind(damage.tables, "regions"),
}
ODD = {
    "a folder": Path.mkdir,
    "a pipe": os.mkfifo,
    "a link to itself": lambda path: path.symlink_to(path.name),
    "an endless device": lambda path: path.symlink_to("/dev/zero"),
}
"""What may stand in a file's place, and is none."""


def list_cases(files: dict[str, bytes]) -> Iterator[tuple]:
    """Yield a place, how its file is bad, and the content or what puts something else there."""
    for place, kind in KINDS.items():
        yield from ((place, *case) for case in (*kind.hostile(files[place]), *ODD.items()))
        for seed in range(DAMAGED):
            yield place, *damage.damage(files[place], random.Random(f"{place} {seed}"))


def run(name: str) -> str:
    """Run a command; return the one line that it ends with, empty after a success."""
    command = COMMANDS[name]
    try:
        main(command.split()) if isinstance(command, str) else command()
    except SystemExit as stop:
        return str(stop)
    except BaseException as error:
        expected = isinstance(error, (ValueError, OSError)) and not isinstance(command, str)
        return f"error: {error}" if expected else traceback.format_exc()
    return ""


def fork(work: Callable[[], None]) -> tuple[int, float]:
    """Do some work in a child process; return its wait status and seconds of the processor."""
    if not (pid := os.fork()):
        work()
        os._exit(0)
    end = time.monotonic() + 12 * MAX_SECONDS  # of the wall, where others use the cores
    while not (ended := os.wait4(pid, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return ended[1], ended[2].ru_utime + ended[2].ru_stime


def watch(root: Path, events: list[str]) -> None:
    """Note what reading a file must not do: run what is in it, or write anywhere but in out."""
    allowed = (str(root / "out"), str(root / "tmp"), "/dev/")

    def hook(event: str, arguments: tuple) -> None:
        if event in ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec"):
            events.append(f"{event} {arguments[:2]}")
        elif event == "open" and isinstance(arguments[0], (str, bytes, Path)):
            path, mode, flags = arguments
            writes = set(mode or "") & set("wax+") or flags & (os.O_WRONLY | os.O_RDWR)
            if writes and not os.path.abspath(os.fsdecode(path)).startswith(allowed):
                events.append(f"writes {path}")

    sys.addaudithook(hook)


def own_megabytes(line: str) -> float:
    """Return what a line of Linux's ``/proc/self/status`` says."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(text.split()[1]) for text in lines if text.startswith(line)) / 1024


def attempt(root: Path, commands: str, record: Path) -> None:
    """Run commands in a folder; write how they ended and what they printed to `record`."""
    os.chdir(root)
    os.environ["TMPDIR"] = tempfile.tempdir = str(root / "tmp")
    limit = int(own_megabytes("VmData") + 3 * MAX_MEGABYTES) << 20  # not to harm the machine
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (2 * MAX_SECONDS,) * 2)
    events, printed, before = [], io.StringIO(), own_megabytes("VmRSS")
    watch(root, events)
    with redirect_stdout(printed), redirect_stderr(printed):
        endings = {name: run(name) for name in commands.split()}
    content = {"endings": endings, "printed": printed.getvalue()[-20000:], "events": events}
    record.write_text(json.dumps(content | {"megabytes": own_megabytes("VmHWM") - before}))


def snapshot(root: Path) -> dict[Path, bytes]:
    """Read what lies where nothing may be written."""
    paths = {*root.iterdir(), *(root / "in").rglob("*"), *(root / "beside").rglob("*")}
    return {path: path.read_bytes() if path.is_file() else b"" for path in paths}


def read_result(root: Path, place: str) -> bytes:
    """Read what was made of the subjects whose files are whole; of tensors the first eight."""
    path = root / "out" / KINDS[place].result
    return np.load(path)[:8].tobytes() if path.suffix == ".npy" else path.read_bytes()


def find_problems(root: Path, place: str, record: dict, expected: bytes | None) -> Iterator[str]:
    """Yield what is wrong with how a case ended."""
    path, result, printed = root / "in" / place, KINDS[place].result, record["printed"]
    names = (path.name, path.name.split(".")[0], path.parent.name)
    for name, ending in record["endings"].items():
        named = any(part in ending + printed for part in names)
        if ending and (result or not ending.startswith("error: ") or not named):
            yield f"{name} should do the others, or name the file: {ending[-1500:]}"
        elif len(ending) > 2000 or "\n" in ending:
            yield f"{name}: no line: {ending[:300]}"
    if "Traceback" in printed:
        yield f"a traceback: {printed[-1500:]}"
    yield from record["events"]
    yield from (f"left behind: {path}" for path in (root / "out").rglob("*.partial"))
    if result and not any(record["endings"].values()):
        if read_result(root, place) != expected:
            yield "the others are not what they are without the bad one"
        folder = (root / "out" / result).parent
        reasons = pd.read_csv(folder / "rejected.csv", dtype=str).set_index("Subject")["reason"]
        reason, made = reasons.get(BAD, ""), (*folder.glob(f"{BAD}*"), *folder.glob("tensors.npy"))
        if path.is_file() and not made and not reason:
            yield "neither made nor rejected"
        if re.search(r"Error: (?!\[Errno)", reason):
            yield f"rejected by accident: {reason}"


class Outcome(NamedTuple):
    place: str
    how: str
    problems: list[str]
    seconds: float  # of the processor, all threads
    megabytes: float  # more than the process had before


CASES = []
"""As `list_cases` gives them; forks of this process read them."""


def try_case(folder: Path, expected: dict[str, bytes], number: int) -> Outcome:
    """Put a file in place in a copy of the study, and run what reads it."""
    place, how, content = CASES[number]
    root, record, megabytes = folder / f"{number}", folder / f"{number}.json", 0.0
    shutil.copytree(folder / "study", root)
    path = root / "in" / place
    path.unlink()
    make = content if callable(content) else lambda: content
    fork(lambda: content(path) if how in ODD else path.write_bytes(make()))
    before = snapshot(root)
    status, seconds = fork(lambda: attempt(root, KINDS[place].commands, record))
    problems = [f"killed: wait status {status}"]
    if record.is_file():
        ended = json.loads(record.read_text())
        megabytes = ended["megabytes"]
        problems = list(find_problems(root, place, ended, expected.get(place)))
    problems += [f"changed: {path}" for path, _ in before.items() ^ snapshot(root).items()]
    if seconds > MAX_SECONDS or megabytes > MAX_MEGABYTES:
        problems.append(f"takes {seconds:.0f} s of the processor, {megabytes:.0f} MB")
    shutil.rmtree(root)
    return Outcome(place, how, problems, seconds, megabytes)


def try_all(every: int = 1, only: str = "") -> Iterator[Outcome]:
    """Try every case, or each so many-th, of the places whose names hold `only`."""
    torch.set_num_threads(1)
    storage.environment()  # which asks git for the commit
    with tempfile.TemporaryDirectory() as temporary:
        folder, files = Path(temporary), make_files()
        for root in (folder / "study", folder / "others"):
            paths = {root / "in" / name: content for name, content in files.items()}
            paths |= {root / name / "mine.txt": b"mine" for name in ("out", "tmp", "beside")}
            for path, content in paths.items():
                if root.name == "study" or BAD not in str(path):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content)
        fork(lambda: attempt(root, "extract unpack fit convert", folder / "record.json"))
        expected = {place: read_result(root, place) for place in KINDS if KINDS[place].result}
        CASES[:] = [case for case in [*list_cases(files)][::every] if only in case[0]]
        with multiprocessing.get_context("fork").Pool() as pool:
            yield from pool.imap(partial(try_case, folder, expected), range(len(CASES)))


def run_all(every: int = 1, only: str = "") -> int:
    """Print what went wrong, and the figures; return how many cases failed."""
    outcomes = []
    for outcome in try_all(every, only):
        outcomes.append(outcome)
        for problem in outcome.problems:
            print(f"{outcome.place}: {outcome.how}: {problem}", flush=True)
    failed = sum(bool(outcome.problems) for outcome in outcomes)
    print(f"{len(outcomes)} hostile files, {failed} failed")
    print(*(f"{count} {place}" for place, count in Counter(o.place for o in outcomes).items()))
    for name in ("seconds", "megabytes"):
        worst = max(outcomes, key=lambda outcome: getattr(outcome, name))
        print(f"at most {getattr(worst, name):.3g} {name} ({worst.place}: {worst.how})")
    return failed


if __name__ == "__main__":
    sys.exit(run_all(*map(int, sys.argv[1:2]), *sys.argv[2:3]) > 0)
