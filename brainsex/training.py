"""Fitting, prediction and cross-validation, after the study: Adam, cross-entropy, k folds."""

import copy
import hashlib
import json
import signal
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing import resource_tracker
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from tqdm.auto import tqdm

from brainsex import evaluation, networks, perturbation, speed, storage
from brainsex.cohort import Cohort, VolumeRows, digest
from brainsex.confounds import RegressedVolumes

PATCHED = 2  # copies of each training volume, blurred in random regions, for the linear layer
INVERSE_PENALTY = 0.01  # C of its logistic regression
MIN_FEATURE_SD = 1e-3  # a feature that hardly varies is not blown up


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
    weight_decay: float = 0.0,
    neutral: bool = False,
    seed: int = 0,
    precision: torch.dtype | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Fit a network in place; the weights kept are those of the last epoch.

    Parameters
    ----------
    network : (N, 1, X, Y, Z) to logits (N, 2), or (N, S, 2) of slabs, labelled as their subject.
    volumes, sex : (N, X, Y, Z) float32, perhaps memory-mapped, read by batches; (N,) 0 or 1.
    validation : another such pair, evaluated once an epoch; it chooses nothing.
    batch_size : subjects at most; the batches of an epoch are equal in size, give or take one.
    lr, milestones : Adam's rate (FloatingPointError if the loss diverges), a tenth after each.
    weight_decay : of Adam, decoupled (Loshchilov and Hutter 2019, arXiv 1711.05101).
    neutral : learn the linear layer of a `MriNet3d` anew at the end: `learn_neutral_layer`.
    precision : torch.bfloat16 or float32; by default the machine's faster one.

    Returns a row an epoch: epoch, train_loss, train_accuracy, validation_loss and -_accuracy.
    """
    for array, labels in (volumes, sex), validation or (volumes, sex):
        if len(array) != len(labels) or len(labels) == 0 or not np.isin(labels, (0, 1)).all():
            counts = f"{len(array)} and {len(labels)}, which are {np.unique(labels)}"
            raise ValueError(f"expected volumes, and as many labels 0 or 1: found {counts}.")
    speed.keep_memory()
    device, history = networks.device(), []
    dtype = precision or networks.fast_precision(device)
    labels = torch.as_tensor(np.array(sex), dtype=torch.long, device=device)
    networks.to_device(network, device)
    moments = speed.patch_moments(network, volumes)
    optimiser = torch.optim.AdamW(network.parameters(), lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, list(milestones))
    bar = tqdm(range(epochs), "fit", disable=not progress)
    with bar, torch.random.fork_rng(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for epoch in bar:
            torch.manual_seed((seed << 20) + epoch)
            network.train()
            loss_sum = correct_sum = 0
            for rows in torch.randperm(len(sex)).tensor_split(-(-len(sex) // batch_size)):
                batch = speed.read_batch(volumes, rows.numpy(), device)
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    logits = speed.training_forward(network, batch, moments[rows]).float()
                loss, correct = _score_logits(logits, labels[rows])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                loss_sum += loss.item() * len(rows)
                correct_sum += correct
            row = {"train_loss": loss_sum / len(sex), "train_accuracy": correct_sum / len(sex)}
            if not np.isfinite(row["train_loss"]):
                raise FloatingPointError(f"epoch {epoch + 1}: the loss is not finite. Lower lr.")
            schedule.step()
            if validation is not None:
                logits = speed.predict_logits(network, validation[0])
                loss, correct = _score_logits(logits, torch.as_tensor(np.array(validation[1])))
                row["validation_loss"] = loss.item()
                row["validation_accuracy"] = correct / len(logits)
            history.append({"epoch": epoch + 1, **row})
    network.eval()
    if neutral:
        learn_neutral_layer(network, volumes, np.asarray(sex), seed=seed)
    network.to("cpu", memory_format=torch.contiguous_format)
    return pd.DataFrame(history)


def learn_neutral_layer(
    network: networks.MriNet3d, volumes: np.ndarray, sex: np.ndarray, *, seed: int = 0
) -> None:
    """Learn the linear layer of a trained network anew, in place, so that a blur tells no sex.

    It becomes a logistic regression on the standardised features, held in memory, of the training
    volumes (N, X, Y, Z); of the same blurred as a whole, half woman and half man; and of the same
    blurred in random regions, which change nobody's sex. Standardised, small differences are not
    drowned by what all brains share; times the squared difference of the sexes, few features count.
    """
    body = copy.deepcopy(network)
    body.linear = nn.Identity()
    blurred = [perturbation.BlurredVolumes(volumes)]
    blurred += [perturbation.BlurredVolumes(volumes, seed=seed + n) for n in range(PATCHED)]
    features = [speed.predict_logits(body, part).numpy() for part in (volumes, *blurred)]
    mean, spread = features[0].mean(0), features[0].std(0).clip(MIN_FEATURE_SD)
    women, men = (features[0][sex == label].mean(0) for label in (0, 1))
    factor = ((men - women) / spread) ** 2
    factor /= spread * max(np.sqrt(np.mean(factor**2)), MIN_FEATURE_SD)
    features.insert(1, features[1])  # blurred as a whole: once for each sex
    labels = np.concatenate([sex, 1 - sex, sex, *[sex] * PATCHED])
    weights = np.repeat([1, 0.5, 0.5, *[1] * PATCHED], len(sex))
    logistic = LogisticRegression(C=INVERSE_PENALTY, solver="newton-cg")
    logistic.fit((np.concatenate(features, dtype=float) - mean) * factor, labels, weights)
    half = logistic.coef_[0] * factor / 2
    offset = logistic.intercept_[0] / 2 - half @ mean
    layer = network.linear
    with torch.no_grad():  # half of the log-odds for man, half against woman
        layer.weight.copy_(torch.from_numpy(np.stack([-half, half])))
        layer.bias.copy_(torch.tensor([-offset, offset]))


def _score_logits(logits: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """Return the mean cross-entropy, of all slabs, and how many subjects are classified right."""
    targets = labels.long().repeat_interleave(logits[0].numel() // 2)
    loss = nn.functional.cross_entropy(logits.reshape(-1, 2), targets)
    return loss, (networks.average_slab_logits(logits).argmax(1) == labels).sum().item()


def predict(network: nn.Module, volumes: np.ndarray) -> np.ndarray:
    """Predict probabilities (N, 2) of woman and man, float32, for finite volumes (N, X, Y, Z).

    A network of slabs gives those of its slabs' mean log-odds. All is computed in float32; no
    volume's depend on the others, on a CPU to the bit. Raises ValueError where one is not finite.
    """
    logits = speed.predict_logits(network, volumes)
    probabilities = networks.average_slab_logits(logits).softmax(1).numpy()
    if bad := np.flatnonzero(~np.isfinite(probabilities).all(1)).tolist():
        raise ValueError(f"volumes {bad[:10]}: no finite probability. Clean the volumes first.")
    return probabilities


def cross_validate(
    cohort: Cohort,
    make_network: Callable[[], nn.Module],
    *,
    folds: int = 10,
    seed: int = 0,
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
    only : folds to fit, all by default; finished ones are read.
    confounds : (N, K), regressed out of each voxel inside the training folds.
    out : folder for ``fold-K.pt`` (state dicts), ``fold-K.json``, ``folds.csv`` and ``run.json``.
    workers : folds at once on a CPU, by default all cores; some 3 GB each at the study's sizes.
    overwrite : start anew in a folder of other data or settings, else a ValueError.
    settings : of `fit`; milestones (5, 15) by default, the study's; ``validation=None``: no curve.

    Returns a row a subject of these folds: Subject, fold, sex, probability (of man), and in
    ``.attrs["history"]`` the records that `fit` returns, with their fold.
    """
    if assignment is None:
        assignment = evaluation.folds(cohort.sex, groups=cohort.groups, folds=folds, seed=seed)
    folds = range(int(assignment.max()) + 1)
    only = sorted(set(folds if only is None else only))
    settings = {"milestones": (5, 15), **settings, "seed": seed}
    cores, on_cpu = joblib.cpu_count(), networks.device().type == "cpu"
    jobs = max(1, min(len(only), workers or cores)) if on_cpu else 1
    threads = torch.get_num_threads() if jobs == 1 else max(1, cores // jobs)
    table = pd.DataFrame({"Subject": cohort.subjects, "fold": assignment, "sex": cohort.sex})
    with torch.random.fork_rng():
        network = str(make_network())
    affine = None if cohort.affine is None else cohort.affine.tolist()
    grid = {"modality": cohort.modality, "affine": affine, "shape": cohort.volumes.shape[1:]}
    grid |= cohort.preparation
    numbers = (*assignment, *(() if confounds is None else np.ravel(confounds)))
    facts = {"network": network, "grid": grid, "cohort": digest(cohort)}
    facts["assignment"] = hashlib.sha256(repr(numbers).encode()).hexdigest()
    facts |= {} if confounds is None else {"confounds": True}  # what `predict` cannot take out
    stale = {"overwrite": overwrite, "results": ("fold-*.pt", "fold-*.json")}
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(out or temporary)
        storage.start_run(out, "train", settings | facts, **stale)
        storage.write_text(out / "folds.csv", table[["Subject", "fold"]].to_csv(index=False))
        run = out, cohort, assignment, make_network, confounds, settings, threads
        calls = (joblib.delayed(_fit_fold)(fold, *run) for fold in only)
        blocks_signals = jobs > 1 and hasattr(signal, "pthread_sigmask")  # Windows has none
        try:  # workers inherit what is blocked: Ctrl-C reaches this process alone, which ends them
            if blocks_signals:
                resource_tracker.ensure_running()  # its start would unblock the signal
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            results = joblib.Parallel(jobs, return_as="generator")(calls)
        finally:
            if blocks_signals:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        records = list(tqdm(results, "cross-validate", total=len(only), unit="fold"))
    table["probability"] = np.nan
    for fold, record in zip(only, records):
        table.loc[assignment == fold, "probability"] = record["probability"]
    table = table[np.isin(assignment, only)].reset_index(drop=True)
    table.attrs["history"] = [row for record in records for row in record["history"]]
    return table


def _fit_fold(
    fold: int,
    out: Path,
    cohort: Cohort,
    assignment: np.ndarray,
    make_network: Callable[[], nn.Module],
    confounds: np.ndarray | None,
    settings: dict,
    threads: int,
) -> dict:
    """Fit and test one fold, or read its record if it is finished."""
    path, weights = out / f"fold-{fold}.json", out / f"fold-{fold}.pt"
    if path.is_file() and weights.is_file():
        return storage.read_json(path)
    torch.set_num_threads(threads)
    train, test = np.flatnonzero(assignment != fold), np.flatnonzero(assignment == fold)
    seed = 1000 * settings["seed"] + fold
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = make_network()
    volumes = cohort.volumes
    if confounds is not None:
        volumes = RegressedVolumes(volumes, confounds, train)
    seen, held_out = ((VolumeRows(volumes, rows), cohort.sex[rows]) for rows in (train, test))
    options = {"progress": False, "validation": held_out, **settings, "seed": seed}
    history = fit(network, *seen, **options).assign(fold=fold)
    probability = predict(network, held_out[0])[:, 1].tolist()
    record = {"probability": probability, "history": history.to_dict("records")}
    with storage.atomic_path(weights) as partial, partial.open("wb") as file:
        torch.save(network.state_dict(), file)  # to a path, a full disk would be no OSError
    storage.write_text(path, json.dumps(record))
    return record
