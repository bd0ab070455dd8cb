"""Optimizers keyed by role."""
import contextlib
from typing import Any, Dict, Iterator, Optional, Sequence

import torch
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper, OptimWrapperDict, build_optim_wrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS
from mmengine.runner.amp import autocast
from torch import Tensor, nn


@OPTIM_WRAPPERS.register_module()
class RoleOptimWrapper(OptimWrapper):
    """MMEngine's OptimWrapper, but the norm of the gradients stays on the device (`grad_norm`) until it is logged:
    MMEngine's own waits for the device in every step. Arguments as there."""
    grad_norm: Optional[Tensor] = None

    def _clip_grad(self) -> None:
        params = [p for group in self.optimizer.param_groups for p in group['params'] if p.grad is not None]
        if params:
            self.grad_norm = self.clip_func(params, **self.clip_grad_kwargs)


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
        if dtype != 'bfloat16':
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
    """A role's optimizer inside its DeepSpeed engine, which also clips, reduces and accumulates.

    Args:
        engine (DeepSpeedEngine): The role's engine.
        wrapper (OptimWrapper): What the config's optimizer wrapper would be without DeepSpeed.
        frozen (Sequence[DeepSpeedEngine]): Engines of frozen networks that gradients may pass through.
    """

    def __init__(self, engine: Any, wrapper: OptimWrapper, frozen: Sequence[Any] = ()) -> None:
        super().__init__(wrapper.optimizer, wrapper._accumulative_counts)
        self.base_param_settings = wrapper.base_param_settings
        self.engine, self.logs_norm, self.frozen = engine, bool(wrapper.clip_grad_kwargs), frozen
        self.grad_norm: Optional[Tensor] = None

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
        for engine in self.frozen:
            engine.optimizer.release_backward_leftovers()

    def step(self, **kwargs: Any) -> None:
        """The engine's step, which does nothing before the accumulation is complete."""
        self.engine.step()
        if self.should_update() and self.logs_norm:
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
        for role, wrapper in self.items():
            every = getattr(model, 'student_every', 1) if role == 'student' else 1
            steps = getattr(model, 'fake_steps', 1) if role == 'fake' else 1
            wrapper.initialize_count_status(getattr(model, role), cur_iter // every * steps, max_iters // every * steps)


# MMEngine's wrappers, and ours in their place.
OWN_WRAPPERS = dict(OptimWrapper='RoleOptimWrapper', AmpOptimWrapper='AutocastOptimWrapper')


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

    def __init__(self, optim_wrapper_cfg: Dict[str, Any], paramwise_cfg: Optional[Dict[str, Any]] = None) -> None:
        if paramwise_cfg is not None:
            raise ValueError('optim_wrapper.paramwise_cfg must stand under a role: optim_wrapper.student.paramwise_cfg')
        self.configs = {k: v for k, v in optim_wrapper_cfg.items() if k not in ('type', 'constructor')}

    def __call__(self, model: nn.Module) -> RoleOptimWrapperDict:
        """Builds the wrappers.

        Args:
            model (nn.Module): A method, or a data-parallel wrapper of one.

        Raises:
            ValueError: If a trained role has no config, a config has no role, or the fake score accumulates the
                steps of one rollout.
        """
        model = model.module if is_model_wrapper(model) else model
        roles = model.trained_roles
        # Swapping model.type between distillation and teacher training needs no other optim_wrapper.
        for role in [r for r in self.configs if r not in roles]:
            if role not in ('student', 'fake'):
                raise ValueError(f'optim_wrapper.{role} is no role: {type(model).__name__} trains {list(roles)}')
            print_log(f'optim_wrapper.{role} does not apply to {type(model).__name__}: left aside', 'current')
        missing = [role for role in roles if role not in self.configs]
        if missing:
            raise ValueError(f'optim_wrapper.{missing[0]} is missing: {type(model).__name__} trains {list(roles)}, '
                             f'but optim_wrapper has {list(self.configs)}')
        wrappers = {role: self._build(role, getattr(model, role)) for role in roles}
        counts = getattr(wrappers.get('fake'), '_accumulative_counts', 1)
        if counts > 1 and getattr(model, 'fake_steps', 1) > 1:
            raise ValueError(f'model.fake_steps={model.fake_steps} does not go with optim_wrapper.fake.'
                             f'accumulative_counts={counts}, which would join the steps of one rollout: set one to 1')
        return RoleOptimWrapperDict(**wrappers)

    def _build(self, role: str, network: nn.Module) -> OptimWrapper:
        cfg = dict(self.configs[role])
        cfg.setdefault('type', 'OptimWrapper')
        if cfg['type'] == 'AmpOptimWrapper':
            if cfg.get('dtype', 'float16') != 'bfloat16':
                raise ValueError(f"optim_wrapper.{role}.dtype must be 'bfloat16' (float16 overflows in these models), "
                                 f"but is {cfg.get('dtype', 'float16, the default of AmpOptimWrapper')!r}")
            cfg.pop('loss_scale', None)
        cfg['type'] = OWN_WRAPPERS.get(cfg['type'], cfg['type'])
        return build_optim_wrapper(network, cfg)
