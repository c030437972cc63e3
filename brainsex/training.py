"""Fitting, prediction and cross-validation, after the study: Adam, cross-entropy, k folds.

An epoch's random draws come from (seed, epoch): an interrupted run goes on to the same weights.
"""

import hashlib
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import joblib
import nibabel as nib
import numpy as np
import pandas as pd
import torch
from nibabel.orientations import axcodes2ornt, ornt_transform
from torch import Tensor, nn
from tqdm.auto import tqdm

from brainsex import SHAPE, evaluation, layouts, networks, speed, storage
from brainsex import volumes as volume_files
from brainsex.cohort import Cohort, VolumeRows, check_grid, digest
from brainsex.confounds import RegressedVolumes


@dataclass(frozen=True)
class History:
    """Training curves: epoch, train_loss, train_accuracy, and validation_loss and -_accuracy."""

    epochs: pd.DataFrame


def fit(
    network: nn.Module,
    volumes: np.ndarray,
    sex: np.ndarray,
    *,
    validation: tuple[np.ndarray, np.ndarray] | None = None,
    epochs: int = 20,
    batch_size: int = 45,
    lr: float = 3e-4,
    milestones: Sequence[int] = (),
    seed: int = 0,
    precision: torch.dtype | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> History:
    """Fit a network in place; the weights kept are those of the last epoch.

    Parameters
    ----------
    network : (N, 1, X, Y, Z) to logits (N, 2), or (N, S, 2) of slabs, labelled as their subject.
    volumes, sex : (N, X, Y, Z) float32, perhaps memory-mapped, read by batches; (N,) 0 or 1.
    validation : another such pair, evaluated once an epoch; it chooses nothing.
    batch_size : subjects at most; the batches of an epoch are equal in size, give or take one.
    lr, milestones : Adam's rate (FloatingPointError if the loss diverges), a tenth after each.
    precision : torch.bfloat16 or float32; by default the machine's faster one.
    checkpoint : file to save to after each epoch and to resume from; ValueError if another call's.
    """
    for array, labels in (volumes, sex), validation or (volumes, sex):
        if len(array) != len(labels) or len(labels) == 0 or not np.isin(labels, (0, 1)).all():
            counts = f"{len(array)} and {len(labels)}, which are {np.unique(labels)}"
            raise ValueError(f"expected volumes, and as many labels 0 or 1: found {counts}.")
    device = networks.device()
    dtype = precision or networks.fast_precision(device)
    labels = torch.as_tensor(np.array(sex), dtype=torch.long, device=device)
    options = (epochs, batch_size, lr, tuple(milestones), seed, dtype)
    call = repr((str(network), tuple(volumes.shape), labels.tolist(), *options))
    networks.to_device(network, device)
    optimiser = torch.optim.Adam(network.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, list(milestones))
    parts = {"network": network, "optimiser": optimiser, "schedule": schedule}
    history = _resume(checkpoint, call, parts, device)
    start = len(history)
    bar = tqdm(range(start, epochs), "fit", epochs, initial=start, disable=not progress)
    with bar, torch.random.fork_rng(), speed.float32_convolutions():
        for epoch in bar:
            torch.manual_seed((seed << 20) + epoch)
            row = {"epoch": epoch + 1}
            row |= _fit_epoch(network, optimiser, _read_batches(volumes, labels, batch_size), dtype)
            if not np.isfinite(row["train_loss"]):
                raise FloatingPointError(f"epoch {epoch + 1}: the loss is not finite. Lower lr.")
            schedule.step()
            if validation is not None:
                logits = speed.predict_logits(network, validation[0], dtype)
                loss, correct = _score_logits(logits, torch.as_tensor(np.array(validation[1])))
                row["validation_loss"] = loss.item()
                row["validation_accuracy"] = correct / len(logits)
            history.append(row)
            if checkpoint is not None:
                states = {name: part.state_dict() for name, part in parts.items()}
                _save(checkpoint, {"call": call, "history": history, **states})
            bar.set_postfix({name: f"{value:.3f}" for name, value in row.items()})
    network.eval().to("cpu", memory_format=torch.contiguous_format)
    return History(pd.DataFrame(history))


def _read_batches(volumes: np.ndarray, labels: Tensor, batch_size: int) -> Iterator[tuple]:
    """Yield everybody's volumes and labels once, in random order."""
    for rows in torch.randperm(len(labels)).tensor_split(-(-len(labels) // batch_size)):
        yield speed.read_batch(volumes, rows.numpy(), labels.device), labels[rows]


def _fit_epoch(
    network: nn.Module, optimiser: torch.optim.Optimizer, batches: Iterable, dtype: torch.dtype
) -> dict[str, float]:
    """Take a step for each batch of volumes and labels; return running loss and accuracy."""
    network.train()
    loss_sum = correct_sum = count = 0
    for volumes, labels in batches:
        with speed.autocast(volumes.device, dtype):
            logits = speed.training_forward(network, volumes).float()
        loss, correct = _score_logits(logits, labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        loss_sum += loss.item() * len(labels)
        correct_sum += correct
        count += len(labels)
    return {"train_loss": loss_sum / count, "train_accuracy": correct_sum / count}


def _score_logits(logits: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """Return the mean cross-entropy, of all slabs, and how many subjects are classified right."""
    targets = labels.long().repeat_interleave(logits[0].numel() // 2)
    loss = nn.functional.cross_entropy(logits.reshape(-1, 2), targets)
    correct = networks.average_slab_logits(logits).argmax(1) == labels
    return loss, correct.sum().item()


def _save(path: str | Path, content: dict) -> None:
    """Write as `torch.save`, which alone makes a nameless RuntimeError of a full disk."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with storage.atomic_path(path) as partial:
        partial.write_bytes(buffer.getvalue())


def _resume(path: str | Path | None, call: str, parts: dict, device: torch.device) -> list:
    """Restore the states in a checkpoint, if there is one, and return its history."""
    if path is None or not Path(path).is_file():
        return []
    with storage.reading(path, "a checkpoint of the same call of fit", "delete it"):
        saved = networks.read_checkpoint(path, device)
        if saved["call"] != call:
            raise ValueError("settings, volumes or labels differ")
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        return saved["history"]


def predict(network: nn.Module, volumes: np.ndarray) -> np.ndarray:
    """Predict probabilities (N, 2) of woman and man, float32, for finite volumes (N, X, Y, Z).

    A network of slabs gives those of its slabs' mean log-odds. A copy computes in float32; on a CPU
    no volume's depend on the others, to the bit. Raises ValueError where one is not finite.
    """
    if len(volumes) == 0:
        raise ValueError("expected volumes (N, X, Y, Z), found none.")
    logits = speed.predict_logits(network, volumes, torch.float32)
    probabilities = networks.average_slab_logits(logits).softmax(1).numpy()
    if bad := np.flatnonzero(~np.isfinite(probabilities).all(1)).tolist():
        raise ValueError(f"volumes {bad[:10]}: no finite probability. Clean the volumes first.")
    return probabilities


def slab_log_odds(network: networks.MriNet2d, volumes: np.ndarray) -> np.ndarray:
    """Compute the log-odds of man of each slab, (N, S) float32, of volumes (N, X, Y, Z)."""
    logits = speed.predict_logits(network, volumes, torch.float32).numpy()
    return logits[..., 1] - logits[..., 0]


def cross_validate(
    cohort: Cohort,
    make_network: Callable[[], nn.Module],
    *,
    folds: int = 10,
    seed: int = 0,
    milestones: Sequence[int] = (5, 15),
    only: Sequence[int] | None = None,
    assignment: np.ndarray | None = None,
    confounds: np.ndarray | None = None,
    out: str | Path | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    **settings: object,
) -> pd.DataFrame:
    """Fit and test one network a fold. The last epoch's is kept, so no test fold chooses anything.

    Parameters
    ----------
    folds, seed : of `evaluation.folds`, unless there is an `assignment` (N,) to folds from 0 on.
    milestones, settings : of `fit`.
    only : folds to fit, all by default; finished ones are read.
    confounds : (N, K), regressed out of each voxel inside the training folds.
    out : folder for ``fold-K.pt`` (state dicts), ``fold-K.json``, ``folds.csv`` and ``run.json``.
    workers : folds at once on a CPU, by default as many as cores; 3 GB each at the study's sizes.
    overwrite : start anew in a folder of other data or settings, else a ValueError.

    Returns a row a subject of these folds: Subject, fold, sex, probability (of man), and in
    ``.attrs["history"]`` the records of `History.epochs`, with their fold.
    """
    if assignment is None:
        assignment = evaluation.folds(cohort.sex, groups=cohort.groups, folds=folds, seed=seed)
    folds = int(assignment.max()) + 1
    only = list(range(folds)) if only is None else sorted(set(only))
    if not set(only) <= set(range(folds)):
        raise ValueError(f"expected some of folds 0 to {folds - 1}, found {only}.")
    settings |= {"seed": seed, "milestones": tuple(milestones)}
    cores = joblib.cpu_count()
    jobs = min(len(only), workers or cores) if networks.device().type == "cpu" else 1
    threads = torch.get_num_threads() if jobs <= 1 else max(1, cores // jobs)
    with nullcontext(out) if out is not None else tempfile.TemporaryDirectory() as folder:
        run = _Run(Path(folder), cohort, assignment, make_network, confounds, settings)
        _record(run, overwrite)
        results = joblib.Parallel(max(1, jobs), return_as="generator")(
            joblib.delayed(_fit_fold)(run, fold, threads, os.getpid()) for fold in only
        )
        records = list(tqdm(results, "cross-validate", total=len(only), unit="fold"))
    predictions = pd.DataFrame({"Subject": cohort.subjects, "fold": assignment, "sex": cohort.sex})
    predictions["probability"] = np.nan
    for fold, record in zip(only, records):
        predictions.loc[assignment == fold, "probability"] = record["probability"]
    predictions = predictions[np.isin(assignment, only)].reset_index(drop=True)
    predictions.attrs["history"] = [row for record in records for row in record["history"]]
    return predictions


@dataclass(frozen=True)
class _Run:
    """What the folds of a cross-validation have in common."""

    out: Path
    cohort: Cohort
    assignment: np.ndarray
    make_network: Callable[[], nn.Module]
    confounds: np.ndarray | None
    settings: dict


def _record(run: _Run, overwrite: bool) -> None:
    """Write what the folds depend on to ``run.json``, and who is in which to ``folds.csv``."""
    with torch.random.fork_rng():
        network = str(run.make_network())
    cohort, confounds = run.cohort, () if run.confounds is None else np.ravel(run.confounds)
    grid = {
        "shape": cohort.volumes.shape[1:],
        "affine": None if cohort.affine is None else cohort.affine.tolist(),
        "modality": cohort.modality,
        "normalised": cohort.normalised,
    }
    assignment = hashlib.sha256(repr((*run.assignment, *confounds)).encode()).hexdigest()
    facts = {"network": network, "grid": grid, "cohort": digest(cohort), "assignment": assignment}
    results = ("fold-*.pt", "fold-*.json", ".fold-*")
    storage.start_run(run.out, "train", run.settings | facts, overwrite=overwrite, results=results)
    table = pd.DataFrame({"Subject": cohort.subjects, "fold": run.assignment}).to_csv(index=False)
    path = run.out / "folds.csv"
    if not path.is_file() or path.read_text(encoding="utf-8") != table:
        storage.write_text(path, table)


def _fit_fold(run: _Run, fold: int, threads: int, parent_pid: int) -> dict:
    """Fit and test one fold, or read its record if it is finished."""
    storage.exit_with_parent(parent_pid)
    path, weights = run.out / f"fold-{fold}.json", run.out / f"fold-{fold}.pt"
    train, test = np.flatnonzero(run.assignment != fold), np.flatnonzero(run.assignment == fold)
    if path.is_file() and weights.is_file():
        return storage.read_json(path)
    torch.set_num_threads(threads)
    seed = 1000 * run.settings["seed"] + fold
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = run.make_network()
    volumes, checkpoint = run.cohort.volumes, run.out / f".fold-{fold}.checkpoint"
    if run.confounds is not None:
        volumes = RegressedVolumes(volumes, run.confounds, train)
    seen, held_out = ((VolumeRows(volumes, rows), run.cohort.sex[rows]) for rows in (train, test))
    options = {"progress": False, **run.settings, "seed": seed, "checkpoint": checkpoint}
    history = fit(network, *seen, validation=held_out, **options).epochs.assign(fold=fold)
    probability = predict(network, held_out[0])[:, 1].tolist()
    record = {"probability": probability, "history": history.to_dict("records")}
    _save(weights, network.state_dict())
    storage.write_text(path, json.dumps(record))
    checkpoint.unlink(missing_ok=True)
    return record


def predict_files(
    checkpoint: str | Path, paths: Sequence[Path], *, orientation: str = "RAS"
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Predict the sex of NIfTI volumes at native resolution, prepared as the training cohort was.

    ``run.json`` beside the checkpoint (``fold-K.pt``) names the cohort's grid and modality. Without
    it, as for a state dict of the published architecture, they are FA of any field of view.
    `orientation` is that of the arrays which the network was fitted to: ours are RAS; HCP's files
    read without their affine are LAS, the mirror image. Raises ValueError if there is no such one.

    Returns Subject and probability_of_man; and Subject and reason of the volumes left out.
    """
    checkpoint = Path(checkpoint)
    record, grid = checkpoint.with_name(storage.RUN_RECORD), {"shape": SHAPE}
    if record.is_file():
        grid = storage.read_json(record).get("train", {}).get("grid", grid)
    grid = check_grid(grid, record)
    if sorted(orientation.translate(str.maketrans("LPI", "RAS"))) != ["A", "R", "S"]:
        raise ValueError(f"expected an orientation such as RAS or LAS, found {orientation}.")
    turn = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(orientation))
    network, rows, rejected = networks.load(checkpoint, grid["shape"]), [], []
    for path in tqdm(paths, "predict", unit="volume"):
        try:
            volume, affine, _ = volume_files.prepare(path, grid["modality"], grid["normalised"])
            image = nib.Nifti1Image(volume, affine).as_reoriented(turn)
            small, affine = volume_files.resample(image.dataobj, image.affine, network.shape)
            if grid["affine"] is not None and not np.allclose(affine, grid["affine"], atol=1e-3):
                expected, actual = (np.round(a, 3).tolist() for a in (grid["affine"], affine))
                raise ValueError(
                    f"{path}: expected the training cohort's field of view, of affine {expected} "
                    f"on the network's grid, found {actual}."
                )
            probability = predict(network, np.asarray(small)[None])[0, 1]
            rows.append((layouts.subject_of(path), probability))
        except (ValueError, OSError) as error:
            rejected.append((layouts.subject_of(path), str(error)))
    reasons = pd.DataFrame(rejected, columns=["Subject", "reason"])
    return pd.DataFrame(rows, columns=["Subject", "probability_of_man"]), reasons
