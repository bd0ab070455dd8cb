"""What stays in a GPU's memory, and what an iteration adds to it."""
import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import HOOKS, OPTIM_WRAPPER_CONSTRUCTORS
from torch import Tensor, nn

from cdm_plugin.codecs import VAECodec
from cdm_plugin.commands.doctor.calls import ask, looks
from cdm_plugin.commands.doctor.footprint import Footprint, measure, nbytes, peak_of
from cdm_plugin.commands.doctor.report import ROLES, Part
from cdm_plugin.engine import StudentEMA
from cdm_plugin.hooks import CDMHook, SampleGridHook
from cdm_plugin.methods import DiffusionModel, Distillation
from cdm_plugin.registry import is_type
from cdm_plugin.roles.lora import AdapterRole


def build_optimizers(cfg: Config, method: DiffusionModel) -> dict[str, Any]:
    """The optimizer wrappers of a method on the meta device, by role.

    Raises:
        ValueError: For any mistake in `optim_wrapper`.
    """
    wrapper_cfg = copy.deepcopy(cfg.get('optim_wrapper', {}))
    constructor = wrapper_cfg.pop('constructor')
    for role in wrapper_cfg.values():
        if isinstance(role, dict) and isinstance(role.get('optimizer'), dict):
            for kernel in ('fused', 'foreach', 'capturable'):  # none of them runs on the meta device
                role['optimizer'].pop(kernel, None)
    built = OPTIM_WRAPPER_CONSTRUCTORS.build(dict(type=constructor, optim_wrapper_cfg=wrapper_cfg.to_dict()))(method)
    return dict(built.items())


def _optimizer_bytes(wrapper: Any) -> int:
    """Bytes of the state that a step creates. The step is made, on the meta device, for one parameter of each shape:
    optimizers skip those without a gradient."""
    alike: dict[Any, list[Tensor]] = {}
    for i, group in enumerate(wrapper.optimizer.param_groups):
        for p in group['params']:
            alike.setdefault((i, p.shape, p.dtype), []).append(p)
    for p, *_ in alike.values():
        p.grad = torch.empty_like(p)
    try:
        wrapper.optimizer.step()
    finally:
        for p, *_ in alike.values():
            p.grad = None
    return sum(len(same) * nbytes(t for t in wrapper.optimizer.state[same[0]].values() if isinstance(t, Tensor))
               for same in alike.values())


def count_parts(cfg: Config, method: DiffusionModel, wrappers: dict[str, Any]) -> list[Part]:
    """What stays in a GPU's memory: networks with their optimizer state and EMA, text encoders, VAE.

    Args:
        cfg (Config): The config.
        method (DiffusionModel): The method on the meta device.
        wrappers (dict): Its optimizer wrappers by role.

    Returns:
        list[Part]: In the order of a table.
    """
    parts = []
    if method.base is not None:
        adapters = {id(p) for role in method.trained_roles for p in getattr(method, role).parameters()}
        own = [p for p in method.base.parameters() if id(p) not in adapters]
        parts.append(Part('base', _numel(own), _dtypes(own), _base_bytes(method, own) + _buffers(method.base),
                          note='frozen, shared by the roles'))
    for role in dict.fromkeys((*method.denoisers, *method.trained_roles)):
        network = getattr(method, role)
        weights = list(network.parameters())
        part = Part(role, _numel(weights), _dtypes(weights), nbytes(weights) + _buffers(network))
        if isinstance(network, AdapterRole):
            part.note = f'adapters of rank {method.lora.rank}' if network.adapter else 'the base with adapters off'
        if role in wrappers:
            part.gradients = nbytes([p for p in weights if p.requires_grad])
            try:
                part.optimizer = _optimizer_bytes(wrappers[role])
            except Exception:  # an optimizer from outside may need real weights
                part.note = ', '.join(filter(None, (part.note, 'the state of its optimizer is not known')))
        if role == method.main_role and _ema_decay(cfg) is not None:
            part.ema = nbytes(StudentEMA(network).weights.values())
        parts.append(part)
    parts += getattr(method.backbone.conditioner, 'parts', ())
    judges = [p for loss in getattr(method, 'losses', {}).values() for p in loss.parameters()]
    if judges:
        parts.append(Part('losses', _numel(judges), _dtypes(judges), nbytes(judges), note='frozen, judge the student'))
    codec = list(method.backbone.codec.parameters())
    if codec:
        parts.append(Part('VAE', _numel(codec), _dtypes(codec), nbytes(codec) + _buffers(method.backbone.codec)))
    return parts


def _base_bytes(method: DiffusionModel, weights: Sequence[Tensor]) -> int:
    quantization = method.backbone.quantization
    if quantization is None:
        return nbytes(weights)
    # bitsandbytes quantises linear layers: 4 bits and a float32 scale for 64 of them, or 8 bits.
    a_weight = 0.5 + 4 / 64 if quantization.get('load_in_4bit') else 1
    linear = {id(m.weight) for m in method.base.modules() if isinstance(m, nn.Linear)}
    return int(sum(p.numel() * a_weight if id(p) in linear else p.nbytes for p in weights))


def _ema_decay(cfg: Config) -> float | None:
    hook = _hook(cfg, CDMHook)
    return None if hook is None else hook.get('ema_decay', 0.999)


def _hook(cfg: Config, cls: type) -> dict[str, Any] | None:
    """The config of a custom hook, or None."""
    return next((h for h in cfg.get('custom_hooks') or [] if is_type(h, cls, HOOKS)), None)


def _numel(tensors: Any) -> int:
    return sum(t.numel() for t in tensors)


def _buffers(module: nn.Module) -> int:
    return nbytes(module.buffers())


def _dtypes(tensors: Sequence[Tensor]) -> str:
    return ' and '.join(sorted({str(t.dtype).removeprefix('torch.') for t in tensors})) or 'none'


def estimate_phases(cfg: Config, method: DiffusionModel, wrappers: dict[str, Any], batch: int, parts: Sequence[Part],
                    call: Callable[..., Footprint]) -> tuple[dict[str, int], dict[str, int]]:
    """The memory of one iteration, phase by phase.

    Args:
        cfg (Config): The config.
        method (DiffusionModel): The method on the meta device.
        wrappers (dict): Its optimizer wrappers by role.
        batch (int): Samples of one GPU.
        parts (Sequence[Part]): What stays in memory.
        call (Callable): (role, samples, with gradient) -> Footprint of one call.

    Returns:
        tuple: Bytes that single calls add, and bytes on top of the parts for each phase.
    """
    named = {part.name: part for part in parts}
    student = call('student', batch, True)
    calls = {f'student, {batch} with gradient': student.waiting + student.backward}
    # Gradients that are accumulated stay; others live from their backward pass to their optimizer step.
    kept = sum(named[role].gradients for role in wrappers if _accumulates(wrappers[role]))
    gradients = {role: 0 if _accumulates(wrappers[role]) else named[role].gradients for role in wrappers}
    images = (_hook(cfg, SampleGridHook) or {}).get('num_images', 8)
    phases, sampling = {}, 0
    if isinstance(method, Distillation):
        questions, points = ask(method)
        seen = batch * looks(method)
        fake = call('fake', seen, True)
        calls[f'fake score, {seen} with gradient'] = fake.waiting + fake.backward
        phases['fake-score step'] = student.waiting + max(
            fake.running, max(fake.waiting, gradients['fake']) + fake.backward)
        phases["fake score's optimizer"] = (student.waiting + gradients['fake']
                                            + _step_bytes(cfg, 'fake', named['fake']))
        own = Footprint()
        if points:
            own = student if points == 1 else call('student', points * batch, True)
            calls[f'student, {points * batch} off the trajectory'] = own.waiting + own.backward
        if method.fake_judge is not None:  # the student's gradient comes through the fake score
            through = call('fake', batch, True)
            own = Footprint(max(own.forward, own.held + through.forward), own.held + through.held,
                            max(own.backward, through.backward), max(own.casts, own.held_casts + through.casts),
                            own.held_casts + through.held_casts)
            calls[f'fake score, {batch} in the student step'] = through.waiting + through.backward
        asked = 0.0
        for role, count in questions.items():
            size = min(count * batch, method.max_batch_per_call or count * batch)
            answer = call(role, size, False)
            calls[f'{ROLES[role]}, {size} without gradient'] = answer.running
            asked = max(asked, answer.running)
            # Guidance doubles the teacher's batch.
            sampling = max(sampling, answer.forward / size * images * (1 + (role == 'teacher')) + answer.casts)
        phases['questions to teacher and fake score'] = student.waiting + own.waiting + asked
        if own.waiting:  # the latest call's backward pass comes first; after it, all gradients are there
            phases['student step'] = student.waiting + max(
                own.running, max(own.waiting, gradients['student']) + max(own.backward, student.backward))
    phases.setdefault('student step', max(
        student.running, max(student.waiting, gradients['student']) + student.backward))
    for role in method.trained_roles:  # what its loss adds is its own
        name = f"{ROLES.get(role, role)}'s optimizer"
        phases.setdefault(name, gradients[role] + _step_bytes(cfg, role, named[role]))
    if getattr(method.backbone.conditioner, 'offload', False):
        phases['text encoding'] = method.backbone.conditioner.largest
    if _hook(cfg, SampleGridHook) is not None:
        # The averaged weights take the student's place, whose own wait beside; VAECodec decodes one image at a time.
        decode = _decode_bytes(method)
        phases['sample grid'] = named['student'].ema + max(sampling, decode)
        calls.update({'VAE, 1 image': decode} if decode else {})
    if student.casts:
        calls["autocast's copies of a role's weights"] = student.casts
    return ({name: int(value) for name, value in calls.items()},
            {name: int(value) + kept for name, value in phases.items()})


def measured_calls(method: DiffusionModel, wrappers: dict[str, Any]) -> Callable[..., Footprint]:
    """`measure` for `estimate_phases`, which runs each call once."""
    dtype = getattr(wrappers['student'], 'dtype', None)

    @functools.cache
    def call(role: str, batch: int, grad: bool) -> Footprint:
        return measure(method, role, batch, grad, dtype)

    return call


def without_gradients(cfg: Config, method: DiffusionModel, wrappers: dict[str, Any], batch: int, parts: Sequence[Part],
                      call: Callable[..., Footprint], casts: bool) -> int:
    """Most that an iteration adds without gradients, and without autocast's copies of weights if `casts` is False."""
    ungraded = [replace(part, gradients=0) for part in parts]

    def measured(*args: Any) -> Footprint:
        return call(*args) if casts else call(*args)._replace(casts=0, held_casts=0)

    return max(estimate_phases(cfg, method, wrappers, batch, ungraded, measured)[1].values())


def _accumulates(wrapper: Any) -> bool:
    return getattr(wrapper, '_accumulative_counts', 1) > 1


def _step_bytes(cfg: Config, role: str, part: Part) -> int:
    """What an optimizer step adds: torch's default on GPUs works on all weights at once, in one copy of them."""
    optimizer = cfg.optim_wrapper[role].get('optimizer', {})
    return 0 if optimizer.get('fused') or optimizer.get('foreach') is False else part.gradients


def _decode_bytes(method: DiffusionModel) -> int:
    codec = method.backbone.codec
    if not isinstance(codec, VAECodec):
        return 0
    latents = torch.empty(method.latent_shape(1, method.largest_latent_size), device='meta')
    return peak_of(lambda: codec.decode(latents), [*codec.parameters(), *codec.buffers(), latents])
