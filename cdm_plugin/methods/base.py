"""What every method is: an MMEngine model with a backbone, a student network, and a way to sample from it."""
import contextlib
from collections import Counter
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Tuple, Union

import torch
from mmengine.dist import get_rank, get_world_size
from mmengine.logging import print_log
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from torch import Tensor, nn

from cdm_plugin import plugins
from cdm_plugin.attention import set_attention
from cdm_plugin.backbones import Backbone
from cdm_plugin.condition import Condition
from cdm_plugin.draws import stream
from cdm_plugin.lora import LoRA, checkpoint_in_role
from cdm_plugin.networks import anchored, dtype_of, unwrap
from cdm_plugin.sampling import euler_sample
from cdm_plugin.time_grids import check_sigmas

ROLES = ('student', 'fake', 'teacher')
# Settings of `model` that say how its weights were trained: they go with a checkpoint.
TRAINED_KEYS = ('type', 'alpha', 'losses', 'time_grid', 'sample_sigmas', 'fake_steps', 'student_every', 'fake_merge',
                'anchor_aware_fake', 'lora')


class DiffusionModel(BaseModel):
    """Base class of all methods.

    Args:
        backbone (dict): Config of the backbone.
        sample_sigmas (Sequence[float]): Noise levels of inference before the scheduler's shift, descending from 1.
            Default (1, 0.75, 0.5, 0.25): 4 steps.
        image_size (int or tuple, optional): Pixels, one number or (height, width). Default: the size that the
            network was made for.
        activation_checkpointing (bool): Whether trained networks recompute their activations in backward. Default
            False.
        lora (dict, optional): Settings of `cdm_plugin.lora.LoRA`, `dict(rank=64)`: trained roles are adapters of one
            frozen base. Default: full weights.
        data_preprocessor (dict, optional): Default DistillationDataPreprocessor.

    Attributes:
        iteration (int): The runner's iteration, kept by CDMHook; draws are a function of it.
        seed (int): The run's seed, kept by CDMHook.
        student_updated (bool): Whether the last train_step changed the student's weights.
        anchor_sigma (Tensor): Noise levels of the last train_step's anchors, (B,); None without anchors.
        student_ema: The student's moving average, or None; kept by CDMHook.
        autocast_dtype (torch.dtype): Dtype of autocast when the networks sample, or None; kept by CDMHook.
        log_sink (Callable): Takes the scalars of an iteration in place of `train_step`'s caller, or None; kept by
            CDMHook, which brings them to the host when they are due.
        config (Config): The training config, kept by load_method for the model card; or None.
        validated (int): Samples of this rank since the validation began, of `validation_size` on all ranks; kept with
            CDMHook.
        calls (Counter): Network calls of the last train_step by (role, with gradient).
        call_samples (Counter): The same, counted in samples.
    """
    frozen_prefixes: Tuple[str, ...] = ('backbone.', 'base.')

    def __init__(self, backbone: Dict[str, Any], sample_sigmas: Sequence[float] = (1.0, 0.75, 0.5, 0.25),
                 image_size: Union[None, int, Sequence[int]] = None, activation_checkpointing: bool = False,
                 lora: Optional[Dict[str, Any]] = None, data_preprocessor: Optional[Dict[str, Any]] = None) -> None:
        super().__init__(data_preprocessor or dict(type='DistillationDataPreprocessor'))
        self.sample_sigmas = check_sigmas(sample_sigmas, 'model.sample_sigmas')
        self.backbone: Backbone = MODELS.build(dict(backbone)) if isinstance(backbone, dict) else backbone
        self.latent_size = self._latent_size(image_size)
        self.lora = None if lora is None else LoRA.from_config(lora)
        self.activation_checkpointing = activation_checkpointing
        # The network whose adapters the roles are; None if each role has weights of its own.
        self.base = None if self.lora is None else frozen(self.backbone.build_network())
        if self.base is not None and activation_checkpointing:
            self.base.enable_gradient_checkpointing(gradient_checkpointing_func=checkpoint_in_role)
        self.student = self.build_trained('student')
        self.iteration: Optional[int] = None
        self.seed: Optional[int] = None
        self.student_updated = False
        self.student_ema = None
        self.anchor_sigma: Optional[Tensor] = None
        self.validated, self.validation_size = 0, None
        self.config: Any = None
        self.autocast_dtype: Optional[torch.dtype] = None
        self.log_sink: Optional[Callable[[Dict[str, Any]], None]] = None
        self.calls: Counter = Counter()
        self.call_samples: Counter = Counter()
        self._optim_wrapper = None
        self._null: Optional[Condition] = None
        self.register_state_dict_post_hook(self._drop_frozen)
        self.register_load_state_dict_post_hook(self._forgive_frozen)

    def check_trainable(self) -> None:
        """Raises ValueError for weights that only a frozen network may have."""
        if self.base is None and self.backbone.dtype == torch.bfloat16:
            raise ValueError("model.backbone.dtype='bfloat16' cannot be trained without model.lora (small updates are "
                             "lost in rounding): leave it float32 and set optim_wrapper.*: type='AmpOptimWrapper', "
                             "dtype='bfloat16'")
        if self.base is None and self.backbone.quantization is not None:
            raise ValueError('model.backbone.quantization needs model.lora: quantised weights cannot be trained')

    def set_attention(self, dtype: Optional[torch.dtype] = None, training: bool = True) -> None:
        """Switches the networks to the attention kernel that `backbone.attention` asks for, on the device where they
        are.

        Args:
            dtype (torch.dtype, optional): What the networks run in under autocast. Default: their own.
            training (bool): Whether gradients pass through. Default True.

        Raises:
            ValueError: If that kernel cannot run there.
        """
        own = [self.base] if self.base is not None else [getattr(self, role) for role in ROLES if hasattr(self, role)]
        for network in own:
            kernel, why = set_attention(network, self.backbone.attention, self.device, dtype or dtype_of(network),
                                        training)
        print_log(f'attention: {kernel} ({why})', 'current')

    def build_trained(self, role: str) -> nn.Module:
        """The network of a trained role: weights of its own, or an adapter of the base."""
        if self.base is not None:
            return self.lora.add(self.base, role, self.backbone.lora_targets)
        network = self.backbone.build_network().requires_grad_(True)
        if self.activation_checkpointing:
            network.enable_gradient_checkpointing()
        return network

    def set_image_size(self, height: int, width: int) -> None:
        """Samples and trains at another size from now on, in pixels.

        Raises:
            ValueError: If the codec or the network cannot.
        """
        self.latent_size = self._latent_size((height, width))

    def _latent_size(self, image_size: Union[None, int, Sequence[int]]) -> Tuple[int, int]:
        if image_size is None:
            return self.backbone.default_latent_size()
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f'model.image_size must be a number or (height, width) in pixels, but is {image_size!r}')
        latent_size = self.backbone.codec.latent_size(*size)
        self.backbone.check_latent_size(latent_size, image_size)
        return latent_size

    # Checkpoints hold what is trained; frozen networks come from the pretrained model again.

    @staticmethod
    def _drop_frozen(module: 'DiffusionModel', state: Dict[str, Tensor], prefix: str, metadata: Any) -> None:
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
    def trained_roles(self) -> Tuple[str, ...]:
        """Roles with an optimizer."""
        return ('student',)

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(self.student.parameters()).device

    @property
    def math_dtype(self) -> torch.dtype:
        """float32, or float64 with float64 networks."""
        dtype = next(self.student.parameters()).dtype
        return dtype if dtype == torch.float64 else torch.float32

    def velocity(self, role: str, x: Tensor, sigma: Tensor, condition: Condition,
                 anchor_sigma: Optional[Tensor] = None) -> Tensor:
        """The velocity of a role's network.

        Args:
            role (str): 'student', 'fake' or 'teacher'.
            x (Tensor): Noisy latents, (B, C, h, w).
            sigma (Tensor): Noise levels in [0, 1] after the scheduler's shift, (B,).
            condition (Condition): B rows.
            anchor_sigma (Tensor, optional): The anchors' noise levels for an anchor-aware fake score, (B,).

        Returns:
            Tensor: (B, C, h, w), float32 (float64 from float64 networks).
        """
        network = getattr(self, role)
        key = (role, torch.is_grad_enabled())
        self.calls[key] += 1
        self.call_samples[key] += len(x)
        with self._precision(role), anchored(network, anchor_sigma):
            return self.backbone.velocity(network, x, sigma, condition)

    def _precision(self, role: str) -> contextlib.AbstractContextManager:
        """Mixed precision (and gradient synchronisation) as the role's optimizer wrapper wants it.

        One context a call: autocast keeps casted weights until it is left, and weights that were cast without
        gradient would silently cut the gradient of a later call.
        """
        if self._optim_wrapper is None:
            if self.autocast_dtype is None:
                return contextlib.nullcontext()
            return torch.autocast(self.device.type, self.autocast_dtype)
        wrapper = self._optim_wrapper[role if role in self.trained_roles else 'student']
        return wrapper.optim_context(getattr(self, role))

    @contextlib.contextmanager
    def stepping(self, optim_wrapper: Any):
        """What holds during one train_step."""
        if self.iteration is None or self.seed is None:
            raise ValueError(f'{type(self).__name__} does not know the iteration: add dict(type=\'CDMHook\') to '
                             'custom_hooks (it keeps iteration and seed, which all random numbers depend on)')
        self.calls.clear()
        self.call_samples.clear()
        self.student_updated = False
        self._optim_wrapper = optim_wrapper
        try:
            yield
        finally:
            self._optim_wrapper = None

    def draw_key(self) -> Dict[str, int]:
        """Seed, rank and iteration, of which an iteration's draws are a function."""
        return dict(seed=self.seed, rank=get_rank(), iteration=self.iteration)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return get_world_size()

    def latent_shape(self, batch: int) -> Tuple[int, ...]:
        """Shape of a batch of latents, (B, C, h, w)."""
        return (batch, self.backbone.latent_channels, *self.latent_size)

    def shift(self, sigmas: Tensor) -> Tensor:
        """The scheduler's shift of noise levels at this image size."""
        return self.backbone.shift_sigmas(sigmas, self.latent_size)

    def null_condition(self, rows: int) -> Condition:
        """The null condition, repeated. It is encoded once: conditioners are frozen."""
        if self._null is None:
            self._null = self.backbone.conditioner.null()
        return self._null.to(self.device).expand(rows)

    def finish(self, logs: Dict[str, Any]) -> Dict[str, Any]:
        """Completes the scalars of one iteration: gradient norms, network calls by role, and what plug-ins observe.

        Returns:
            dict: The scalars; none of them if `log_sink` takes them.
        """
        logs = dict(logs)
        for role, wrapper in self._optim_wrapper.items():
            if getattr(wrapper, 'grad_norm', None) is not None:
                logs[f'grad_norm_{role}'], wrapper.grad_norm = wrapper.grad_norm, None
        counts: Counter = Counter()
        for (role, _), n in self.calls.items():
            counts[f'calls_{role}'] += n
        logs = dict(logs, **{name: float(n) for name, n in counts.items()})
        for extra in plugins.manager.hook.cdm_after_iteration(method=self, iteration=self.iteration, logs=logs):
            logs.update(extra or {})
        if self.log_sink is None:
            return logs
        self.log_sink(logs)
        return {}

    # Sampling

    @torch.no_grad()
    def sample(self, condition: Condition, noise: Optional[Tensor] = None, sigmas: Optional[Tensor] = None,
               role: str = 'student', guidance_scale: float = 1.0, anchor_sigma: Optional[float] = None) -> Tensor:
        """Images from noise.

        Args:
            condition (Condition): B rows.
            noise (Tensor, optional): Standard normal, (B, C, h, w). Default: the same noise in every call.
            sigmas (Tensor, optional): Noise levels before the scheduler's shift, (N,). Default: `sample_sigmas`.
            role (str): Whose network: 'student', 'fake' or 'teacher'. Default 'student'.
            guidance_scale (float): Classifier-free guidance; 1 is off. Default 1.
            anchor_sigma (float, optional): Anchor of an anchor-aware fake score. Default: the last level.

        Returns:
            Tensor: Images in [-1, 1], (B, 3 or 1, H, W).
        """
        if noise is None:
            noise = torch.randn(self.latent_shape(len(condition)), generator=stream(0, 'sample'))
        noise, condition = noise.to(self.device, self.math_dtype), condition.to(self.device)
        sigmas = self.shift(self.sample_sigmas if sigmas is None else sigmas)
        anchors = noise.new_full((len(noise),), float(sigmas[-1] if anchor_sigma is None else anchor_sigma))
        null = self.null_condition(len(noise)) if guidance_scale != 1 else None

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            if null is None:
                return self.velocity(role, x, sigma, condition, anchors)
            both = self.velocity(role, torch.cat([x, x]), torch.cat([sigma, sigma]),
                                 Condition.cat([condition, null]), torch.cat([anchors, anchors]))
            return self.backbone.guide(*both.chunk(2), guidance_scale)

        network = unwrap(getattr(self, role))
        training = network.training
        network.eval()
        try:
            latents = euler_sample(velocity, noise, sigmas)
        finally:
            network.train(training)
        return self.backbone.codec.decode(latents)

    def noise(self, seed: int, indices: Iterable[int]) -> Tensor:
        """The noise that an evaluation starts from: each row depends on the seed and its index alone.

        Args:
            seed (int): The seed.
            indices (Iterable[int]): B numbers of samples.

        Returns:
            Tensor: Standard normal, (B, C, h, w), on the CPU.
        """
        return torch.cat([torch.randn(self.latent_shape(1), generator=stream(seed, 'sample', i)) for i in indices])

    def forward(self, mode: str = 'predict', **data: Any) -> List[Dict[str, Any]]:
        """Samples a preprocessed batch of prompts with `sample_sigmas`, for validation and test.

        A sample's noise depends on the run's seed and the sample's place in the dataset alone (of MMEngine's
        DefaultSampler without shuffling): it is the same in every validation, for any batch size and number of ranks,
        and the one that `cdm sample` and `cdm evaluate` draw with that seed.

        Returns:
            list[dict]: One a sample: `image` (C, H, W) in [-1, 1], `index` in the dataset and, if known, `prompt`.
        """
        if mode not in ('predict', 'tensor'):
            raise ValueError(f'{type(self).__name__} has no forward mode {mode!r}: training goes through train_step')
        condition = self.backbone.condition(data)
        indices = [get_rank() + get_world_size() * (self.validated + i) for i in range(len(condition))]
        self.validated += len(condition)
        if self.validation_size is not None:  # the sampler fills up the ranks' shares with the first samples
            indices = [i % self.validation_size for i in indices]
        images = self.sample(condition, self.noise(self.seed, indices))
        prompts = data.get('prompt')
        if isinstance(prompts, Tensor):
            prompts = prompts.tolist()
        return [dict(image=image, index=index, **({} if prompts is None else dict(prompt=prompt)))
                for image, index, prompt in zip(images, indices, prompts or indices)]


def frozen(network: nn.Module) -> nn.Module:
    """A network that is never trained."""
    return network.requires_grad_(False).eval()
