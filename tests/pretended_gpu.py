"""A GPU where there is none: tensors that say they are on "cuda" and are computed on the CPU.

An operation that mixes tensors of both devices raises, as it does on a GPU; values are there, so that steps
which depend on data run too (torch's own fake tensors stop at these)."""
import contextlib
from unittest import mock
import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda:0")
MIXING = {"copy_", "_to_copy"}                       # take tensors of both devices on a GPU too
INDEXING = {"index", "index_put", "index_put_"}      # take indices on the CPU, which are copied each time

def indices(index):
    "Lists and arrays among indices as tensors on the GPU; torch would make empty ones, for it sees `meta`."
    if isinstance(index, tuple): return tuple(indices(i) for i in index)
    return torch.as_tensor(index).to(CUDA) if isinstance(index, (list, np.ndarray)) else index

class OnGPU(torch.Tensor):
    "A tensor that says it is on a GPU (to torch itself: on `meta`), and keeps its values in `inner`."
    __torch_function__ = torch._C._disabled_torch_function_impl
    device, is_cuda, is_meta, is_cpu = CUDA, True, False, False

    @staticmethod
    def __new__(cls, inner):
        layout = dict(strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype)
        new = torch.Tensor._make_wrapper_subclass(cls, inner.shape, device="meta", **layout)
        new.inner = inner
        return new

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        raise RuntimeError(f"{operation} outside of the pretended GPU")

    def __getitem__(self, index): return super().__getitem__(indices(index))
    def __setitem__(self, index, value): super().__setitem__(indices(index), value)
    def get_device(self): return 0
    def tolist(self): return self.inner.tolist()
    def numpy(self): raise TypeError("can't convert cuda:0 device type tensor to numpy")
    def __array__(self, *args): return self.numpy()

def is_gpu(device):
    "Whether an operation's `device` is the pretended GPU; it is `meta` where torch took it from a tensor."
    return device is not None and torch.device(device).type in ("cuda", "meta")

class PretendedGPU(TorchDispatchMode):
    "Computes everything on the CPU; raises where tensors are mixed, and notes CPU indices of GPU tensors."
    def __init__(self):
        super().__init__()
        self.cpu_indices = set()      # "file:line" of each

    def check(self, name, operation, on_gpu, on_cpu, generator, indexed):
        "Raise `RuntimeError` where a GPU would."
        if generator is not None: raise RuntimeError(f"{operation}: a CPU generator for a tensor on cuda")
        mixed = [t for t in on_cpu if t.dim()]        # numbers as tensors may be anywhere
        if not (on_gpu and mixed) or name in MIXING: return
        if not indexed: raise RuntimeError(f"{operation}: tensors on cuda and on the CPU")
        self.cpu_indices.add(caller())

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), operation.overloadpacket.__name__
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        on_gpu = [t for t in tensors if isinstance(t, OnGPU)]
        on_cpu = [t for t in tensors if not isinstance(t, OnGPU)]
        device = kwargs.get("device")
        to_gpu = bool(on_gpu) if device is None else is_gpu(device)
        generator = kwargs.get("generator") if to_gpu else None
        self.check(name, operation, on_gpu, on_cpu, generator, name in INDEXING and only_indices(args))
        if device is not None: kwargs["device"] = "cpu"
        plain = tree_map(lambda t: t.inner if isinstance(t, OnGPU) else t, (args, kwargs))
        result = operation(*plain[0], **plain[1])
        known = {id(t.inner): t for t in on_gpu} | {id(t): t for t in on_cpu}
        def back(t):
            if not isinstance(t, torch.Tensor): return t
            if id(t) in known: return known[id(t)]             # changed in place
            return OnGPU(t) if to_gpu else t
        return tree_map(back, result)

def only_indices(args):
    "Whether no more than indices is on the CPU: `args` are a tensor, indices and, for `index_put`, values."
    tensor, _, *values = args
    values = [v for v in values[:1] if isinstance(v, torch.Tensor) and v.dim()]
    return all(isinstance(t, OnGPU) for t in (tensor, *values))

def caller():
    "Where the library called what runs now, as `module:line`."
    import traceback
    lines = [f for f in traceback.extract_stack() if "mdd_bench" in f.filename]
    if not lines: return "a test"
    return f"{lines[-1].filename.rpartition('/')[2]}:{lines[-1].lineno}"

def on_the_way(make):
    "`torch.tensor` and `torch.as_tensor` by way of the CPU: in C++ they ask for a real GPU."
    def made(data, *, device=None, **options):
        return make(data, **options) if device is None else make(data, **options).to(device)
    return made

@contextlib.contextmanager
def pretended_gpu():
    "Inside, `cuda` can be used on a machine without a GPU; gives the `PretendedGPU`."
    torch._C._ensureCUDADeviceGuardSet()        # torch's own fake tensors begin with it too
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    patches = [
        mock.patch("torch.cuda._lazy_init", lambda: None),
        mock.patch("torch.tensor", on_the_way(torch.tensor)),
        mock.patch("torch.as_tensor", on_the_way(torch.as_tensor)),
        mock.patch("torch.cuda.get_device_name", lambda device=None: "pretended"),
        mock.patch("torch.cuda.max_memory_allocated", lambda device=None: 0),
    ]
    with contextlib.ExitStack() as stack:
        for patch in patches: stack.enter_context(patch)
        try: yield stack.enter_context(PretendedGPU())
        finally: torch.__future__.set_overwrite_module_params_on_conversion(before)
