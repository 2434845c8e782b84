"""The training loop: one function for any number of inputs and any kind of loss.

It is handed loaders of `(data, target)`, a model, a loss, an optimiser, a scheduler and metrics (metrics.py):

    history = fit(train_loader, val_loader, model, loss_fn, optimizer, scheduler, 20, cuda=False, log_interval=50)
"""

import contextlib
import io
import math
import os
import pickle
import random
import time
import types
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DistributedSampler
from tqdm.auto import tqdm


def fit(
    train_loader: Iterable,
    val_loader: Iterable | None,
    model: nn.Module,
    loss_fn: Callable,
    optimizer: Optimizer,
    scheduler: Any,
    n_epochs: int,
    cuda: bool | int | str | torch.device | None,
    log_interval: int,
    metrics: Sequence[Any] = [],
    start_epoch: int = 0,
    *,
    checkpoint: str | os.PathLike | None = None,
    monitor: str | None = None,
    mode: str = "min",
    amp: torch.dtype | None = None,
    max_chunk: int | None = None,
    log_dir: str | os.PathLike | None = None,
) -> list[dict[str, Any]]:
    """Train a model, and validate it after every epoch.

    A batch is `(data, target)`. Data is a tensor or a tuple, passed to the model as positional arguments, or a dict,
    passed by keyword. The loss gets the outputs and then the target; an empty target (`[]`) is left out. A loss may
    return a tuple, its value first. Averages weigh each batch by what its loss is the mean of: by the triplets selected
    where the loss says how many (`n_selected`); by an integer that comes second, the count of active triplets, unless
    the loss says average="all"; else by its samples.

    Training is in training mode throughout, so parts that were put into evaluation mode beforehand train as well.

    A tqdm bar shows in a terminal and in a notebook; elsewhere, or with TQDM_DISABLE=1 in the environment, a line is
    printed every `log_interval` batches. A line is printed for each epoch.

    With a `checkpoint`, all that the run depends on is written to that file after every epoch: weights, optimiser,
    scheduler, history and random states (torch's, numpy's, Python's, and those of generators that loaders, model, loss
    and metrics hold). The same call then goes on where the file ends. On a CPU, without persistent workers, it ends in
    the same weights and history, bit for bit, as without the interruption; seconds apart. When an error or Ctrl-C ends
    a run, what the unfinished epoch has trained is written to `CHECKPOINT.interrupted`, for you alone: the call goes on
    from the whole epoch before. `torch.load(checkpoint, weights_only=True)["model"]` is the model's state dict.

    With `max_chunk`, a batch goes through the network in chunks of so many samples, and memory holds the activations of
    one at a time: first without gradient, for the loss of the whole batch and its gradient by the embeddings; then
    again, with the same random draws, to carry that gradient back (Gao et al. 2021, gradient caching). Selection and
    gradient are those of the whole batch, but that batch norm sees chunks. It costs a second forward pass.

    Args:
        train_loader: DataLoader, or any iterable of batches; `set_epoch` of its sampler is called before each epoch.
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
        checkpoint: path of a file to keep the run in, and to resume it from where there is one; None for none.
        monitor: entry of the history, such as "val_loss" or "val_map@r": the best epoch by it is written to
            `CHECKPOINT.best` as well; None for none.
        mode: whether "min" or "max" of it is best.
        amp: torch.bfloat16 or torch.float16 for the forward pass of the model, by autocast; loss and selection are in
            float32. float16 comes with gradient scaling. None for the precision that the model has.
        max_chunk: samples that go through the network at once; None for the whole batch.
        log_dir: folder for TensorBoard: the numbers of the history, and for its projector the last embeddings that an
            EmbeddingMetric has met. Needs the package tensorboard. None for none.

    Returns:
        The history: a list with a dict for each epoch, of `epoch` (from 1), `lr` (of the first parameter group),
        `train_loss`, `val_loss` (None without validation), `seconds`, and each metric as `train_NAME` and `val_NAME`;
        one whose value is a dict has an entry for each key instead, and one whose value is None has none.

    Raises:
        ValueError: an empty loader, or a batch that is not `(data, target)`; another `amp`, or a `max_chunk` below 1; a
            checkpoint that is damaged, none of `fit`, or of another model, optimiser, scheduler or longer run, which is
            left as it is.
        FloatingPointError: a loss that is not finite, naming epoch and batch. On a CPU the optimiser has not made the
            step, so the weights are those of the batch before; on a GPU losses are read every `log_interval` batches.
    """
    history: list[dict[str, Any]] = []
    device = _to_device(model, cuda)
    step = _Step(model, optimizer, amp, max_chunk)
    file: Any = contextlib.nullcontext()
    log: Any = contextlib.nullcontext()
    if checkpoint is not None:
        parts = {"model": _unwrapped(model), "optimizer": optimizer, "scheduler": scheduler, "loss_fn": loss_fn}
        parts |= {"scaler": step.scaler}
        holders = (train_loader, val_loader, model, loss_fn, metrics)
        file = _Checkpoint(checkpoint, monitor, mode, parts, holders, history)
        start_epoch = file.resume(start_epoch, n_epochs)
    if log_dir is not None and _rank() == 0:
        log = _tensorboard(log_dir)
    _bring_forward(scheduler, start_epoch)
    diagnosis = _Diagnosis(loss_fn)
    with _keep_modes(model), file, log as writer:
        for epoch in range(start_epoch, n_epochs):
            began = time.perf_counter()
            row = {"epoch": epoch + 1, "lr": optimizer.param_groups[0]["lr"]}
            title = f"Epoch {epoch + 1}/{n_epochs}"

            _set_epoch(train_loader, epoch)
            model.train()
            row["train_loss"], _ = _run_epoch(
                train_loader, loss_fn, step, device, metrics, f"{title} train", log_interval, is_training=True,
                diagnosis=diagnosis,
            )  # fmt: skip
            row.update(_values("train", metrics))
            diagnosis.warn(title)

            row["val_loss"] = None
            if val_loader is not None:
                row["val_loss"], _ = _evaluate(val_loader, loss_fn, step, device, metrics, f"{title} validation")
                row.update(_values("val", metrics))

            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(row["train_loss"] if val_loader is None else row["val_loss"])
            elif scheduler is not None:
                scheduler.step()
            row["seconds"] = time.perf_counter() - began
            history.append(row)
            if checkpoint is not None:
                file.keep(epoch + 1)
            if _rank() == 0:
                tqdm.write(_summary(title, row))
                if writer is not None:
                    _write_log(writer, row, metrics if epoch + 1 == n_epochs else [])
    return history


def train_epoch(
    train_loader: Iterable,
    model: nn.Module,
    loss_fn: Callable,
    optimizer: Optimizer,
    cuda: bool | int | str | torch.device | None,
    log_interval: int,
    metrics: Sequence[Any],
    *,
    title: str = "Train",
    amp: torch.dtype | None = None,
    max_chunk: int | None = None,
) -> tuple[float, Sequence[Any]]:
    """Train for one pass over the loader; see `fit`.

    Returns:
        `(loss, metrics)`: the average loss as a float, and the metrics, whose `value()` is that of the pass.
    """
    model.train()
    device = _to_device(model, cuda)
    step = _Step(model, optimizer, amp, max_chunk)
    return _run_epoch(train_loader, loss_fn, step, device, metrics, title, log_interval, is_training=True)


def test_epoch(
    val_loader: Iterable,
    model: nn.Module,
    loss_fn: Callable,
    cuda: bool | int | str | torch.device | None,
    metrics: Sequence[Any],
    *,
    title: str = "Validation",
    amp: torch.dtype | None = None,
    max_chunk: int | None = None,
) -> tuple[float, Sequence[Any]]:
    """Evaluate on one pass over the loader, in evaluation mode and without gradient; see `fit`.

    Returns:
        `(loss, metrics)`: the average loss as a float, and the metrics, whose `value()` is that of the pass.
    """
    device = _to_device(model, cuda)
    return _evaluate(val_loader, loss_fn, _Step(model, None, amp, max_chunk), device, metrics, title)


test_epoch.__test__ = False  # type: ignore[attr-defined]  # a function of the library, for all that pytest sees in its name


@torch.no_grad()
def extract_embeddings(
    loader: Iterable, model: nn.Module, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Embeddings and labels of all samples of a loader, in its order, in evaluation mode and without gradient.

    Args:
        loader: yields `(x, label)` batches, tensors (B, ...) and (B,). Processes that share the samples by torch's
            DistributedSampler, shuffle=False, each return all, every sample once.
        model: its `get_embedding` is called where it has one, else the model itself; its mode is restored.
        device: where to compute; by default where the model's first parameter lies.

    Returns:
        `(embeddings, labels)`: tensors (N, D) and (N,) on the CPU.

    Raises:
        ValueError: an empty loader, or batches that are not `(tensor, labels)`.
    """
    if device is None:
        device = next((parameter.device for parameter in model.parameters()), None)
    model = _unwrapped(model)
    embed = getattr(model, "get_embedding", model)
    sampler = _sampler_of_processes(loader)
    n_own = _n_own_samples(sampler)
    if sampler is not None and (n_own is None or sampler.shuffle):
        raise ValueError("to put embeddings of several processes in order, DistributedSampler needs shuffle=False")
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
    embeddings, labels = torch.cat(embeddings)[:n_own], torch.cat(labels)[:n_own]
    if sampler is not None:
        embeddings, labels = (_in_turn(parts) for parts in zip(*_gathered((embeddings, labels))))
    return embeddings, labels


@torch.no_grad()
def _evaluate(loader, loss_fn, step, device, metrics, title):
    """One pass in evaluation mode and without gradient."""
    with _keep_modes(step.model):
        step.model.eval()
        return _run_epoch(loader, loss_fn, step, device, metrics, title)


def _run_epoch(loader, loss_fn, step, device, metrics, title, log_interval=None, *, is_training=False, diagnosis=None):
    """One pass: fetch, forward, and for training backward and step. Returns the average loss and the metrics."""
    for metric in metrics:
        metric.reset()

    sampler = _sampler_of_processes(loader)
    n_own = _n_own_samples(sampler)
    losses = _Losses(title)
    disable = os.environ.get("TQDM_DISABLE", "0") not in ("", "0") or _rank() > 0 or None  # None: without a terminal
    with tqdm(loader, desc=title, leave=False, disable=disable) as bar:
        for batch_number, batch in enumerate(bar, start=1):
            data, target = _move(_data_and_target(batch), device)
            outputs, target = step.forward(data), _as_tuple(target)
            loss_outputs = loss_fn(*outputs, *target)
            loss, count = _loss_and_count(loss_outputs)
            losses.add(loss, _weight(loss_fn, count, data))

            is_logged = bool(log_interval) and batch_number % log_interval == 0
            if is_logged or loss.device.type == "cpu":
                losses.check()
            if is_training:
                step.backward(loss)
            if diagnosis is not None:
                diagnosis.observe(outputs, loss, count)
            outputs, target, n_own = _without_padding(outputs, target, n_own)
            for metric in metrics:
                metric(outputs, target or None, loss_outputs)
            if is_logged:
                _log(bar, title, batch_number, losses.average(last=log_interval))

    losses.check()
    if sampler is not None:
        for metric in metrics:
            if hasattr(metric, "gather"):
                metric.gather()
    return losses.average(is_shared=sampler is not None), metrics


@contextlib.contextmanager
def _keep_modes(model):
    """Give each part of the model back its mode, training or evaluation, which need not be the same for all."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class _Step:
    """A batch's way through the network and back: in which precision, whole or in chunks. Arguments as for `fit`."""

    def __init__(self, model, optimizer=None, amp=None, max_chunk=None):
        if amp not in (None, torch.bfloat16, torch.float16):
            raise ValueError(f"expected amp to be torch.bfloat16, torch.float16 or None, got {amp!r}")
        if max_chunk is not None and max_chunk < 1:
            raise ValueError(f"expected max_chunk of at least 1, got {max_chunk}")
        self.model = model
        self.optimizer = optimizer
        self.amp = amp
        self.max_chunk = max_chunk
        parameter = next(model.parameters(), torch.empty(0))
        self.scaler = torch.amp.GradScaler(parameter.device.type) if amp == torch.float16 else None
        self.random = None if max_chunk is None else _RandomStates([model])
        self.chunks = []  # of the last batch, with the random states before each

    def forward(self, data):
        """The model's outputs for a batch, a tuple; of chunks without their graphs, which `backward` makes anew."""
        self.chunks = []
        n = _n_samples(data)
        if self.max_chunk is None or n <= self.max_chunk:
            return self._outputs(data)
        is_training = torch.is_grad_enabled()
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        outputs = []
        with torch.no_grad():
            for start in range(0, n, self.max_chunk):
                chunk = _slice(data, slice(start, start + self.max_chunk), n)
                if is_training:
                    self.chunks.append((chunk, self.random.get()))
                outputs.append(self._outputs(chunk))
            for buffer, old in zip(self.model.buffers(), buffers):
                buffer.copy_(old)  # running averages are for the second pass to change
        self.embeddings = tuple(torch.cat(x).requires_grad_(is_training) for x in zip(*outputs))
        return self.embeddings

    def backward(self, loss):
        """Gradients, and a step of the optimiser."""
        self.optimizer.zero_grad()
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        if self.chunks:
            self._backward_of_chunks()
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def _backward_of_chunks(self):
        """Carry the gradient by the embeddings back through the network, with the draws as they were."""
        behind = self.random.get()
        gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in self.embeddings]
        gradients = zip(*(gradient.split(self.max_chunk) for gradient in gradients))
        for number, ((chunk, states), gradient) in enumerate(zip(self.chunks, gradients), start=1):
            self.random.set(states)
            waits = isinstance(self.model, DistributedDataParallel) and number < len(self.chunks)
            with self.model.no_sync() if waits else contextlib.nullcontext():  # processes meet at the last one
                torch.autograd.backward(self._outputs(chunk), gradient)
        self.random.set(behind)

    def _outputs(self, data):
        tensor = next(_tensors(data), None)
        precision = contextlib.nullcontext()
        if self.amp is not None and tensor is not None:
            precision = torch.autocast(tensor.device.type, self.amp)
        with precision:
            if isinstance(data, Mapping):
                outputs = self.model(**data)
            else:
                is_many = type(data) in (tuple, list)  # a named tuple is one argument
                outputs = self.model(*data) if is_many else self.model(data)
        outputs = tuple(outputs) if type(outputs) in (tuple, list) else (outputs,)
        return outputs if self.amp is None else tuple(x.float() if torch.is_tensor(x) else x for x in outputs)


class _Diagnosis:
    """Looks at the embeddings of each training batch, and warns once of what will not get better by itself."""

    REMEDY = (
        "try batch-all, semi-hard or random hard negatives in place of the hardest, a lower learning rate, more "
        "dimensions, or normalised embeddings (EmbeddingNetL2)"
    )

    PATIENCE = 50  # steps; before, a small spread may be a beginning

    def __init__(self, loss_fn):
        loss_fn = getattr(loss_fn, "loss_fn", loss_fn)  # in a GlobalBatchLoss
        self.n_steps = 0
        self.margin = getattr(loss_fn, "margin", None)
        self.is_soft = getattr(loss_fn, "soft_margin", False)
        self.is_silent = self.margin is None or _rank() > 0  # outputs for other losses may be what they are
        self._reset()

    def _reset(self):
        self.losses, self.spreads, self.norms, self.counts = [], [], [], []  # tensors, read at the end of an epoch

    @torch.no_grad()
    def observe(self, outputs, loss, count):
        x = outputs[0].detach() if torch.is_tensor(outputs[0]) else None
        if self.is_silent or x is None or x.dim() != 2 or len(x) < 2 or not x.is_floating_point():
            return
        x = x.float()
        self.n_steps += 1
        self.losses.append(loss.detach().reshape(()))
        self.spreads.append((x - x.mean(dim=0)).square().sum(dim=1).mean().sqrt())
        self.norms.append(x.square().sum(dim=1).mean().sqrt())
        if count is not None:
            self.counts.append(count)

    def warn(self, title):
        """Say what the epoch shows, where it shows anything."""
        problem = self._problem() if self.losses else None
        self._reset()
        if problem is not None and not self.is_silent:
            self.is_silent = True
            warnings.warn(f"{title}: {problem}", stacklevel=3)

    def _problem(self):
        n = max(1, len(self.losses) // 10)  # as it is at the end of the epoch
        loss, spread, norm = (float(torch.stack(x[-n:]).mean()) for x in (self.losses, self.spreads, self.norms))
        if spread <= 1e-3 * norm:
            state = f"their spread is {spread:.1g} at a norm of {norm:.1g}"
            return f"the embeddings have collapsed to a point, {state}; {self.REMEDY}"
        if not self.counts:
            return None
        name, value = ("ln 2", math.log(2)) if self.is_soft and self.margin == 0 else ("the margin", self.margin)
        is_at_standstill = abs(loss - value) <= 0.02 * value and spread <= 0.1 * value
        if value > 0 and is_at_standstill and self.n_steps >= self.PATIENCE:
            state = f"the loss stands at {name}, {value:.3g}, and their spread is {spread:.1g}"
            return f"the embeddings are about to collapse, {state}; {self.REMEDY}"
        if self.margin == 0 and not self.is_soft:
            return "a margin of 0 is met by embeddings that are all the same; try a margin of 0.2 to 1"
        if int(torch.stack(self.counts).sum()) == 0:
            return "no triplet was active, so nothing was learned; try harder ones, a larger margin, or stop here"
        return None


class _Losses:
    """The losses of a pass and what each counts for, kept as tensors: reading one would make a GPU wait."""

    def __init__(self, title):
        self.title = title
        self.losses, self.weights, self.n_checked = [], [], 0

    def add(self, loss, weight):
        self.losses.append(loss.detach().reshape(()))
        self.weights.append(weight)

    def check(self):
        """FloatingPointError for one that is not finite, of those added since the last check; ValueError for none."""
        if not self.losses:
            raise ValueError(f"{self.title}: the loader is empty, it gave no batch")
        unchecked = self.losses[self.n_checked :]
        for loss in torch.stack(unchecked).tolist() if unchecked else []:
            self.n_checked += 1
            if not math.isfinite(loss):
                remedy = "try a lower learning rate, and look for inputs that are not finite"
                raise FloatingPointError(f"{self.title}: the loss is {loss} in batch {self.n_checked}; {remedy}")

    def average(self, last=0, is_shared=False):
        """The weighted mean of the last ones, 0 for all; over all processes where they share a pass."""
        losses, weights = (torch.stack(x[-last:]).cpu().double() for x in (self.losses, self.weights))
        own = float((losses * weights).sum()), float(weights.sum())
        total, weight = map(sum, zip(*_gathered(own))) if is_shared else own
        return total / max(weight, 1)


def _as_tuple(target):
    """The target in a tuple, which is empty for an empty one."""
    is_empty = target is None or (isinstance(target, (tuple, list)) and len(target) == 0)
    return () if is_empty else (target,)


def _loss_and_count(loss_outputs):
    """The value that a loss returned, and the integer that came second as a 0-dim tensor, None where none did."""
    if not isinstance(loss_outputs, (tuple, list)):
        return loss_outputs, None
    loss, count = loss_outputs[0], loss_outputs[1] if len(loss_outputs) > 1 else None
    if torch.is_tensor(count) and count.numel() == 1 and not count.is_floating_point():
        return loss, count.detach().reshape(())
    return loss, torch.tensor(count) if isinstance(count, int) else None


def _slice(data, rows, n):
    """Some samples of a batch's data, of its tensors that have n."""
    return _map(lambda x: x[rows] if torch.is_tensor(x) and x.dim() and len(x) == n else x, data)


def _tensors(data):
    """The tensors in a batch's data, in order."""
    if torch.is_tensor(data):
        yield data
    elif isinstance(data, (Mapping, tuple, list)):
        for part in data.values() if isinstance(data, Mapping) else data:
            yield from _tensors(part)


def _data_and_target(batch):
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        size = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        raise ValueError(f"expected batches (data, target), got a {type(batch).__name__}{size}")
    return batch


def _weight(loss_fn, count, data):
    """What a batch counts for in averages: what its loss is the mean of, triplets where it says so, else samples."""
    n_selected = getattr(loss_fn, "n_selected", None)
    if isinstance(n_selected, int):
        return torch.tensor(n_selected)
    if count is not None and getattr(loss_fn, "average", "active") == "active":
        return count.clamp(min=0)
    return torch.tensor(_n_samples(data) or 1)


def _n_samples(data):
    """Length of the first tensor in a batch's data that has one, 0 where none has."""
    return next((len(x) for x in _tensors(data) if x.dim() and len(x)), 0)


def _sampler_of_processes(loader):
    """The sampler of a loader that deals its samples to several processes; None where there is none."""
    return next((sampler for sampler in _samplers_of(loader) if getattr(sampler, "num_replicas", 1) > 1), None)


def _samplers_of(loader):
    """A loader's samplers, and those behind its batch samplers."""
    samplers = [getattr(loader, name, None) for name in ("sampler", "batch_sampler")]
    return samplers + [getattr(sampler, "sampler", None) for sampler in samplers]


def _n_own_samples(sampler):
    """How many samples a DistributedSampler has for this process but for those that it gives twice; None for others."""
    if not isinstance(sampler, DistributedSampler) or sampler.drop_last:
        return None
    return len(range(sampler.rank, len(sampler.dataset), sampler.num_replicas))


def _without_padding(outputs, target, n_own):
    """Outputs and target as far as they are of the process's first n_own samples, and how many are left of these."""
    n = len(outputs[0]) if torch.is_tensor(outputs[0]) and outputs[0].dim() else 0
    if n_own is None or n <= n_own:
        return outputs, target, None if n_own is None else n_own - n
    parts = [[x[:n_own] if torch.is_tensor(x) and len(x) == n else x for x in part] for part in (outputs, target)]
    return *map(tuple, parts), 0


def _rank():
    """The number of this process, 0 where there is one."""
    is_one_of_many = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if is_one_of_many else 0


def _gathered(value):
    """A value of each process, in the order of their ranks; a list of one without torch.distributed."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def _of_first(function):
    """What a function returns in the first process, in all of them; an OSError that it raises, likewise."""
    try:
        result = function() if _rank() == 0 else None
    except OSError as error:
        result = error
    result = _gathered(result)[0]
    if isinstance(result, OSError):
        raise result
    return result


def _in_turn(parts):
    """The rows of all processes (N, ...), of which row i was dealt to process i % W."""
    place = torch.cat([torch.arange(len(part)) * len(parts) + rank for rank, part in enumerate(parts)])
    return torch.cat(parts)[place.argsort()]


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


@contextlib.contextmanager
def _tensorboard(log_dir):
    """A writer for TensorBoard, imported only now."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(log_dir) as writer:
        yield writer


def _write_log(writer, row, metrics):
    """The numbers of an epoch, and the embeddings that metrics have collected."""
    for name, value in row.items():
        if isinstance(value, (int, float)) and name != "epoch":
            writer.add_scalar(name.replace("_", "/", 1), value, row["epoch"])
    for metric in metrics:
        if len(getattr(metric, "embeddings", ())) > 0:
            writer.add_embedding(
                torch.cat(metric.embeddings), torch.cat(metric.labels).tolist(), global_step=row["epoch"]
            )
    writer.flush()


def _set_epoch(loader, epoch):
    """Tell a loader's samplers the epoch, where they ask for it, as DistributedSampler does."""
    for sampler in _samplers_of(loader):
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)


def _summary(title, row):
    """One line of the epoch's losses and metrics: train_NAME and val_NAME side by side."""
    names = dict.fromkeys(key.split("_", 1)[1] for key in row if key.startswith(("train_", "val_")))
    parts = []
    for name in names:
        values = [row[key] for key in (f"train_{name}", f"val_{name}") if row.get(key) is not None]
        parts.append(f"{name} " + " / ".join(f"{v:.4g}" if isinstance(v, (int, float)) else str(v) for v in values))
    return f"{title}, train / validation: {', '.join(parts)} ({row['seconds']:.1f} s)"


def _move(value, device):
    """Tensors, and what else has `to`, in nested tuples, lists and dicts to a device; None leaves all as it is."""
    if device is None:
        return value

    def move(x):
        if torch.is_tensor(x):
            return x.to(device, non_blocking=True)
        return x.to(device) if hasattr(x, "to") else x

    return _map(move, value)


def _map(function, value):
    """What a function makes of each tensor, of what else has `to`, and of all that is in no tuple, list or dict.

    Tuples and lists come back as lists, named tuples as what they were.
    """
    if hasattr(value, "to") or not isinstance(value, (Mapping, tuple, list)):
        return function(value)
    if isinstance(value, Mapping):
        return {key: _map(function, x) for key, x in value.items()}
    parts = [_map(function, x) for x in value]
    return type(value)(*parts) if hasattr(value, "_fields") else parts


def _to_device(model, cuda):
    """The device that `cuda` stands for, with the model moved there; None for leaving all where it is."""
    if not cuda:
        return None
    is_true = cuda == 1  # True, and what passes for it
    if is_true and not torch.cuda.is_available():
        raise ValueError("cuda=True, but torch sees no GPU: give cuda=False or a device")
    device = torch.device("cuda" if is_true else cuda)
    model.to(device)
    return device


def _unwrapped(model):
    return model.module if isinstance(model, DistributedDataParallel) else model


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


class _Checkpoint:
    """The file of a run: `resume` from it, `keep` each epoch; as a context it keeps what an error interrupts.

    Of several processes the first reads and writes, for all.

    Args:
        path, monitor, mode: as for `fit`.
        parts: dict of what has a state: model, optimiser, scheduler, loss; None for those that there are not.
        holders: what may hold random generators.
        history: the list that `fit` fills.
    """

    FORMAT = "siamese-triplet run, 1"

    def __init__(self, path, monitor, mode, parts, holders, history):
        if mode not in ("min", "max"):
            raise ValueError(f'expected mode "min" or "max", got {mode!r}')
        self.path = Path(path)
        self.monitor = monitor
        self.sign = 1 if mode == "min" else -1
        self.parts = {name: part for name, part in parts.items() if hasattr(part, "state_dict")}
        self.random = _RandomStates(holders)
        self.history = history
        self.epoch = 0

    def resume(self, start_epoch, n_epochs):
        """Bring all parts to the state in the file; the epochs trained, `start_epoch` where there is no file."""
        self.epoch = start_epoch
        own = self._state(_gathered(self.random.get()))
        if not _gathered(self.path.exists())[0]:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                _read(_as_bytes(own))  # what cannot be read back should be known before training
            except ValueError as error:
                raise ValueError(f"the state of this run cannot be kept in a file: {error}") from error
            return start_epoch
        try:
            state = _read(_of_first(self.path.read_bytes))
            _check_state(state, own, start_epoch, n_epochs)
        except (ValueError, OSError) as error:
            remedy = "It is left as it is: name another file, or move it away"
            raise ValueError(f"cannot resume from {self.path}: {error}. {remedy}") from error
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.random.set(state["random"][_rank()])
        self.history.extend(state["history"])
        self.epoch = state["epoch"]
        if _rank() == 0:
            tqdm.write(f"Resumed after epoch {self.epoch}, from {self.path}")
        return self.epoch

    def keep(self, epoch):
        """Write the state after an epoch."""
        self.epoch = epoch
        random_states = _gathered(self.random.get())
        content = _as_bytes(self._state(random_states)) if _rank() == 0 else None
        try:
            if self._is_best() and content is not None:  # first, since a run that dies between repeats the epoch
                _replace(self._sibling("best"), content)
        finally:
            if content is not None:
                _replace(self.path, content)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if error is not None and _rank() == 0:
            try:
                _replace(self._sibling("interrupted"), _as_bytes(self._state([self.random.get()])))
            except Exception as second:  # the first error is the one to be seen
                warnings.warn(f"what the interrupted epoch trained could not be kept: {second}", stacklevel=2)

    def _state(self, random_states):
        return {name: part.state_dict() for name, part in self.parts.items()} | {
            "format": self.FORMAT,
            "epoch": self.epoch,
            "history": [{key: _plain(value) for key, value in row.items()} for row in self.history],
            "optimizer_name": type(self.parts["optimizer"]).__name__,
            "scheduler_name": type(self.parts.get("scheduler")).__name__,
            "random": random_states,
        }

    def _is_best(self):
        if self.monitor is None:
            return False
        values = [_plain(row.get(self.monitor)) for row in self.history]
        if not isinstance(values[-1], (int, float)):
            entries = ", ".join(self.history[-1])
            raise ValueError(f"monitor={self.monitor!r} is no number of the history, whose entries are {entries}")
        earlier = [value for value in values[:-1] if isinstance(value, (int, float))]
        return all(self.sign * values[-1] < self.sign * value for value in earlier)

    def _sibling(self, name):
        return self.path.with_name(f"{self.path.name}.{name}")


def _check_state(state, own, start_epoch, n_epochs):
    """ValueError for a state that is not of the run whose own is given."""
    if not isinstance(state, dict) or state.get("format") != own["format"] or state.keys() != own.keys():
        raise ValueError("it is no checkpoint of fit with the same parts")
    there, here = ({key: _kind(x) for key, x in s["model"].items()} for s in (state, own))
    for key in [*here, *there]:
        if there.get(key) != here.get(key):
            raise ValueError(f"its model has {key} of {there.get(key)}, this one of {here.get(key)}")
    traits = {
        "optimiser": lambda s: s["optimizer_name"],
        "parameters in the optimiser's groups": lambda s: [len(g["params"]) for g in s["optimizer"]["param_groups"]],
        "scheduler": lambda s: s["scheduler_name"],
        "processes": lambda s: len(s["random"]),
        "random generators": lambda s: [len(generators) for generators, _ in s["random"]],
    }
    for name, trait in traits.items():
        if trait(state) != trait(own):
            raise ValueError(f"its {name}: {trait(state)}, here: {trait(own)}")
    if start_epoch not in (0, state["epoch"]) or state["epoch"] > n_epochs:
        given = f"start_epoch={start_epoch} and n_epochs={n_epochs}"
        raise ValueError(f"it ends with epoch {state['epoch']}, for {given}")


def _as_bytes(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _replace(path, content):
    """Write a file at once: it is the old one or the new one, whenever the process may die."""
    partial = path.with_name(f"{path.name}.partial")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _read(content):
    """What `torch.save` wrote, of tensors and plain values alone: nothing in it is executed."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            damaged = archive.testzip()  # torch.load does not compare checksums
        if damaged is not None:
            raise ValueError(f"it is damaged, in {damaged}")
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"it holds more than tensors and plain values ({str(error).splitlines()[0]})") from error
    except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"it is damaged, or none that torch.save wrote ({type(error).__name__})") from error


def _plain(value):
    """Numbers of numpy and torch as Python's; text for what a file of weights may not hold."""
    value = value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _kind(x):
    return f"{tuple(x.shape)} {x.dtype}" if torch.is_tensor(x) else type(x).__name__


class _RandomStates:
    """States of torch's, numpy's and Python's random generators, of those that objects hold, and of the GPUs'."""

    def __init__(self, holders):
        self.generators = [torch.default_generator, np.random, random, *_generators(holders)]

    def get(self):
        cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return [_random_state(generator) for generator in self.generators], cuda_states

    def set(self, states):
        for generator, state in zip(self.generators, states[0]):
            _set_random_state(generator, state)
        if states[1] and torch.cuda.is_initialized():
            torch.cuda.set_rng_state_all(states[1])


def _generators(holders):
    """Random generators that objects hold, and those that these hold in turn, in the order of their attributes."""
    found, seen, queue = [], set(), list(holders)
    while queue:
        x = queue.pop(0)
        if id(x) in seen or isinstance(x, (type, types.ModuleType, types.FunctionType, torch.Tensor, np.ndarray)):
            continue
        seen.add(id(x))
        if isinstance(x, (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)):
            found.append(x)
        elif isinstance(x, (list, tuple, Mapping)):
            queue.extend([] if len(x) > 100 else x.values() if isinstance(x, Mapping) else x)  # longer ones are data
        elif hasattr(x, "__dict__"):
            queue.extend(value for name, value in vars(x).items() if name != "_iterator")  # of persistent workers
    return found


def _random_state(generator):
    """The state of a generator, or of numpy's or Python's module of random numbers, as tensor or plain values."""
    if isinstance(generator, np.random.Generator):
        return _without_arrays(generator.bit_generator.state)
    return _without_arrays(generator.getstate() if hasattr(generator, "getstate") else generator.get_state())


def _set_random_state(generator, state):
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif hasattr(generator, "setstate"):
        generator.setstate(state)
    else:
        generator.set_state(state)


def _without_arrays(state):
    if isinstance(state, dict):
        return {key: _without_arrays(value) for key, value in state.items()}
    if isinstance(state, tuple):
        return tuple(map(_without_arrays, state))
    return state.tolist() if isinstance(state, (np.ndarray, np.generic)) else state
