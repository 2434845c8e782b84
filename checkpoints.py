"""Checkpoints: a training run in one file, from which the same call goes on as if nothing had happened.

`fit` calls `resume` before the first epoch and `save` after each; a loop of your own can do the same:

    fit(train_loader, val_loader, model, ..., checkpoint=Checkpoint("run.pt", best="val_map@r", mode="max"))
"""

import contextlib
import glob
import io
import math
import os
import pickle
import random
import uuid
import zipfile
import zlib
from collections.abc import Iterable
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

_FORMAT = "siamese-triplet run, 2"
_WRAPPERS = (DataParallel, DistributedDataParallel, AveragedModel)
# How an optimiser computes its steps: no setting of the run, so it may change on resuming.
_EXECUTION = ("foreach", "fused", "capturable", "differentiable")
# What changes as an optimiser and its scheduler work.
_PROGRESS = {
    "params", "param_names", "last_epoch", "best", "num_bad_epochs", "cooldown_counter", "T_cur", "T_i", "scale",
    "_growth_tracker", "_step_count", "_last_lr", "_is_initial", "_get_lr_called_within_step",
}  # fmt: skip


class Checkpoint:
    """The file of a training run: weights, optimiser, scheduler, history and random states after the last epoch.

    On a CPU a resumed run ends in the same weights as an undisturbed one, bit for bit, if all its random numbers come
    from generators that are kept: the global ones of torch, its GPUs, numpy and Python, and the `generators` given
    here. A sampler with a seed needs none.

    The file holds tensors and plain values alone: reading it executes nothing, and
    `torch.load(path, weights_only=True)["model"]` is the state dict of the model, without wrappers (DataParallel,
    DistributedDataParallel, AveragedModel, torch.compile). It is written under a unique name beside the target and then
    renamed, so it is whole at any moment. Of several processes the first reads and writes, for all.

    Args:
        path: the file. A relative path is one of the current folder as it is now; a link is followed.
        best: entry of the history, such as "val_loss" or "val_map@r": the best epoch by it is kept too, in `PATH.best`.
            An epoch in which it is NaN or missing is not the best. None for none.
        mode: whether "min" or "max" of it is best.
        generators: random generators to keep besides the global ones, each time in the same order: `torch.Generator`,
            `numpy.random.Generator`, `numpy.random.RandomState`, `random.Random`.

    Raises:
        ValueError: another `mode`.
        TypeError: generators whose state cannot be kept.

    >>> import tempfile
    >>> net, folder = nn.Linear(2, 1), tempfile.mkdtemp()
    >>> Checkpoint(f"{folder}/run.pt").save({"model": net}, [{"epoch": 1, "train_loss": 0.5}])
    >>> Checkpoint(f"{folder}/run.pt").resume({"model": net})
    [{'epoch': 1, 'train_loss': 0.5}]
    """

    def __init__(
        self, path: str | os.PathLike, *, best: str | None = None, mode: str = "min", generators: Iterable[Any] = ()
    ) -> None:
        if mode not in ("min", "max"):
            raise ValueError(f'expected mode "min" or "max", got {mode!r}')
        self.path, self.best_path = (Path(os.path.realpath(f"{Path(path)}{end}")) for end in ("", ".best"))
        self.best = best
        self.mode = mode
        self.generators = list(generators)
        self._settings: dict[str, Any] = {}  # of optimiser and scheduler, as the run began
        for generator in self.generators:
            _check_generator(generator)

    def resume(self, parts: dict[str, Any]) -> list[dict[str, Any]]:
        """Bring all parts to the state in the file, if there is one.

        Args:
            parts: what has a state, by name: "model", "optimizer", "scheduler", "loss_fn" and so on. Parts without a
                `state_dict`, None among them, are ignored.

        Returns:
            The history in the file, a list with a dict for each epoch; empty if there is no file.

        Raises:
            ValueError: a file that is damaged, no checkpoint, or of another model, optimiser, scheduler or number of
                processes, or of other settings (learning rate, weight decay, T_max, ...), naming both values; it is
                left as it is. A state that could not be read back from a file.
            OSError: the file cannot be written.
        """
        parts = _with_state(parts)
        own = self._state(parts, [])
        own["settings"] = _settings(own)
        try:
            content = _of_first(lambda: _content(self.path))
            state = own if content is None else _read(content)
            _check(state, own)
        except (ValueError, OSError) as error:
            remedy = "It is left as it is: name another file, or move it away"
            raise ValueError(f"cannot resume from {self.path}: {error}. {remedy}") from error
        _of_first(lambda: self._try(own))
        self._settings = state["settings"]
        if content is not None:
            for name, part in parts.items():
                _load(part, state[name], state["wrappers"].get(name, {}))
            self._set_random_states(*state["random"][_rank()])
        return state["history"]

    def save(self, parts: dict[str, Any], history: list[dict[str, Any]]) -> None:
        """Write the state of all parts and, if the last epoch is the best, `PATH.best`; parts as for `resume`.

        Raises:
            ValueError: no epoch has a number as its entry `best`. The state is kept all the same.
            OSError: the file cannot be written. The old one stays then, and nothing else is left.
        """
        state = self._state(_with_state(parts), history)  # in all processes: their random states are gathered
        state["settings"] = self._settings
        _of_first(lambda: self._write(_as_bytes(state), state["history"]))

    def _state(self, parts, history):
        return {name: _state_of(part) for name, part in parts.items()} | {
            "format": _FORMAT,
            "history": [{key: _plain(value) for key, value in row.items()} for row in history],
            "kinds": {name: _kind(part) for name, part in parts.items()},
            "shapes": {name: _parameter_shapes(part) for name, part in parts.items()},
            "wrappers": {name: _state_of_wrappers(part) for name, part in parts.items()},
            "generators": [_name_of(generator) for generator in self.generators],
            "random": _gathered(self._random_states()),
        }

    def _try(self, state):
        """Write the state and read it back: what would fail after an epoch fails before it."""
        try:
            content = _as_bytes(state)
            _read(content)
        except (ValueError, AttributeError, TypeError, RuntimeError, pickle.PicklingError) as error:
            raise ValueError(f"the state of this run cannot be kept in a file: {error}") from error
        with _written_beside(self.path, content) as partial:
            for other in self.path.parent.glob(f".{glob.escape(self.path.name[:200])}.*.partial"):
                if other.stat().st_mtime < partial.stat().st_mtime - 3600:  # of a process that was killed
                    other.unlink()

    def _write(self, content, history):
        try:
            if self._is_best(history):  # first, since a run that dies in between repeats the epoch
                _replace(self.best_path, content)
        finally:
            _replace(self.path, content)

    def _is_best(self, history):
        if self.best is None or not history:
            return False
        values = [row.get(self.best) for row in history]
        if not any(isinstance(value, Real) for value in values):
            entries = ", ".join(history[-1])
            raise ValueError(f"best={self.best!r} is no number in the history, whose entries are {entries}")
        sign = 1 if self.mode == "min" else -1
        *earlier, last = (sign * x if isinstance(x, Real) and not math.isnan(x) else math.inf for x in values)
        return last < min(earlier, default=math.inf)

    def _random_states(self):
        gpu_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return [_random_state(generator) for generator in self._all_generators()], gpu_states

    def _set_random_states(self, states, gpu_states):
        for generator, state in zip(self._all_generators(), states):
            _set_random_state(generator, state)
        if gpu_states and torch.cuda.is_initialized():
            torch.cuda.set_rng_state_all(gpu_states[: torch.cuda.device_count()])

    def _all_generators(self):
        return [torch.default_generator, np.random, random, *self.generators]


def _with_state(parts):
    """The parts that have a state; ValueError for a name that the file has for something else."""
    reserved = {"format", "history", "kinds", "shapes", "wrappers", "generators", "random", "settings"}.intersection(
        parts
    )
    if reserved:
        raise ValueError(f"expected other names of parts than {', '.join(sorted(reserved))}")
    return {name: part for name, part in parts.items() if hasattr(part, "state_dict")}


def _state_of(part):
    """The state dict of a part; that of a module without what wrappers add."""
    state = part.state_dict()
    if not isinstance(part, nn.Module):
        return _without_arrays(state)
    keys = {key: _bare_key(part, key) for key in state}
    return {bare: state[key] for key, bare in keys.items() if bare is not None}


def _state_of_wrappers(part):
    """What `_state_of` leaves out, such as how many models an AveragedModel is the mean of."""
    state = part.state_dict() if isinstance(part, nn.Module) else {}
    return {key: value for key, value in state.items() if _bare_key(part, key) is None}


def _load(part, state, state_of_wrappers):
    """Bring a part to a state that `_state_of` gave, perhaps of a part in other wrappers."""
    if isinstance(part, nn.Module):
        own = part.state_dict() | state_of_wrappers
        state = {key: state.get(_bare_key(part, key), own[key]) for key in part.state_dict()}
    elif isinstance(part, torch.optim.Optimizer):
        execution = [{key: group[key] for key in _EXECUTION if key in group} for group in part.param_groups]
        state = state | {"param_groups": [group | own for group, own in zip(state["param_groups"], execution)]}
    part.load_state_dict(state)


def _bare_key(module, key):
    """A key of a state dict without what wrappers add to it, however deep; None for what is a wrapper's own."""
    kept = []
    for name in key.split("."):
        while not _holds(module, name) and len(module._modules) == 1:
            (module,) = module._modules.values()  # its keys are those of what it holds, as Chunked's of networks.py
        inner = "_orig_mod" if "_orig_mod" in module._modules else "module" if isinstance(module, _WRAPPERS) else None
        if inner is None:
            kept.append(name)
        elif name != inner:
            return None
        module = getattr(module, name, module)
    return ".".join(kept)


def _holds(module, name):
    return name == "_extra_state" or any(name in x for x in (module._modules, module._parameters, module._buffers))


def _kind(part):
    """The class that a part and that of the file must share; modules need only the same tensors."""
    return "module" if isinstance(part, nn.Module) else type(part).__name__


def _parameter_shapes(part):
    """Shapes of an optimiser's parameters, group by group: its state goes by their order."""
    return [[list(x.shape) for x in group["params"]] for group in getattr(part, "param_groups", [])]


def _settings(state):
    """Path, such as "scheduler T_max", -> plain value, for the settings in a state; as made, not as scheduled since."""
    settings = {}
    for name, kind in state["kinds"].items():
        if kind != "module" and isinstance(state[name], dict):
            settings |= _leaves({name: state[name].get("param_groups", state[name])})
    return settings


def _leaves(value, path=""):
    """The plain values in nested dicts and lists, each under its path."""
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        scheduled = {"lr"} if "initial_lr" in value else set()
        scheduled |= {"momentum", "betas"} if "max_momentum" in value else set()
        items = [(key, x) for key, x in value.items() if key not in (*_PROGRESS, *_EXECUTION, *scheduled)]
    elif isinstance(value, (list, tuple)) and any(isinstance(x, dict) for x in value):
        items = [*enumerate(value), ("length", len(value))]
    else:
        value = sorted(map(list, value.items())) if isinstance(value, dict) else value  # milestones and their number
        value = value.tolist() if hasattr(value, "tolist") else list(value) if isinstance(value, tuple) else value
        return {path: value} if value is None or isinstance(value, (bool, int, float, str, list)) else {}
    return {leaf: x for key, inner in items for leaf, x in _leaves(inner, f"{path} {key}".strip()).items()}


def _check(state, own):
    """ValueError for a state that is not of the run whose own is given."""
    if not isinstance(state, dict) or state.get("format") != _FORMAT or own.keys() - own["kinds"] - state.keys():
        raise ValueError("it is no checkpoint of this version")
    if state["kinds"].keys() != own["kinds"].keys():
        raise ValueError(f"it keeps {', '.join(state['kinds'])}, this run {', '.join(own['kinds'])}")
    for name, kind in own["kinds"].items():
        if state["kinds"][name] != kind:
            raise ValueError(f"its {name}: {state['kinds'][name]}, here: {kind}")
        if state["shapes"][name] != own["shapes"][name]:
            raise ValueError(f"its {name} has its parameters in other groups, another order, or of other shapes")
        tensors = [{key: _shape(x) for key, x in s[name].items()} if kind == "module" else {} for s in (state, own)]
        for key in tensors[0] | tensors[1]:
            there, here = (x.get(key) for x in tensors)
            if there != here:
                raise ValueError(f"its {name} has {key} of {there}, here it is of {here}")
    for name, trait in (("processes", lambda s: len(s["random"])), ("generators", lambda s: s["generators"])):
        if trait(state) != trait(own):
            raise ValueError(f"its {name}: {trait(state)}, here: {trait(own)}")
    now = _settings(state)  # what goes on in the process that wrote the file is as the scheduler has left it
    for path in state["settings"] and own["settings"] | state["settings"]:
        there, here = state["settings"].get(path), own["settings"].get(path)
        is_missing = (path in own["settings"]) != (path in state["settings"])
        if is_missing and own["shapes"].get(path.split()[0]):
            continue  # versions of torch differ in the options of an optimiser
        if here not in (there, now.get(path, there)):
            raise ValueError(f"its {path}: {there}, here: {here}")


def _shape(x):
    return f"{tuple(x.shape)} {x.dtype}" if torch.is_tensor(x) else type(x).__name__


def _plain(value):
    """Numbers of numpy and torch as Python's; text for what a file of weights cannot hold."""
    value = value.item() if hasattr(value, "item") and math.prod(getattr(value, "shape", (0,))) == 1 else value
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _content(path):
    """The bytes of a file; None where there is none."""
    if path.exists() and not path.is_file():
        raise ValueError("it is no file")
    return path.read_bytes() if path.exists() else None


def _as_bytes(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _read(content):
    """What `torch.save` wrote, if it is tensors and plain values alone: nothing in it is executed."""
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


@contextlib.contextmanager
def _written_beside(path, content):
    """The path of a file beside another, written to the disk; removed behind, unless it was renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name[:200]}.{uuid.uuid4().hex}.partial")  # names may have 255 characters
    try:
        with open(partial, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        yield partial
    finally:
        partial.unlink(missing_ok=True)


def _replace(path, content):
    """Write a file at once: it is the old one or the new one, whenever the process may die."""
    with _written_beside(path, content) as partial:
        if path.exists():
            os.chmod(partial, path.stat().st_mode)
        os.replace(partial, path)


def _check_generator(generator):
    try:
        _set_random_state(generator, _random_state(generator))
    except Exception as error:
        kinds = "torch.Generator, numpy.random.Generator, numpy.random.RandomState or random.Random"
        raise TypeError(f"expected generators of {kinds}, got a {type(generator).__name__}: {error}") from error


def _name_of(generator):
    """Its class and, of numpy's, that of what it draws from."""
    return type(getattr(generator, "bit_generator", generator)).__name__


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
    """Numpy's arrays and numbers in nested dicts, lists and tuples as Python's, which a file of weights can hold."""
    if type(state) is dict:
        return {key: _without_arrays(value) for key, value in state.items()}
    if type(state) in (tuple, list):
        return type(state)(map(_without_arrays, state))
    return state.tolist() if isinstance(state, (np.ndarray, np.generic)) else state


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
    """What a function returns in the first process, in all of them; an error that it raises, likewise."""
    result, error = None, None
    try:
        result = function() if _rank() == 0 else None
    except (OSError, ValueError) as raised:
        error = raised
    result, error = _gathered((result, error))[0]
    if error is not None:
        raise error
    return result
