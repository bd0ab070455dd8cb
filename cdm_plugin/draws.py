"""Every random number of one iteration.

Draws are a pure function of (seed, rank, iteration), and what must agree across ranks (the time grid, the number of
network calls) of (seed, iteration) alone. So a resumed run repeats the uninterrupted one to the bit, a sharded run
cannot hang on unequal rollouts, and a test can inject its own draws.

Each quantity has a stream of its own, keyed by its name: adding a loss to a recipe changes no other draw.
"""
import contextlib
import dataclasses
import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Generator, Tensor

from cdm_plugin.flow import shift_sigmas

# Whether a noise level is drawn before the scheduler's shift, which then is applied to it, or as it is used.
SigmaShift = Literal['none', 'scheduler']
# How a student goes from one level to the next: an Euler step, or by noising its x0 anew.
Rollout = Literal['ode', 'renoise']


def stream(*key: Any) -> Generator:
    """A CPU generator whose sequence is a pure function of the key."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return Generator().manual_seed(int.from_bytes(digest, 'little') >> 1)


def _move(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if isinstance(value, Mapping):
        return {k: _move(v, device, dtype) for k, v in value.items()}
    if isinstance(value, list):
        return [_move(v, device, dtype) for v in value]
    if not isinstance(value, Tensor):
        return value
    if device.type == 'cuda' and value.device.type == 'cpu':
        value = value.pin_memory()  # a copy from other memory waits for the device
    return value.to(device, dtype if value.is_floating_point() else None, non_blocking=True)


M = TypeVar('M', bound='_Movable')


@dataclass(frozen=True)
class _Movable:

    def to(self: M, device: torch.device, dtype: torch.dtype = torch.float32) -> M:
        """A copy on a device; floating-point tensors get the dtype."""
        return dataclasses.replace(self, **{
            f.name: _move(getattr(self, f.name), device, dtype) for f in dataclasses.fields(self)})


@dataclass(frozen=True)
class DrawContext:
    """What a loss and a sigma sampler may draw from. All levels are after the scheduler's shift.

    Attributes:
        generator (Generator): The loss's own CPU stream.
        anchor_sigma (Tensor): Noise levels of the anchors, (B,) float64.
        draw_grid (Callable): Draws another time grid from a generator, (N,).
        shape (tuple): Shape of the latents, (B, ...).
        sigmas (Tensor): The iteration's time grid, (N,). Default: empty.
        scheduler_shift (float): The scheduler's shift of a single level, see `shift_sigmas`. Default 1, none.
        sigma_shift (str): `shift` of the sigma samplers that state none. Default 'none'.
        rollout (str): How the student goes from level to level, 'ode' or 'renoise'. Default 'ode'.
    """
    generator: Generator
    anchor_sigma: Tensor
    draw_grid: Callable[[Generator], Tensor]
    shape: tuple[int, ...]
    sigmas: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))
    scheduler_shift: float = 1.0
    sigma_shift: SigmaShift = 'none'
    rollout: Rollout = 'ode'

    @property
    def end_sigma(self) -> Tensor:
        """Where the sampling step that starts at each anchor ends: the next level of the grid, or 0, (B,)."""
        levels = torch.cat([self.sigmas, self.sigmas.new_zeros(1)])
        return torch.where(levels < self.anchor_sigma[:, None], levels, 0.0).amax(1)

    def before_shift(self) -> 'DrawContext':
        """The same with the levels as they were before the scheduler's shift."""
        def undone(sigmas: Tensor) -> Tensor:
            return shift_sigmas(sigmas, 1 / self.scheduler_shift)
        return dataclasses.replace(
            self, anchor_sigma=undone(self.anchor_sigma), sigmas=undone(self.sigmas), scheduler_shift=1.0,
            draw_grid=lambda generator: undone(self.draw_grid(generator)))

    def sigma(self, sampler: Callable[['DrawContext'], Tensor]) -> Tensor:
        """One noise level a sample from a sigma sampler, (B,)."""
        return sampler(self)

    def noise(self) -> Tensor:
        """Standard normal noise of the latents' shape."""
        return torch.randn(self.shape, generator=self.generator)


@dataclass(frozen=True)
class Draws(_Movable):
    """The random numbers of one distillation iteration of one rank.

    Attributes:
        sigmas (Tensor): The time grid after the scheduler's shift, descending from 1, (N,). Equal on every rank.
        anchor (Tensor): Each sample's anchor index in 0..N-1, (B,) int64.
        rollout_steps (int): Largest anchor index over all ranks: network calls of the rollout, equal on every rank.
        noise (Tensor): Where the rollout starts, (B, ...).
        fake_sigma (Tensor): Noise levels of the fake-score steps, (fake_steps, B).
        fake_noise (Tensor): Noise of the fake-score steps, (fake_steps, B, ...).
        losses (dict): For each loss by name, the tensors that its `draw` returned. Empty without a student step.
        step_noise (list): For each call of a rollout that noises anew, the noise of the samples that move, (K, ...).
            Empty for Euler steps.
        order (Tensor, optional): The samples from the highest anchor to the lowest, (B,) int64. Default: of `anchor`.
        moving (tuple, optional): For each call of the rollout, how many samples have not arrived, the first ones of
            `order`. Default: of `anchor`. A plan made on the host spares the device a synchronisation.
    """
    sigmas: Tensor
    anchor: Tensor
    rollout_steps: int
    noise: Tensor
    fake_sigma: Tensor
    fake_noise: Tensor
    losses: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    step_noise: list[Tensor] = field(default_factory=list)
    order: Tensor | None = None
    moving: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.moving is None:
            anchors = self.anchor.tolist()
            object.__setattr__(self, 'order', self.anchor.argsort(descending=True, stable=True))
            object.__setattr__(self, 'moving', tuple(
                sum(anchor > step for anchor in anchors) for step in range(self.rollout_steps)))

    @property
    def anchor_sigma(self) -> Tensor:
        """Noise level of each sample's anchor, (B,)."""
        return self.sigmas[self.anchor]

    @property
    def end_sigma(self) -> Tensor:
        """Where the sampling step that starts at each sample's anchor ends, (B,); 0 for the last one."""
        return torch.cat([self.sigmas, self.sigmas.new_zeros(1)])[self.anchor + 1]

    @classmethod
    def sample(cls, *, seed: int, rank: int, iteration: int, shape: tuple[int, ...], time_grid, fake_sigma: Callable,
               losses: Mapping[str, Any], shift: Callable[[Tensor], Tensor], world_size: int = 1,
               fake_steps: int = 1, rollout: Rollout = 'ode', scheduler_shift: float = 1.0,
               sigma_shift: SigmaShift = 'none') -> 'Draws':
        """Draws one iteration.

        Args:
            seed (int): The run's seed.
            rank (int): This process's rank.
            iteration (int): The runner's iteration, from 0.
            shape (tuple): Shape of the latents, (B, ...); B is equal on every rank.
            time_grid: Has `sample(generator) -> (N,)`, levels before the scheduler's shift.
            fake_sigma (Callable): Sigma sampler of the fake-score steps.
            losses (Mapping): The losses to draw for, by name; each has `draw(DrawContext) -> dict`.
            shift (Callable): The scheduler's shift, (N,) -> (N,).
            world_size (int): Number of ranks. Default 1.
            fake_steps (int): Fake-score steps of the iteration. Default 1.
            rollout (str): 'ode', or 'renoise' to draw the noise of its steps too. Default 'ode'.
            scheduler_shift, sigma_shift: See `DrawContext`.

        Returns:
            Draws: On the CPU; sigmas in float64, noise in float32.
        """
        batch = shape[0]

        def draw_grid(generator: Generator) -> Tensor:
            return shift(time_grid.sample(generator))

        def anchors_of(r: int) -> Tensor:
            return torch.randint(len(sigmas), (batch,), generator=stream(seed, r, iteration, 'anchor'))

        def context(name: str) -> DrawContext:
            return DrawContext(stream(seed, rank, iteration, name), sigmas[anchor], draw_grid, shape, sigmas,
                               scheduler_shift, sigma_shift, rollout)

        sigmas = draw_grid(stream(seed, iteration, 'time_grid'))
        anchor = anchors_of(rank)
        rollout_steps = max(int(anchors_of(r).max()) for r in range(world_size))
        moving = [int((anchor > step).sum()) for step in range(rollout_steps)] if rollout == 'renoise' else []
        fakes = [context('fake' if step == 0 else f'fake:{step}') for step in range(fake_steps)]
        return cls(
            sigmas=sigmas, anchor=anchor, rollout_steps=rollout_steps, noise=context('noise').noise(),
            fake_sigma=torch.stack([fake.sigma(fake_sigma) for fake in fakes]),
            fake_noise=torch.stack([fake.noise() for fake in fakes]),
            losses={name: loss.draw(context(f'loss:{name}')) for name, loss in losses.items()},
            step_noise=[torch.randn(k, *shape[1:], generator=stream(seed, rank, iteration, f'step:{step}'))
                        for step, k in enumerate(moving)])


@dataclass(frozen=True)
class FlowMatchingDraws(_Movable):
    """The random numbers of one flow-matching iteration of one rank.

    Attributes:
        sigma (Tensor): Noise levels, (B,).
        noise (Tensor): (B, ...).
        drop (Tensor): Which samples see the null condition, for classifier-free guidance, (B,) bool.
    """
    sigma: Tensor
    noise: Tensor
    drop: Tensor

    @classmethod
    def sample(cls, *, seed: int, rank: int, iteration: int, shape: tuple[int, ...], sigma: Callable,
               drop_rate: float, shift: Callable[[Tensor], Tensor]) -> 'FlowMatchingDraws':
        """Draws one iteration; arguments as in `Draws.sample`, `sigma` is a sigma sampler, `drop_rate` in [0, 1]."""
        generator = stream(seed, rank, iteration, 'flow_matching')
        context = DrawContext(generator, torch.ones(shape[0], dtype=torch.float64), lambda g: torch.ones(1), shape)
        return cls(sigma=shift(context.sigma(sigma)), noise=context.noise(),
                   drop=torch.rand(shape[0], generator=generator) < drop_rate)


@contextlib.contextmanager
def randomness_kept() -> Iterator[None]:
    """Random numbers go on after it as if nothing had been drawn inside."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextlib.contextmanager
def drawn_by(*key: Any) -> Iterator[None]:
    """Context in which Python's, NumPy's and torch's random numbers are a function of the key."""
    number = int(torch.randint(2**32, (), generator=stream('drawn', *key)))
    with randomness_kept():
        random.seed(number)
        np.random.seed(number)
        torch.manual_seed(number)
        yield
