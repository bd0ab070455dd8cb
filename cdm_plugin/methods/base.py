"""What every method is: an MMEngine model with a backbone, roles, and a way to sample from them."""
import contextlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.dist import get_rank, get_world_size
from mmengine.logging import print_log
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from torch import Tensor, nn

from cdm_plugin.backbones import Backbone
from cdm_plugin.condition import Condition
from cdm_plugin.draws import Rollout, stream
from cdm_plugin.methods.overrides import arguments_of
from cdm_plugin.methods.phases import Iteration, Phase, passed_through, take_turn
from cdm_plugin.methods.plugin_hooks import observe
from cdm_plugin.methods.sampling import Sampling
from cdm_plugin.roles.anchor_aware import anchored
from cdm_plugin.roles.attention import set_attention
from cdm_plugin.roles.features import recorded
from cdm_plugin.roles.lora import LoRA, checkpoint_in_role
from cdm_plugin.roles.weights import dtype_of, unwrap
from cdm_plugin.sizes import Pair, Size, image_sizes
from cdm_plugin.time_grids import check_sigmas

# Settings of `model` that say how its weights were trained: they go with a checkpoint.
TRAINED_KEYS = ('type', 'alpha', 'guidance', 'losses', 'time_grid', 'sample_sigmas', 'fake_sigma', 'fake_loss',
                'fake_steps', 'student_every', 'fake_merge', 'anchor_aware_fake', 'lora', 'teacher', 'rollout',
                'sigma_shift')


class DiffusionModel(Sampling, BaseModel):
    """Base class of all methods.

    Args:
        backbone (dict): Config of the backbone.
        sample_sigmas (Sequence[float]): Noise levels of inference before the scheduler's shift, descending from 1.
            Default (1, 0.75, 0.5, 0.25): 4 steps.
        image_size (int, tuple or list, optional): Pixels, one number or (height, width); or a list of such sizes, of
            which each iteration draws one, the same on every rank (a batch with pictures keeps their size). What
            is sampled without saying a size has the first. Default: the size that the network was made for.
        activation_checkpointing (bool): Whether trained networks recompute their activations in backward. Default
            False.
        lora (dict, optional): Settings of `cdm_plugin.roles.lora.LoRA`, `dict(rank=64)`: trained roles are adapters of
            one frozen base. Default: full weights.
        data_preprocessor (dict, optional): Default DistillationDataPreprocessor.
        rollout (str): How the student goes from level to level, in training and when it samples: 'ode', Euler steps, or
            'renoise', its x0 noised anew (DMD2's own, diffusers' `stochastic_sampling`). Default 'ode'.

    Attributes:
        iteration (int): The runner's iteration, kept by CDMHook; draws are a function of it.
        seed (int): The run's seed, kept by CDMHook.
        latent_sizes (tuple): Height and width of the latents, one a size of `image_size`.
        updated (dict): Roles whose weights the last train_step changed: True, or a tensor of 1 or 0 where only the
            device knows whether the step was taken.
        anchor_sigma (Tensor): Noise levels of the last train_step's anchors, (B,); None without anchors.
        student_ema: The main role's moving average, or None; kept by CDMHook.
        autocast_dtype (torch.dtype): Dtype of autocast when the networks sample, or None; kept by CDMHook.
        config (Config): The training config, kept by load_method for the model card; or None.
        validated (int): Samples of this rank since the validation began, of `validation_size` on all ranks; kept with
            CDMHook.
        calls (Counter): Network calls of the last train_step by (role, with gradient).
        call_samples (Counter): The same, counted in samples.
    """
    config_key = 'model'
    # The role that samples by default, has the moving average, and is exported.
    main_role = 'student'
    # Roles that methods of this class train, whatever the config.
    trains: tuple[str, ...] = ('student',)
    # Roles whose networks predict a velocity.
    denoisers: tuple[str, ...] = ('student',)
    # Not in checkpoints: frozen, and there again from where it came.
    frozen_prefixes: tuple[str, ...] = ('backbone.', 'base.', 'losses.')

    def __init__(self, backbone: dict[str, Any] | Backbone, sample_sigmas: Sequence[float] = (1.0, 0.75, 0.5, 0.25),
                 image_size: None | Size | Sequence[Size] = None, activation_checkpointing: bool = False,
                 lora: dict[str, Any] | None = None, data_preprocessor: dict[str, Any] | None = None,
                 rollout: Rollout = 'ode') -> None:
        super().__init__(data_preprocessor or dict(type='DistillationDataPreprocessor'))
        self.sample_sigmas, self.rollout = check_sigmas(sample_sigmas, 'model.sample_sigmas'), rollout
        self.backbone: Backbone = MODELS.build(dict(backbone)) if isinstance(backbone, dict) else backbone
        self.latent_sizes = self._latent_sizes(image_size)
        self.lora = None if lora is None else LoRA.from_config(lora)
        self.activation_checkpointing = activation_checkpointing
        # The network whose adapters the roles are; None if each role has weights of its own.
        self.base = None if self.lora is None else frozen(self.backbone.build_network())
        if self.base is not None and activation_checkpointing:
            self.base.enable_gradient_checkpointing(gradient_checkpointing_func=checkpoint_in_role)
        # Backbones of the roles that have another than the model's.
        self.own_backbones: dict[str, Backbone] = {}
        self.student = self.build_trained('student')
        self.iteration: int | None = None
        self.seed: int | None = None
        self.updated: dict[str, bool | Tensor] = {}
        self._failed_observers: set[str] = set()
        self.student_ema: Any = None
        self.anchor_sigma: Tensor | None = None
        self.validated, self.validation_size = 0, None
        self.config: Any = None
        self.autocast_dtype: torch.dtype | None = None
        self.calls: Counter = Counter()
        self.call_samples: Counter = Counter()
        self._optim_wrapper: Any = None
        self._training_role: str | None = None
        self._null: Condition | None = None
        self.register_state_dict_post_hook(self._drop_frozen)
        self.register_load_state_dict_post_hook(self._forgive_frozen)

    @classmethod
    def more_keys(cls) -> set[str]:
        """Keys of a config that a method takes beside its own: its siblings', which it leaves aside."""
        return arguments_of(DiffusionModel)

    # Roles

    def build_trained(self, role: str) -> nn.Module:
        """The network of a trained denoiser: an adapter of the base, or weights of its own."""
        if self.base is not None:
            return self.lora.add(self.base, role, list(self.backbone.lora_targets))
        network = self.start_backbone().build_network().requires_grad_(True)
        if self.activation_checkpointing:
            network.enable_gradient_checkpointing()
        return network

    def start_backbone(self) -> Backbone:
        """The backbone whose weights trained denoisers start from."""
        return self.backbone

    def backbone_of(self, role: str) -> Backbone:
        """The backbone that calls a role's network."""
        return self.own_backbones.get(role, self.backbone)

    @property
    def phases(self) -> tuple[Phase, ...]:
        """What an iteration trains, in order."""
        return ()

    @property
    def trained_roles(self) -> tuple[str, ...]:
        """Roles with an optimizer."""
        return tuple(dict.fromkeys(phase.role for phase in self.phases))

    @property
    def merges(self) -> tuple[tuple[str, str], ...]:
        """(target, source) of roles of which one is merged into the other, weight by weight."""
        return ()

    def check_trainable(self) -> None:
        """Raises ValueError for weights that only a frozen network may have."""
        if self.base is None and self.backbone.dtype == torch.bfloat16:
            raise ValueError("model.backbone.dtype='bfloat16' cannot be trained without model.lora (small updates are "
                             "lost in rounding): leave it float32 and set optim_wrapper.*: type='AmpOptimWrapper', "
                             "dtype='bfloat16'")
        if self.base is None and self.backbone.quantization is not None:
            raise ValueError('model.backbone.quantization needs model.lora: quantised weights cannot be trained')

    def set_attention(self, dtype: torch.dtype | None = None, training: bool = True) -> None:
        """Switches the networks to the attention kernel that `backbone.attention` asks for, on the device where they
        are.

        Args:
            dtype (torch.dtype, optional): What the networks run in under autocast. Default: their own.
            training (bool): Whether gradients pass through. Default True.

        Raises:
            ValueError: If that kernel cannot run there.
        """
        roles = [getattr(self, role) for role in self.denoisers if hasattr(self, role)]
        networks = dict.fromkeys(getattr(unwrap(network), 'base', network) for network in roles)
        for network in networks:
            kernel, why = set_attention(network, self.backbone.attention, self.device, dtype or dtype_of(network),
                                        training, self.backbone.takes_mask)
        print_log(f'attention: {kernel} ({why})', 'current')

    # Sizes

    def _latent_sizes(self, image_size: None | Size | Sequence[Size]) -> tuple[tuple[int, int], ...]:
        if image_size is None:
            return (self.backbone.default_latent_size(),)
        return tuple(self._latent_size(pair) for pair in image_sizes(image_size, 'model.image_size'))

    def _latent_size(self, pair: Pair) -> tuple[int, int]:
        try:
            latent_size = self.backbone.codec.latent_size(*pair)
        except ValueError as error:
            raise ValueError(f'model.image_size: {error}') from None
        self.backbone.check_latent_size(latent_size, pair)
        return latent_size

    @property
    def largest_latent_size(self) -> tuple[int, int]:
        """That of `latent_sizes` with the most tokens."""
        return max(self.latent_sizes, key=self.backbone.tokens)

    def draw_latent_size(self) -> tuple[int, int]:
        """Height and width of this iteration's latents, a function of the seed and the iteration alone."""
        if len(self.latent_sizes) == 1:
            return self.latent_sizes[0]
        generator = stream(self.seed, self.iteration, 'image_size')
        return self.latent_sizes[int(torch.randint(len(self.latent_sizes), (), generator=generator))]

    def latent_shape(self, batch: int, latent_size: tuple[int, int] | None = None) -> tuple[int, ...]:
        """Shape of a batch of latents, (B, C, h, w); of the first of `image_size` by default."""
        return (batch, self.backbone.latent_channels, *(latent_size or self.latent_sizes[0]))

    # Checkpoints hold what is trained; frozen networks come from the pretrained model again.

    @staticmethod
    def _drop_frozen(module: 'DiffusionModel', state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
        for key in [k for k in state if k[len(prefix):].startswith(module.frozen_prefixes)]:
            del state[key]

    @staticmethod
    def _forgive_frozen(module: 'DiffusionModel', incompatible: Any) -> None:
        missing = incompatible.missing_keys
        missing[:] = [k for k in missing if not k.startswith(module.frozen_prefixes)]

    def init_weights(self) -> None:
        """Nothing to do: networks come with their weights."""

    def train(self, mode: bool = True) -> 'DiffusionModel':
        """Sets the training mode; frozen parts stay in evaluation mode."""
        super().train(mode)
        self.backbone.eval()
        if self.base is not None:
            self.base.eval()
        return self

    # Networks

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> None:
        """DDP asks for this before anything else. Around the whole method it would wait forever for the gradients of
        the role whose turn it is not, so MMEngine's default wrapper is refused here, by the key that is missing."""
        raise ValueError("a run of several processes needs model_wrapper_cfg=dict(type='DistillationDataParallel') in "
                         'the config')

    @property
    def student_updated(self) -> bool:
        """Whether the last train_step changed the main role's weights, as far as is known without the device."""
        return self.main_role in self.updated

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(getattr(self, self.main_role).parameters()).device

    @property
    def math_dtype(self) -> torch.dtype:
        """float32, or float64 with float64 networks."""
        dtype = next(getattr(self, self.main_role).parameters()).dtype
        return dtype if dtype == torch.float64 else torch.float32

    def velocity(self, role: str, x: Tensor, sigma: Tensor, condition: Condition,
                 anchor_sigma: Tensor | None = None) -> Tensor:
        """The velocity of a role's network.

        Args:
            role (str): One of `denoisers`.
            x (Tensor): Noisy latents, (B, C, h, w).
            sigma (Tensor): Noise levels in [0, 1] after the scheduler's shift, (B,).
            condition (Condition): B rows.
            anchor_sigma (Tensor, optional): The anchors' noise levels for an anchor-aware fake score, (B,).

        Returns:
            Tensor: (B, C, h, w), float32 (float64 from float64 networks).
        """
        network = getattr(self, role)
        key = (role, torch.is_grad_enabled())
        if key[1] and self._training_role not in (None, role):
            network = unwrap(network)  # gradients that pass through are not reduced
        self.calls[key] += 1
        self.call_samples[key] += len(x)
        with self._precision(role), anchored(network, anchor_sigma):
            return self.backbone_of(role).velocity(network, x, sigma, condition)

    def features(self, role: str, x: Tensor, sigma: Tensor, condition: Condition, anchor_sigma: Tensor,
                 blocks: Sequence[int] | None) -> tuple[Tensor, list[Tensor]]:
        """The velocity of a role's network, and what some of its blocks make of the image.

        Args:
            role, x, sigma, condition, anchor_sigma: See `velocity`.
            blocks (Sequence[int], optional): Which blocks, ascending. Default: the middle one.

        Returns:
            tuple: The velocity (B, C, h, w), and a feature map (B, D, h', w') a block.
        """
        backbone = self.backbone_of(role)
        with recorded(self.blocks_of(role, blocks)) as outputs:
            velocity = self.velocity(role, x, sigma, condition, anchor_sigma)
        return velocity, [backbone.feature_map(output, (x.shape[-2], x.shape[-1])) for output in outputs]

    def blocks_of(self, role: str, blocks: Sequence[int] | None) -> list[nn.Module]:
        """Some blocks of a role's network; arguments as in `features`.

        Raises:
            ValueError: If it has fewer.
        """
        network = unwrap(getattr(self, role))
        own = self.backbone_of(role).blocks(getattr(network, 'base', network))
        wanted = (len(own) // 2,) if blocks is None else blocks
        places = sorted({i % len(own) for i in wanted if -len(own) <= i < len(own)})
        if not 0 < len(places) == len(wanted):
            raise ValueError(f'model.losses.*.blocks must be different ones of the {len(own)} blocks of the network '
                             f'(role {role!r}), but is {list(wanted)}')
        return [own[i] for i in places]

    def call(self, role: str, *args: Any) -> Any:
        """What the network of a role that is no denoiser makes of its arguments, in the precision of its optimizer
        wrapper. In another role's phase it is called without the wrapper that would reduce its gradients."""
        network = getattr(self, role)
        with self._precision(role):
            return (network if role == self._training_role else unwrap(network))(*args)

    def _precision(self, role: str) -> contextlib.AbstractContextManager:
        """Mixed precision (and gradient synchronisation) as the role's optimizer wrapper wants it.

        One context a call: autocast keeps casted weights until it is left, and weights that were cast without
        gradient would silently cut the gradient of a later call.
        """
        if self._optim_wrapper is None:
            if self.autocast_dtype is None:
                return contextlib.nullcontext()
            return torch.autocast(self.device.type, self.autocast_dtype)
        wrapper = self._optim_wrapper[role if role in self._optim_wrapper.keys() else self.main_role]
        return wrapper.optim_context(getattr(self, role))

    def shift(self, sigmas: Tensor, latent_size: tuple[int, int] | None = None) -> Tensor:
        """What the scheduler makes of a list of noise levels, for latents of that size (default: the first of
        `image_size`); see `Backbone.shift_grid`."""
        return self.backbone.shift_grid(sigmas, latent_size or self.latent_sizes[0])

    def null_condition(self, rows: int) -> Condition:
        """The null condition, repeated. It is encoded once: conditioners are frozen."""
        if self._null is None:
            self._null = self.backbone.conditioner.null()
        return self._null.to(self.device).expand(rows)

    # One iteration

    def start(self, batch: dict[str, Any]) -> Iteration:
        """What the phases of an iteration share, of a preprocessed batch."""
        raise NotImplementedError

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        """One iteration: the turns of the roles that are due.

        Args:
            data (dict or list): A batch from the dataloader.
            optim_wrapper (OptimWrapperDict): One wrapper a trained role.

        Returns:
            dict: Scalars to log, on the device.
        """
        self._check_hook()
        self.calls.clear()
        self.call_samples.clear()
        self.updated.clear()
        self._optim_wrapper = optim_wrapper
        try:
            iteration = self.start(self.data_preprocessor(data, True))
            for phase in self.phases:
                if phase.is_due(self.iteration):
                    self._train_role(phase, iteration)
            return self.finish(iteration.logs)
        finally:
            self._optim_wrapper = self._training_role = None

    def _check_hook(self) -> None:
        if self.seed is None or self.training and self.iteration is None:
            raise ValueError(f'{type(self).__name__} does not know the iteration: add dict(type=\'CDMHook\') to '
                             'custom_hooks (it keeps iteration and seed, which all random numbers depend on)')

    def _train_role(self, phase: Phase, iteration: Iteration) -> None:
        self._training_role = phase.role
        with passed_through([unwrap(getattr(self, role)) for role in phase.through]):
            taken = take_turn(phase, iteration, self._optim_wrapper[phase.role])
            if taken is not False:
                self.updated[phase.role] = taken

    def is_due(self, role: str) -> bool:
        """Whether a role has a turn in this iteration."""
        return any(phase.role == role and phase.is_due(self.iteration) for phase in self.phases)

    def draw_key(self) -> dict[str, int]:
        """Seed, rank and iteration, of which an iteration's draws are a function."""
        return dict(seed=self.seed, rank=get_rank(), iteration=self.iteration)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return get_world_size()

    def finish(self, logs: dict[str, Any]) -> dict[str, Any]:
        """Completes the scalars of one iteration: gradient norms, network calls by role, and what plug-ins observe."""
        for role, wrapper in self._optim_wrapper.items():
            if getattr(wrapper, 'grad_norm', None) is not None:
                logs[f'grad_norm_{role}'], wrapper.grad_norm = wrapper.grad_norm, None
        counts: Counter = Counter()
        for (role, _), n in self.calls.items():
            counts[f'calls_{role}'] += n
        logs = dict(logs, **{name: float(n) for name, n in counts.items()})
        return dict(logs, **observe(self, self.iteration, logs, self._failed_observers))


def frozen(network: nn.Module) -> nn.Module:
    """A network that is never trained."""
    return network.requires_grad_(False).eval()
