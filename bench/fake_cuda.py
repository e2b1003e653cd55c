"""A GPU that is not there: the real engine on fake CUDA tensors, with each operation noted.

Fake tensors have shapes, types and CUDA's autocast rules, but no contents: what makes the host wait
for a number raises, and so do tensors on different devices; copies between host and device are
noted. Kernels, streams, NCCL and the compiler stay untested. bench/roofline.py counts with it.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

CUDA = torch.device("cuda", 0)
ROOT = f"{Path(__file__).parents[1]}/"
# By the function, or the file, that an operation is called from; the innermost counts.
PARTS = {"sample_views": "views", "extract_patches": "views", "encode_visible": "encoder"}
PARTS |= {"encode_target": "target", "decoder.py": "decoder", "losses.py": "loss"}
PARTS |= {"begin_step": "moving average", "end_step": "optimiser"}
NO_WORK = ("empty", "new_empty", "lift_fresh", "device")
WRITE_ONLY = ("copy_", "fill_", "zero_", "normal_", "uniform_")
GATHERS = ("index", "embedding", "gather", "index_select")  # read as much as they write
PRECISIONS = {torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass
class Operation:
    name: str
    part: str
    line: str
    region: int | None  # which call of compiled code; None: outside
    backward: bool
    flops: float
    precision: str
    reads: dict[int, int]  # bytes by storage
    writes: dict[int, int]

    @property
    def bytes(self) -> int:
        return sum(self.reads.values()) + sum(self.writes.values())


def tensors_in(*values) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def by_storage(*values) -> dict[int, int]:
    """Parts of one storage, as q, k and v, are added up; what is expanded is there once."""
    sizes: Counter[int] = Counter()
    for tensor in tensors_in(values):
        storage = tensor.untyped_storage()
        sizes[storage._cdata] = min(storage.nbytes(), sizes[storage._cdata] + tensor.nbytes)
    return sizes


class Recorder(TorchDispatchMode):
    """Notes what runs while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.copies: list[str] = []  # between host and device
        self.kept: dict[int, int] = {}  # for the backward pass: bytes by storage
        self.made: list = []  # storages, so that no other one gets their number
        self.region: int | None = None
        self.regions = count()
        self.origins: dict = {}  # part, line and region of each node of autograd
        self.origin: tuple | None = None  # of the backward pass that is running

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        outputs = function(*args, **kwargs)
        name = function._schema.name.partition("::")[2]
        if not name.startswith(NO_WORK):
            self.note(function, name, args, kwargs, outputs)
        self.made += [tensor.untyped_storage() for tensor in tensors_in(outputs)]
        return outputs

    def note(self, function, name: str, args: tuple, kwargs: dict, outputs) -> None:
        part, line, region = self.origin or self.place()
        if name in ("_to_copy", "copy_") and len({t.device for t in tensors_in(args, outputs)}) > 1:
            self.copies.append(f"{name} at {line}")
        changed = [
            value
            for argument, value in zip(function._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        reads, writes = by_storage(args, kwargs), by_storage(changed, kwargs.get("out"))
        writes |= {key: size for key, size in by_storage(outputs).items() if key not in reads}
        if not writes:
            return  # a view
        if name in GATHERS:
            reads[next(iter(reads))] = sum(writes.values())
        if name.endswith(WRITE_ONLY):
            reads = {key: size for key, size in reads.items() if key not in writes}
        formula = flop_registry.get(function._overloadpacket)
        flops = formula(*args, **kwargs, out_val=outputs) if formula else 0
        low = {tensor.dtype for tensor in tensors_in(outputs)} & PRECISIONS.keys()
        precision = PRECISIONS[low.pop()] if low else "fp32"
        place = part, line, region, self.origin is not None
        self.operations.append(Operation(name, *place, flops, precision, reads, writes))

    def place(self) -> tuple[str, str, int | None]:
        line, part, frame = "", "", sys._getframe(3)
        while frame is not None and not part:
            path = frame.f_code.co_filename
            if not line and "/torch/" not in path and path != __file__:
                short = path.removeprefix(ROOT) if "/site-packages/" not in path else path
                line = f"{'/'.join(short.split('/')[-2:])}:{frame.f_lineno}"
            part = PARTS.get(frame.f_code.co_name) or PARTS.get(path.rpartition("/")[2], "")
            frame = frame.f_back
        found = part or "loss", line, self.region
        self.origins[torch.autograd._get_sequence_nr() - 1] = found
        return found

    def compile(self, function: Callable, **options) -> Callable:
        """In place of torch.compile."""

        def inside(*args, **kwargs):
            outer = self.region
            self.region = next(self.regions) if outer is None else outer
            outputs = function(*args, **kwargs)
            self.region = outer
            return outputs

        return inside

    def backward(self, root: Tensor) -> None:
        """In place of Tensor.backward, node by node: autograd's engine would ask the driver."""
        nodes = {root.grad_fn: [torch.ones_like(root)]}  # with their gradients
        found = [root.grad_fn]
        for node in found:
            new = {child for child, _ in node.next_functions if child} - nodes.keys()
            nodes |= {child: [None] * len(child._input_metadata) for child in new}
            found += new
        # What has made a tensor is older than what has used it; parameters have the largest number.
        for node in sorted(
            found, key=lambda node: hasattr(node, "variable") or -node._sequence_nr()
        ):
            if hasattr(node, "variable"):
                self.accumulate(node, *nodes[node])
                continue
            self.origin = self.origins.get(node._sequence_nr(), ("loss", "", None))
            results = node(*nodes[node])
            results = results if isinstance(results, tuple) else (results,)
            for (child, slot), result in zip(node.next_functions, results, strict=True):
                if child is None or result is None:
                    continue
                wanted, before = child._input_metadata[slot], nodes[child][slot]
                result = result.sum_to_size(wanted.shape).to(wanted.dtype)
                nodes[child][slot] = result if before is None else before + result
                self.origins[child] = self.origin
        self.origin = None

    def accumulate(self, node, gradient: Tensor) -> None:
        self.origin = (*self.origins[node][:2], None)  # outside of compiled code
        parameter = node.variable
        parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)

    def keep(self, tensor: Tensor) -> Tensor:
        self.kept |= by_storage(tensor)
        return tensor


class FusedAttention(TorchFunctionMode):
    """As a GPU would choose, without asking the driver: flash, which float32 does not have."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        if torch.is_autocast_enabled("cuda"):
            args = [tensor.to(torch.get_autocast_dtype("cuda")) for tensor in args]
        if args[0].dtype == torch.float32:
            return torch.ops.aten._scaled_dot_product_efficient_attention(*args, None, True)[0]
        return torch.ops.aten._scaled_dot_product_flash_attention(*args)[0]


def without_generator(function: Callable) -> Callable:
    return lambda *args, generator=None, **kwargs: function(*args, **kwargs)


@contextmanager
def fake_cuda() -> Iterator[Recorder]:
    """Inside, what is built on CUDA is on a fake GPU; enter the recorder to note what runs."""
    recorder = Recorder()
    patches = [
        (torch, "compile", recorder.compile),
        (torch, "Generator", lambda device: mock.Mock(device=CUDA)),
        (torch, "rand", without_generator(torch.rand)),
        (torch, "randint", without_generator(torch.randint)),
        (Tensor, "backward", torch.no_grad()(lambda root: recorder.backward(root))),
        (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
        (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        (torch._C, "_current_graph_task_id", lambda: 1),  # recomputing asks for it
        (FakeTensorMode, "__deepcopy__", lambda mode, memo: mode),  # the target is a copy
    ]
    with ExitStack() as stack:
        for owner, name, value in patches:
            stack.enter_context(mock.patch.object(owner, name, value, create=True))
        for mode in (FakeTensorMode(), FusedAttention()):
            stack.enter_context(mode)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(recorder.keep, lambda t: t))
        yield recorder
