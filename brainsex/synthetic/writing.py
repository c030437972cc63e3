"""A synthetic cohort: people, their tables with HCP's columns, and their volumes, written to disk.

Every subject has a head size, a smooth deformation, FA variation, noise, and real maps' bright rim;
FreeSurfer's measures vary together by head size, kind, structure, side and kinship.
"""

import gzip
import io
import json
import math
import zipfile
from pathlib import Path

import joblib
import nibabel as nib
import numpy as np
import pandas as pd
from numpy.random import Generator
from scipy.ndimage import binary_erosion, map_coordinates, zoom
from threadpoolctl import threadpool_limits
from tqdm.auto import tqdm

from brainsex import LABELS, storage
from brainsex.synthetic.template import REGIONS, make_anatomy

ROWS, MEN = 1113, 507  # subjects in HCP's tables, and the men among them
SHARES = {"family": 0.4, "twins": 0.45, "own": 0.15}
"""Variance of anatomy that a family shares, that identical twins share besides, and one's own."""
HEAD_SIZE = 0.12  # men's mean head volume less women's, over the mean of both, as in life
HEAD_SPREAD = 0.075  # coefficient of variation of head volume within a sex
FAMILY_SIZES = (0.22, 0.28, 0.32, 0.14, 0.03, 0.01)  # shares of families of 1, 2, … members
BEHAVIOURAL = "Subject Release Acquisition Gender Age QC_Issue 3T_dMRI_Compl".split()
RESTRICTED = "Subject Age_in_Yrs ZygositySR Family_ID Mother_ID Father_ID".split()
FACTOR_SHARES = (0.4, 0.36, 0.24)  # of a factor's variance: its kind's, its structure's, its side's
MEASURES = pd.read_csv(Path(__file__).with_name("measures.csv"), index_col="column")
"""A row per column of the export, in its order: either a sum of the columns that match `parts`, or
median · head^exponent · exp(men_minus_women · (sex − ½) + Σ loading · factor), where a factor is
named by kind, structure and side; rounded to `decimals`. Medians are those of heads like the MNI
template's, from which the volumes are made: 1.3 times an average head."""
DEFORMATION = 1.5  # standard deviation of a subject's displacement along each axis, mm
NOISE = 0.05  # standard deviation of either noise component of FA
FIELDS = (4, 7, 8, 7)  # control points along X, Y, Z of a subject's displacements (3) and of FA
SHELLS, DIFFUSIVITY = (5, 1000, 2000, 3000), 7e-4  # HCP's, s/mm²; mean of a tensor, mm²/s
DRAWS = 2 + np.prod(FIELDS)  # of a subject: head size, level of FA, `FIELDS`


def write_cohort(
    folder: str | Path,
    *,
    subjects: int = 200,
    spacing: float = 2.5,
    head_size: float = HEAD_SIZE,
    effect: float = 1.0,
    diffusion: int = 0,
    seed: int = 0,
    workers: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a synthetic cohort in HCP's layout, which DATA_ACCESS.md describes; return its folder.

    Memory does not depend on the number of subjects; archives already there are kept.

    Parameters
    ----------
    subjects : how many of 1113 rows, or more, have a volume.
    spacing : voxel size in mm, 0.5 to 10; 1.25 gives HCP's own grid.
    head_size : men's mean head volume less women's, over the mean of both; 0 removes the confound.
    effect : multiplies every difference planted beside it, in volumes and in FreeSurfer's table.
    diffusion : how many have, instead of an archive of FA, a package of a diffusion series.
    seed : a subject's volume depends on it and on the subject's row alone.
    workers : threads; all cores by default.
    overwrite : start anew in the folder of a synthetic cohort; a ValueError for any other folder.
    """
    folder, marker = Path(folder), Path(folder) / "SYNTHETIC"
    options = {"subjects": subjects, "spacing": float(spacing), "head_size": float(head_size)}
    options |= {"effect": float(effect), "seed": seed}
    options |= {"diffusion": diffusion} if diffusion else {}
    if subjects < 1 or not abs(head_size) < 1 or not 0.5 <= spacing <= 10:
        expected = "at least one subject, a spacing of 0.5 to 10 mm and |head_size| < 1"
        raise ValueError(f"expected {expected}, found {options}")
    beside = (path for path in folder.glob("[!.]*") if path.name != storage.RUN_RECORD)
    if not marker.is_file() and any(beside):
        raise ValueError(f"{folder}: expected an empty folder or a synthetic cohort; name another")
    stale = ("archives/*.zip", "*.csv", "*.npy", "grid.json", "fa/*.nii.gz")
    storage.start_run(folder, "synthesize", options, overwrite=overwrite, results=stale)
    storage.write_text(marker, json.dumps(options))  # first, so that nothing passes for real
    people = _draw_people(subjects, seed)
    anatomy = _, labels, affine = make_anatomy(spacing)
    storage.write_nifti(folder / "truth" / "regions.nii.gz", labels, affine)
    regions = REGIONS.drop(columns="radius_mm")
    regions["volume_ml"] = np.bincount(labels.flat)[1:] * spacing**3 / 1000
    text = regions.to_csv(index=False, float_format="%.3f")
    storage.write_text(folder / "truth" / "regions.csv", text)

    def write_subject(row: int, person: pd.Series) -> None:
        write = _write_package if row in imaged.index[:diffusion] else _write_archive
        kind = "preproc" if write is _write_package else "FA"
        path = folder / "archives" / f"{person['Subject']}_3T_Diffusion_{kind}.zip"
        if not path.is_file():
            rng, sex = np.random.default_rng([seed, row]), LABELS[person["Gender"]]
            draws = _anatomical_draws(person, seed, DRAWS)
            head = _head_volume(sex, head_size, draws[0])
            volume = _subject_volume(anatomy, head, draws, effect * (sex - 0.5), rng)
            write(path, person["Subject"], volume, affine)

    imaged = people[people["3T_dMRI_Compl"] == "true"]
    rows = tqdm(imaged.iterrows(), "synthesize", total=len(imaged), unit="subject")
    with threadpool_limits(1):  # of BLAS: subjects' small products would wait for each other
        run = joblib.Parallel(workers or joblib.cpu_count(), "threading")
        run(joblib.delayed(write_subject)(*row) for row in rows)
    _write_tables(folder, people, options)
    return folder


def head_size_alone(cohort: str | Path, folder: str | Path) -> Path:
    """Write the tables of a synthetic cohort's people anew, as if only their heads differed.

    Returns the folder. Raises FileNotFoundError for a real cohort, of which nobody knows these.
    """
    folder = Path(folder)
    options = storage.read_json(Path(cohort) / "SYNTHETIC") | {"effect": 0.0}
    storage.write_text(folder / "SYNTHETIC", json.dumps(options))
    _write_tables(folder, _draw_people(options["subjects"], options["seed"]), options)
    return folder


def _subject_volume(
    anatomy: tuple, head: float, draws: np.ndarray, effect: float, rng: Generator
) -> np.ndarray:
    """Make a subject's FA (X, Y, Z) in [0, 1], `effect` multiplying what is planted, with noise."""
    images, _, affine = anatomy
    *fields, level = (_smooth_field(images.shape[1:], f) for f in draws[2:].reshape(FIELDS))
    centre = np.linalg.solve(affine[:3, :3], (0, -18, 8) - affine[:3, 3]).reshape(3, 1, 1, 1)
    away = (np.indices(level.shape) - centre) / head ** (1 / 3)
    # where each of the subject's voxels lies in the template, as indices along X, Y, Z
    positions = away + centre + DEFORMATION / affine[0, 0] * np.stack(fields)
    mask = map_coordinates(images[1], positions, order=1) > 0.5
    fa, planted = (map_coordinates(image, positions[:, mask], order=1) for image in images[::2])
    fa *= 1 + 0.03 * draws[1] + 0.05 * level[mask]
    fa += effect * planted
    noise = NOISE * rng.standard_normal((2, *mask.shape), np.float32)[:, mask]
    volume = np.zeros(mask.shape, np.float32)
    volume[mask] = np.hypot(0.9 * fa + noise[0], noise[1])
    bright = mask & ~binary_erosion(mask) & (rng.random(mask.shape, np.float32) < 0.15)  # rim
    volume[bright] = rng.uniform(0.4, 1.0, bright.sum())
    return np.clip(volume, 0, 1)


def _smooth_field(shape: tuple[int, ...], field: np.ndarray) -> np.ndarray:
    """Make a field of unit standard deviation and about 30 mm correlation from control points."""
    field = field.astype(np.float32)
    for axis, size in enumerate(shape):
        spline = zoom(np.eye(field.shape[axis], dtype=np.float32), (size / field.shape[axis], 1))
        field = np.moveaxis(np.tensordot(spline, field, (1, axis)), 0, axis)
    return field / field.std()


def _nifti(volume: np.ndarray, affine: np.ndarray) -> bytes:
    """Make a gzipped NIfTI in HCP's LAS orientation, the same bytes on every run."""
    image = nib.Nifti1Image(volume, affine).as_reoriented([[0, -1], [1, 1], [2, 1]])
    image.set_sform(image.affine, 1)
    image.set_qform(image.affine, 1)
    return gzip.compress(image.to_bytes(), 3, mtime=0)


def _write_archive(path: Path, subject: str, volume: np.ndarray, affine: np.ndarray) -> None:
    """Write an archive that holds another one, stored, which holds the FA file."""
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        name = f"{subject}/T1w/Diffusion/dti_FA.nii.gz"
        archive.writestr(zipfile.ZipInfo(name), _nifti(volume, affine))
    with storage.atomic_path(path) as partial, zipfile.ZipFile(partial, "w") as archive:
        archive.writestr(zipfile.ZipInfo(f"{subject}/{subject}_dtifit.zip"), inner.getvalue())


def _write_package(path: Path, subject: str, fa: np.ndarray, affine: np.ndarray) -> None:
    """Write a package as HCP's, of a diffusion series without noise to which this FA is fitted."""
    bvals, rng = np.repeat(SHELLS, (3, 12, 6, 6)), np.random.default_rng(0)
    bvecs = rng.standard_normal((len(bvals), 3))
    bvecs /= np.linalg.norm(bvecs, axis=1, keepdims=True)
    main = np.moveaxis(np.indices(fa.shape, np.float32), 0, -1) - np.divide(fa.shape, 2) + 0.1
    main /= np.linalg.norm(main, axis=-1, keepdims=True)  # fibres run from the centre outwards
    share = fa / np.sqrt(3 - 2 * fa**2)  # of tensors alike in two directions, FA² = 9s² / (3 + 6s²)
    along = (main @ bvecs.T) ** 2  # (X, Y, Z, volumes)
    diffusivity = DIFFUSIVITY * (1 - share[..., None] + 3 * share[..., None] * along)
    signal = 10_000 * np.exp(-bvals * diffusivity) * (fa[..., None] > 0)
    files = {"bvals": " ".join(map(str, bvals)) + "\n"}
    files["bvecs"] = "".join(" ".join(f"{x:.6f}" for x in row) + "\n" for row in bvecs.T)
    files["data.nii.gz"] = _nifti(signal.round().astype(np.int16), affine)
    files["nodif_brain_mask.nii.gz"] = _nifti((fa > 0).astype(np.uint8), affine)
    with storage.atomic_path(path) as partial, zipfile.ZipFile(partial, "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(f"{subject}/T1w/Diffusion/{name}"), content)


def _write_tables(folder: Path, people: pd.DataFrame, options: dict) -> None:
    """Write the three tables; the behavioural one last: where it is, all is written."""
    sizes = {name: options[name] for name in ("head_size", "effect", "seed")}
    for name, table in {
        "unrestricted_hcp_freesurfer": _freesurfer_table(people, **sizes),
        "restricted": people[RESTRICTED],
        "unrestricted_behavioral": people[BEHAVIOURAL],
    }.items():
        storage.write_text(folder / f"{name}.csv", table.to_csv(index=False))


def _draw_people(subjects: int, seed: int) -> pd.DataFrame:
    """Draw 1113 people or more, of whom `subjects` have a volume, with HCP's share of men.

    Half of the families of two or more have twins, three in five of them identical; whole families
    have volumes, as far as the numbers allow. Returns a row a person, in the order of IDs, which
    begin with 0, as none of HCP's does; family, twins and own are numbers that relatives share.
    """
    rng, rows = np.random.default_rng(seed), max(ROWS, subjects)
    numbers = np.sort(rng.choice(np.arange(1000, 100_000), rows, replace=False))
    people = _draw_kinship(rows, rng)
    men, imaged_men = (round(n * MEN / ROWS) for n in (rows, subjects))
    sex = _choose_whole(people["twins"], np.zeros(rows, int), [men], rng).astype(int)
    imaged = _choose_whole(people["family"], sex, [subjects - imaged_men, imaged_men], rng)
    mean_age = 28.9 - 1.4 * pd.Series(sex).groupby(people["birth"]).transform("mean")
    age = mean_age + 3.5 * rng.standard_normal(rows)[people["birth"]]
    age = np.clip(age.round(), 22, 37).astype(int)
    mother, father = 50_000 + people["family"], 80_000 + people["family"]
    columns = {
        "Subject": [f"{n:06d}" for n in numbers],
        "Release": rng.choice(["S500", "S900", "S1200"], rows),
        "Acquisition": [f"Q{n:02d}" for n in rng.integers(1, 14, rows)],
        "Gender": np.array(list(LABELS))[sex],
        "Age": np.array(["22-25", "26-30", "31-35", "36+"])[np.digitize(age, (26, 31, 36))],
        "QC_Issue": "",
        "3T_dMRI_Compl": np.where(imaged, "true", "false"),
        "Age_in_Yrs": age,
        "Family_ID": mother.astype(str) + "_" + father.astype(str),
        "Mother_ID": mother,
        "Father_ID": father,
    }
    return people.assign(**columns)


def _draw_kinship(rows: int, rng: Generator) -> pd.DataFrame:
    """Draw family, twins, own, birth (a number that twins have in common) and HCP's zygosity."""
    sizes = rng.choice(np.arange(1, len(FAMILY_SIZES) + 1), rows, p=FAMILY_SIZES)
    family = np.repeat(np.arange(rows), sizes)[:rows]
    eldest = np.diff(family, prepend=-1) > 0
    first = np.flatnonzero(eldest & (np.diff(family, append=rows) == 0))
    first = first[rng.random(len(first)) < 0.5]
    identical = first[rng.random(len(first)) < 0.6]
    own, birth, twins = (np.arange(rows) for _ in range(3))
    birth[first + 1], twins[identical + 1] = first, identical
    zygosity = np.full(rows, "NotTwin", dtype=object)
    zygosity[[*first, *(first + 1)]] = "NotMZ"
    zygosity[[*identical, *(identical + 1)]] = "MZ"
    kin = {"family": family, "twins": twins, "own": own, "birth": birth, "ZygositySR": zygosity}
    return pd.DataFrame(kin).iloc[rng.permutation(rows)].reset_index(drop=True)


def _choose_whole(units: pd.Series, kind: np.ndarray, room: list, rng: Generator) -> np.ndarray:
    """Choose (N,) bool as many of each kind as there is room, units whole as far as they fit."""
    chosen, left = np.zeros(len(units), bool), np.array(room)
    for names in (units, np.arange(len(units))):
        members = list(pd.Series(kind).groupby(np.asarray(names)).indices.values())
        for n in rng.permutation(len(members)):
            wanted = np.bincount(kind[members[n]], minlength=len(left))
            if not chosen[members[n]].any() and (wanted <= left).all():
                chosen[members[n]] = True
                left -= wanted
    return chosen


def _anatomical_draws(person: pd.Series, seed: int, count: int) -> np.ndarray:
    """Draw standard normal numbers (count,) of a person; those of relatives correlate."""
    keys = ([seed, n, person[name]] for n, name in enumerate(SHARES, 1))
    draws = (np.random.default_rng(key).standard_normal(count) for key in keys)
    return sum(math.sqrt(share) * values for share, values in zip(SHARES.values(), draws))


def _correlated_draws(people: pd.DataFrame, rng: Generator, count: int) -> np.ndarray:
    """Draw standard normal numbers (N, count) of all people; those of relatives correlate."""
    draws = zip(SHARES.items(), rng.standard_normal((len(SHARES), len(people), count)))
    return sum(math.sqrt(share) * values[people[name]] for (name, share), values in draws)


def _head_volume(sex: np.ndarray, head_size: float, draw: np.ndarray) -> np.ndarray:
    """Return head volume relative to the template, by sex and the first anatomical draw."""
    return 1 + head_size * (sex - 0.5) + HEAD_SPREAD * np.clip(draw, -2.5, 2.5)


def _freesurfer_table(
    people: pd.DataFrame, *, head_size: float = HEAD_SIZE, effect: float = 1.0, seed: int = 0
) -> pd.DataFrame:
    """Make FreeSurfer's measures of N people (`_draw_people`), with the heads of their volumes.

    Returns (N, 938): Subject, Release, Gender and 935 columns ``FS_…``; volumes in mm³, areas in
    mm², thickness in mm. The export calls the right cerebellar cortex left, so that seven names
    stand twice.
    """
    sex = people["Gender"].map(LABELS).to_numpy()[:, None]
    first_draws = [_anatomical_draws(person, seed, 1) for _, person in people.iterrows()]
    head = _head_volume(sex, head_size, np.array(first_draws))
    median, exponent, difference = MEASURES.loc[:, "median":"men_minus_women"].to_numpy().T
    loadings = MEASURES[["loading_1", "loading_2"]].fillna(0).to_numpy()
    sides = MEASURES[["factor_1", "factor_2"]].fillna("")
    levels = [sides.replace(end, "", regex=True) for end in (" .+$", " [^ ]+$", "^$")]
    names, positions = np.unique(levels, return_inverse=True)  # of kinds, structures and sides
    draws = _correlated_draws(people, np.random.default_rng([seed, 1]), len(names))
    shares = zip(FACTOR_SHARES, positions)  # of the measures' two factors, of unit variance
    scores = sum(math.sqrt(share) * draws[:, position] for share, position in shares)
    deviation = effect * (sex - 0.5) * difference + (loadings * scores).sum(-1)
    values = median * head**exponent * np.exp(deviation)
    table = pd.DataFrame(values, people.index, MEASURES.index).round(MEASURES["decimals"])
    for column, parts in MEASURES["parts"].dropna().items():
        table[column] = table.filter(regex=parts).sum(axis=1)
    for name in ("BrainSeg", "Mask"):
        table[f"{name}Vol_eTIV_Ratio"] = table[f"{name}_Vol"] / table["InterCranial_Vol"]
    table = table.round(MEASURES["decimals"])
    table.columns = "FS_" + table.columns.str.replace("R_Cerebellum_Cort", "L_Cerebellum_Cort")
    return pd.concat([people[["Subject", "Release", "Gender"]], table], axis=1)
