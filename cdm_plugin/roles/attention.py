"""Picks the attention kernel of a network.

Diffusers' networks compute attention in one of two ways, and `ModelMixin.set_attention_backend` is right for neither
here. SD3's processor calls torch itself: the setting is accepted and ignored. The processors of newer networks
(LongCat-Image, Flux, Qwen-Image) call `dispatch_attention_fn` and heed it, but it also becomes the default of every
other network of the process. So each attention module is switched by itself: its processor is told the kernel, or is
replaced by one that calls it.
"""
import functools
import importlib.metadata
import re
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    _check_attention_backend_requirements,
    _maybe_download_kernel_for_backend,
    dispatch_attention_fn,
)
from diffusers.models.attention_processor import JointAttnProcessor2_0, XFormersJointAttnProcessor
from diffusers.utils import is_xformers_available
from mmengine import dist
from torch import Tensor, nn

from cdm_plugin.errors import did_you_mean
from cdm_plugin.roles.weights import unwrap

FIRST = ('auto', 'native', 'xformers', 'flash')
KNOWN = (*FIRST, *sorted({b.value for b in AttentionBackendName} - set(FIRST), key=lambda b: (b.startswith('_'), b)))
# What 'auto' measures beside torch's own. Kernels from the hub are left out: choosing must not download code.
CANDIDATES = ('xformers', 'flash', '_flash_3')
# An image of 1024x1024 pixels in SD3 or LongCat-Image, and its text.
TOKENS = 4096 + 256
WARM_UP, RUNS = 3, 9


def check_name(name: str) -> str:
    """The name itself.

    Args:
        name (str): 'auto', or a value of diffusers' AttentionBackendName.

    Raises:
        ValueError: If the name is unknown.
    """
    if name in KNOWN:
        return name
    raise ValueError(f'model.backbone.attention={name!r} is unknown; known are {", ".join(KNOWN)}'
                     f'{did_you_mean(str(name).lower(), KNOWN)}')


def set_attention(network: nn.Module, name: str = 'auto', device: None | str | torch.device = None,
                  dtype: torch.dtype = torch.float32, training: bool = True,
                  masked: bool = False) -> tuple[str, str]:
    """Switches the network's attention; no other network and no default of diffusers changes.

    'native' brings back the network's own processors, and torch's kernel in those that dispatch.

    Args:
        network (nn.Module): A diffusers network, with or without adapters, or a wrapper of one.
        name (str): See `check_name`. 'auto' takes the fastest kernel that runs on this device and dtype, by measuring
            (rank 0 measures, all ranks take its choice). Default 'auto'.
        device (torch.device or str, optional): Where the network will run. Default: where it is.
        dtype (torch.dtype): What queries, keys and values will have when it runs, under autocast autocast's. Default
            float32.
        training (bool): Whether gradients pass through. Default True.
        masked (bool): Whether attention gets a mask of texts' padding, which some kernels refuse and others misread.
            Default False.

    Returns:
        tuple: The kernel's name (never 'auto'), and why it was taken, as a text; where xformers is installed and might
        be taken, also which of its kernels there are.

    Raises:
        ValueError: If the name is unknown, or the kernel cannot run: its package is missing, the device or dtype does
            not fit, it has no backward pass or takes no mask where that is needed, or the network's attention cannot
            be switched.
    """
    check_name(name)
    network = unwrap(network)
    device = torch.device(device or next(network.parameters()).device)
    attentions = [m for m in network.modules()
                  if hasattr(m, 'set_processor') and getattr(m, 'processor', None) is not None]
    need = (device, dtype, *_heads_and_width(attentions), training, masked)
    fixed = _unswitchable(attentions)

    chosen, why = name, 'model.backbone.attention names it'
    if name == 'auto':
        chosen, why = ('native', fixed) if fixed else _fastest(*need)
    if chosen != 'native':
        # Also what 'auto' chose: rank 0 measured, and this rank's machine may lack the package.
        problem = fixed or _problem(chosen, *need)
        if problem:
            state = f' ({xformers_state()})' if chosen == 'xformers' and xformers_state() else ''
            raise ValueError(f'model.backbone.attention={name!r} cannot be used: {problem}{state}')
    for module in attentions:
        _switch(module, AttentionBackendName(chosen))
    if name in ('auto', 'xformers') and xformers_state() is not None:
        why += f'; {xformers_state()}'
    return chosen, why


class KernelJointAttnProcessor(JointAttnProcessor2_0):
    """SD3's joint attention through any kernel that diffusers dispatches to.

    Args:
        backend (AttentionBackendName): The kernel.
    """

    def __init__(self, backend: AttentionBackendName) -> None:
        super().__init__()
        self.backend = backend

    def __call__(self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
                 *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, Tensor]:
        """Attends image (B, N, C) and text (B, M, C) tokens to each other, or, without text, the image's to each other.

        Returns:
            Tensor or tuple: The image's tokens, (B, N, C), and with text, its tokens.
        """
        qkv = _heads(attn, hidden_states, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k))
        if encoder_hidden_states is not None:
            text = _heads(attn, encoder_hidden_states, (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj),
                          (attn.norm_added_q, attn.norm_added_k))
            qkv = [torch.cat(pair, dim=1) for pair in zip(qkv, text)]
        out = dispatch_attention_fn(*qkv, backend=self.backend).flatten(2)
        image, text = out.split([hidden_states.shape[1], out.shape[1] - hidden_states.shape[1]], dim=1)
        for layer in attn.to_out:  # linear, dropout
            image = layer(image)
        if encoder_hidden_states is None:
            return image
        return image, text if attn.context_pre_only else attn.to_add_out(text)


def _heads(attn: nn.Module, tokens: Tensor, projections: Sequence[nn.Module],
           norms: Sequence[nn.Module | None]) -> Sequence[Tensor]:
    """Query, key and value of tokens (B, N, C), each (B, N, heads, C / heads)."""
    query, key, value = (layer(tokens).unflatten(-1, (attn.heads, -1)) for layer in projections)
    query, key = (x if norm is None else norm(x) for x, norm in zip((query, key), norms))
    return query, key, value


# Switching


def _own_processor(module: nn.Module) -> Any:
    """The processor that the network came with."""
    return getattr(module.processor, 'replaced', module.processor)


def _unswitchable(attentions: Sequence[nn.Module]) -> str | None:
    """Why the network keeps its own attention, or None."""
    own = [_own_processor(module) for module in attentions]
    fixed = sorted({type(p).__name__ for p in own
                    if type(p) is not JointAttnProcessor2_0 and not hasattr(p, '_attention_backend')})
    if fixed:
        return f'the network computes attention in {", ".join(fixed)}, which cannot be switched'
    return None if own else 'the network has no attention that can be switched'


def _switch(module: nn.Module, backend: AttentionBackendName) -> None:
    native, processor = backend is AttentionBackendName.NATIVE, _own_processor(module)
    if hasattr(processor, '_attention_backend'):
        # Said also for torch's: unsaid, it is the process's default, which anybody may change.
        processor._attention_backend = backend
    elif not native:
        replaced, xformers = processor, backend is AttentionBackendName.XFORMERS
        processor = XFormersJointAttnProcessor() if xformers else KernelJointAttnProcessor(backend)
        processor.replaced = replaced
    if processor is not module.processor:
        module.set_processor(processor)

    for name in ('norm_q', 'norm_k', 'norm_added_q', 'norm_added_k'):
        norm = getattr(module, name, None)
        if norm is not None:
            # Found by what they call: in a copy of the network, a handle would still belong to the original.
            for key in [k for k, hook in norm._forward_hooks.items() if hook is _to_autocast_dtype]:
                del norm._forward_hooks[key]
            if not native:
                norm.register_forward_hook(_to_autocast_dtype)


def _to_autocast_dtype(norm: nn.Module, args: Any, output: Tensor) -> Tensor:
    """Forward hook. Under autocast a norm of float32 weights returns float32 beside values in bfloat16: torch's own
    attention is cast by autocast, the other kernels refuse."""
    device = output.device.type
    if output.dtype == torch.float32 and torch.is_autocast_enabled(device):
        return output.to(torch.get_autocast_dtype(device))
    return output


# What there is of xformers


@functools.cache
def xformers_state() -> str | None:
    """Which attention kernels of xformers there are beside this torch, as a text; None without xformers.

    A wheel of xformers is built for one version of torch. Beside another its own code does not load; the kernels that
    it calls in torch stay as long as torch has not changed them.
    """
    if not is_xformers_available():
        return None
    version = importlib.metadata.version('xformers')
    try:
        from xformers import _cpp_lib
        from xformers.ops import fmha
    except Exception as error:  # whatever a package raises beside a torch that it does not know
        return f'xformers {version} cannot be imported: {_first_line(error)}'
    # A kernel has a class for each direction, called fa2F@2.5.7-pt and fa2B@2.5.7-pt.
    kernels: dict[str, list[bool]] = {}
    for kernel in (*fmha.ALL_FW_OPS, *fmha.ALL_BW_OPS):
        kernels.setdefault(re.sub(r'[FB](?=-|$)', '', kernel.NAME.partition('@')[0]), []).append(kernel.is_available())
    there = [name if len(found) == 2 else f'{name} (without gradients)'
             for name, found in kernels.items() if all(found)]
    missing = [name for name, found in kernels.items() if not all(found)]
    text = (f'xformers {version}: {", ".join(there) or "no attention kernel"} there'
            + (f', {", ".join(missing)} not' if missing else ''))
    built = getattr(getattr(_cpp_lib, '_cpp_library_load_exception', None), 'build_info', None)
    if built is not None:
        text += f"; built for torch {built.torch_version}, beside {torch.__version__} its own code does not load"
    return text


# Choosing


def _heads_and_width(attentions: Sequence[nn.Module]) -> tuple[int, int]:
    """Number and width of the heads, as far as the attention modules tell: the last ones, which are the trunk's."""
    for module in reversed(attentions):
        heads, query = getattr(module, 'heads', getattr(module, 'num_heads', None)), getattr(module, 'to_q', None)
        if heads and query is not None:
            return heads, query.out_features // heads
    return 1, 64


def _problem(name: str, device: torch.device, dtype: torch.dtype, heads: int, head_dim: int, training: bool,
             masked: bool) -> str | None:
    """Why the kernel cannot run, or None if it did."""
    if training and 'sage' in name:
        return f'{name} has no backward pass, it can only sample'
    backend, where = AttentionBackendName(name), 'the CPU' if device.type == 'cpu' else str(device)
    refusal = _refusal(backend, device, dtype, head_dim)
    if refusal:
        fitting = [_plain(d) for d in (torch.float16, torch.bfloat16) if not _refusal(backend, device, d, head_dim)]
        if fitting:
            return (f'{name} needs {" or ".join(fitting)}, but the networks run in {_plain(dtype)} (set '
                    "optim_wrapper.*: type='AmpOptimWrapper', dtype='bfloat16', or choose another kernel)")
        return f'{name} has no kernel for {where}: {refusal}'
    try:
        _check_attention_backend_requirements(backend)
        _maybe_download_kernel_for_backend(backend)
    except Exception as error:  # packages, then whatever a download may raise
        if name == 'xformers' and not is_xformers_available():
            return "the package xformers is not installed: pip install 'cdm_plugin[scale]'"
        return _first_line(error)
    try:
        inputs = _inputs(device, dtype, heads, head_dim, 128, training)
        out = _attend(backend, inputs, masked)
        if masked and not torch.allclose(out, _attend(backend, _other_padding(inputs), masked), atol=0.01):
            return f'{name} lets padding through, which texts of different lengths have'
    except NotImplementedError as error:
        return f'{name} has no kernel for {where}: {_first_line(error)}'
    except Exception as error:  # every package has its own way to say no
        mask = ' and a mask of texts\' padding' if masked else ''
        return (f'{name} failed on {where} in {_plain(dtype)} with heads of width {head_dim}{mask}: '
                f'{_first_line(error)}')
    return None


def _refusal(backend: AttentionBackendName, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """What diffusers' own checks of the inputs say, which it skips in a run unless an environment variable is set."""
    try:
        x = torch.empty(1, 1, 1, head_dim, device=device, dtype=dtype)
        for check in _AttentionBackendRegistry._constraints[backend]:
            check(query=x, key=x, value=x, attn_mask=None, is_causal=False)
    except Exception as error:  # also: there is no such device
        return _first_line(error)
    return None


@functools.cache  # student, fake score and teacher get the same answer
def _fastest(device: torch.device, dtype: torch.dtype, heads: int, head_dim: int, training: bool,
             masked: bool) -> tuple[str, str]:
    """Name of the fastest kernel that runs, and the times."""
    if device.type != 'cuda':
        return 'native', f'nothing else to choose from on {device.type}'
    answer: list[Any] = [None]
    if dist.is_main_process():
        need = (device, dtype, heads, head_dim, training, masked)
        problems = {name: _problem(name, *need) for name in CANDIDATES}
        usable = ['native', *(name for name in CANDIDATES if problems[name] is None)]
        times = {name: _milliseconds(name, *need) for name in usable} if len(usable) > 1 else {}
        parts = [f'{name} {ms:.2f} ms' for name, ms in times.items()]
        parts = [f'fastest of {", ".join(parts)} for {TOKENS} tokens'] if parts else ['nothing else runs here']
        parts += [f'not {name}: {problem}' for name, problem in problems.items() if problem]
        answer = [(min(times, key=times.get) if times else 'native', '; '.join(parts))]
    dist.broadcast_object_list(answer)
    return answer[0]


def _milliseconds(name: str, device: torch.device, dtype: torch.dtype, heads: int, head_dim: int, training: bool,
                  masked: bool) -> float:
    """Median time of one attention, with its backward pass in training, on a CUDA device."""
    times = []
    with torch.cuda.device(device):
        inputs = _inputs(device, dtype, heads, head_dim, TOKENS, training)
        for _ in range(WARM_UP + RUNS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            _attend(AttentionBackendName(name), inputs, masked)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
    return statistics.median(times[WARM_UP:])


def _inputs(device: torch.device, dtype: torch.dtype, heads: int, head_dim: int, tokens: int,
            training: bool) -> Sequence[Tensor]:
    """Query, key and value, (1, tokens, heads, head_dim); the global random numbers stay where they are."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, tokens, heads, head_dim)
    return [torch.randn(shape, generator=generator, device=device, dtype=dtype, requires_grad=training)
            for _ in range(3)]


def _attend(backend: AttentionBackendName, inputs: Sequence[Tensor], masked: bool) -> Tensor:
    """One attention, without the last quarter of the keys if `masked`, and with its backward pass if the inputs ask
    for gradients."""
    tokens, mask = inputs[0].shape[1], None
    if masked:
        mask = (torch.arange(tokens, device=inputs[0].device) < 3 * tokens // 4)[None, None, None]
    with torch.enable_grad():
        out = dispatch_attention_fn(*inputs, attn_mask=mask, backend=backend)
        if inputs[0].requires_grad:
            torch.autograd.grad(out, inputs, torch.ones_like(out))
    return out.detach()


def _other_padding(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """The same where `_attend` looks under a mask, other keys and values elsewhere."""
    query, key, value = (x.detach() for x in inputs)
    rest = query.shape[1] - 3 * query.shape[1] // 4
    return query, *(torch.cat([x[:, :-rest], x[:, -rest:] + 9], 1) for x in (key, value))


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix('torch.')


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
