"""Fitting, prediction and cross-validation, after the study: Adam, cross-entropy, k folds.

An epoch's random draws come from (seed, epoch): an interrupted run goes on to the same weights.
"""

import hashlib
import io
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from brainsex import evaluation, networks, ranks, read_record, replacing, runs, write
from brainsex.cohort import Cohort, Rows, fingerprint
from brainsex.confounds import Residuals


@dataclass(frozen=True)
class History:
    """An epoch a row: train_loss, train_accuracy (running), and validation_loss and -_accuracy."""

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
    """Train a network in place; the weights kept are the last epoch's.

    Parameters
    ----------
    network : (N, 1, X, Y, Z) to logits (N, 2), or (N, S, 2) of slabs, each labelled as its subject.
    volumes, sex : (N, X, Y, Z) float32, perhaps memory-mapped, read batch by batch; (N,) 0 or 1.
    validation : the same pair; evaluated once an epoch. It chooses nothing.
    batch_size : subjects at most; the batches of an epoch are of equal size, give or take one.
    lr, milestones : Adam's rate (too high: FloatingPointError), a tenth after each of these epochs.
    seed : of the batches and the dropout.
    precision : by default bfloat16 autocast where the machine gains from it, else float32.
    checkpoint : file to save to after each epoch and to resume from; of another call: ValueError.
    """
    for given, of in ((volumes, sex), validation or (volumes, sex)):
        if len(given) != len(of) or len(of) == 0 or not np.isin(of, (0, 1)).all():
            found = f"{len(given)} and {len(of)}, which are {np.unique(of)}"
            raise ValueError(f"expected volumes, and as many labels 0 or 1: found {found}.")
    device = networks.device()
    dtype = precision or networks.precision(device)
    labels = torch.as_tensor(np.array(sex), dtype=torch.long, device=device)
    options = (epochs, batch_size, lr, tuple(milestones), seed, dtype)
    call = repr((str(network), tuple(volumes.shape), labels.tolist(), *options))
    networks.place(network, device)
    optimiser = torch.optim.Adam(network.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, list(milestones))
    parts = {"network": network, "optimiser": optimiser, "schedule": schedule}
    history: list[dict] = []
    if checkpoint is not None and Path(checkpoint).is_file():
        history = _resume(Path(checkpoint), call, parts, device)
    bar = tqdm(range(epochs), initial=len(history), desc="fit", unit="epoch", disable=not progress)
    with bar, torch.random.fork_rng():
        for epoch in range(len(history), epochs):
            torch.manual_seed((seed << 20) + epoch)
            row = {"epoch": epoch + 1}
            row |= _epoch(network, optimiser, volumes, labels, batch_size, dtype)
            if not np.isfinite(row["train_loss"]):
                raise FloatingPointError(f"epoch {epoch + 1}: the loss is not finite. Lower lr.")
            schedule.step()
            if validation is not None:
                row |= _evaluate(network, *validation, dtype)
            history.append(row)
            if checkpoint is not None:
                saved = {name: part.state_dict() for name, part in parts.items()}
                _save(Path(checkpoint), {"call": call, "history": history, **saved})
            bar.update()
            bar.set_postfix({name: f"{value:.3f}" for name, value in row.items()})
    network.eval().to("cpu", memory_format=torch.contiguous_format)
    return History(pd.DataFrame(history))


def _save(path: Path, content: dict) -> None:
    """As `torch.save`, which makes a RuntimeError of a full disk, and names no file."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with replacing(path) as partial:
        partial.write_bytes(buffer.getvalue())


def _resume(checkpoint: Path, call: str, parts: dict, device: torch.device) -> list[dict]:
    """Put the parts back as a checkpoint of the same call has them; its history."""
    try:
        saved = networks.read(checkpoint, device)
        if saved["call"] == call:
            for name, part in parts.items():
                part.load_state_dict(saved[name])
            pd.DataFrame(saved["history"])["epoch"]
            return saved["history"]
    except networks.UNREADABLE as error:
        why = " ".join(str(error).split())
        raise ValueError(f"{checkpoint}: no checkpoint ({why:.1000}). Delete it.") from error
    raise ValueError(f"{checkpoint} is of another call. Delete it, or name another file.")


def _epoch(network, optimiser, volumes, labels: Tensor, batch_size: int, dtype) -> dict[str, float]:
    """One pass over the volumes in random order; running loss and accuracy."""
    network.train()
    loss_sum = correct = 0.0
    for rows in torch.randperm(len(labels)).tensor_split(-(-len(labels) // batch_size)):
        target, batch = labels[rows], networks.batch(volumes, rows.numpy(), labels.device)
        with networks.autocast(labels.device, dtype):
            logits = network(batch).float()
        loss = _loss(logits, target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        loss_sum += loss.item() * len(rows)
        correct += (networks.by_subject(logits).argmax(1) == target).sum().item()
    return {"train_loss": loss_sum / len(labels), "train_accuracy": correct / len(labels)}


def _loss(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy of logits (N, 2), or of those of slabs (N, S, 2), for targets (N,)."""
    slabs = logits[0].numel() // 2
    return nn.functional.cross_entropy(logits.reshape(-1, 2), target.repeat_interleave(slabs))


def _evaluate(network, volumes, sex, dtype) -> dict[str, float]:
    """Loss and accuracy of one pass in evaluation mode."""
    logits = networks.evaluate(network, volumes, dtype)
    labels = torch.as_tensor(np.array(sex), dtype=torch.long)
    accuracy = (networks.by_subject(logits).argmax(1) == labels).double().mean()
    return {"validation_loss": _loss(logits, labels).item(), "validation_accuracy": accuracy.item()}


def predict(network: nn.Module, volumes: np.ndarray) -> np.ndarray:
    """Probabilities (N, 2) of woman and man, float32, of finite volumes (N, X, Y, Z), at least one.

    Of slabs: of the mean of their log-odds. A copy of the network runs, in float32. On a CPU no
    volume's depend on the others, to the bit.
    """
    if len(volumes) == 0:
        raise ValueError("expected volumes (N, X, Y, Z), found none.")
    logits = networks.evaluate(network, volumes, torch.float32)
    probabilities = networks.by_subject(logits).softmax(1).numpy()
    if bad := np.flatnonzero(~np.isfinite(probabilities).all(1)).tolist():
        raise ValueError(f"volumes {bad[:10]}: no finite probability. Clean the volumes first.")
    return probabilities


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
    **settings,
) -> pd.DataFrame:
    """Fit and test one network a fold. The last epoch's is kept, so no test fold chooses anything.

    Parameters
    ----------
    make_network : called under ``torch.manual_seed``, once a fold.
    folds, seed : of `evaluation.folds`, unless there is an assignment (N,) to folds from 0 on.
    milestones, settings : of `fit`.
    only : the folds to run, where not all; the others can follow in another call.
    confounds : (N, K), regressed out of each voxel inside the training folds.
    out : folder for ``fold-K.pt`` (state dicts), ``folds.csv`` (Subject, fold) and ``run.json``.
        Folds finished there are kept, half done they are resumed; of other data or settings, they
        are deleted.
    workers : folds at once on a CPU, by default as many as cores; 3 GB each at the study's sizes.

    The processes of `ranks` share the folds, and all return all of them. On a CPU the bits depend
    on a fold's threads, which are what they would be in one process, unless `workers` is 1.

    Returns
    -------
    One row a subject of the folds run, in the cohort's order: Subject, fold, sex, probability (of
    man); ``.attrs["history"]``: `History.epochs` as records, with the fold, its own validation.
    """
    if assignment is None:
        assignment = evaluation.folds(cohort.sex, groups=cohort.groups, folds=folds, seed=seed)
    folds = int(assignment.max()) + 1
    chosen = list(range(folds)) if only is None else sorted(set(only))
    if not chosen or not set(chosen) <= set(range(folds)):
        raise ValueError(f"expected some of folds 0 to {folds - 1}, found {only}.")
    settings["milestones"] = tuple(milestones)
    cores = joblib.cpu_count()
    jobs = min(len(chosen), workers or cores) if networks.device().type == "cpu" else 1
    threads = torch.get_num_threads() if jobs == 1 else max(1, cores // jobs)
    mine = ranks.mine(chosen)
    at_once = max(1, min(len(mine), jobs // ranks.beside()))
    with (
        nullcontext(out) if out is not None else tempfile.TemporaryDirectory() as folder,
        runs.alone(folder),
    ):
        run = Path(folder), cohort, assignment, make_network, confounds
        if ranks.first():
            _prepare(*run, {"folds": folds, "seed": seed, **settings})
        ranks.gather()  # nobody trains before the folder is prepared
        done = joblib.Parallel(at_once, return_as="generator")(
            joblib.delayed(_fold)(os.getpid(), *run, fold, 1000 * seed + fold, threads, settings)
            for fold in mine
        )
        bar = {"total": len(mine), "unit": "fold", "disable": not ranks.first()}
        records = list(tqdm(done, "cross-validate", **bar))
        found = ranks.gather(dict(zip(mine, records)))
    records = {fold: one[fold] for fold in chosen for one in found if fold in one}
    predictions = pd.DataFrame({"Subject": cohort.subjects, "fold": assignment, "sex": cohort.sex})
    for fold, record in records.items():
        predictions.loc[assignment == fold, "probability"] = record["probability"]
    predictions = predictions[np.isin(assignment, chosen)].reset_index(drop=True)
    predictions.attrs["history"] = [row for one in records.values() for row in one["history"]]
    return predictions


def _prepare(out: Path, cohort, assignment, make_network, confounds, settings: dict) -> None:
    """Record the run; delete what another left: its networks may have seen what is held out now."""
    with torch.random.fork_rng():
        network = str(make_network())
    numbers = () if confounds is None else np.ravel(confounds)
    facts = {name: str(value) for name, value in settings.items()}
    facts["cohort"] = fingerprint(cohort.subjects, cohort.sex, cohort.volumes)
    facts["assignment"] = hashlib.sha256(repr((*assignment, *numbers)).encode()).hexdigest()
    grid = {
        "shape": cohort.volumes.shape[1:],
        "affine": None if cohort.affine is None else cohort.affine.tolist(),
        "modality": cohort.modality,
        "normalised": cohort.normalised,
    }
    facts |= {"network": network, "grid": grid}
    if not runs.same(out, "train", **facts):
        for stale in (*out.glob("fold-*.pt"), *out.glob("fold-*.json"), *out.glob(".fold-*")):
            stale.unlink()
    runs.record(out, "train", **facts)
    table = pd.DataFrame({"Subject": cohort.subjects, "fold": assignment})
    write(out / "folds.csv", table.to_csv(index=False))


def _finished(result: Path, count: int) -> dict:
    """The record of a fold that is done, of so many held-out subjects."""
    record = read_record(result)
    try:
        found = np.asarray(record.get("probability"), float)
    except (ValueError, TypeError, OverflowError):
        found = np.empty(0)
    history = record.get("history")
    rows = isinstance(history, list) and all(isinstance(row, dict) for row in history)
    if found.shape != (count,) or not np.isfinite(found).all() or not rows:
        raise ValueError(f"{result}: expected {count} probabilities and a history. Delete it.")
    return record


def _fold(
    parent, out, cohort, assignment, make_network, confounds, fold, seed, threads, settings
) -> dict:
    """Train and test one fold, unless it is done."""
    runs.follow(parent)
    result, weights = out / f"fold-{fold}.json", out / f"fold-{fold}.pt"
    if result.is_file() and weights.is_file():
        return _finished(result, int((assignment == fold).sum()))
    torch.set_num_threads(threads)
    parts = [np.flatnonzero(rows) for rows in (assignment != fold, assignment == fold)]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = make_network()
    checkpoint, volumes = out / f".fold-{fold}.checkpoint", cohort.volumes
    if confounds is not None:
        volumes = Residuals(volumes, confounds, parts[0])
    seen, held_out = ((Rows(volumes, rows), cohort.sex[rows]) for rows in parts)
    options = {"seed": seed, "checkpoint": checkpoint, "progress": False} | settings
    history = fit(network, *seen, validation=held_out, **options).epochs.assign(fold=fold)
    probability = predict(network, held_out[0])[:, 1].tolist()
    record = {"probability": probability, "history": history.to_dict("records")}
    _save(weights, network.state_dict())
    write(result, json.dumps(record))
    checkpoint.unlink(missing_ok=True)
    return record
