"""How a method samples from the networks of its roles."""
from collections.abc import Iterable
from typing import Any

import torch
from mmengine.dist import get_rank, get_world_size
from torch import Tensor

from cdm_plugin.condition import Condition
from cdm_plugin.draws import Rollout, stream
from cdm_plugin.roles.weights import unwrap
from cdm_plugin.sampling import euler_sample, renoise_sample


class Sampling:
    """The part of a method that samples: few steps by a role's network, and MMEngine's validation by them."""
    # What the method has besides.
    backbone: Any
    main_role: Any
    rollout: Any
    seed: Any
    latent_shape: Any
    device: Any
    math_dtype: Any
    shift: Any
    sample_sigmas: Any
    null_condition: Any
    velocity: Any
    backbone_of: Any
    validated: Any
    validation_size: Any
    _check_hook: Any

    def sample(self, condition: Condition, *args: Any, **kwargs: Any) -> Tensor:
        """Images from noise: `sample_latents`, decoded.

        Returns:
            Tensor: Images in [-1, 1], (B, 3 or 1, H, W).
        """
        latents = self.sample_latents(condition, *args, **kwargs)
        with torch.no_grad():
            return self.backbone.codec.decode(latents)

    @torch.no_grad()
    def sample_latents(self, condition: Condition, noise: Tensor | None = None, sigmas: Tensor | None = None,
                       role: str | None = None, guidance_scale: float = 1.0,
                       anchor_sigma: float | None = None, rollout: Rollout | None = None) -> Tensor:
        """Latents of images from noise.

        Args:
            condition (Condition): B rows.
            noise (Tensor, optional): Standard normal, (B, C, h, w); its size is the images'. Default: the same noise
                in every call, of the first of `image_size`.
            sigmas (Tensor, optional): Noise levels before the scheduler's shift, (N,). Default: `sample_sigmas`.
            role (str, optional): Whose network, one of `denoisers`. Default: `main_role`.
            guidance_scale (float): Classifier-free guidance; 1 is off. Default 1.
            anchor_sigma (float, optional): Anchor of an anchor-aware fake score. Default: the last level.
            rollout (str, optional): 'ode' or 'renoise'. Default: the method's for `main_role`, 'ode' for others.

        Returns:
            Tensor: (B, C, h, w).
        """
        role = role or self.main_role
        rollout = rollout or (self.rollout if role == self.main_role else 'ode')
        if noise is None:
            noise = torch.randn(self.latent_shape(len(condition)), generator=stream(0, 'sample'))
        noise, condition = noise.to(self.device, self.math_dtype), condition.to(self.device)
        sigmas = self.shift(self.sample_sigmas if sigmas is None else sigmas, (noise.shape[-2], noise.shape[-1]))
        anchors = noise.new_full((len(noise),), float(sigmas[-1] if anchor_sigma is None else anchor_sigma))
        null = self.null_condition(len(noise)) if guidance_scale != 1 else None

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            if null is None:
                return self.velocity(role, x, sigma, condition, anchors)
            both = self.velocity(role, torch.cat([x, x]), torch.cat([sigma, sigma]),
                                 Condition.cat([condition, null]), torch.cat([anchors, anchors]))
            (conditional, unconditional), backbone = both.chunk(2), self.backbone_of(role)
            return backbone.guide(conditional, unconditional, backbone.guidance_at(guidance_scale, sigma))

        network = unwrap(getattr(self, role))
        training = network.training
        network.eval()
        try:
            return (renoise_sample if rollout == 'renoise' else euler_sample)(velocity, noise, sigmas)
        finally:
            network.train(training)

    def noise(self, seed: int, indices: Iterable[int], latent_size: tuple[int, int] | None = None) -> Tensor:
        """The noise that an evaluation starts from: each row depends on the seed and its index alone.

        Args:
            seed (int): The seed.
            indices (Iterable[int]): B numbers of samples.
            latent_size (tuple, optional): Height and width. Default: the first of `image_size`.

        Returns:
            Tensor: Standard normal, (B, C, h, w), on the CPU.
        """
        shape = self.latent_shape(1, latent_size)
        return torch.cat([torch.randn(shape, generator=stream(seed, 'sample', i)) for i in indices])

    def forward(self, mode: str = 'predict', **data: Any) -> list[dict[str, Any]]:
        """Samples a preprocessed batch of prompts with `sample_sigmas`, for validation and test.

        A sample's noise depends on the run's seed and the sample's place in the dataset alone (of MMEngine's
        DefaultSampler without shuffling): it is the same in every validation, for any batch size and number of ranks,
        and the one that `cdm sample` and `cdm evaluate` draw with that seed.

        Returns:
            list[dict]: One a sample: `image` (C, H, W) in [-1, 1], `index` in the dataset and, if known, `prompt`.
        """
        if mode not in ('predict', 'tensor'):
            raise ValueError(f'{type(self).__name__} has no forward mode {mode!r}: training goes through train_step')
        self._check_hook()
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
