"""Hostile and broken files: each through the commands that read it, in a process of its own.

``python -m tests.reliability.hostile [EVERY] [PLACE]`` prints what went wrong; with EVERY only each
such case is tried. A case is a small study that is whole but for one file.
"""

import gzip
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from brainsex import cohort, explain, networks, participants, storage, tabular
from brainsex.__main__ import main
from tests.reliability import damage
from tests.reliability.damage import save_bytes
from tests.test_archives import zipped
from tests.test_diffusion import SHAPE as SERIES_SHAPE
from tests.test_diffusion import image, series

MAX_SECONDS, MAX_MEGABYTES = 10, 1024  # of the processor; beyond what the warm process has
DAMAGED = 30  # cases of seeded damage of each file
BAD = "000009"  # the last subject, whose file is hostile where it is one subject's
SHAPE, AFFINE = (22, 23, 24), np.diag([8.0, 8, 8, 1])


def make_table(count: int, header: str, row: str) -> bytes:
    """Make a table of people; in `row` stand {who}, {sex}, {label} and the number {n}."""
    numbers = range(1, count + 1)
    rows = [row.format(who=f"{n:06d}", sex="FM"[n % 2], label=n % 2, n=n) for n in numbers]
    return "\n".join([header, *rows, ""]).encode()


def write_study(root: Path, count: int = 9, without: str = "/none") -> dict[str, bytes]:
    """Write whole files of every kind into ``in``, but where a name holds `without`; return them.

    The converted cohort has 12 subjects at most.
    """
    values = np.random.default_rng(0).uniform(0.1, 0.9, (count, *SHAPE)).astype(np.float32)
    people, trained = partial(make_table, count), min(count, 12)
    measures = "Subject,Release,Gender,FS_IntraCranial_Vol,FS_L_Thalamus_Vol"
    subjects = "Subject,Gender,label,brain_volume_ml,group"
    grid = {"shape": SHAPE, "affine": AFFINE.tolist(), "modality": "fa"}
    files = {
        "study/unrestricted_behavioral.csv": people("Subject,Gender,Age", "{who},{sex},22-25"),
        "study/restricted.csv": people("Subject,Family_ID,Age_in_Yrs", "{who},F{n},3{n}"),
        "study/unrestricted_hcp_freesurfer.csv": people(measures, "{who},S9,{sex},15{n},{n}.5"),
        "bids/participants.tsv": people("participant_id\tsex\tage", "sub-{who}\t{sex}\t30"),
        "cohort/tensors.npy": save_bytes(np.save, values[:trained]),
        "cohort/labels.npy": save_bytes(np.save, np.arange(1, trained + 1) % 2),
        "cohort/subjects.csv": make_table(trained, subjects, "{who},{sex},{label},1500.5,F{n}"),
        "cohort/grid.json": json.dumps(grid).encode(),
        "networks/fold-0.pt": save_bytes(torch.save, networks.MriNet3d(1, SHAPE).state_dict()),
        "networks/run.json": json.dumps({"train": {"grid": grid}}).encode(),
        "networks/folds.csv": people("Subject,fold", "{who},0"),
    }
    for number, volume in enumerate(values, 1):
        who = f"{number:06d}"
        fa = damage.pack(gzip.decompress(image(volume, affine=AFFINE)))  # without the time
        content = series(number, dev=image(np.full((*SERIES_SHAPE, 9), 0.01)))
        content = {f"{who}/T1w/Diffusion/{name}": file for name, file in content.items()}
        files |= {f"series/{name}": file for name, file in content.items()}
        files[f"packages/{who}_3T_Diffusion_preproc.zip"] = zipped(content.items())
        files[f"archives/{who}.zip"] = zipped([("in.zip", zipped([(f"{who}_FA.nii.gz", fa)]))])
        files[f"study/fa/{who}.nii.gz"] = files[f"bids/sub-{who}/dwi/sub-{who}_FA.nii.gz"] = fa
    for name, content in files.items():
        if without not in name:
            (root / "in" / name).parent.mkdir(parents=True, exist_ok=True)
            (root / "in" / name).write_bytes(content)
    return files


COMMANDS = {
    "extract": "extract {0}/in/archives {1}",
    "unpack": "fa {0}/in/packages {1}",
    "fa": "fa {0}/in/series {1}",
    "convert": "convert {0}/in/study --out {1}",
    "bids": "convert {0}/in/bids --out {1}",
    "train": "train {0}/in/cohort {1} --channels 1 --folds 2 --epochs 6 --workers 1",
    "predict": "predict {0}/in/networks/fold-0.pt "
    "{0}/in/study/fa/000001.nii.gz {0}/in/study/fa/000009.nii.gz",
    "masks": "masks {0}/in/cohort {0}/in/networks {1}",
    "explain": lambda: explain.explain(
        cohort.load_cohort("in/cohort"), "in/networks", "out/masks", rows=[0], iterations=1
    ),
    "people": lambda: participants.read_people("in/study/unrestricted_behavioral.csv"),
    "measures": lambda: tabular.load_table("in/study/unrestricted_hcp_freesurfer.csv"),
}
"""The arguments of a command that reads a study {0} and writes {1}; or a call of a notebook's."""
SERIES, FITTED = f"series/{BAD}/T1w/Diffusion", "fa/000001.nii.gz"
KINDS = {  # a place: files there; what reads them; what of other subjects must not depend on it
    f"archives/{BAD}.zip": (damage.zips, "extract", "extract/000001.nii.gz"),
    f"packages/{BAD}_3T_Diffusion_preproc.zip": (damage.zips, "unpack", "unpack/000001.nii.gz"),
    f"study/fa/{BAD}.nii.gz": (damage.niftis, "convert predict", "convert/tensors.npy"),
    f"{SERIES}/data.nii.gz": (damage.niftis, "fa", FITTED),
    f"{SERIES}/grad_dev.nii.gz": (damage.niftis, "fa", FITTED),
    f"{SERIES}/bvals": (damage.texts, "fa", FITTED),
    f"{SERIES}/bvecs": (damage.texts, "fa", FITTED),
    "study/unrestricted_behavioral.csv": (damage.tables, "convert people", ""),
    "study/restricted.csv": (damage.tables, "convert measures", ""),
    "study/unrestricted_hcp_freesurfer.csv": (damage.tables, "convert measures", ""),
    "bids/participants.tsv": (damage.tables, "bids", ""),
    "cohort/tensors.npy": (damage.arrays, "train explain", ""),
    "cohort/labels.npy": (damage.arrays, "train explain", ""),
    "cohort/subjects.csv": (damage.tables, "train explain", ""),
    "networks/fold-0.pt": (damage.weights, "predict explain", ""),
}


def list_cases(files: dict[str, bytes]) -> Iterator[tuple]:
    for place, (hostile, _, _) in KINDS.items():
        yield from ((place, *case) for case in hostile(files[place]))
        for seed in range(DAMAGED):
            yield place, *damage.damage(files[place], random.Random(f"{place} {seed}"))


def run(name: str) -> str:
    """Run a command; return the one line that it ends with, empty after a success."""
    command = COMMANDS[name]
    try:
        command() if callable(command) else main(command.format(".", f"out/{name}").split())
    except SystemExit as stop:
        return str(stop)
    except BaseException as error:
        expected = callable(command) and isinstance(error, (ValueError, OSError))
        return f"error: {error}" if expected else traceback.format_exc()
    return ""


def watch(allowed: tuple[str, ...]) -> list[str]:
    """Return a list of what reading a file must not do: run what is in it, or write elsewhere."""
    events = []

    def hook(event: str, arguments: tuple) -> None:
        if event in ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec"):
            events.append(f"{event} {arguments[:2]}")
        elif event == "open" and isinstance(arguments[0], (str, bytes, Path)):
            path = os.path.abspath(os.fsdecode(arguments[0]))
            if arguments[2] & (os.O_WRONLY | os.O_RDWR) and not path.startswith(allowed):
                events.append(f"writes {path}")

    sys.addaudithook(hook)
    return events


def own_megabytes(name: str) -> float:
    words = Path("/proc/self/status").read_text().split()
    return int(words[words.index(f"{name}:") + 1]) / 1024


def snapshot(root: Path) -> dict[Path, bytes]:  # where nothing may be written
    paths = {*root.iterdir(), *(root / "in").rglob("*"), *(root / "beside").rglob("*")}
    return {path: path.read_bytes() if path.is_file() else b"" for path in paths}


def read_result(root: Path, place: str) -> bytes:
    """Read what was made of the subjects whose files are whole; of tensors the first eight."""
    path = root / "out" / KINDS[place][2]
    return np.load(path)[:8].tobytes() if path.suffix == ".npy" else path.read_bytes()


def find_problems(root: Path, place: str, endings: dict, printed: str, expected) -> Iterator[str]:
    """Yield what is wrong with how the commands ended, and with what they left."""
    path, result = root / "in" / place, KINDS[place][2]
    for name, ending in endings.items():
        parts = [path.name, path.name.split(".")[0], path.parent.name]
        parts += ["rejected.csv", "families", "loss is not finite"]
        named = any(part in ending + printed for part in parts)
        line = ending.startswith("error: ") and len(ending) < 2000 and "\n" not in ending
        if ending and not (named and line and not result):
            yield f"{name} should do the others, or end with a line: {ending[:200]}{ending[-999:]}"
    if "Traceback" in printed:
        yield f"a traceback: {printed[-1500:]}"
    yield from (f"left behind: {path}" for path in (root / "out").rglob("*.partial"))
    if result and not any(endings.values()):
        if read_result(root, place) != expected:
            yield "the others are not what they are without the bad one"
        folder = (root / "out" / result).parent
        reasons = pd.read_csv(folder / "rejected.csv", dtype=str).set_index("Subject")["reason"]
        reason, made = reasons.get(BAD, ""), (*folder.glob(f"{BAD}*"), *folder.glob("tensors.npy"))
        if (not made and not reason) or re.search(r"Error: (?!\[Errno)", reason):
            yield f"neither made nor rejected for a reason: {reason}"


CASES: list[tuple] = []
"""A place, what is bad about its file, its content, and what to expect: child processes inherit."""


def run_in(root: Path, names: str) -> dict[str, str]:
    """Run commands in the folder of a study; return how each ends."""
    os.chdir(root)
    return {name: run(name) for name in names.split()}


def try_case(number: int, root: Path) -> dict:
    """Put a file in place in a copy of the study, and run what reads it, in its own process."""
    import resource  # which Windows has not

    (place, _, content, expected), printed = CASES[number], io.StringIO()
    shutil.copytree(root.parent / "study", root)
    (root / "in" / place).write_bytes(content() if callable(content) else content)
    before = snapshot(root)
    os.environ["TMPDIR"] = tempfile.tempdir = str(root / "tmp")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    memory, began = own_megabytes("VmRSS"), time.process_time()
    limit = int(own_megabytes("VmData") + 3 * MAX_MEGABYTES) << 20  # not to harm the machine
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    problems = watch((str(root / "out"), str(root / "tmp"), "/dev/"))
    with redirect_stdout(printed), redirect_stderr(printed):
        endings = run_in(root, KINDS[place][1])
    seconds, megabytes = time.process_time() - began, own_megabytes("VmHWM") - memory
    if seconds > MAX_SECONDS or megabytes > MAX_MEGABYTES:
        problems.append(f"takes {seconds:.0f} s of the processor, {megabytes:.0f} MB")
    problems += find_problems(root, place, endings, printed.getvalue(), expected)
    problems += [f"changed: {path}" for path, _ in before.items() ^ snapshot(root).items()]
    shutil.rmtree(root)
    return {"problems": problems, "s": seconds, "MB": megabytes}


def try_all(every: int = 1, only: str = "") -> int:
    """Try each so many-th case at places whose names hold `only`; return how many fail."""
    torch.set_num_threads(1)
    storage._environment()  # which asks git for the commit
    fork, outcomes = multiprocessing.get_context("fork"), []
    with tempfile.TemporaryDirectory() as temporary:
        study, good = Path(temporary, "study"), Path(temporary, "others")
        files, _ = write_study(study), write_study(good, without=BAD)
        for root, name in product((study, good), ("out", "tmp", "beside")):
            (root / name).mkdir()
            (root / name / "mine.txt").write_text("mine")
        with fork.Pool(1) as pool:
            pool.apply(run_in, [good, "extract unpack fa convert"])
        whole = {place: read_result(good, place) for place in KINDS if KINDS[place][2]}
        cases = [case for case in [*list_cases(files)][::every] if only in case[0]]
        CASES.extend((*case, whole.get(case[0])) for case in cases)
        with fork.Pool(maxtasksperchild=1) as pool:
            roots = (Path(temporary, str(number)) for number in range(len(cases)))
            running = [pool.apply_async(try_case, task) for task in enumerate(roots)]
            for (place, how, _), result in zip(cases, running):
                outcome = {"problems": ["killed"], "s": 0, "MB": 0}
                with suppress(multiprocessing.TimeoutError):
                    outcome = result.get(12 * MAX_SECONDS)
                outcomes.append(outcome)
                print(*(f"{place}: {how}: {text}\n" for text in outcome["problems"]), end="")
    failed = sum(bool(outcome["problems"]) for outcome in outcomes)
    worst = {name: max(outcome[name] for outcome in outcomes) for name in ("s", "MB")}
    print(f"{len(outcomes)} hostile files, {failed} failed; at most {worst}")
    return failed


if __name__ == "__main__":
    sys.exit(try_all(*map(int, sys.argv[1:2]), *sys.argv[2:3]) > 0)
