"""Fitting, prediction and cross-validation, after the study: Adam, cross-entropy, k folds.

Every random draw of an epoch comes from (seed, epoch), so a run that was interrupted goes on to
the same weights as one that was not.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from brainsex import evaluation, networks, replacing
from brainsex.cohort import Cohort, Rows
from brainsex.confounds import Residuals


@dataclass(frozen=True)
class History:
    """One row an epoch: epoch, train_loss, train_accuracy (running, in training mode, as the
    weights move), validation_loss, validation_accuracy (after the epoch, in evaluation mode)."""

    epochs: pd.DataFrame


def _check(volumes: np.ndarray, sex: np.ndarray) -> None:
    if len(volumes) != len(sex) or len(sex) == 0 or not np.isin(sex, (0, 1)).all():
        raise ValueError(
            "expected volumes, and as many labels 0 or 1: "
            f"found {len(volumes)} and {len(sex)}, which are {np.unique(sex)}."
        )


def fit(
    network: nn.Module,
    volumes: np.ndarray,
    sex: np.ndarray,
    *,
    validation: tuple[np.ndarray, np.ndarray] | None = None,
    epochs: int = 20,
    batch_size: int = 45,
    lr: float = 3e-4,
    weight_decay: float = 0.0,
    milestones: Sequence[int] = (),
    seed: int = 0,
    precision: torch.dtype | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> History:
    """Train a network in place; the weights kept are the last epoch's.

    Parameters
    ----------
    network : takes (N, 1, X, Y, Z), returns logits (N, 2), or (N, S, 2) of S slabs, each of which
        is then labelled as its subject; made by the caller.
    volumes : (N, X, Y, Z) float32; may be memory-mapped, is read batch by batch.
    sex : (N,) 0 or 1.
    validation : the same pair; evaluated once an epoch, without gradients. It chooses nothing.
    batch_size : subjects at most (slabs come with theirs: the study's 128 are 9 subjects of 14);
        the batches of an epoch are of equal size, give or take one.
    lr, weight_decay : of Adam.
    milestones : epochs after which the rate is multiplied by 0.1; the study's cross-validation
        has (5, 15).
    seed : of the batches and the dropout.
    precision : by default bfloat16 autocast where the machine gains from it, else float32.
    checkpoint : file to save to after each epoch and to resume from; of the same call only.

    Raises
    ------
    ValueError
        Labels other than 0 and 1, lengths that differ, or a checkpoint of another call.
    FloatingPointError
        The loss is not finite.
    """
    _check(volumes, sex)
    if validation is not None:
        _check(*validation)
    device = networks.device()
    dtype = precision or networks.precision(device)
    labels = torch.as_tensor(np.array(sex), dtype=torch.long)
    options = (epochs, batch_size, lr, weight_decay, tuple(milestones), seed, dtype)
    call = repr((str(network), tuple(volumes.shape), labels.tolist(), *options))
    networks.place(network, device)
    optimiser = torch.optim.Adam(network.parameters(), lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, list(milestones))
    parts = {"network": network, "optimiser": optimiser, "schedule": schedule}
    history: list[dict] = []
    if checkpoint is not None and Path(checkpoint).is_file():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        if saved["call"] != call:
            raise ValueError(f"{checkpoint} is of another call. Delete it, or name another file.")
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        history = saved["history"]
    bar = tqdm(range(epochs), initial=len(history), desc="fit", unit="epoch", disable=not progress)
    with bar, torch.random.fork_rng():
        for epoch in range(len(history), epochs):
            torch.manual_seed((seed << 20) + epoch)
            scores = _epoch(network, optimiser, volumes, labels, batch_size, dtype)
            row = {"epoch": epoch + 1, **scores}
            if not np.isfinite(row["train_loss"]):
                raise FloatingPointError(f"epoch {epoch + 1}: the loss is not finite. Lower lr.")
            schedule.step()
            if validation is not None:
                row |= _evaluate(network, *validation, dtype)
            history.append(row)
            if checkpoint is not None:
                saved = {name: part.state_dict() for name, part in parts.items()}
                with replacing(Path(checkpoint)) as path:
                    torch.save({"call": call, "history": history, **saved}, path)
            bar.update()
            bar.set_postfix({name: f"{value:.3f}" for name, value in row.items()})
    network.eval().to("cpu", memory_format=torch.contiguous_format)
    return History(pd.DataFrame(history))


def _epoch(network, optimiser, volumes, labels: Tensor, batch_size: int, dtype) -> dict[str, float]:
    """One pass over the volumes in random order; running loss and accuracy."""
    device = next(network.parameters()).device
    network.train()
    loss_sum = correct = 0.0
    for rows in torch.randperm(len(labels)).tensor_split(-(-len(labels) // batch_size)):
        target = labels[rows].to(device)
        logits = networks.logits(network, networks.batch(volumes, rows.numpy(), device), dtype)
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
    """Probabilities (N, 2) of woman and man, float32, of volumes (N, X, Y, Z).

    Of a network of slabs: those of the mean of the slabs' log-odds.
    The network runs in float32, in evaluation mode, where it lies; its mode is put back. However
    many volumes there are in a call, on a CPU each one's probabilities are the same to the bit.

    Raises
    ------
    ValueError
        No volumes, or volumes that are not finite or not of the network's shape.
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

    On a CPU as many folds as there are cores run at once, each in a process of its own.

    Parameters
    ----------
    cohort : volumes, sex and, where known, groups, which then never span folds.
    make_network : called under ``torch.manual_seed``, once a fold.
    folds, seed : of `evaluation.folds`: the same folds as every other classifier's.
    milestones, settings : of `fit`.
    only : the folds to run, where not all; the others can follow in another call.
    assignment : (N,) folds from 0 on, in place of those of `folds` and `seed`.
    confounds : (N, K), regressed out of each voxel inside the training folds.
    out : folder for ``fold-K.pt`` (state dicts), ``folds.csv`` (Subject, fold) and ``run.json``.
        Folds that are finished there, over the same data with the same settings, are kept; half
        done, they are resumed; of other data or settings, they are deleted.
    workers : folds at once on a CPU, as many as cores by default. Each holds a batch's activations:
        4.8 GB at the study's sizes (3D, 45 subjects, bfloat16).

    Returns
    -------
    One row a subject of the folds run, in the cohort's order: Subject, fold, sex, probability (of
    man). The curves are in ``.attrs["history"]``: `History.epochs` of all folds as records, with
    the fold; a fold's validation is its test fold.

    Raises
    ------
    ValueError
        More folds than subjects or families, or folds in `only` that there are not.
    """
    if out is None:
        with tempfile.TemporaryDirectory() as folder:
            options = {"folds": folds, "seed": seed, "milestones": milestones, "only": only}
            options |= {"assignment": assignment, "confounds": confounds, **settings}
            return cross_validate(cohort, make_network, out=folder, workers=workers, **options)
    if assignment is None:
        assignment = evaluation.folds(cohort.sex, groups=cohort.groups, folds=folds, seed=seed)
    folds = int(assignment.max()) + 1
    chosen = list(range(folds)) if only is None else sorted(set(only))
    if not chosen or not set(chosen) <= set(range(folds)):
        raise ValueError(f"expected some of folds 0 to {folds - 1}, found {only}.")
    settings["milestones"] = tuple(milestones)
    out = Path(out)
    recorded = {"folds": folds, "seed": seed, **settings}
    if confounds is not None:
        recorded["confounds"] = np.asarray(confounds).tolist()
    _prepare(out, cohort, assignment, make_network, recorded)
    cores = joblib.cpu_count()
    jobs = min(len(chosen), workers or cores) if networks.device().type == "cpu" else 1
    threads = torch.get_num_threads() if jobs == 1 else max(1, cores // jobs)
    done = joblib.Parallel(jobs, return_as="generator")(
        joblib.delayed(_fold)(
            cohort, make_network, assignment, confounds, fold, seed, out, threads, settings
        )
        for fold in chosen
    )
    probability, history = np.empty(len(cohort)), []
    bar = tqdm(done, "cross-validate", total=len(chosen), unit="fold")
    for fold, record in zip(chosen, bar):
        probability[assignment == fold] = record["probability"]
        history += record["history"]
    columns = {"Subject": cohort.subjects, "fold": assignment, "sex": cohort.sex}
    predictions = pd.DataFrame({**columns, "probability": probability})
    predictions = predictions[np.isin(assignment, chosen)].reset_index(drop=True)
    predictions.attrs["history"] = history
    return predictions


def _prepare(out: Path, cohort, assignment: np.ndarray, make_network, settings: dict) -> None:
    """Record the run; delete what another left: its networks may have seen what is held out now."""
    with torch.random.fork_rng():
        network = str(make_network())
    data = hashlib.sha256(repr((*cohort.subjects, *cohort.sex, *assignment)).encode())
    for volume in cohort.volumes:
        data.update(np.ascontiguousarray(volume))
    settings = {name: str(value) for name, value in settings.items()}
    grid = {
        "shape": cohort.volumes.shape[1:],
        "affine": None if cohort.affine is None else cohort.affine.tolist(),
        "modality": cohort.modality,
        "normalised": cohort.normalised,
    }
    run = {"data": data.hexdigest(), "network": network, "grid": grid, **settings}
    run = json.dumps(run, indent=1)
    if not (out / "run.json").is_file() or (out / "run.json").read_text() != run:
        for pattern in ("fold-*.pt", "fold-*.json", ".fold-*.checkpoint"):
            for stale in out.glob(pattern):
                stale.unlink()
    with replacing(out / "run.json") as path:
        path.write_text(run)
    with replacing(out / "folds.csv") as path:
        pd.DataFrame({"Subject": cohort.subjects, "fold": assignment}).to_csv(path, index=False)


def _fold(
    cohort, make_network, assignment, confounds, fold, seed, out: Path, threads, settings: dict
) -> dict:
    """Train and test one fold, unless it is done."""
    result, weights = out / f"fold-{fold}.json", out / f"fold-{fold}.pt"
    if result.is_file() and weights.is_file():
        return json.loads(result.read_text())
    torch.set_num_threads(threads)
    train, test = (np.flatnonzero(rows) for rows in (assignment != fold, assignment == fold))
    seed = seed * 1000 + fold
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = make_network()
    volumes = cohort.volumes
    if confounds is not None:
        volumes = Residuals(volumes, confounds, train)
    held_out, checkpoint = Rows(volumes, test), out / f".fold-{fold}.checkpoint"
    fitted = fit(
        network,
        Rows(volumes, train),
        cohort.sex[train],
        validation=(held_out, cohort.sex[test]),
        seed=seed,
        checkpoint=checkpoint,
        progress=False,
        **settings,
    )
    probability = predict(network, held_out)[:, 1].tolist()
    history = fitted.epochs.assign(fold=fold).to_dict("records")
    with replacing(weights) as path:
        torch.save(network.state_dict(), path)
    with replacing(result) as path:
        path.write_text(json.dumps({"probability": probability, "history": history}))
    checkpoint.unlink(missing_ok=True)
    return {"probability": probability, "history": history}
