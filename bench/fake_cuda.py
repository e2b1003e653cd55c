"""The real training step on fake CUDA tensors: no GPU, no memory and no arithmetic, but the
operations, their types and CUDA's own autocast rules.

It finds tensors on different devices, and what would make the host wait (item(), sizes that depend
on values, copies between host and device), and notes what each operation reads and writes. It does
not find wrong kernels, and knows nothing of streams, NCCL, or the compiler. The backward pass runs
node by node on the Python side, because autograd's own engine asks the driver for a context.
"""

import heapq
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

CUDA = torch.device("cuda", 0)
# By the function, or the file, that an operation is called from; the innermost counts.
PARTS = {
    **dict.fromkeys(("sample_views", "extract_patches", "normalise"), "views"),
    **{"encode_visible": "encoder", "encode_target": "target", "decoder.py": "decoder"},
    **{"losses.py": "loss", "begin_step": "moving average", "end_step": "optimiser"},
}
NOT_OURS = ("/torch/", __file__, "importlib")
WRITE_ONLY = ("copy_", "fill_", "zero_", "normal_", "uniform_")
GATHERS = ("index", "embedding", "gather", "index_select")  # read as much as they write


@dataclass
class Operation:
    name: str
    part: str
    line: str
    region: int | None  # which call of a compiled region; None: outside of all
    backward: bool
    flops: float
    precision: str
    reads: dict[int, int]  # bytes by storage
    writes: dict[int, int]

    @property
    def bytes(self) -> int:
        return sum(self.reads.values()) + sum(self.writes.values())


def size_of(tensor: Tensor) -> int:
    """In bytes; what is expanded is there once."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * torch.Size(n for n, step in sizes if step or n < 2).numel()


def tensors_in(*values) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def by_storage(tensors: list[Tensor]) -> dict[int, int]:
    sizes: dict[int, int] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        size = sizes.get(storage._cdata, 0) + size_of(tensor)  # of several parts, such as q, k, v
        sizes[storage._cdata] = min(size, storage.nbytes())
    return sizes


class Recorder(TorchDispatchMode):
    """Notes what runs while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.waits: list[str] = []  # copies between host and device
        self.kept = 0  # bytes that were alive when a backward pass began
        self.region: int | None = None
        self.regions = 0
        self.origins: dict[int, tuple] = {}  # part, line and region by number of the autograd node
        self.origin: tuple | None = None  # of the backward pass that is running
        # Storages with their bytes; the references keep their keys from being used again.
        self.born: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        outputs = operation(*args, **(kwargs or {}))
        name = operation._schema.name.partition("::")[2]
        given, made = tensors_in(args, kwargs), tensors_in(outputs)
        if name != "device" and (given or made):
            self.note(operation, name, given, made, (args, kwargs or {}, outputs))
        return outputs

    def note(self, operation, name: str, given: list, made: list, call: tuple) -> None:
        part, line, region = self.place()
        if len({tensor.device.type for tensor in given + made if tensor.dim() or not given}) > 1:
            self.waits.append(f"{name} at {line}")
        written = [
            value
            for argument, value in zip(operation._schema.arguments, call[0], strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        written += [call[1][n] for n in ("out",) if n in call[1]]
        reads, writes = by_storage(given), by_storage(tensors_in(written))
        new = {key: size for key, size in by_storage(made).items() if key not in reads}
        for storage in (tensor.untyped_storage() for tensor in made):
            if storage._cdata in new:
                self.born[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        if not writes and not new or name.startswith(("empty", "new_empty", "lift_fresh")):
            return  # a view, or memory alone
        if name in GATHERS:
            reads[next(iter(reads))] = sum(new.values())
        if name.endswith(WRITE_ONLY):
            reads = {key: size for key, size in reads.items() if key not in writes}
        flops = flop_registry.get(operation._overloadpacket)
        work = flops(*call[0], **call[1], out_val=call[2]) if flops else 0
        low = next((t.dtype for t in made if t.dtype.itemsize == 2), None)
        precision = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(low, "fp32")
        backward = self.origin is not None
        self.operations.append(
            Operation(name, part, line, region, backward, work, precision, reads, writes | new)
        )

    def place(self) -> tuple[str, str, int | None]:
        """Part, line and region: of a backward pass those of its forward pass."""
        if self.origin is not None:
            return self.origin
        line, part, frame = "", "", sys._getframe(3)
        while frame is not None and not part:
            path = frame.f_code.co_filename
            if not line and not any(word in path for word in NOT_OURS):
                line = f"{Path(path).parent.name}/{Path(path).name}:{frame.f_lineno}"
            part = PARTS.get(frame.f_code.co_name) or PARTS.get(Path(path).name, "")
            frame = frame.f_back
        found = part or "loss", line, self.region
        self.origins[torch.autograd._get_sequence_nr() - 1] = found
        return found

    def compile(self, function: Callable, **options) -> Callable:
        """In place of torch.compile: notes what would be compiled, and runs it as it is."""

        @wraps(function)
        def inside(*args, **kwargs):
            if self.region is not None:
                return function(*args, **kwargs)
            self.regions += 1
            self.region = self.regions
            try:
                return function(*args, **kwargs)
            finally:
                self.region = None

        return inside

    def backward(self, root: Tensor) -> None:
        """In place of Tensor.backward, in the order of autograd's engine."""
        alive = [size for reference, size in self.born.values() if not reference.expired()]
        self.kept = max(self.kept, sum(alive))
        waiting = count_uses(root.grad_fn)
        received = {root.grad_fn: [torch.ones_like(root)]}
        ready = [(0, 0, root.grad_fn)]
        with torch.no_grad():
            while ready:
                node = heapq.heappop(ready)[2]
                results = self.run(node, received.pop(node))
                for (child, slot), result in zip(node.next_functions, results, strict=True):
                    if child is None:
                        continue
                    expected = child._input_metadata
                    slots = received.setdefault(child, [None] * len(expected))
                    if result is not None:
                        before, wanted = slots[slot], expected[slot]
                        result = result.sum_to_size(wanted.shape).to(wanted.dtype)
                        slots[slot] = result if before is None else before + result
                    waiting[child] -= 1
                    if waiting[child] == 0:
                        heapq.heappush(ready, (-child._sequence_nr(), len(received), child))
        self.origin = None

    def run(self, node, gradients: list) -> tuple:
        if not hasattr(node, "variable"):
            self.origin = self.origins.get(node._sequence_nr(), ("loss", "", None))
            results = node(*gradients)
            return results if isinstance(results, tuple) else (results,)
        self.origin = (*self.origin[:2], None)  # gradients are summed outside of compiled code
        if node.variable.grad is None:
            node.variable.grad = gradients[0]
        else:
            node.variable.grad.add_(gradients[0])
        return ()


def count_uses(root) -> Counter:
    """Of each node below the root by how many others its result is needed."""
    uses, left = Counter(), [root]
    while left:
        for child, _ in left.pop().next_functions:
            if child is not None:
                left += [] if child in uses else [child]
                uses[child] += 1
    return uses


class AsOnGPU(TorchFunctionMode):
    """What a GPU would choose, without asking the driver."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            return fused_attention(*args)
        return function(*args, **(kwargs or {}))


def fused_attention(*inputs: Tensor) -> Tensor:
    """Flash attention, which float32 does not have."""
    if torch.is_autocast_enabled("cuda"):
        inputs = tuple(tensor.to(torch.get_autocast_dtype("cuda")) for tensor in inputs)
    if inputs[0].dtype == torch.float32:
        return torch.ops.aten._scaled_dot_product_efficient_attention(*inputs, None, True)[0]
    return torch.ops.aten._scaled_dot_product_flash_attention(*inputs)[0]


class Generator:
    """A generator of random numbers on the fake device."""

    device = CUDA

    def manual_seed(self, seed: int) -> None:
        pass


def without_generator(function: Callable) -> Callable:
    return lambda *args, generator, **kwargs: function(*args, **kwargs)


@contextmanager
def fake_cuda() -> Iterator[Recorder]:
    """Inside, networks that are built are on a fake GPU; enter the recorder to note what runs."""
    recorder, optimizer = Recorder(), torch.optim.Optimizer
    patches = [
        (torch, "compile", recorder.compile),
        (torch, "Generator", lambda device: Generator()),
        *((torch, name, without_generator(getattr(torch, name))) for name in ("rand", "randint")),
        (torch.Tensor, "backward", lambda root: recorder.backward(root)),
        (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
        (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        (torch._C, "_current_graph_task_id", lambda: 1),  # recomputing asks for it
        (FakeTensorMode, "__deepcopy__", lambda mode, memo: mode),  # the target is a copy
        *((optimizer, name, lambda _: None) for name in dir(optimizer) if "graph_capture" in name),
    ]
    with ExitStack() as stack:
        for owner, name, value in patches:
            stack.enter_context(mock.patch.object(owner, name, value, create=True))
        stack.enter_context(FakeTensorMode())
        stack.enter_context(CUDA)
        stack.enter_context(AsOnGPU())
        yield recorder
