"""Fitting, prediction and cross-validation, after the study: Adam, cross-entropy, k folds.

Every random draw of an epoch comes from (seed, epoch), so a run that was interrupted goes on to
the same weights as one that was not.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from brainsex import evaluation, networks, replacing
from brainsex.cohort import Cohort


@dataclass(frozen=True)
class History:
    """One row an epoch: epoch, train_loss, train_accuracy (running, in training mode, as the
    weights move), validation_loss, validation_accuracy (after the epoch, in evaluation mode)."""

    epochs: pd.DataFrame


def _batch(volumes: np.ndarray, rows: np.ndarray, device: torch.device) -> Tensor:
    """Volumes (n, 1, X, Y, Z) of some rows, read in the order they lie on disk."""
    order = np.argsort(rows)
    batch = np.empty((len(rows), 1, *volumes.shape[1:]), np.float32)
    batch[order, 0] = volumes[rows[order]]
    return torch.from_numpy(batch).to(device, memory_format=torch.channels_last_3d)


def _logits(network: nn.Module, batch: Tensor, dtype: torch.dtype) -> Tensor:
    with torch.autocast(batch.device.type, dtype=dtype, enabled=dtype != torch.float32):
        return network(batch).float()


def _check(volumes: np.ndarray, sex: np.ndarray) -> None:
    if len(volumes) != len(sex) or len(sex) == 0:
        raise ValueError(
            f"expected as many volumes as labels, and some: {len(volumes)} and {len(sex)}."
        )
    if not np.isin(sex, (0, 1)).all():
        raise ValueError(f"expected labels 0 and 1, found {np.unique(sex)}.")


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
    network : takes (N, 1, X, Y, Z), returns logits (N, 2); made by the caller.
    volumes : (N, X, Y, Z) float32; may be memory-mapped, is read batch by batch.
    sex : (N,) 0 or 1.
    validation : the same pair; evaluated once an epoch, without gradients. It chooses nothing.
    batch_size : at most; the batches of an epoch are of equal size, give or take one.
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
    device = networks.device()
    dtype = precision or networks.precision(device)
    settings = {
        "n": len(sex),
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "weight_decay": weight_decay,
        "milestones": list(milestones),
        "seed": seed,
        "precision": str(dtype),
    }
    network.to(device, memory_format=torch.channels_last_3d)
    optimiser = torch.optim.Adam(network.parameters(), lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, list(milestones))
    history: list[dict] = []
    if checkpoint is not None and Path(checkpoint).is_file():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        if saved["settings"] != settings:
            raise ValueError(f"{checkpoint} is of another run: {saved['settings']}. Delete it.")
        network.load_state_dict(saved["network"])
        optimiser.load_state_dict(saved["optimiser"])
        schedule.load_state_dict(saved["schedule"])
        history = saved["history"]
    labels = torch.as_tensor(np.asarray(sex), dtype=torch.long)
    batches = -(-len(sex) // batch_size)
    bar = tqdm(range(epochs), initial=len(history), desc="fit", unit="epoch", disable=not progress)
    with torch.random.fork_rng():
        for epoch in range(len(history), epochs):
            torch.manual_seed((seed << 20) + epoch)
            network.train()
            loss_sum = correct = 0.0
            for rows in torch.randperm(len(sex)).tensor_split(batches):
                target = labels[rows].to(device)
                logits = _logits(network, _batch(volumes, rows.numpy(), device), dtype)
                loss = nn.functional.cross_entropy(logits, target)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                loss_sum += loss.item() * len(rows)
                correct += (logits.argmax(1) == target).sum().item()
            if not np.isfinite(loss_sum):
                raise FloatingPointError(f"epoch {epoch}: the loss is {loss_sum}; lower lr.")
            schedule.step()
            row = {
                "epoch": epoch + 1,
                "train_loss": loss_sum / len(sex),
                "train_accuracy": correct / len(sex),
            }
            if validation is not None:
                row |= _evaluate(network, *validation, dtype)
            history.append(row)
            if checkpoint is not None:
                with replacing(Path(checkpoint)) as path:
                    torch.save(
                        {
                            "settings": settings,
                            "network": network.state_dict(),
                            "optimiser": optimiser.state_dict(),
                            "schedule": schedule.state_dict(),
                            "history": history,
                        },
                        path,
                    )
            bar.update()
            bar.set_postfix({k: f"{v:.3f}" for k, v in row.items() if k != "epoch"})
    bar.close()
    network.eval().to("cpu", memory_format=torch.contiguous_format)
    return History(pd.DataFrame(history))


def _evaluate(network, volumes, sex, dtype) -> dict[str, float]:
    """Loss and accuracy of one pass."""
    logits = _forward(network, volumes, dtype)
    loss = nn.functional.cross_entropy(logits, torch.as_tensor(np.asarray(sex)).long())
    accuracy = (logits.argmax(1).numpy() == sex).mean()
    return {"validation_loss": loss.item(), "validation_accuracy": float(accuracy)}


@torch.no_grad()
def _forward(network: nn.Module, volumes: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Logits (N, 2) in evaluation mode, a fixed few subjects at a time."""
    device = next(network.parameters()).device
    size = 32 if device.type == "cuda" else 1  # larger batches are slower on a CPU: page faults
    mode = network.training
    network.eval()
    try:
        return torch.cat(
            [
                _logits(network, _batch(volumes, rows, device), dtype).cpu()
                for rows in np.array_split(np.arange(len(volumes)), -(-len(volumes) // size))
            ]
        )
    finally:
        network.train(mode)


def predict(network: nn.Module, volumes: np.ndarray) -> np.ndarray:
    """Probabilities (N, 2) of woman and man, float32, of volumes (N, X, Y, Z).

    The network runs in float32, in evaluation mode, where it lies; its mode is put back.
    """
    if len(volumes) == 0:
        raise ValueError("expected volumes (N, X, Y, Z), found none.")
    return _forward(network, volumes, torch.float32).softmax(1).numpy()


def cross_validate(
    cohort: Cohort,
    make_network: Callable[[], nn.Module],
    *,
    folds: int = 10,
    seed: int = 0,
    out: str | Path | None = None,
    **settings,
) -> pd.DataFrame:
    """Fit and test one network a fold; a test fold is scored once, after the last epoch.

    Parameters
    ----------
    cohort : volumes, sex and, where known, groups, which then never span folds.
    make_network : called under ``torch.manual_seed``, once a fold.
    folds, seed : of `evaluation.folds`: the same folds as every other classifier's.
    out : folder for ``fold-K.pt`` (state dicts), ``folds.csv`` (Subject, fold) and
        ``predictions.csv``; what is finished there is kept, what is half done resumes.
    settings : of `fit`.

    Returns
    -------
    One row a subject, in the cohort's order: Subject, fold, sex, probability (of man). The
    curves of all folds are in ``.attrs["history"]``, a list of one row a fold and epoch.
    """
    assignment = evaluation.folds(cohort.sex, groups=cohort.groups, folds=folds, seed=seed)
    out = None if out is None else Path(out)
    key = hashlib.sha256(
        json.dumps(
            [
                *(cohort.subjects.tolist(), cohort.sex.tolist(), assignment.tolist(), seed),
                {k: str(v) for k, v in settings.items()},
                str(make_network()),
                hashlib.sha256(np.ascontiguousarray(cohort.volumes[:: len(cohort) - 1])).hexdigest(),
            ]
        ).encode()
    ).hexdigest()
    if out is not None:
        with replacing(out / "folds.csv") as path:
            pd.DataFrame({"Subject": cohort.subjects, "fold": assignment}).to_csv(path, index=False)
    probability = np.empty(len(cohort))
    history = []
    for fold in range(folds):
        train, test = (np.flatnonzero(m) for m in (assignment != fold, assignment == fold))
        done = None if out is None else out / f"fold-{fold}.json"
        if done is not None and done.is_file() and (r := json.loads(done.read_text()))["key"] == key:
            probability[test], epochs = r["probability"], r["history"]
        else:
            with torch.random.fork_rng():
                torch.manual_seed(seed * 1000 + fold)
                network = make_network()
            checkpoint = None if out is None else out / f".fold-{fold}-{key[:12]}.checkpoint"
            fitted = fit(
                network,
                _Rows(cohort.volumes, train),
                cohort.sex[train],
                validation=(_Rows(cohort.volumes, test), cohort.sex[test]),
                seed=seed * 1000 + fold,
                checkpoint=checkpoint,
                **settings,
            )
            probability[test] = predict(network, _Rows(cohort.volumes, test))[:, 1]
            epochs = fitted.epochs.assign(fold=fold).to_dict("records")
            if out is not None:
                with replacing(out / f"fold-{fold}.pt") as path:
                    torch.save(network.state_dict(), path)
                record = {"key": key, "probability": probability[test].tolist(), "history": epochs}
                with replacing(done) as path:
                    path.write_text(json.dumps(record))
                checkpoint.unlink()
        history += epochs
    predictions = pd.DataFrame(
        {
            "Subject": cohort.subjects,
            "fold": assignment,
            "sex": cohort.sex,
            "probability": probability,
        }
    )
    predictions.attrs["history"] = history
    if out is not None:
        with replacing(out / "predictions.csv") as path:
            predictions.to_csv(path, index=False)
    return predictions


class _Rows:
    """Some rows of a memory-mapped array, read when they are asked for."""

    def __init__(self, volumes: np.ndarray, rows: np.ndarray):
        self.volumes, self.rows = volumes, rows
        self.shape = (len(rows), *volumes.shape[1:])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index) -> np.ndarray:
        return self.volumes[self.rows[index]]
