"""Maps of a cohort's held-out subjects, each by the network that did not see it, saved as NIfTI."""

import gzip
import hashlib
import inspect
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from torch import nn
from tqdm.auto import tqdm

from brainsex import networks, nifti, perturbation, ranks, replacing, runs, tables
from brainsex import write as write_text
from brainsex.cohort import Cohort, fingerprint

CHUNK = 64
"""Subjects whose maps are computed and saved at a time: what a killed run may lose."""


def held_out(networks_folder: str | Path, subjects: Sequence[str]) -> np.ndarray:
    """Fold (N,) of each subject: the number K of the network ``fold-K.pt`` that did not see it.

    Raises
    ------
    FileNotFoundError
        No ``folds.csv`` there: run notebook 04.
    ValueError
        A subject that it does not know.
    """
    path = Path(networks_folder) / "folds.csv"
    if not path.is_file():
        raise FileNotFoundError(f"{networks_folder}: no folds.csv. Run notebook 04_cnn_3d first.")
    folds = tables.folds(path)
    if unknown := sorted(set(subjects) - set(folds.index)):
        raise ValueError(f"{networks_folder}: folds.csv does not know {', '.join(unknown[:10])}.")
    return folds[subjects].to_numpy()


def load(networks_folder: str | Path, fold: int, cohort: Cohort) -> nn.Module:
    """A fold's network for the cohort's volumes; raises as `networks.load`."""
    return networks.load(Path(networks_folder) / f"fold-{fold}.pt", cohort.volumes.shape[1:])


def training_means(cohort: Cohort, folds: np.ndarray, fold: int) -> np.ndarray:
    """Mean volumes (2, X, Y, Z) of the women and the men whom a fold's network was trained on.

    Parameters
    ----------
    folds : (N,), of everybody in the cohort, as from `held_out`.

    Raises
    ------
    ValueError
        No women or no men among them.
    """
    found = np.zeros((2, *cohort.volumes.shape[1:]), np.float32)
    for sex, mean in enumerate(found):
        chosen = np.flatnonzero((folds != fold) & (cohort.sex == sex))
        if len(chosen) == 0:
            raise ValueError(f"fold {fold}: no {('women', 'men')[sex]} among training subjects.")
        for row in chosen:
            mean += cohort.volumes[row] / len(chosen)
    return found


def explain(
    cohort: Cohort,
    networks_folder: str | Path,
    out: str | Path,
    *,
    rows: Sequence[int] | None = None,
    **settings,
) -> pd.DataFrame:
    """Masks of held-out subjects, each by the network that did not see it, saved one by one.

    Parameters
    ----------
    cohort : with an affine.
    networks_folder : ``fold-K.pt`` and ``folds.csv``, as `training.cross_validate` leaves them.
    out : gets ``<ID>.nii.gz``, the masks in the cohort's space, ``persistence/<ID>.nii.gz`` and
        ``masks.csv``. What is there of the same networks and settings is kept: an interrupted run
        goes on. Processes of `ranks` share the subjects, and keep a table each until all are done.
    rows : which subjects, by their place in the cohort; all by default.
    settings : numbers, of `perturbation.optimise_masks`.

    Returns
    -------
    One row a subject, in the order of `rows`: Subject, sex, fold, target, before, after, volume.

    Raises
    ------
    FileNotFoundError
        No networks there: run notebook 04.
    ValueError
        The cohort has no affine, or a subject that ``folds.csv`` does not know.
    """
    networks_folder, out = Path(networks_folder), Path(out)
    if cohort.affine is None:
        raise ValueError("the cohort has no affine: masks would lie nowhere. Give cohort.load one.")
    rows = np.arange(len(cohort)) if rows is None else np.asarray(rows)
    subjects = cohort.subjects[rows]
    folds = held_out(networks_folder, subjects)
    record = out / ("masks.csv" if ranks.first() else f".masks-{ranks.number()}.csv")
    columns = ["sex", "fold", "target", "before", "after", "volume"]
    mine, found = ranks.mine(np.arange(len(rows))), []
    bar = tqdm(total=len(mine), desc="masks", unit="subject", disable=not ranks.first())
    with bar, runs.alone(out, "persistence"):
        if ranks.first():
            digest = fingerprint(cohort.subjects, cohort.sex, cohort.volumes)
            runs.record(out, "masks", networks=networks_folder, cohort=digest, **settings)
        ranks.gather()  # nobody reads or writes before the folder is this run's
        before = [path for path in (out / "masks.csv", *_parts(out)) if path.is_file()]
        done = pd.concat([pd.DataFrame(), *(_written(path, columns) for path in before)])
        for fold in np.unique(folds[mine]):
            network = load(networks_folder, fold, cohort)
            now = key(networks_folder, fold, perturbation, sorted(settings.items()))
            here = mine[folds[mine] == fold]
            if len(done):
                same = done[(done["key"] == now) & done["Subject"].isin(subjects[here])]
                whole = [
                    all(_read(path, now) is not None for path in _paths(out, name))
                    for name in same["Subject"]
                ]
                found.append(same.loc[whole].drop_duplicates("Subject"))
                here = here[~np.isin(subjects[here], found[-1]["Subject"])]
            bar.update((folds[mine] == fold).sum() - len(here))
            for start in range(0, len(here), CHUNK):
                some = rows[here[start : start + CHUNK]]
                names = cohort.subjects[some]
                made = perturbation.optimise_masks(
                    network, cohort.volumes[some], subjects=names, progress=False, **settings
                )
                for name, *maps in zip(names, made.masks, made.persistence):
                    for path, one in zip(_paths(out, name), maps):
                        write(path, one, cohort.affine, now)
                more = {"Subject": names, "sex": cohort.sex[some], "fold": fold, "key": now}
                found.append(made.history.assign(**more))
                others = done if ranks.first() else pd.DataFrame()
                write_text(record, _latest(others, found).to_csv(index=False))
                bar.update(len(some))
        found = [one for part in ranks.gather(found) for one in part]
        done = _latest(done, found)
        if ranks.first():
            write_text(out / "masks.csv", done.to_csv(index=False))
            for part in _parts(out):
                part.unlink()
    return done.set_index("Subject").loc[subjects, columns].reset_index()


def _written(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """What a run before left of its table."""
    found = tables.written(path, "Subject", *columns, "key")
    if len(found) and any(found[name].dtype.kind not in "iuf" for name in columns[3:]):
        raise ValueError(f"{path}: expected numbers, found others. Delete it.")
    return found


def _parts(out: Path) -> list[Path]:
    """Tables of the processes that an unfinished run had beside the first."""
    return sorted(out.glob(".masks-*.csv"))


def _latest(done: pd.DataFrame, found: list[pd.DataFrame]) -> pd.DataFrame:
    """A row a subject, what was found before what was there; the same whatever came first."""
    return pd.concat([done, *found]).drop_duplicates("Subject", keep="last").sort_values("Subject")


def _paths(out: Path, subject: str) -> tuple[Path, Path]:
    """Where a subject's mask lies, and its persistence."""
    return out / f"{subject}.nii.gz", out / "persistence" / f"{subject}.nii.gz"


def key(networks_folder: str | Path, fold: int, *how) -> str:
    """What a map depends on: a fold's weights, this source, and `how` it was made.

    `how` are modules, whose source counts, arrays by their bytes, and settings by what they print.
    """
    parts = []
    for part in (sys.modules[__name__], networks, *how):
        if isinstance(part, np.ndarray):
            part = hashlib.sha256(part.tobytes()).hexdigest()
        parts.append(inspect.getsource(part) if inspect.ismodule(part) else part)
    how = repr((*parts, networks.precision(networks.device())))
    weights = (Path(networks_folder) / f"fold-{fold}.pt").read_bytes()
    return hashlib.sha256(weights + how.encode()).hexdigest()[:16]


def write(path: Path, image: np.ndarray, affine: np.ndarray, key: str) -> None:
    """A map as NIfTI, its key in the header (descrip): the same bytes whenever it is written."""
    image = nib.Nifti1Image(image, affine)
    image.header["descrip"] = key
    with replacing(path) as partial:
        partial.write_bytes(gzip.compress(image.to_bytes(), 1, mtime=0))


def kept(
    paths: Sequence[Path],
    affine: np.ndarray,
    key: str,
    compute: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """Maps (n, X, Y, Z) from NIfTI files; what is not there under its key is computed and written.

    `compute` takes the places (m,) in `paths` of what is missing, a few at a time, and gives
    their maps (m, X, Y, Z).
    """
    found = [_read(path, key) for path in paths]
    missing = [place for place, one in enumerate(found) if one is None]
    with runs.alone(paths[0].parent) if missing else nullcontext():
        for start in range(0, len(missing), CHUNK):
            some = np.array(missing[start : start + CHUNK])
            for place, one in zip(some, compute(some)):
                write(paths[place], one, affine, key)
                found[place] = one
    return np.stack(found)


def _read(path: Path, key: str) -> np.ndarray | None:
    """A map that is there under its key and whole."""
    try:
        volume, _ = nifti.load(path)
        return volume if nib.load(path).header["descrip"].item().decode() == key else None
    except (FileNotFoundError, ValueError):
        return None
