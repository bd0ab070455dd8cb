"""Optimizers keyed by role."""
import contextlib
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import torch
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.optim import AmpOptimWrapper, OptimWrapper, OptimWrapperDict, build_optim_wrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS
from mmengine.runner.amp import autocast
from torch import Tensor, nn

from cdm_plugin.arguments import MAY_BE_INFINITE, check_value
from cdm_plugin.config import check_part
from cdm_plugin.engine.guard import StepGuard
from cdm_plugin.losses import ScoreLoss
from cdm_plugin.methods import DiffusionModel
from cdm_plugin.methods.overrides import subclasses
from cdm_plugin.registry import class_of


@OPTIM_WRAPPERS.register_module()
class RoleOptimWrapper(OptimWrapper):
    """MMEngine's OptimWrapper, but a step with gradients that are not finite is left out (`guard`), and the norm of the
    gradients stays on the device (`grad_norm`) until it is logged: MMEngine's own waits for the device in every step.

    Adam and AdamW with `fused=True` learn on the device whether they may step. Others have no way to, so for them each
    step waits for the norm, which costs nothing on a CPU. Arguments as MMEngine's.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.guard = StepGuard()
        self.grad_norm: Tensor | None = None

    @property
    def waits(self) -> bool:
        """Whether each step waits for the device."""
        # SGD can as well, but one that leaves out its first step goes on from momentum that nobody has set.
        return not (isinstance(self.optimizer, (torch.optim.Adam, torch.optim.AdamW))
                    and all(group['fused'] for group in self.optimizer.param_groups))

    def step(self, **kwargs: Any) -> None:
        """Clips the gradients and steps, if they are finite."""
        fine = self._clip_grad().isfinite()
        if not self.waits:
            self.optimizer.grad_scale, self.optimizer.found_inf = None, (~fine).to(torch.float32)
            try:
                self.optimizer.step(**kwargs)
            finally:
                del self.optimizer.grad_scale, self.optimizer.found_inf
            self.guard.judged(fine)
        else:
            taken = bool(fine)
            if taken:
                self.optimizer.step(**kwargs)
            self.guard.judged(taken)

    def _clip_grad(self) -> Tensor:
        """Clips the gradients, if wanted; their norm before that."""
        params = [p for group in self.optimizer.param_groups for p in group['params'] if p.grad is not None]
        if self.clip_grad_kwargs and self.clip_func is torch.nn.utils.clip_grad_norm_ and params:
            self.grad_norm = norm = self.clip_func(params, **self.clip_grad_kwargs)
            return norm
        norms = torch._foreach_norm([p.grad for p in params]) if params else [torch.zeros(())]
        if self.clip_grad_kwargs and params:
            self.clip_func(params, **self.clip_grad_kwargs)
        return torch.linalg.vector_norm(torch.stack([norm.to(norms[0]) for norm in norms]))


@OPTIM_WRAPPERS.register_module()
class AutocastOptimWrapper(RoleOptimWrapper):
    """bfloat16 autocast around float32 weights, on any device.

    MMEngine's AmpOptimWrapper runs on accelerators only and scales the loss, which bfloat16 (with float32's range)
    does not need.

    Args:
        dtype (str): Autocast's dtype. Default 'bfloat16'.
        **kwargs: See OptimWrapper.
    """

    def __init__(self, dtype: str = 'bfloat16', **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if dtype not in ('bfloat16', torch.bfloat16):
            raise ValueError(f"optim_wrapper.*.dtype must be 'bfloat16' for AutocastOptimWrapper, but is {dtype!r}")
        self.dtype = torch.bfloat16

    @contextlib.contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Context of the role's forward pass."""
        # MMEngine's default is the machine's best device; a network without parameters of its own has no device.
        device = self.optimizer.param_groups[0]['params'][0].device.type
        with super().optim_context(model), autocast(device, self.dtype):
            yield


class EngineOptimWrapper(OptimWrapper):
    """A role's optimizer inside its DeepSpeed engine, which also clips, reduces and accumulates. It leaves out a step
    whose gradients are not finite, after the ranks have agreed on it, and waits for the device to know (`guard`).

    Args:
        engine (DeepSpeedEngine): The role's engine.
        wrapper (OptimWrapper): What the config's optimizer wrapper would be without DeepSpeed.
        passed (Sequence[DeepSpeedEngine]): Engines of other networks that gradients pass through.
    """

    def __init__(self, engine: Any, wrapper: OptimWrapper, passed: Sequence[Any] = ()) -> None:
        super().__init__(wrapper.optimizer, wrapper._accumulative_counts)
        self.base_param_settings = wrapper.base_param_settings
        self.engine, self.logs_norm, self.passed = engine, bool(wrapper.clip_grad_kwargs), passed
        self.grad_norm: Tensor | None = None
        self.guard = StepGuard()

    @property
    def waits(self) -> bool:
        """Whether each step waits for the device."""
        return True

    def update_params(self, loss: Tensor, step_kwargs: Any = None, zero_kwargs: Any = None) -> None:
        """Backward and, when enough has been accumulated, an optimizer step."""
        self.backward(self.scale_loss(loss))
        self.step()

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """The engine's backward; gradients are reduced when this is the last pass before a step."""
        self._inner_count += 1
        self.engine.set_gradient_accumulation_boundary(self.should_update())
        self.engine.backward(loss, scale_wrt_gas=False)
        # A network called twice before one backward pass leaves weights gathered, which only its own engine releases.
        for engine in self.passed:
            partition = getattr(engine.optimizer, 'parameter_offload', engine.optimizer)  # of a trained or a frozen one
            if hasattr(partition, 'release_backward_leftovers'):  # stage 3
                partition.release_backward_leftovers()

    def step(self, **kwargs: Any) -> None:
        """The engine's step, which does nothing before the accumulation is complete."""
        self.engine.step()
        if not self.should_update():
            return
        self.guard.judged(not self.engine.optimizer.overflow)
        if self.logs_norm:
            norm = self.engine.get_global_grad_norm()
            self.grad_norm = None if norm is None else torch.as_tensor(norm)

    def zero_grad(self, **kwargs: Any) -> None:
        """Nothing to do: the engine's step does it."""

    @contextlib.contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Nothing to do: the engine knows precision and synchronisation."""
        yield


class RoleOptimWrapperDict(OptimWrapperDict):
    """OptimWrapperDict whose accumulation counters survive a resume: each role's counts its own steps only."""

    def initialize_count_status(self, model: nn.Module, cur_iter: int, max_iters: int) -> None:
        """Starts every role's counter at the number of steps that it has made by `cur_iter`."""
        model = model.module if is_model_wrapper(model) else model
        for phase in model.phases:
            self[phase.role].initialize_count_status(getattr(model, phase.role), phase.steps_by(cur_iter),
                                                     phase.steps_by(max_iters) if max_iters > 0 else max_iters)


# MMEngine's wrappers, and ours in their place.
OWN_WRAPPERS = {OptimWrapper: RoleOptimWrapper, AmpOptimWrapper: AutocastOptimWrapper}


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class DistillationOptimWrapperConstructor:
    """Builds one optimizer wrapper a trained role, from a config keyed by role.

    Example::

        optim_wrapper = dict(
            constructor='DistillationOptimWrapperConstructor',
            student=dict(type='AmpOptimWrapper', dtype='bfloat16', optimizer=dict(type='AdamW', lr=1e-5)),
            fake=dict(type='AmpOptimWrapper', dtype='bfloat16', optimizer=dict(type='AdamW', lr=5e-6)))

    OptimWrapper becomes RoleOptimWrapper, and AmpOptimWrapper with bfloat16 AutocastOptimWrapper, so that one config
    runs on CPU and GPU. float16 is refused: it overflows in the backbones' larger models.

    Args:
        optim_wrapper_cfg (dict): Role -> config of its wrapper (any keys of MMEngine's, `paramwise_cfg` included).
        paramwise_cfg (dict, optional): Not supported here; set it under a role.
    """

    def __init__(self, optim_wrapper_cfg: Annotated[dict[str, Any], MAY_BE_INFINITE],
                 paramwise_cfg: dict[str, Any] | None = None) -> None:
        if paramwise_cfg is not None:
            raise ValueError('optim_wrapper.paramwise_cfg must stand under a role: optim_wrapper.student.paramwise_cfg')
        for role, cfg in optim_wrapper_cfg.items():
            check_part(cfg, f'optim_wrapper.{role}')
        self.configs = {k: v for k, v in optim_wrapper_cfg.items() if k not in ('type', 'constructor')}

    def __call__(self, model: nn.Module) -> RoleOptimWrapperDict:
        """Builds the wrappers.

        Args:
            model (nn.Module): A method, or a data-parallel wrapper of one.

        Raises:
            ValueError: If a trained role has no config, a config has no role, or a role accumulates the steps of one
                rollout.
        """
        model = model.module if is_model_wrapper(model) else model
        roles = model.trained_roles
        # Swapping model.type between distillation and teacher training, or leaving a loss out, needs no other
        # optim_wrapper.
        family = {role for method in subclasses(DiffusionModel) for role in method.trains}
        family |= {loss.role for loss in subclasses(ScoreLoss)}
        for role in [r for r in self.configs if r not in roles]:
            if role not in family:
                raise ValueError(f'optim_wrapper.{role} is no role: {type(model).__name__} trains {list(roles)}')
            print_log(f'optim_wrapper.{role} does not apply to {type(model).__name__}: left aside', 'current')
        missing = [role for role in roles if role not in self.configs]
        if missing:
            raise ValueError(f'optim_wrapper.{missing[0]} is missing: {type(model).__name__} trains {list(roles)}, '
                             f'but optim_wrapper has {list(self.configs)}')
        wrappers = {role: self._build(role, getattr(model, role)) for role in roles}
        for phase in model.phases:
            counts = getattr(wrappers[phase.role], '_accumulative_counts', 1)
            if counts > 1 and phase.steps > 1:
                raise ValueError(f'model.{phase.role}_steps={phase.steps} does not go with optim_wrapper.{phase.role}.'
                                 f'accumulative_counts={counts}, which would join the steps of one rollout: set one '
                                 'to 1')
        return RoleOptimWrapperDict(**wrappers)

    def _build(self, role: str, network: nn.Module) -> OptimWrapper:
        check_value(self.configs[role], Annotated[dict, MAY_BE_INFINITE], f'optim_wrapper.{role}')
        cfg = dict(self.configs[role])
        cls = class_of(cfg.get('type', OptimWrapper), OPTIM_WRAPPERS)
        if cls is AmpOptimWrapper:
            if cfg.get('dtype', 'float16') not in ('bfloat16', torch.bfloat16):
                raise ValueError(f"optim_wrapper.{role}.dtype must be 'bfloat16' (float16 overflows in these models), "
                                 f"but is {cfg.get('dtype', 'float16, the default of AmpOptimWrapper')!r}")
            cfg.pop('loss_scale', None)
        if cls in OWN_WRAPPERS:
            cfg['type'] = OWN_WRAPPERS[cls]
        return build_optim_wrapper(network, cfg)
