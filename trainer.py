"""The training loop: one function for any number of inputs and any kind of loss.

It is handed loaders of `(data, target)`, a model, a loss, an optimiser, a scheduler and metrics (metrics.py):

    history = fit(train_loader, val_loader, model, loss_fn, optimizer, scheduler, 20, cuda=False, log_interval=50)
"""

import contextlib
import os
import time
import warnings
from collections.abc import Mapping

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau
from tqdm.auto import tqdm


def fit(
    train_loader,
    val_loader,
    model,
    loss_fn,
    optimizer,
    scheduler,
    n_epochs,
    cuda,
    log_interval,
    metrics=[],
    start_epoch=0,
):
    """Train a model, and validate it after every epoch.

    A batch is `(data, target)`. Data is a tensor or a tuple, passed to the model as positional arguments, or a dict,
    passed by keyword. The loss gets the outputs and then the target; an empty target (`[]`) is left out. A loss may
    return a tuple, its value first. Averages weigh each batch by what its loss is the mean of: by the triplets selected
    where the loss says how many (`n_selected`); by an integer that comes second, the count of active triplets, unless
    the loss says average="all"; else by its samples.

    Training is in training mode throughout, so parts that were put into evaluation mode beforehand train as well.

    A tqdm bar shows in a terminal and in a notebook; elsewhere, or with TQDM_DISABLE=1 in the environment, a line is
    printed every `log_interval` batches. A line is printed for each epoch.

    Args:
        train_loader: DataLoader, or any iterable of batches.
        val_loader: the same for validation; None for none.
        model: `nn.Module`; left in the mode (training or evaluation) in which it came.
        loss_fn: called as `loss_fn(*outputs, target)`.
        optimizer: a `torch.optim` optimiser of the model's parameters.
        scheduler: stepped once at the end of each epoch, ReduceLROnPlateau with the validation loss (the training loss
            where there is no validation); None for a constant rate.
        n_epochs: train up to this epoch.
        cuda: True for the current GPU, or any device, to which model and batches are moved; False leaves them where
            they are.
        log_interval: number of batches between two log lines.
        metrics: list of `Metric`, called as `metric(outputs, target, loss_outputs)` with tuples of outputs and target.
        start_epoch: number of epochs already trained: 8 begins with the ninth. A scheduler that has made fewer steps is
            brought forward; one that keeps no `last_epoch` is left as it is.

    Returns:
        The history: a list with a dict for each epoch, of `epoch` (from 1), `lr` (of the first parameter group),
        `train_loss`, `val_loss` (None without validation), `seconds`, and each metric as `train_NAME` and `val_NAME`;
        one whose value is a dict has an entry for each key instead, and one whose value is None has none.

    Raises:
        ValueError: an empty loader, or a batch that is not `(data, target)`.
        FloatingPointError: a loss that is not finite, naming epoch and batch. On a CPU the optimiser has not made the
            step, so the weights are those of the batch before; on a GPU losses are read every `log_interval` batches.
    """
    _bring_forward(scheduler, start_epoch)
    history = []
    with _keep_modes(model):
        for epoch in range(start_epoch, n_epochs):
            began = time.perf_counter()
            row = {"epoch": epoch + 1, "lr": optimizer.param_groups[0]["lr"]}
            title = f"Epoch {epoch + 1}/{n_epochs}"

            row["train_loss"], _ = train_epoch(
                train_loader, model, loss_fn, optimizer, cuda, log_interval, metrics, title=f"{title} train"
            )
            row.update(_values("train", metrics))

            row["val_loss"] = None
            if val_loader is not None:
                row["val_loss"], _ = test_epoch(val_loader, model, loss_fn, cuda, metrics, title=f"{title} validation")
                row.update(_values("val", metrics))

            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(row["train_loss"] if val_loader is None else row["val_loss"])
            elif scheduler is not None:
                scheduler.step()
            row["seconds"] = time.perf_counter() - began
            history.append(row)
            tqdm.write(_summary(title, row))
    return history


def train_epoch(train_loader, model, loss_fn, optimizer, cuda, log_interval, metrics, *, title="Train"):
    """Train for one pass over the loader; see `fit`.

    Returns:
        `(loss, metrics)`: the average loss as a float, and the metrics, whose `value()` is that of the pass.
    """
    model.train()
    return _run_epoch(train_loader, model, loss_fn, cuda, metrics, title, log_interval, optimizer)


@torch.no_grad()
def test_epoch(val_loader, model, loss_fn, cuda, metrics, *, title="Validation"):
    """Evaluate on one pass over the loader, in evaluation mode and without gradient; see `fit`.

    Returns:
        `(loss, metrics)`: the average loss as a float, and the metrics, whose `value()` is that of the pass.
    """
    with _keep_modes(model):
        model.eval()
        return _run_epoch(val_loader, model, loss_fn, cuda, metrics, title)


test_epoch.__test__ = False  # a function of the library, for all that pytest sees in its name


@torch.no_grad()
def extract_embeddings(loader, model, device=None):
    """Embeddings and labels of all samples of a loader, in its order, in evaluation mode and without gradient.

    Args:
        loader: yields `(x, label)` batches, tensors (B, ...) and (B,).
        model: its `get_embedding` is called where it has one, else the model itself; its mode is restored.
        device: where to compute; by default where the model's first parameter lies.

    Returns:
        `(embeddings, labels)`: tensors (N, D) and (N,) on the CPU.

    Raises:
        ValueError: an empty loader, or batches that are not `(tensor, labels)`.
    """
    if device is None:
        device = next((parameter.device for parameter in model.parameters()), None)
    embed = getattr(model, "get_embedding", model)
    embeddings, labels = [], []
    with _keep_modes(model):
        model.eval()
        for batch in loader:
            data, target = _data_and_target(batch)
            if not (torch.is_tensor(data) and torch.is_tensor(target)):
                raise ValueError("expected batches (x, label), not pairs or triplets: give the dataset as it was")
            embeddings.append(embed(data.to(device) if device is not None else data).cpu())
            labels.append(target.reshape(-1).cpu() if target.numel() == len(target) else target.cpu())
    if not embeddings:
        raise ValueError("the loader is empty: it gave no batch")
    return torch.cat(embeddings), torch.cat(labels)


def _run_epoch(loader, model, loss_fn, cuda, metrics, title, log_interval=None, optimizer=None):
    """One pass: fetch, forward, and with an optimiser backward and step. Returns the average loss and the metrics."""
    device = _device(cuda)
    if device is not None:
        model.to(device)
    for metric in metrics:
        metric.reset()

    losses, weights, n_checked = [], [], 0  # kept as tensors: reading one would make a GPU wait
    disable = True if os.environ.get("TQDM_DISABLE", "0") not in ("", "0") else None  # None: where there is no terminal
    with tqdm(loader, desc=title, leave=False, disable=disable) as bar:
        for batch_number, batch in enumerate(bar, start=1):
            data, target = _move(_data_and_target(batch), device)
            outputs, target, loss_outputs = _forward(model, loss_fn, data, target)
            loss = loss_outputs[0] if isinstance(loss_outputs, (tuple, list)) else loss_outputs
            losses.append(loss.detach().reshape(()))
            weights.append(_weight(loss_fn, loss_outputs, data))

            is_logged = bool(log_interval) and batch_number % log_interval == 0
            if is_logged or loss.device.type == "cpu":
                _check_finite(losses[n_checked:], title, n_checked)
                n_checked = len(losses)
            if optimizer is not None:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            for metric in metrics:
                metric(outputs, target, loss_outputs)
            if is_logged:
                _log(bar, title, batch_number, _average(losses[-log_interval:], weights[-log_interval:]))

    if not losses:
        raise ValueError(f"{title}: the loader is empty, it gave no batch")
    _check_finite(losses[n_checked:], title, n_checked)
    return _average(losses, weights), metrics


@contextlib.contextmanager
def _keep_modes(model):
    """Give each part of the model back its mode, training or evaluation, which need not be the same for all."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _forward(model, loss_fn, data, target):
    """Outputs and target as tuples (None for an empty target), and what the loss returned."""
    if isinstance(data, Mapping):
        outputs = model(**data)
    else:
        outputs = model(*data) if type(data) in (tuple, list) else model(data)  # a named tuple is one argument
    outputs = tuple(outputs) if type(outputs) in (tuple, list) else (outputs,)
    is_empty = target is None or (isinstance(target, (tuple, list)) and len(target) == 0)
    target = None if is_empty else (target,)
    return outputs, target, loss_fn(*outputs, *(target or ()))


def _data_and_target(batch):
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        size = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        raise ValueError(f"expected batches (data, target), got a {type(batch).__name__}{size}")
    return batch


def _weight(loss_fn, loss_outputs, data):
    """What a batch counts for in averages: what its loss is the mean of, triplets where it says so, else samples."""
    n_selected = getattr(loss_fn, "n_selected", None)
    if isinstance(n_selected, int):
        return torch.tensor(n_selected)
    is_counted = isinstance(loss_outputs, (tuple, list)) and len(loss_outputs) > 1
    count = loss_outputs[1] if is_counted and getattr(loss_fn, "average", "active") == "active" else None
    if torch.is_tensor(count) and count.numel() == 1 and not count.is_floating_point():
        return count.detach().reshape(()).clamp(min=0)
    if isinstance(count, int):
        return torch.tensor(max(count, 0))
    return torch.tensor(_n_samples(data) or 1)


def _n_samples(data):
    """Length of the first tensor in a batch's data, 0 where it holds none."""
    if torch.is_tensor(data):
        return len(data) if data.dim() else 0
    parts = data.values() if isinstance(data, Mapping) else data if isinstance(data, (tuple, list)) else ()
    return next((n for n in map(_n_samples, parts) if n), 0)


def _average(losses, weights):
    losses = torch.stack(losses).cpu().double()
    weights = torch.stack(weights).cpu().double()
    return float((losses * weights).sum() / weights.sum().clamp(min=1))


def _check_finite(losses, title, n_before):
    for batch_number, loss in enumerate(torch.stack(losses).tolist() if losses else [], start=n_before + 1):
        if loss != loss or loss in (float("inf"), float("-inf")):
            remedy = "try a lower learning rate, and look for inputs that are not finite"
            raise FloatingPointError(f"{title}: the loss is {loss} in batch {batch_number}; {remedy}")


def _log(bar, title, batch_number, loss):
    if not bar.disable:
        bar.set_postfix(loss=f"{loss:.4f}")
    else:
        share = f" of {bar.total}" if bar.total else ""
        print(f"{title}: batch {batch_number}{share}, loss {loss:.6f}", flush=True)


def _values(part, metrics):
    """Entries of the history for one pass: `PART_NAME`, or `PART_KEY` for the values of a dict; None leaves out."""
    entries = {}
    for metric in metrics:
        value = metric.value()
        named = value if isinstance(value, dict) else {metric.name(): value}
        entries.update({f"{part}_{name}": number for name, number in named.items() if number is not None})
    return entries


def _summary(title, row):
    """One line of the epoch's losses and metrics: train_NAME and val_NAME side by side."""
    names = dict.fromkeys(key.split("_", 1)[1] for key in row if key.startswith(("train_", "val_")))
    parts = []
    for name in names:
        values = [row[key] for key in (f"train_{name}", f"val_{name}") if row.get(key) is not None]
        parts.append(f"{name} " + " / ".join(f"{v:.4g}" if isinstance(v, (int, float)) else str(v) for v in values))
    return f"{title}, train / validation: {', '.join(parts)} ({row['seconds']:.1f} s)"


def _move(value, device):
    """Tensors, and what else has `to`, in nested tuples, lists and dicts to a device; None leaves them where they are.

    Tuples and lists come back as lists, named tuples as what they were.
    """
    if device is None:
        return value
    if torch.is_tensor(value):
        return value.to(device, non_blocking=True)
    if hasattr(value, "to"):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _move(x, device) for key, x in value.items()}
    if isinstance(value, (tuple, list)):
        moved = [_move(x, device) for x in value]
        return type(value)(*moved) if hasattr(value, "_fields") else moved
    return value


def _device(cuda):
    if not cuda:
        return None
    if cuda == 1:  # True, and what passes for it
        if not torch.cuda.is_available():
            raise ValueError("cuda=True, but torch sees no GPU: give cuda=False or a device")
        return torch.device("cuda")
    return torch.device(cuda)


def _bring_forward(scheduler, start_epoch):
    """Steps that the scheduler missed before `start_epoch`; one that the caller restored has made them."""
    if scheduler is None or isinstance(scheduler, ReduceLROnPlateau):
        return
    last = getattr(scheduler, "_schedulers", [scheduler])[-1]  # ChainedScheduler does not count itself
    n_missed = start_epoch - getattr(scheduler, "last_epoch", getattr(last, "last_epoch", start_epoch))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*before `optimizer.step.*")  # those steps are not in this process
        for _ in range(n_missed):
            scheduler.step()
    if n_missed > 0 and hasattr(scheduler, "_get_closed_form_lr"):
        # Steps go from rate to rate, and those of an optimiser that the caller restored had decayed already.
        for group, rate in zip(scheduler.optimizer.param_groups, scheduler._get_closed_form_lr()):
            group["lr"] = rate
