"""The memory of network calls, measured by running them on shapes."""
import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from cdm_plugin.methods import DiffusionModel
from cdm_plugin.roles.lora import AdapterRole, checkpoint_in_role


class Footprint(NamedTuple):
    """Bytes that one network call adds; casts are autocast's copies of weights.

    Attributes:
        forward (float): Most at one time in the forward pass, without casts.
        held (float): What waits for the backward pass, without casts.
        backward (float): Most that the backward pass adds to that at one time, without the weights' gradients.
        casts (float): Casts at the end of the forward pass.
        held_casts (float): Casts that wait for the backward pass.
    """
    forward: float = 0
    held: float = 0
    backward: float = 0
    casts: float = 0
    held_casts: float = 0

    def extended(self, one_more: 'Footprint', least: 'Footprint', count: int) -> 'Footprint':
        """With `count` more blocks of which `one_more` has one more than `least`. The backward pass frees one block
        before the next and needs what the largest does."""
        total = Footprint(*(a + count * (b - c) for a, b, c in zip(self, one_more, least)))
        return total._replace(backward=max(self.backward, one_more.backward))

    @property
    def waiting(self) -> float:
        """What waits for the backward pass, casts included."""
        return self.held + self.held_casts

    @property
    def running(self) -> float:
        """Most at one time in the forward pass, casts included."""
        return self.forward + self.casts


class _Tracker(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, storage by storage."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.seen: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.now = self.peak = 0
        self.ignore(known)

    def ignore(self, tensors: Sequence[Tensor]) -> None:
        """These count for nothing."""
        for t in tensors:
            self.seen[t.untyped_storage()] = True

    def forget(self, t: Tensor) -> None:
        """This one counted, but is counted elsewhere."""
        storage = t.untyped_storage()
        if self.seen.get(storage) is not None:
            finalizer = self.seen[storage]
            if finalizer is not True and finalizer.alive:
                finalizer()
                finalizer.detach()

    def __torch_dispatch__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                if storage not in self.seen:
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    self.seen[storage] = weakref.finalize(storage, self._freed, storage.nbytes())
        return out

    def _freed(self, nbytes: int) -> None:
        self.now -= nbytes


class _Attention(torch.autograd.Function):
    """Attention's memory: no kernel that trains large images keeps the matrix of all pairs of tokens."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = v.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class _Gpu(TorchFunctionMode):
    """What a GPU does that the meta device does not: autocast, and attention without its matrix.

    Args:
        dtype (torch.dtype, optional): Of autocast; None is no autocast.
        tracker (_Tracker): Where casts are not counted.
    """
    # The functions of torch's lists for CUDA that diffusers' networks call.
    LOWER = {'linear', 'conv1d', 'conv2d', 'conv3d', 'matmul', '__matmul__', 'bmm', 'baddbmm', 'addmm', 'einsum'}
    FLOAT32 = {'layer_norm', 'group_norm', 'softmax', 'pow', '__pow__', 'rsqrt', 'exp', 'log', 'sum', 'norm'}

    def __init__(self, dtype: torch.dtype | None, tracker: _Tracker) -> None:
        super().__init__()
        self.dtype, self.tracker, self.depth = dtype, tracker, 0
        self.casts: dict[int, Tensor] | None = {}

    def __enter__(self) -> '_Gpu':
        self.depth += 1
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self.depth -= 1
        super().__exit__(*error)

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, '__name__', '')
        if name == 'scaled_dot_product_attention':
            named = [kwargs[n] for n in ('query', 'key', 'value') if n in kwargs]
            return _Attention.apply(*(self._cast(t) for t in (*args, *named)[:3]))
        if self.dtype is not None and name in self.LOWER:
            args, kwargs = [self._cast(a) for a in args], {k: self._cast(v) for k, v in kwargs.items()}
        elif self.dtype is not None and name in self.FLOAT32:
            args = [a.float() if isinstance(a, Tensor) and a.dtype == self.dtype else a for a in args]
        return func(*args, **kwargs)

    def _cast(self, value: Any) -> Any:
        if self.dtype is None or not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        if self.casts is None or not (value.is_leaf and value.requires_grad):
            return value.to(self.dtype)
        if id(value) not in self.casts:  # autocast keeps what it casts of trained weights until it is left
            with torch.enable_grad():
                self.casts[id(value)] = value.to(self.dtype)
            self.tracker.forget(self.casts[id(value)])
        return self.casts[id(value)]


class _InGpu(nn.Module):
    """A block whose recomputation, in backward, sees the same GPU."""

    def __init__(self, block: nn.Module, gpu: _Gpu) -> None:
        super().__init__()
        self.block, self.gpu = block, gpu

    def forward(self, *args: Any) -> Any:
        with contextlib.nullcontext() if self.gpu.depth else self.gpu:
            return self.block(*args)


def measure(method: DiffusionModel, role: str, batch: int, grad: bool, autocast: torch.dtype | None) -> Footprint:
    """The memory of one call of a role's network, with its backward pass if it has a gradient.

    Blocks that repeat cost the same: one of each kind runs, then one more of each, and the rest is multiplied.

    Args:
        method (DiffusionModel): The method on the meta device.
        role (str): One of the method's denoisers.
        batch (int): Samples in the call.
        grad (bool): Whether it has a gradient.
        autocast (torch.dtype, optional): Autocast's dtype.
    """
    network = network_of(method, role)
    kinds = _kinds(network, method.backbone_of(role).repeated_blocks)
    firsts = {name: [indices[0] for indices in groups] for name, groups in kinds.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='Mismatch dtype between input and weight')  # training says it itself
        with _only(network, firsts):
            least = _run(method, role, batch, grad, autocast)
        total = least
        for name, groups in kinds.items():
            for indices in groups:
                if len(indices) > 1:
                    with _only(network, {**firsts, name: sorted([*firsts[name], indices[1]])}):
                        more = _run(method, role, batch, grad, autocast)
                    total = total.extended(more, least, len(indices) - 1)
    return total


def network_of(method: DiffusionModel, role: str) -> nn.Module:
    """The network that a role calls: its own, or the base that it adapts."""
    network = getattr(method, role)
    return network.base if isinstance(network, AdapterRole) else network


def _kinds(network: nn.Module, names: Sequence[str]) -> dict[str, list[list[int]]]:
    """For each list of repeated blocks, the indices of its blocks by kind (equal class and shapes)."""
    found = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and all(type(m).__name__ in names for m in module):
            groups: dict[Any, list[int]] = {}
            for i, block in enumerate(module):
                shapes = tuple((n, tuple(p.shape)) for n, p in block.named_parameters())
                groups.setdefault((type(block), shapes), []).append(i)
            found[name] = list(groups.values())
    return found


@contextlib.contextmanager
def _only(network: nn.Module, blocks: dict[str, list[int]]) -> Iterator[None]:
    """The network has only these blocks of its lists inside."""
    lists = {name: network.get_submodule(name) for name in blocks}
    for name, indices in blocks.items():
        network.set_submodule(name, nn.ModuleList([lists[name][i] for i in indices]))
    try:
        yield
    finally:
        for name, module in lists.items():
            network.set_submodule(name, module)


def _run(method: DiffusionModel, role: str, batch: int, grad: bool, autocast: torch.dtype | None) -> Footprint:
    network = network_of(method, role)
    x = torch.empty(method.latent_shape(batch, method.largest_latent_size), device='meta')
    sigma = torch.empty(batch, device='meta')
    condition = method.null_condition(batch)
    known = [*network.parameters(), *network.buffers(), *getattr(method, role).parameters(), x, sigma,
             *condition.fields.values()]
    tracker = _Tracker(known)
    gpu = _Gpu(autocast, tracker)
    if method.activation_checkpointing:
        network.enable_gradient_checkpointing(
            gradient_checkpointing_func=lambda block, *args: checkpoint_in_role(_InGpu(block, gpu), *args))
    with torch.set_grad_enabled(grad), tracker:
        with gpu:
            out = method.velocity(role, x, sigma, condition, sigma)
        casts = [weakref.ref(cast) for cast in gpu.casts.values()]
        cast_bytes, forward = nbytes(gpu.casts.values()), tracker.peak
        gpu.casts = None  # autocast is left; a recomputation casts anew
        held, held_casts = tracker.now, sum(cast().nbytes for cast in casts if cast() is not None)
        backward = 0
        if grad:
            # A gradient counts with its role, not here.
            hooks = [p.register_post_accumulate_grad_hook(_drop_gradient)
                     for p in getattr(method, role).parameters() if p.requires_grad]
            tracker.peak = tracker.now
            torch.autograd.backward(out, torch.empty_like(out))
            backward = tracker.peak - held
            for hook in hooks:
                hook.remove()
    return Footprint(forward, held, backward, cast_bytes, held_casts)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def peak_of(function: Callable, known: Sequence[Tensor]) -> int:
    """Most bytes at one time while a function runs without gradient."""
    tracker = _Tracker(known)
    with torch.no_grad(), tracker, _Gpu(None, tracker):
        function()
    return tracker.peak


def nbytes(tensors: Any) -> int:
    """Bytes of tensors."""
    return sum(t.nbytes for t in tensors)
