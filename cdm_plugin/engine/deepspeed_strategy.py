"""DeepSpeed under MMEngine's FlexibleRunner: one engine a trained role, partitioned frozen networks."""
import logging
import os
import time
from pathlib import Path
from typing import Any
from unittest import mock

import mmengine
import torch
from mmengine._strategy import BaseStrategy
from mmengine.device import get_device
from mmengine.dist import all_gather_object, init_dist
from mmengine.logging import print_log
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS, STRATEGIES
from mmengine.runner import CheckpointLoader
from mmengine.runner.checkpoint import load_state_dict
from torch import Tensor, nn

from cdm_plugin.backbones import Backbone
from cdm_plugin.compat import plain
from cdm_plugin.engine.deepspeed_config import OWN_KEYS, engine_config, import_deepspeed, initialize, settle_config
from cdm_plugin.engine.launch import start_processes
from cdm_plugin.engine.loading import as_checkpoint, check_start, named_as, some
from cdm_plugin.engine.optim_wrapper import AutocastOptimWrapper, EngineOptimWrapper, RoleOptimWrapperDict
from cdm_plugin.engine.partition import build_partitioned, partition_frozen
from cdm_plugin.engine.settings import settle
from cdm_plugin.engine.shard_files import is_sharded, layout_of, read_common, read_pieces, read_whole, write
from cdm_plugin.engine.shards import Shards
from cdm_plugin.registry import is_type


@STRATEGIES.register_module()
class DistillationDeepSpeedStrategy(BaseStrategy):
    """Trains a method of this package with DeepSpeed's ZeRO, nothing in `model` or `optim_wrapper` changed.

    Student and fake score have one engine each. Frozen networks, text encoders among them, are partitioned at stage 3,
    and whole below. LoRA adapters are whole at stage 3 as well, like at 2; what is partitioned then is their base.
    Checkpoints are folders (`cdm_plugin.engine.shards`) that another number of processes resumes too.

    Example::

        runner_type = 'FlexibleRunner'
        strategy = dict(type='DistillationDeepSpeedStrategy', zero_optimization=dict(stage=3), bf16=dict(enabled=True))

    Args:
        config (dict or str, optional): DeepSpeed's config, or the path of its JSON file.
        zero_optimization (dict, optional): DeepSpeed's section of that name; stage 1, 2 or 3, `offload_optimizer` and
            `offload_param` to the CPU. Default: stage 2.
        bf16 (dict, optional): `dict(enabled=True)` runs the networks in bfloat16 over float32 master weights. Default:
            on if `optim_wrapper` has AmpOptimWrapper.
        train_micro_batch_size_per_gpu (int, optional): Must be train_dataloader.batch_size. Default: that.
        **kwargs: Other sections of DeepSpeed's config, and arguments of MMEngine's BaseStrategy.
    """
    hands_on_keys = True

    _prepared: bool  # MMEngine's

    def __init__(self, *, config: None | str | dict[str, Any] = None,
                 zero_optimization: dict[str, Any] | None = None, bf16: dict[str, Any] | None = None,
                 train_micro_batch_size_per_gpu: int | None = None, **kwargs: Any) -> None:
        import_deepspeed()
        own = {key: kwargs.pop(key) for key in OWN_KEYS & kwargs.keys()}
        self.config = settle_config(config, dict(kwargs, zero_optimization=zero_optimization, bf16=bf16,
                                                 train_micro_batch_size_per_gpu=train_micro_batch_size_per_gpu))
        self.engines: dict[str, Any] = {}
        self.shards: dict[str, Shards] = {}
        self._frozen_engines: list[Any] = []
        self._buffers: dict[str, Tensor] = {}
        # This rank's pieces of the weights as they were loaded, before they were rounded to what the networks run in.
        self._pretrained: dict[nn.Module, dict[str, Tensor]] = {}
        super().__init__(**own)

    @property
    def stage(self) -> int:
        """The ZeRO stage."""
        return self.config['zero_optimization'].get('stage', 2)

    # Environment

    def _setup_env(self, **kwargs: Any) -> None:
        super()._setup_env(**kwargs)
        if not torch.distributed.is_initialized():  # launcher='none'
            os.environ.setdefault('LOCAL_RANK', '0')
            torch.distributed.init_process_group('gloo' if get_device() == 'cpu' else 'nccl', rank=0, world_size=1,
                                                 store=torch.distributed.HashStore())
        # Whoever started the processes, DeepSpeed has to know them too.
        import_deepspeed().init_distributed(auto_mpi_discovery=False, verbose=False)

    def _setup_distributed(self, launcher: str, backend: str = 'nccl', **kwargs: Any) -> None:
        start_processes(launcher, dict(dist_cfg=kwargs))
        if not torch.distributed.is_initialized():
            init_dist(launcher, backend, init_backend='deepspeed', **kwargs)

    # Preparation

    def prepare(self, model: nn.Module | dict[str, Any], *, optim_wrapper: Any = None,
                param_scheduler: Any = None, compile: Any = False,
                dispatch_kwargs: dict[str, Any] | None = None) -> Any:
        """Builds the model, its engines, optimizer wrappers and schedulers; without `optim_wrapper` (validation, test)
        the model stays whole. Arguments as in MMEngine."""
        if self._prepared:
            return self._prepared_components()
        self.dispatch_kwargs.update(dispatch_kwargs or {})
        device = torch.device(get_device())
        if optim_wrapper is None:
            self.model = self._init_model_weights(super().build_model(model)).to(device)
        else:
            self._settle_precision(optim_wrapper)
            model = self._init_model_weights(self.build_model(model))
            self.optim_wrapper = self.build_optim_wrapper(optim_wrapper, model)
            if not isinstance(self.optim_wrapper, RoleOptimWrapperDict):
                raise ValueError("optim_wrapper needs constructor='DistillationOptimWrapperConstructor' and one entry "
                                 'a role')
            self._scale_lr()
            self.model = self._partition(model, device)
            self.optim_wrapper.initialize_count_status(self.model, 0, self.dispatch_kwargs.get('max_iters') or -1)
        if param_scheduler is not None:
            self.param_schedulers = self.build_param_scheduler(param_scheduler, self.optim_wrapper)
        self._prepared = True
        return self._prepared_components()

    def build_model(self, model: nn.Module | dict[str, Any]) -> nn.Module:
        """Builds the model. At stage 3 its pretrained networks are partitioned as they are built, one after the other;
        no process but the first ever holds a whole one."""
        if self.stage < 3 or not isinstance(model, dict):
            return super().build_model(model)
        build_whole = Backbone.build_network

        def build_network(backbone: Backbone, dtype: torch.dtype | None = None) -> nn.Module:
            if backbone.pretrained is None:
                return build_whole(backbone, dtype)
            if backbone.quantization is not None:
                raise ValueError('model.backbone.quantization does not go with strategy.zero_optimization.stage=3, '
                                 'which cannot partition quantised weights: set stage=2')
            network, pieces = build_partitioned(backbone, self._engine_config(), dtype, self.run_dtype)
            self._pretrained[network] = pieces
            return network

        with mock.patch.object(Backbone, 'build_network', build_network):
            return super().build_model(model)

    def _partition(self, model: nn.Module, device: torch.device) -> nn.Module:
        wrappers = dict(self.optim_wrapper.items())
        self._check_method(model, wrappers)
        for target, source in model.merges:
            same_layout(getattr(model, source), getattr(model, target), wrappers[target])
        # Engines may round buffers to bfloat16; a checkpoint keeps them as they were.
        for role in wrappers:
            network = getattr(model, role)
            names = network.state_dict().keys()
            self._buffers.update({f'{role}.{name}': b.detach().clone() for name, b in network.named_buffers()
                                  if name in names})
        self._place_frozen(model, device)
        # Adapters are small, and their base is called by three roles: they stay whole, their optimizers do not.
        stage = 2 if getattr(model, 'lora', None) is not None and self.stage == 3 else self.stage
        for role, wrapper in wrappers.items():
            network = getattr(model, role)
            pieces = self._pretrained.pop(network, {})
            wholes = {name: p.detach() for name, p in network.named_parameters() if not hasattr(p, 'ds_id')}
            engine = initialize(network, self._engine_config(wrapper, stage), wrapper.optimizer)
            shards = Shards(engine)
            if self.run_dtype is not None:  # the engine made its float32 weights of rounded ones
                pieces.update({name: piece.cut(wholes[name]) for name, piece in shards.pieces.items()
                               if name in wholes})
                shards.load({**shards.weights, **pieces})
            engine.weight_shards = shards
            self.engines[role], self.shards[role] = engine, shards
            model._modules[role] = engine
        for phase in model.phases:
            passed = [*self._frozen_engines, *(self.engines[role] for role in phase.through)]
            self.optim_wrapper.optim_wrappers[phase.role] = EngineOptimWrapper(
                self.engines[phase.role], wrappers[phase.role], passed)
        self._pretrained.clear()
        self._check_merge(model)
        return model

    def _settle_precision(self, optim_wrapper: Any) -> None:
        """Takes `bf16` from the optimizer wrappers, or checks that they agree."""
        wrappers = [value for _, value in optim_wrapper.items()] if hasattr(optim_wrapper, 'items') else []
        amp = any(is_type(wrapper, AmpOptimWrapper, OPTIM_WRAPPERS) if isinstance(wrapper, dict)
                  else isinstance(wrapper, AutocastOptimWrapper) for wrapper in wrappers)
        bf16 = self.config.setdefault('bf16', dict(enabled=amp))
        if amp and not bf16.get('enabled'):
            raise ValueError("optim_wrapper.*.type='AmpOptimWrapper' and strategy.bf16=dict(enabled=False) contradict "
                             "each other: set type='OptimWrapper' to train in float32, or leave strategy.bf16 out")

    @property
    def run_dtype(self) -> torch.dtype | None:
        """What the networks run in; None is the dtype that they have."""
        return torch.bfloat16 if self.config.get('bf16', {}).get('enabled') else None

    def _check_method(self, model: nn.Module, wrappers: dict[str, OptimWrapper]) -> None:
        batch, own = (c.get('train_micro_batch_size_per_gpu') for c in (self.dispatch_kwargs, self.config))
        if own not in (None, 'auto', batch):
            raise ValueError(f'strategy.train_micro_batch_size_per_gpu={own}, but train_dataloader.batch_size={batch}: '
                             'leave the former out')
        for role, wrapper in wrappers.items():
            clip = wrapper.clip_grad_kwargs or {}
            if clip and (wrapper.grad_name != 'grad_norm' or clip.get('norm_type', 2) != 2):
                raise ValueError(f'optim_wrapper.{role}.clip_grad={clip}: DeepSpeed clips by the 2-norm only, '
                                 'dict(max_norm=...)')

    def _engine_config(self, wrapper: OptimWrapper | None = None, stage: int | None = None) -> dict[str, Any]:
        batch_size = self.dispatch_kwargs.get('train_micro_batch_size_per_gpu') or 1
        return engine_config(self.config, batch_size, wrapper, stage)

    def _place_frozen(self, model: nn.Module, device: torch.device) -> None:
        """Frozen networks on the device: partitioned at stage 3, otherwise whole; in bfloat16 if the roles are."""
        model._set_device(device)
        networks = [getattr(model, role) for role in model.denoisers if role not in model.trained_roles]
        networks = list(dict.fromkeys(getattr(network, 'base', network) for network in networks))
        for network in networks if self.run_dtype is not None and not model.backbone.quantization else ():
            trained = {p for p in network.parameters() if p.requires_grad}  # a base holds the adapters as well
            for tensor in (*network.parameters(), *network.buffers()):
                if tensor not in trained and tensor.is_floating_point():
                    tensor.data = tensor.data.to(self.run_dtype)
        conditioner = model.backbone.conditioner
        if not getattr(conditioner, 'offload', False):  # those wait in the CPU's memory
            networks += getattr(conditioner, 'encoders', [])
        for network in networks:
            if self.stage == 3:
                self._frozen_engines.append(partition_frozen(network, self._engine_config()))
            else:
                network.to(device)
        model.backbone.to(device)
        for child in model.children():  # losses, a teacher's adapters and the like
            if child not in networks and child is not model.backbone and not any(
                    child is getattr(model, role) for role in model.trained_roles):
                child.to(device)

    def _check_merge(self, model: nn.Module) -> None:
        for target, source in model.merges:
            theirs, own = layout_of({k: self.shards[k] for k in (source, target)}).values()
            if any(theirs.get(name) != place for name, place in own.items() if name in self.shards[source].shapes):
                raise ValueError(f'model.{target}_merge needs {source} and {target} to be sharded alike: give '
                                 f'optim_wrapper.{source} and .{target} the same paramwise_cfg, or set '
                                 'strategy.zero_optimization.stage=3')

    # Checkpoints

    def save_checkpoint(self, filename: str, *, save_optimizer: bool = True, save_param_scheduler: bool = True,
                        extra_ckpt: dict[str, Any] | None = None, callback: Any = None) -> None:
        """Writes a folder with every rank's pieces; arguments as in MMEngine."""
        common = dict(extra_ckpt or {})
        common['meta'] = dict(common.get('meta', {}), seed=self.seed, mmengine=mmengine.__version__,
                              time=time.strftime('%Y%m%d_%H%M%S', time.localtime()))
        if save_param_scheduler and hasattr(self, 'param_schedulers'):
            common['param_schedulers'] = self.scheduler_state_dict()
        if callback is not None:
            callback(common)
        own: dict[str, Any] = dict(layout=layout_of(self.shards), weights={}, optimizer={})
        if 'student_ema' in common:
            own['student_ema'] = common.pop('student_ema')
        for role, shards in self.shards.items():
            own['weights'][role] = shards.weights
            if save_optimizer:
                own['optimizer'][role] = plain(shards.optimizer_state())
        roles = tuple(f'{role}.' for role in self.shards)
        rest = {k: v for k, v in self.model.state_dict().items() if not k.startswith(roles)}
        common.update(state_dict={**rest, **self._buffers}, world_size=self.world_size,
                      shapes={role: {n: list(s) for n, s in sh.shapes.items()} for role, sh in self.shards.items()})
        write(Path(filename), self.rank, plain(common), own, all_gather_object)

    def load_checkpoint(self, filename: str, *, map_location: Any = 'cpu', strict: bool = False, revise_keys: Any = (),
                        callback: Any = None) -> dict[str, Any]:
        """Loads the weights of a folder of shards, or of a plain checkpoint."""
        self.logger.info(f'Load checkpoint from {filename}')
        if not self.shards:  # validation and test: the model is whole
            state = read_whole(filename) if is_sharded(filename) else CheckpointLoader.load_checkpoint(filename, 'cpu')
            load_state_dict(self.model, state['state_dict'], strict=True)
        elif is_sharded(filename):
            state = self._load_shards(filename, optimizer=False)
        else:
            state = self._load_plain(filename)
        if callback is not None:
            callback(state)
        return state

    def resume(self, filename: str, *, resume_optimizer: bool = True, resume_param_scheduler: bool = True,
               map_location: Any = 'default', callback: Any = None) -> dict[str, Any]:
        """Resumes from a folder of shards; arguments as in MMEngine."""
        self.logger.info(f'Resume checkpoint from {filename}')
        if not is_sharded(filename):
            raise ValueError(f'{filename!r} is no checkpoint of DistillationDeepSpeedStrategy (a folder of shards): to '
                             'start from its weights, set load_from and leave resume out')
        state = self._load_shards(filename, resume_optimizer)
        if resume_param_scheduler and hasattr(self, 'param_schedulers'):
            self.load_scheduler_state_dict(state.pop('param_schedulers'))
        seed = state['meta'].get('seed')
        if seed is not None and seed != self._randomness.get('seed'):
            if self._randomness.get('seed') is not None:
                self.logger.warning(f'randomness.seed={self._randomness["seed"]}, but the checkpoint has {seed}, which '
                                    'is taken')
            self._randomness.update(seed=seed)
            self._set_randomness(**self._randomness)
        self.optim_wrapper.initialize_count_status(
            self.model, state['meta']['iter'], self.dispatch_kwargs.get('max_iters') or -1)
        if callback is not None:
            callback(state)
        return state

    def _load_shards(self, folder: str, optimizer: bool) -> dict[str, Any]:
        common = read_common(folder)
        if common['world_size'] != self.world_size:
            print_log(f'{folder} was written by {common["world_size"]} processes, these are {self.world_size}: its '
                      'shards are cut anew; the data come in another order', 'current', level=logging.WARNING)
        own = read_pieces(folder, common, self.rank, self.world_size, self.shards)
        if optimizer:
            if not own['optimizer'].keys() >= self.shards.keys():
                raise ValueError(f'the checkpoint {folder!r} was saved without optimizers: set load_from and leave '
                                 'resume out')
            groups = {role: dict(param_groups=of_role['groups']) for role, of_role in own['optimizer'].items()}
            common['param_schedulers'] = settle(
                dict(self.optim_wrapper.items()), getattr(self, 'param_schedulers', {}), groups,
                common.get('param_schedulers', {}), common['meta']['iter'], common['meta']['epoch'],
                self.dispatch_kwargs.get('epoch_length', 0))
        for role, shards in self.shards.items():
            shards.load(own['weights'][role])
            if optimizer:
                shards.load_optimizer_state(own['optimizer'][role])
        if 'student_ema' in own:
            common['student_ema'] = own['student_ema']
        return common

    def _load_plain(self, filename: str) -> dict[str, Any]:
        state = as_checkpoint(CheckpointLoader.load_checkpoint(filename, map_location='cpu', logger='silent'), filename)
        own = {f'{role}.{name}': shape for role, shards in self.shards.items() for name, shape in shards.shapes.items()}
        weights = named_as(state['state_dict'], own, self.model.main_role)
        check_start(weights, own, self.model.trains, filename)
        if missing := own.keys() - weights.keys():
            print_log(f'{filename} lacks {len(missing)} weights, which stay as they are ({some(missing)})', 'current',
                      level=logging.WARNING)
        for role, shards in self.shards.items():
            shards.load({**shards.weights, **{name: piece.cut(weights[f'{role}.{name}']) for name, piece
                                              in shards.pieces.items() if f'{role}.{name}' in weights}})
        if 'student_ema' in state:
            ema = state['student_ema']['weights']
            state['student_ema'] = dict(state['student_ema'], weights={
                name: piece.cut(ema[name]) for name, piece in self.shards['student'].pieces.items()})
        return state


def same_layout(source: nn.Module, target: nn.Module, wrapper: OptimWrapper) -> None:
    """Moves the target's weights that the source lacks (those of an anchor-aware fake score) to parameter groups of
    their own, at the end: stages 1 and 2 lay a group's weights end to end, so the others are then sharded alike."""
    common = {name for name, _ in source.named_parameters()}
    extra = {p for name, p in target.named_parameters() if name not in common}
    groups: list[dict[str, Any]] = wrapper.optimizer.param_groups
    split: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for group in groups:
        for part, inside in zip(split, (False, True)):
            params = [p for p in group['params'] if (p in extra) == inside]
            if params:
                part.append(dict(group, params=params))
    groups[:] = split[0] + split[1]
