"""The training loop: one function for any number of inputs and any kind of loss.

It is handed loaders of `(data, target)`, a model, a loss, an optimiser, a scheduler and metrics (metrics.py):

    history = fit(train_loader, val_loader, model, loss_fn, optimizer, scheduler, 20, cuda=False, log_interval=50)
"""

import contextlib
import copy
import inspect
import math
import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DistributedSampler
from tqdm.auto import tqdm

_WRAPPERS = (DataParallel, DistributedDataParallel, AveragedModel)
_CHANGEABLE = (Tensor, np.ndarray, list, dict, set, deque)


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
    amp: torch.dtype | None = None,
    checkpoint: Any = None,
    on_epoch: Callable[[dict[str, Any]], Any] | None = None,
    scheduler_step: str = "epoch",
    compile: bool = False,
) -> list[dict[str, Any]]:
    """Train a model, and validate it after every epoch.

    A batch is `(data, target)`. Data is a tensor or a tuple, passed to the model as positional arguments, or a dict,
    passed by keyword. The loss gets the outputs and then the target; an empty target (`[]`) is left out. A loss returns
    its value, or a tuple that begins with it. Losses are averaged over samples.

    Training puts the model into training mode. Frozen parts stay as they are: those in evaluation mode of whose
    parameters none requires a gradient. In validation model and loss are in evaluation mode, and afterwards the modes,
    and the loss's state, are as before.

    A tqdm bar shows in a terminal and in a notebook; elsewhere, or with TQDM_DISABLE=1 in the environment, a line is
    printed every `log_interval` batches. A line is printed for each epoch. A warning says, once, if embeddings have
    shrunk to a point or no triplet was active.

    Args:
        train_loader: DataLoader, or any iterable of batches; `set_epoch` of its sampler is called before each epoch.
        val_loader: the same for validation; None for none.
        model: `nn.Module`, perhaps in DataParallel, DistributedDataParallel or torch.compile.
        loss_fn: called as `loss_fn(*outputs, target)`.
        optimizer: a `torch.optim` optimiser of the model's parameters, not LBFGS.
        scheduler: a `torch.optim.lr_scheduler`; None for a constant rate. ReduceLROnPlateau gets the validation loss,
            without validation the training loss.
        n_epochs: train up to this epoch.
        cuda: True for the current GPU, or any device, to which model, loss and batches are moved; False leaves them
            where they are.
        log_interval: number of batches between two log lines; 0 for none.
        metrics: list of `Metric`, called as `metric(outputs, target, loss_outputs)` with tuples of outputs and target.
        start_epoch: number of epochs already trained: 8 begins with the ninth. A scheduler that has made fewer steps is
            brought forward.
        amp: torch.bfloat16 or torch.float16 for the forward pass of the model, by autocast; loss and selection are in
            float32. float16 comes with gradient scaling. None for the precision that the model has.
        checkpoint: an object such as `Checkpoint` of checkpoints.py: its `resume(parts)`, called before training,
            returns the history so far, and `save(parts, history)` is called after each. None for none.
        on_epoch: called as `on_epoch(row)` after each epoch, with the history's row, in the first process, when the
            checkpoint has been saved; training ends if it returns True.
        scheduler_step: step the scheduler after every "epoch", or after every "batch", as OneCycleLR wants it.
        compile: compile model and loss as one function by torch.compile, on a GPU with mode "reduce-overhead".

    Returns:
        The history: a list with a dict for each epoch, of `epoch` (from 1), `lr` (of the first parameter group, as the
        epoch began), `train_loss`, `val_loss` (None without validation), `seconds`, and each metric as `train_NAME` and
        `val_NAME`; a metric whose value is a dict has an entry for each key instead, and one whose value is None has
        none.

    Raises:
        ValueError: an empty loader, or a batch that is not `(data, target)`; metrics of the same name; a scheduler that
            does not fit the number of steps; another `amp` or `scheduler_step`; a checkpoint of another run.
        TypeError: a batch that the model does not take, a loss that returns no number, LBFGS.
        RuntimeError: compile=True where torch.compile does not work.
        FloatingPointError: a loss that is not finite, naming epoch and batch. On a CPU the optimiser has not made the
            step, so the weights are those of the batch before; on a GPU losses are read every `log_interval` batches,
            every 100 at least.
    """
    metrics = list(metrics)
    step = _Step(model, loss_fn, optimizer, cuda, amp, compile)
    n_steps = _steps_of_scheduler(scheduler, scheduler_step, train_loader, n_epochs, start_epoch)
    parts = {"model": model, "loss_fn": loss_fn, "optimizer": optimizer, "scheduler": scheduler, "scaler": step.scaler}
    history: list[dict[str, Any]] = [] if checkpoint is None else _resume(checkpoint, parts, start_epoch, n_epochs)
    start_epoch = history[-1]["epoch"] if history else start_epoch
    if not history:  # a checkpoint brought the scheduler to where it was
        _bring_forward(scheduler, start_epoch * n_steps)
    each_batch = scheduler.step if scheduler is not None and scheduler_step == "batch" else None
    watch = _Watch()
    with _keep_modes(model):
        for epoch in range(start_epoch, n_epochs):
            began, title = time.perf_counter(), f"Epoch {epoch + 1}/{n_epochs}"
            row: dict[str, Any] = {"epoch": epoch + 1, "lr": float(optimizer.param_groups[0]["lr"])}
            _set_epoch(train_loader, epoch)
            _to_training(model)
            row["train_loss"] = _run_epoch(
                train_loader, step, metrics, f"{title} train", log_interval,
                is_training=True, watch=watch, each_batch=each_batch,
            )  # fmt: skip
            _add_values(row, "train", metrics)
            watch.warn(title)

            row["val_loss"] = None
            if val_loader is not None:
                row["val_loss"] = _evaluate(val_loader, step, metrics, f"{title} validation")
                _add_values(row, "val", metrics)

            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(row["train_loss"] if val_loader is None else row["val_loss"])
            elif scheduler is not None and each_batch is None:
                scheduler.step()
            row["seconds"] = time.perf_counter() - began
            history.append(row)
            if checkpoint is not None:
                checkpoint.save(parts, history)
            if _rank() == 0:
                tqdm.write(_summary(title, row))
            if _is_end(on_epoch, row):
                break
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
) -> tuple[float, Sequence[Any]]:
    """Train for one pass over the loader; see `fit`. The model is left in training mode.

    Returns:
        `(loss, metrics)`: the average loss as a float, and the metrics, whose `value()` is that of the pass.
    """
    step = _Step(model, loss_fn, optimizer, cuda, amp)
    _to_training(model)
    return _run_epoch(train_loader, step, metrics, title, log_interval, is_training=True), metrics


def test_epoch(
    val_loader: Iterable,
    model: nn.Module,
    loss_fn: Callable,
    cuda: bool | int | str | torch.device | None,
    metrics: Sequence[Any],
    *,
    title: str = "Validation",
    amp: torch.dtype | None = None,
) -> tuple[float, Sequence[Any]]:
    """Evaluate on one pass over the loader, in evaluation mode and without gradient; see `fit`.

    Returns:
        `(loss, metrics)`: the average loss as a float, and the metrics, whose `value()` is that of the pass.
    """
    return _evaluate(val_loader, _Step(model, loss_fn, None, cuda, amp), metrics, title), metrics


test_epoch.__test__ = False  # type: ignore[attr-defined]  # a function of the library, for all that pytest sees in its name


@torch.no_grad()
def extract_embeddings(
    loader: Iterable, model: Callable, device: torch.device | str | None = None, *, output: int = 0
) -> tuple[Tensor, Tensor]:
    """Embeddings and labels of all samples of a loader, in its order, in evaluation mode and without gradient.

    Args:
        loader: yields `(data, label)` batches, data as for `fit` and labels (B,). Processes that share the samples by
            torch's DistributedSampler, shuffle=False, each return all, every sample once.
        model: any callable. Of a module, behind wrappers such as DataParallel, `get_embedding` is called if it has one,
            else the module itself; its mode is restored.
        device: where to compute; by default where the model's first parameter lies.
        output: number of the output to take, if the model returns several.

    Returns:
        `(embeddings, labels)`: tensors (N, D) and (N,) on the CPU.

    Raises:
        ValueError: an empty loader, batches without a label for each sample, or an output that is no tensor with a row
            for each.
        TypeError: data that the model does not take, such as pairs.
    """
    bare: Any = _unwrapped(model)
    embed = getattr(bare, "get_embedding", bare)
    bare = getattr(bare, "__self__", bare)  # of a method
    is_module = isinstance(bare, nn.Module)
    if device is None and is_module:
        device = next((parameter.device for parameter in bare.parameters()), None)
    sampler = _sampler_of_processes(loader)
    n_own = _n_own_samples(sampler)
    if sampler is not None and (n_own is None or sampler.shuffle):
        raise ValueError("to put embeddings of several processes in order, DistributedSampler needs shuffle=False")
    embeddings, labels = [], []
    with _keep_modes(bare) if is_module else contextlib.nullcontext():
        if is_module:
            bare.eval()
        for batch in loader:
            data, target = _data_and_target(batch)
            try:
                rows = _output_number(_call(embed, _move(data, device)), output)
            except TypeError as error:
                _check_inputs(embed, data, error)
                raise
            target = _labels(target, len(rows))
            embeddings.append(rows.cpu())
            labels.append(target.reshape(-1).cpu() if target.numel() == len(target) else target.cpu())
    if not embeddings:
        raise ValueError("the loader is empty: it gave no batch")
    embeddings, labels = torch.cat(embeddings)[:n_own], torch.cat(labels)[:n_own]
    if sampler is not None:
        embeddings, labels = (_in_turn(parts) for parts in zip(*_gathered((embeddings, labels))))
    return embeddings, labels


@torch.no_grad()
def _evaluate(loader, step, metrics, title):
    """One pass in evaluation mode and without gradient. Returns the average loss."""
    with _keep_modes(step.model), _keep_state(step.loss_fn):
        step.model.eval()
        return _run_epoch(loader, step, metrics, title)


def _run_epoch(loader, step, metrics, title, log_interval=0, *, is_training=False, watch=None, each_batch=None):
    """One pass: fetch, forward, and for training backward and step. Returns the average loss."""
    for metric in metrics:
        metric.reset()
    sampler, losses = _sampler_of_processes(loader), _Losses(title)
    n_own = _n_own_samples(sampler)
    disable = os.environ.get("TQDM_DISABLE", "0") not in ("", "0") or _rank() > 0 or None  # None: without a terminal
    with tqdm(loader, desc=title, leave=False, disable=disable) as bar:
        for batch_number, batch in enumerate(bar, start=1):
            data, target = _move(_data_and_target(batch), step.device)
            target = _as_tuple(target)
            outputs, loss_outputs = step.forward(data, target)
            loss = _loss_of(loss_outputs)
            losses.add(loss, _n_samples(target) or _n_samples(data) or _n_samples(outputs) or 1)
            if is_training:
                step.backward(loss)
            if each_batch is not None:
                each_batch()
            if watch is not None:
                watch.observe(outputs, target, loss_outputs)
            outputs, target, n_own = _without_padding(outputs, target, n_own)
            for metric in metrics:
                metric(outputs, target or None, loss_outputs)
            if log_interval and batch_number % log_interval == 0:
                _log(bar, title, batch_number, losses.since_last_time())

    average = losses.average(is_shared=sampler is not None)
    for metric in metrics if sampler is not None else ():
        if hasattr(metric, "gather"):
            metric.gather()
    return average


class _Step:
    """A batch's way through model, loss and optimiser. Arguments as for `fit`."""

    def __init__(self, model, loss_fn, optimizer=None, cuda=False, amp=None, compile=False):
        if amp not in (None, torch.bfloat16, torch.float16):
            raise ValueError(f"expected amp to be torch.bfloat16, torch.float16 or None, got {amp!r}")
        if isinstance(optimizer, torch.optim.LBFGS):
            raise TypeError("LBFGS computes the loss of a batch several times, fit once: take another optimiser")
        self.model, self.loss_fn, self.optimizer, self.amp = model, loss_fn, optimizer, amp
        self.device = _to_device(cuda, model, loss_fn)
        self.parameters = next((x.device for x in model.parameters()), torch.device("cpu"))
        self.scaler = torch.amp.GradScaler(self.parameters.type) if amp == torch.float16 else None
        self.compute = _compiled(self._compute, self.parameters) if compile else self._compute

    def forward(self, data, target):
        """Outputs of the model, a tuple, and what the loss returned."""
        try:
            return self.compute(data, target)
        except TypeError as error:
            _check_inputs(_unwrapped(self.model), data, error)
            raise

    def _compute(self, data, target):
        device = next((x.device for x in _tensors(data)), self.parameters)
        with contextlib.nullcontext() if self.amp is None else torch.autocast(device.type, self.amp):
            outputs = _call(self.model, data)
        outputs = tuple(outputs) if type(outputs) in (tuple, list) else (outputs,)
        if self.amp is not None:
            outputs = tuple(_map(_at_least_float32, x) for x in outputs)
        return outputs, self.loss_fn(*outputs, *target)

    def backward(self, loss):
        """Gradients, and a step of the optimiser."""
        if not loss.requires_grad:
            raise ValueError("the loss has no gradient: it does not depend on parameters that require one")
        self.optimizer.zero_grad()
        if self.scaler is None:
            loss.backward()
            self.optimizer.step()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()


def _compiled(function, device):
    """A function compiled for a device; RuntimeError where that is impossible."""
    try:
        torch.compile(lambda x: x.cos() + 1)(torch.ones(2, device=device))
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise RuntimeError(f"compile=True, but torch.compile does not work here: {reason}") from error
    if device.type != "cuda":
        return torch.compile(function)
    compiled = torch.compile(function, mode="reduce-overhead")

    def replayed(*args):
        torch.compiler.cudagraph_mark_step_begin()
        return _copied(*compiled(*args))

    return replayed


def _copied(outputs, loss_outputs):
    """Copies of what a step returned, which the next one would write over."""

    def clone(x):
        return x.clone() if torch.is_tensor(x) else x

    return _map(clone, outputs), _map(clone, loss_outputs)


def _call(function, data):
    """A function of a batch's data: of a dict by keyword, of a tuple or list by position, of all else as it is."""
    if isinstance(data, Mapping):
        return function(**data)
    return function(*data) if type(data) in (tuple, list) else function(data)  # a named tuple is one argument


def _check_inputs(function, data, error):
    """TypeError in words where a function does not take so many inputs."""
    try:
        _call(inspect.signature(getattr(function, "forward", function)).bind, data)
    except TypeError as mismatch:
        n = len(data) if isinstance(data, Mapping) or type(data) in (tuple, list) else 1
        hint = "SiameseNet wants pairs, TripletNet triplets, in training and validation, other networks one input each"
        raise TypeError(f"the model does not take the {n} input(s) of a batch ({mismatch}); {hint}") from error


def _at_least_float32(x):
    return x.float() if torch.is_tensor(x) and x.dtype in (torch.float16, torch.bfloat16) else x


def _loss_of(loss_outputs):
    """The value that a loss returned; TypeError or ValueError where there is none."""
    loss = loss_outputs[0] if isinstance(loss_outputs, (tuple, list)) and loss_outputs else loss_outputs
    if not torch.is_tensor(loss):
        raise TypeError(f"expected a loss that returns a tensor, or a tuple with one first, got {type(loss).__name__}")
    if loss.numel() != 1 or not loss.is_floating_point():
        given = f"a tensor of shape {tuple(loss.shape)} of {loss.dtype}"
        raise ValueError(f"expected the loss to return one floating-point number, got {given}")
    return loss


class _Losses:
    """The average of a pass's losses over samples. Reading makes a GPU wait, so there they are read by the hundred."""

    def __init__(self, title):
        self.title = title
        self.unread = []
        self.n_batches = self.n = self.last_n = 0
        self.total = self.last_total = 0.0

    def add(self, loss, n):
        self.unread.append((loss.detach().reshape(()), n))
        if loss.device.type == "cpu" or len(self.unread) == 100:
            self.read()

    def read(self):
        """FloatingPointError for a loss that is not finite."""
        losses = torch.stack([loss for loss, _ in self.unread]).tolist() if self.unread else []
        for loss, (_, n) in zip(losses, self.unread):
            self.n_batches += 1
            if not math.isfinite(loss):
                remedy = "try a lower learning rate, and look for inputs that are not finite"
                raise FloatingPointError(f"{self.title}: the loss is {loss} in batch {self.n_batches}; {remedy}")
            self.total += loss * n
            self.n += n
        self.unread = []

    def since_last_time(self):
        """The average of the losses since this was last called."""
        self.read()
        average = (self.total - self.last_total) / (self.n - self.last_n)
        self.last_total, self.last_n = self.total, self.n
        return average

    def average(self, is_shared):
        """The average of all; over all processes where they share a pass."""
        self.read()
        if self.n_batches == 0:
            remedy = "an iterator, not a loader, gives its batches once only"
            raise ValueError(f"{self.title}: the loader is empty, it gave no batch; {remedy}")
        total, n = map(sum, zip(*_gathered((self.total, self.n)))) if is_shared else (self.total, self.n)
        return total / n


class _Watch:
    """Looks at one batch of an epoch, its last large one, and at the counts of all; warns once of what these show."""

    REMEDY = (
        "try batch-all, semi-hard or random hard negatives in place of the hardest, a lower learning rate, more "
        "dimensions, or normalised embeddings (EmbeddingNetL2)"
    )
    PATIENCE = 50  # steps; before, a small spread may be a beginning

    def __init__(self):
        self.is_silent = _rank() > 0
        self.n_steps = 0
        self._begin()

    def _begin(self):
        self.batch, self.n_active, self.has_triplet = None, None, torch.tensor(False)

    @torch.no_grad()
    def observe(self, outputs, target, loss_outputs):
        x, labels = outputs[0], target[0] if target and torch.is_tensor(target[0]) else None
        if self.is_silent or not torch.is_tensor(x) or x.dim() != 2 or x.shape[1] < 2 or not x.is_floating_point():
            return
        self.n_steps += 1
        if self.batch is None or len(x) >= len(self.batch[0]):  # not a last one of few samples
            self.batch = x.detach(), _loss_of(loss_outputs).detach().reshape(())
        count = loss_outputs[1] if isinstance(loss_outputs, (tuple, list)) and len(loss_outputs) > 1 else None
        if isinstance(count, int) or (torch.is_tensor(count) and count.numel() == 1 and not count.is_floating_point()):
            self.n_active = count if self.n_active is None else self.n_active + count
            if labels is None:
                self.has_triplet = torch.tensor(True)  # for all that is known
            else:
                labels = labels.reshape(-1)
                labels = (labels if labels.is_floating_point() else labels.long()).sort().values  # uint16 has no sort
                same = labels[1:] == labels[:-1]  # so there is a pair, and, unless all are, another class
                self.has_triplet = self.has_triplet.to(same.device) | (same.any() & ~same.all())
        elif labels.is_floating_point() if labels is not None else len(outputs) == 1:
            self.batch = None  # no embeddings of classes or triplets: they may be what they are

    def warn(self, title):
        """Say what the epoch shows, if it shows anything."""
        problem = self._problem() if self.batch is not None else None
        self._begin()
        if problem is not None:
            self.is_silent = True
            warnings.warn(f"{title}: {problem}", stacklevel=3)

    def _problem(self):
        x, loss = self.batch[0].float(), self.batch[1].float()
        spread = (x - x.mean(dim=0)).square().sum(dim=1).mean().sqrt()
        norm = x.square().sum(dim=1).mean().sqrt()
        spread, norm, loss = torch.stack((spread, norm, loss)).tolist()
        none_active = self.n_active is not None and int(self.n_active) == 0
        if none_active and not bool(self.has_triplet):
            return "no batch had two samples of one class and one of another, so no triplet; use BalancedBatchSampler"
        if len(x) > 1 and spread <= 1e-3 * norm:
            state = f"their spread is {spread:.1g} at a norm of {norm:.1g}"
            return f"the embeddings have shrunk to a point, {state}; {self.REMEDY}"
        if none_active:
            return "no triplet was active, so nothing was learned; try harder ones, a larger margin, or stop here"
        if self.n_active is not None and spread <= 0.1 * loss and self.n_steps >= self.PATIENCE:
            state = f"their spread is {spread:.1g} beside a loss of {loss:.3g}, which they hardly change"
            return f"the embeddings have shrunk, {state}; if it stays so, {self.REMEDY}"
        return None


def _to_training(model):
    """Put all but frozen parts into training mode; a warning names parts in it that were not."""
    frozen, woken = [], {}

    def visit(module, name, is_trained):
        parameters = list(module.parameters())
        wants_gradient = any(parameter.requires_grad for parameter in parameters)
        if not module.training and not wants_gradient and (is_trained or parameters):
            frozen.extend((part, part.training) for part in module.modules())
            return
        if is_trained and not module.training:
            woken[name] = module
        for child_name, child in module.named_children():
            visit(child, f"{name}.{child_name}".lstrip("."), module.training)

    visit(model, "", False)
    model.train()
    for module, mode in frozen:
        module.training = mode
    names = [name for name, module in woken.items() if module.training]
    if names:
        remedy = "to freeze it, give its parameters requires_grad=False"
        warnings.warn(f"{', '.join(names)} was in evaluation mode and is trained all the same; {remedy}", stacklevel=3)


@contextlib.contextmanager
def _keep_modes(model):
    """Give each part of the model back its mode, training or evaluation, which need not be the same for all."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def _keep_state(loss_fn):
    """A loss in evaluation mode; behind, its modes, buffers and attributes are as they were."""
    if not isinstance(loss_fn, nn.Module):
        yield
        return
    state = [(vars(module), dict(vars(module))) for module in loss_fn.modules()]
    values = [x for module in loss_fn.modules() for x in (*vars(module).values(), *module._buffers.values())]
    held = [x for value in values for x in (value, *getattr(value, "__dict__", {}).values())]  # by selectors
    generators = [(x, x.get_state()) for x in held if isinstance(x, torch.Generator)]
    contents = [(x, x.clone() if torch.is_tensor(x) else x.copy()) for x in values if isinstance(x, _CHANGEABLE)]
    loss_fn.eval()
    try:
        yield
    finally:
        for attributes, before in state:
            attributes.clear()
            attributes.update(before)
        for x, before in contents:
            _set_content(x, before)
        for generator, before in generators:
            generator.set_state(before)


def _set_content(x, content):
    """Give a tensor, an array or a container the content of another."""
    if torch.is_tensor(x):
        x.data = content if x.shape != content.shape else x.data.copy_(content)
    elif isinstance(x, (list, np.ndarray)):
        x[:] = content
    else:
        x.clear()
        (x.extend if isinstance(x, deque) else x.update)(content)


def _as_tuple(target):
    """The target in a tuple, which is empty for an empty one."""
    is_empty = target is None or (isinstance(target, (tuple, list)) and len(target) == 0)
    return () if is_empty else (target,)


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


def _n_samples(data):
    """Length of the first tensor in data or target that has one, 0 where none has."""
    return next((len(x) for x in _tensors(data) if x.dim() and len(x)), 0)


def _output_number(outputs, number):
    """One of the outputs of a model; ValueError where it is no tensor with rows."""
    outputs = tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)
    if not isinstance(number, int):
        raise TypeError(f"expected output to be the number of one, got {number!r}")
    if not -len(outputs) <= number < len(outputs):
        raise ValueError(f"output={number}, but the model returns {len(outputs)} output(s)")
    rows = outputs[number]
    if not torch.is_tensor(rows) or rows.dim() == 0:
        raise ValueError(f"expected output {number} of the model to be a tensor (B, ...), got a {type(rows).__name__}")
    return rows


def _labels(target, n):
    """The labels of a batch as a tensor (n, ...); ValueError where there is not one for each sample."""
    if isinstance(target, (list, np.ndarray)) and np.asarray(target).dtype.kind in "biuf":
        target = torch.as_tensor(np.asarray(target))
    if not torch.is_tensor(target) or target.dim() == 0 or len(target) != n:
        given = f"a tensor {tuple(target.shape)}" if torch.is_tensor(target) else f"a {type(target).__name__}"
        is_text = isinstance(target, (list, tuple)) and any(isinstance(label, str) for label in target)
        of_text = "names, labels = np.unique(strings, return_inverse=True) numbers strings"
        remedy = of_text if is_text else "of pairs or triplets give the dataset as it was"
        raise ValueError(f"expected batches (data, labels), a number for each of {n} embeddings, got {given}; {remedy}")
    return target


def _sampler_of_processes(loader):
    """The sampler of a loader that deals its samples to several processes; None where there is none."""
    return next((sampler for sampler in _samplers_of(loader) if getattr(sampler, "num_replicas", 1) > 1), None)


def _samplers_of(loader):
    """A loader's samplers, and those behind its batch samplers."""
    samplers = [getattr(loader, name, None) for name in ("sampler", "batch_sampler")]
    return samplers + [getattr(sampler, "sampler", None) for sampler in samplers]


def _set_epoch(loader, epoch):
    """Tell a loader's samplers the epoch, if they ask for it, as DistributedSampler does."""
    for sampler in _samplers_of(loader):
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)


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


def _in_turn(parts):
    """The rows of all processes (N, ...), of which row i was dealt to process i % W."""
    place = torch.cat(
        [torch.arange(len(part), device=part.device) * len(parts) + rank for rank, part in enumerate(parts)]
    )
    return torch.cat(parts)[place.argsort()]


def _log(bar, title, batch_number, loss):
    if not bar.disable:
        bar.set_postfix(loss=f"{loss:.4f}")
    else:
        share = f" of {bar.total}" if bar.total else ""
        print(f"{title}: batch {batch_number}{share}, loss {loss:.6f}", flush=True)


def _add_values(row, part, metrics):
    """Put the metrics of a pass into the row: `PART_NAME`, or for a dict `PART_KEY` for each; None adds nothing."""
    for metric in metrics:
        value = metric.value()
        for name, number in (value if isinstance(value, dict) else {metric.name(): value}).items():
            if f"{part}_{name}" in row:
                raise ValueError(f"the history has a {part}_{name} already: give {metric.name()!r} another name for it")
            if number is not None:
                row[f"{part}_{name}"] = number


def _summary(title, row):
    """One line of the epoch's losses and metrics: train_NAME and val_NAME side by side."""
    names = dict.fromkeys(key.split("_", 1)[1] for key in row if key.startswith(("train_", "val_")))
    parts = []
    for name in names:
        values = [row[key] for key in (f"train_{name}", f"val_{name}") if row.get(key) is not None]
        parts.append(f"{name} " + " / ".join(f"{v:.4g}" if isinstance(v, (int, float)) else str(v) for v in values))
    return f"{title}, train / validation: {', '.join(parts)} ({row['seconds']:.1f} s)"


def _is_end(on_epoch, row):
    """Whether the first process's `on_epoch` ends the training, in all processes; a number that is not 0 does not."""
    answer = on_epoch(row) if on_epoch is not None and _rank() == 0 else False
    is_end = isinstance(answer, (bool, np.bool_)) and bool(answer)
    return is_end if on_epoch is None else _gathered(is_end)[0]


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

    Containers come back as what they were.
    """
    if hasattr(value, "to") or not isinstance(value, (Mapping, tuple, list)):
        return function(value)
    if isinstance(value, Mapping):
        mapped = copy.copy(value)
        for key, x in value.items():
            mapped[key] = _map(function, x)
        return mapped
    parts = [_map(function, x) for x in value]
    return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts) if isinstance(value, tuple) else parts


def _to_device(cuda, *parts):
    """The device that `cuda` stands for, with model and loss moved there; None for leaving all where it is."""
    if not cuda:
        return None
    is_true = cuda == 1  # True, and what passes for it
    if is_true and not torch.cuda.is_available():
        raise ValueError("cuda=True, but torch sees no GPU: give cuda=False or a device")
    device = torch.device("cuda" if is_true else cuda)
    for part in parts:
        if isinstance(part, nn.Module):
            part.to(device)
    return device


def _unwrapped(model):
    """The model behind torch's wrappers, however deep."""
    while hasattr(model, "_orig_mod") or isinstance(model, _WRAPPERS):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return model


def _resume(checkpoint, parts, start_epoch, n_epochs):
    """The history of a checkpoint, its parts restored; ValueError where its last epoch is not what was asked for."""
    if not (hasattr(checkpoint, "resume") and hasattr(checkpoint, "save")):
        given = type(checkpoint).__name__
        raise TypeError(f"expected a checkpoint with resume and save, such as Checkpoint(path), got {given}")
    history = checkpoint.resume(parts)
    epoch = history[-1]["epoch"] if history else start_epoch
    if history and (start_epoch not in (0, epoch) or epoch > n_epochs):
        given = f"start_epoch={start_epoch} and n_epochs={n_epochs}"
        raise ValueError(f"cannot resume: the checkpoint ends with epoch {epoch}, for {given}")
    if history and _rank() == 0:
        tqdm.write(f"Resumed after epoch {epoch}")
    return history


def _steps_of_scheduler(scheduler, scheduler_step, loader, n_epochs, start_epoch):
    """Steps of the scheduler an epoch; ValueError where it ends before the training, a warning where it is too long."""
    if scheduler_step not in ("epoch", "batch"):
        raise ValueError(f'expected scheduler_step "epoch" or "batch", got {scheduler_step!r}')
    if scheduler_step == "batch" and isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError('ReduceLROnPlateau goes by the loss of an epoch: scheduler_step="epoch"')
    try:
        n_batches = len(loader)  # type: ignore[arg-type]
    except TypeError:
        n_batches = 0  # not known
    if scheduler_step == "batch" and start_epoch > 0 and n_batches == 0:
        raise ValueError("start_epoch needs a loader with a length, to bring the scheduler forward batch by batch")
    n_steps = 1 if scheduler_step == "epoch" else n_batches
    name, total = type(scheduler).__name__, getattr(scheduler, "total_steps", None)
    if total is not None and total < n_steps * n_epochs:
        raise ValueError(f"{name} ends after {total} steps; {n_epochs} epochs make {n_steps * n_epochs}")
    lengths = [getattr(scheduler, key, None) for key in ("total_steps", "T_max", "total_iters")]
    if scheduler_step == "epoch" and n_batches > 1 and n_epochs * n_batches in lengths:
        message = f"{name} is set for {n_epochs * n_batches} steps, one for each batch, but makes one for each epoch"
        warnings.warn(f'{message}; scheduler_step="batch" makes one for each batch', stacklevel=3)
    return n_steps


def _bring_forward(scheduler, n_steps):
    """Steps that the scheduler has missed; one that the caller restored has made them."""
    if scheduler is None or isinstance(scheduler, ReduceLROnPlateau):
        return
    last = getattr(scheduler, "_schedulers", [scheduler])[-1]  # ChainedScheduler does not count itself
    n_missed = n_steps - getattr(scheduler, "last_epoch", getattr(last, "last_epoch", n_steps))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*before `optimizer.step.*")  # those steps are not in this process
        for _ in range(n_missed):
            scheduler.step()
    if n_missed > 0 and hasattr(scheduler, "_get_closed_form_lr"):
        # Steps go from rate to rate, and those of an optimiser that the caller restored had decayed already.
        for group, rate in zip(scheduler.optimizer.param_groups, scheduler._get_closed_form_lr()):
            group["lr"] = rate
