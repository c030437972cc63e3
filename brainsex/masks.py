"""Perturbation masks of a cohort's held-out subjects, saved one by one as NIfTI."""

import gzip
import hashlib
import inspect
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from brainsex import networks, perturbation, replacing
from brainsex.cohort import Cohort


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
    folds = pd.read_csv(path, dtype={"Subject": str}).set_index("Subject")["fold"]
    if unknown := sorted(set(subjects) - set(folds.index)):
        raise ValueError(f"{networks_folder}: folds.csv does not know {', '.join(unknown[:10])}.")
    return folds[subjects].to_numpy()


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
    out : gets ``<ID>.nii.gz``, the masks in the cohort's space, and ``masks.csv``. What is there
        of the same networks and settings is kept: an interrupted run goes on.
    rows : which subjects, by their place in the cohort; all by default.
    settings : of `perturbation.optimise_masks`; none that is one a volume.

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
    record = out / "masks.csv"
    done = pd.read_csv(record, dtype={"Subject": str}) if record.is_file() else pd.DataFrame()
    fixed = {  # what repr would cut short, in full
        name: hashlib.sha256(value.tobytes()).hexdigest()
        if isinstance(value, np.ndarray)
        else value
        for name, value in settings.items()
    }
    how = [inspect.getsource(perturbation), *sorted(fixed.items())]
    how = repr((*how, networks.precision(networks.device())))
    with tqdm(total=len(rows), desc="masks", unit="subject") as bar:
        for fold in np.unique(folds):
            weights = networks_folder / f"fold-{fold}.pt"
            network = networks.load(weights, cohort.volumes.shape[1:])
            key = hashlib.sha256(weights.read_bytes() + how.encode()).hexdigest()[:16]
            same = done[done["key"] == key]["Subject"] if len(done) else []
            same = [subject for subject in same if (out / f"{subject}.nii.gz").is_file()]
            here = rows[(folds == fold) & ~np.isin(subjects, same)]
            bar.update((folds == fold).sum() - len(here))
            for start in range(0, len(here), 64):
                some = here[start : start + 64]
                names = cohort.subjects[some]
                found = perturbation.optimise_masks(
                    network, cohort.volumes[some], subjects=names, progress=False, **settings
                )
                for name, mask in zip(names, found.masks):
                    _write(out / f"{name}.nii.gz", mask, cohort.affine)
                more = found.history.assign(Subject=names, sex=cohort.sex[some], fold=fold, key=key)
                done = pd.concat([done, more]).drop_duplicates("Subject", keep="last")
                with replacing(record) as partial:
                    done.to_csv(partial, index=False)
                bar.update(len(some))
    columns = ["sex", "fold", "target", "before", "after", "volume"]
    return done.set_index("Subject").loc[subjects, columns].reset_index()


def _write(path: Path, mask: np.ndarray, affine: np.ndarray) -> None:
    """A mask as NIfTI: the same bytes whenever it is written."""
    with replacing(path) as partial:
        partial.write_bytes(gzip.compress(nib.Nifti1Image(mask, affine).to_bytes(), mtime=0))
