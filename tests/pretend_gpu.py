"""CUDA devices that are not there: their tensors lie in the CPU's memory, and are known to be a device's.

So every branch for CUDA runs on any machine. An operation that mixes devices fails, as it would on GPUs. Where the host
waits for one is counted, and a recorded graph is replayed. Only a real GPU can show its kernels and their rounding, its
memory, and streams that overtake each other.
"""

from __future__ import annotations

import functools
import importlib
import sys
import threading
import warnings
from collections import Counter
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

CPU = torch.device("cpu")
ATEN = torch.ops.aten
ASKING = {
    ATEN._local_scalar_dense.default,
    ATEN.nonzero.default,
    ATEN.masked_select.default,
    ATEN.equal.default,
    ATEN.unique_dim.default,
    ATEN._unique2.default,
    ATEN.repeat_interleave.Tensor,
}
"""What asks the device for a number, or for a size that only it knows."""
INDEXING = {ATEN.index.Tensor, ATEN.index_put_.default, ATEN.index_put.default}
"""What takes indices from the CPU, and waits until they are copied."""
STRICT = {ATEN.cat.default, ATEN.stack.default, ATEN.gather.default, ATEN.index_select.default}
"""What takes not even a single number from elsewhere."""


class PretendGpu:
    """Which memory is which device's, and what waited for one."""

    def __init__(self):
        self.waits: Counter[str] = Counter()
        """By folder, file and function: how often the host waited there."""
        self.recording: _Recording | None = None
        self.recordings = 0
        self.seeds: list[int] = []
        """What its generators were seeded with."""
        self.warns = False
        self._on: dict[int, tuple[StorageWeakRef, torch.device]] = {}

    def of(self, tensor):
        """The device that a tensor is on; None for the CPU."""
        if tensor.layout is not torch.strided or tensor.is_meta:
            return None
        ref, device = self._on.get(tensor.untyped_storage()._cdata, (None, None))
        return None if ref is None or ref.expired() else device

    def put(self, tensor, device):
        """Its memory is a device's from now on; None: the CPU's."""
        storage = tensor.untyped_storage()
        self._on[storage._cdata] = StorageWeakRef(storage), device
        if len(self._on) > 20_000:
            self._on = {key: found for key, found in self._on.items() if not found[0].expired()}
        return tensor

    def wait(self):
        """Count a wait, at the innermost line that is neither ours nor PyTorch's."""
        if self.recording is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        frame = sys._getframe(1)
        while frame.f_back and (frame.f_code.co_filename == __file__ or "/torch/" in frame.f_code.co_filename):
            frame = frame.f_back
        path, line = frame.f_code.co_filename, frame.f_lineno
        self.waits["/".join(path.split("/")[-2:]) + " " + frame.f_code.co_qualname] += 1
        if self.warns:
            warnings.warn_explicit("called a synchronizing CUDA operation", UserWarning, path, line)


def _tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _card(device):
    """What stands for a GPU, as one with its number; None for anything else."""
    if type(device) is int:
        return torch.device("cuda", device)
    if not isinstance(device, (str, torch.device)) or torch.device(device).type != "cuda":
        return None
    return torch.device("cuda", torch.device(device).index or 0)


class _Operations(TorchDispatchMode):
    """Every operation, of a backward pass too."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, gpu = kwargs or {}, self.gpu
        found = [(tensor, gpu.of(tensor)) for tensor in _tensors((args, kwargs))]
        on, off = {device for _, device in found if device}, [tensor for tensor, device in found if not device]
        if func is ATEN.copy_.default:
            if on and off and not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False)):
                gpu.wait()
        elif len(on) > 1:
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, found {sorted(map(str, on))}")
        elif on and off:
            if func in INDEXING and gpu.of(args[0]):
                gpu.wait()
            elif func in STRICT or any(tensor.dim() for tensor in off):
                raise RuntimeError(f"{func}: expected all tensors to be on the same device, found {on.pop()} and cpu")
        if on and (
            func in ASKING or (func is ATEN.index.Tensor and any(i.dtype == torch.bool for i in _tensors(args[1])))
        ):
            gpu.wait()
        if gpu.recording is None or not on:
            return self._done(func, args, kwargs, on)
        gpu.recording.keep_what_changes(func, args)
        found = self._done(func, args, kwargs, on)
        gpu.recording.operations.append((func, args, kwargs, found))
        return found

    def _done(self, func, args, kwargs, on):
        if func is ATEN.mm.dtype:  # which the CPU does not have
            found = args[0].to(args[2]) @ args[1].to(args[2])
        else:
            found = func(*args, **kwargs)
        if on and func is not ATEN.copy_.default:
            for tensor in _tensors(found):
                self.gpu.put(tensor, next(iter(on)))
        return found


class _Calls(TorchFunctionMode):
    """What a tensor says of itself, where it is made, and where it goes."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _SPECIAL:
            return _SPECIAL[func](self.gpu, func, args, kwargs)
        if kwargs.get("device") is None:
            return func(*args, **kwargs)
        card = _card(kwargs["device"])
        found = func(*args, **(kwargs | ({"device": CPU} if card else {})))
        if card and func in {torch.as_tensor, torch.asarray}:  # which share memory
            found = found.clone()
        for tensor in _tensors(found):
            self.gpu.put(tensor, card)
        return found


def _to(gpu, func, args, kwargs):
    tensor, *rest = args
    target = kwargs.get("device")
    for place, value in enumerate(rest):
        if isinstance(value, torch.Tensor):
            target, rest[place] = gpu.of(value) or CPU, value.dtype
        elif isinstance(value, (str, torch.device)) or type(value) is int:
            target, rest[place] = value, CPU
    found = func(tensor, *rest, **(kwargs | ({"device": CPU} if "device" in kwargs else {})))
    if target is None or gpu.of(tensor) == _card(target):
        return found
    if not (kwargs.get("non_blocking") or next((value for value in rest if isinstance(value, bool)), False)):
        gpu.wait()
    return gpu.put(found.clone(), _card(target))


def _backward(gpu, func, args, kwargs):
    """What is computed again in the backward pass is computed on the device too."""
    renamed = {"grad_tensors" if name == "gradient" else name: value for name, value in kwargs.items()}
    with _Calls(gpu):
        torch.autograd.backward(*args, **renamed)


def _numpy(gpu, func, args, kwargs):
    if gpu.of(args[0]):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it first")
    return func(*args, **kwargs)


def _tolist(gpu, func, args, kwargs):
    if gpu.of(args[0]):
        gpu.wait()
    return func(*args, **kwargs)


def _pinned(gpu, func, args, kwargs):
    if gpu.of(args[0]):
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
    return args[0].clone()


def _one_hot(gpu, func, args, kwargs):
    """A GPU's does not look for the largest number, so it asks for none."""
    with _disable_current_modes():
        found = func(*args, **kwargs)
    return gpu.put(found, gpu.of(args[0]))


_SPECIAL = {
    torch.device: lambda gpu, func, args, kwargs: _card(args[0]) if type(args[0]) is int else func(*args, **kwargs),
    torch.Tensor.device.__get__: lambda gpu, func, args, kwargs: gpu.of(args[0]) or func(*args, **kwargs),
    torch.Tensor.is_cuda.__get__: lambda gpu, func, args, kwargs: gpu.of(args[0]) is not None,
    torch.Tensor.is_cpu.__get__: lambda gpu, func, args, kwargs: gpu.of(args[0]) is None,
    torch.Tensor.get_device: lambda gpu, func, args, kwargs: getattr(gpu.of(args[0]), "index", -1),
    torch.Tensor.to: _to,
    torch.Tensor.cpu: lambda gpu, func, args, kwargs: _to(gpu, torch.Tensor.to, (args[0], CPU), kwargs),
    torch.Tensor.cuda: lambda gpu, func, args, kwargs: _to(gpu, torch.Tensor.to, (args[0], "cuda"), kwargs),
    torch.Tensor.backward: _backward,
    torch.Tensor.numpy: _numpy,
    torch.Tensor.__array__: _numpy,
    torch.Tensor.tolist: _tolist,
    torch.Tensor.pin_memory: _pinned,
    F.one_hot: _one_hot,
}


class _Recording:
    """What a CUDA graph has recorded, and what lay where that writes: recording computes nothing."""

    def __init__(self):
        self.operations, self._kept = [], {}

    def keep_what_changes(self, func, args):
        """Before an operation that writes to its arguments."""
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in _tensors(value):
                    storage = tensor.untyped_storage()
                    self._kept.setdefault(storage._cdata, (storage, storage.clone()))

    def put_back(self):
        """At the recording's end."""
        for storage, before in self._kept.values():
            storage.copy_(before)

    def replay(self):
        """The same operations, from and to the same memory."""
        for func, args, kwargs, recorded in self.operations:
            for old, new in zip(_tensors(recorded), _tensors(func(*args, **kwargs)), strict=True):
                if old.untyped_storage()._cdata != new.untyped_storage()._cdata:
                    old.copy_(new)


class _Stream:
    """In which everything has happened already."""

    def __init__(self, *_, **__):
        self.wait_stream = self.wait_event = self.synchronize = self.record_event = lambda *_: None


class _Event:
    """Which has happened already."""

    def __init__(self, *_, **__):
        self.record = self.synchronize = lambda *_: None
        self.elapsed_time = lambda other: 1.0


def _graphs(gpu):
    class Graph:
        def replay(self):
            self.recorded.replay()

    @contextmanager
    def graph(made, **_):
        gpu.recording = made.recorded = _Recording()
        gpu.recordings += 1
        try:
            yield
        finally:
            gpu.recording = None
        made.recorded.put_back()

    return {"CUDAGraph": Graph, "graph": graph, "is_current_stream_capturing": lambda: gpu.recording is not None}


def _driver(gpu, count):
    """The functions of `torch.cuda` that are asked."""
    card = SimpleNamespace(name="Pretended", major=9, minor=0, total_memory=10**11, multi_processor_count=132)
    answers = {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "device_count": count,
        "current_device": 0,
        "get_device_name": card.name,
        "get_device_properties": card,
        "get_device_capability": (card.major, card.minor),
        "get_arch_list": ["sm_90"],
        "mem_get_info": (card.total_memory, card.total_memory),
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "device": nullcontext(),
        "stream": nullcontext(),
        "current_stream": _Stream(),
        "default_stream": _Stream(),
        **dict.fromkeys(("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"), 10**6),
        **dict.fromkeys(("_lazy_init", "init", "set_device", "set_rng_state")),
        **dict.fromkeys(("empty_cache", "synchronize", "reset_peak_memory_stats")),
    }

    def warn(mode):
        gpu.warns = mode == "warn"

    def seed(number):
        gpu.seeds.append(number)

    functions = {name: functools.partial(lambda value, *_, **__: value, value) for name, value in answers.items()}
    return {
        **functions,
        **_graphs(gpu),
        "Stream": _Stream,
        "Event": _Event,
        "set_sync_debug_mode": warn,
        "manual_seed": seed,
        "manual_seed_all": seed,
    }


@contextmanager
def pretend_gpu(count=1):
    """There are so many GPUs, in this thread and those that it starts, until the context ends."""
    gpu = PretendGpu()

    def in_thread(run):
        def running(thread):
            with _Calls(gpu), _Operations(gpu):
                run(thread)

        return running

    def cast(init):
        def made(autocast, device_type, *args, **kwargs):
            init(autocast, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)

        return made

    def by_device(group):
        def grouped(tensors, *args, **kwargs):
            card = next((gpu.of(tensor) for row in tensors for tensor in row if tensor is not None), None)
            found = group(tensors, *args, **kwargs)
            return {(card or device, dtype): rows for (device, dtype), rows in found.items()}

        return grouped

    def load(path, map_location=None, load=torch.load, **kwargs):
        card = _card(map_location)
        found = load(path, map_location=CPU if card else map_location, **kwargs)
        for tensor in _tensors(found) if card else ():
            gpu.put(tensor, card)
        return found

    by_hand = "_group_tensors_by_device_and_dtype"
    patches = [(torch.cuda, name, value) for name, value in _driver(gpu, count).items()]
    patches += [
        (torch, "load", load),
        (torch.Tensor, "record_stream", lambda tensor, stream: None),
        (torch.autocast, "__init__", cast(torch.autocast.__init__)),
        (threading.Thread, "run", in_thread(threading.Thread.run)),
        (torch.profiler, "profile", lambda **_: nullcontext(SimpleNamespace(events=list))),
    ]
    for name in ("torch.utils._foreach_utils", "torch.optim.optimizer", "torch.nn.utils.clip_grad"):
        module = importlib.import_module(name)
        patches.append((module, by_hand, by_device(getattr(module, by_hand))))
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(mock.patch.object(*patch))
        stack.enter_context(_Calls(gpu))
        stack.enter_context(_Operations(gpu))
        yield gpu
