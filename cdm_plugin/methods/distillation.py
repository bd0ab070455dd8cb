"""The loop that DMD2, Decoupled DMD and CDM share: rollout, fake-score step, student step (arXiv 2605.06376, alg. 1).

A method is this class with its defaults: a time grid, a set of losses, an update ratio.
"""
import inspect
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import torch
from mmengine.logging import print_log
from mmengine.registry import MODELS, TASK_UTILS
from torch import Tensor, nn

from cdm_plugin import plugins
from cdm_plugin.condition import Condition
from cdm_plugin.conditioners import check_dtype
from cdm_plugin.draws import Draws
from cdm_plugin.flow import add_noise, to_x0
from cdm_plugin.losses.base import ScoreQuery, build_sampler
from cdm_plugin.lora import AdapterRole
from cdm_plugin.methods.base import DiffusionModel, frozen
from cdm_plugin.networks import make_anchor_aware, merge_weights
from cdm_plugin.rollout import Prediction, rollout
from cdm_plugin.time_grids import DynamicTimeGrid, FixedTimeGrid

# The terms that some method of the family has. A partial override of one that this method lacks is left aside, so
# that changing model.type alone swaps methods.
FAMILY_TERMS = ('ca', 'dm', 'cdm')


class Distillation(DiffusionModel):
    """Base class of the distillation methods.

    Args:
        backbone (dict): Config of the backbone; its pretrained network is the teacher.
        sample_sigmas (Sequence[float]): Noise levels of inference before the scheduler's shift. Default: 4 steps.
        alpha (float): Guidance that the student learns, as alpha = guidance scale - 1. Default 7.
        losses (dict, optional): Overrides of the method's losses by name: a dict without `type` changes single
            arguments, one with `type` replaces or adds a loss, None removes it.
        time_grid (dict, optional): Override of the method's time grid, likewise.
        fake_sigma (dict): Sigma sampler of the fake-score steps. Default UniformSigma.
        fake_loss (dict): Loss of the fake-score steps. Default FlowMatchingLoss.
        fake_steps (int): Fake-score steps an iteration, all on its one rollout, with noise of their own. Default 1.
        student_every (int, optional): Iterations a student step. Default: the method's.
        fake_merge (float, optional): Share of the student merged into the fake score after each of its steps, in
            [0, 1]. Default: the method's.
        anchor_aware_fake (bool): Whether the fake score receives the anchor's noise level. Default False.
        max_batch_per_call (int, optional): Largest batch of one call of the teacher or the fake score in the student
            step. Default: no limit.
        teacher_dtype (str, optional): Dtype of the teacher's weights; 'bfloat16' halves its memory. Default: the
            backbone's.
        image_size, activation_checkpointing, lora, data_preprocessor: See `DiffusionModel`.
    """
    default_student_every: int
    default_fake_merge: float = 0.0
    frozen_prefixes = ('backbone.', 'base.', 'teacher.')

    def __init__(self, backbone: Dict[str, Any], sample_sigmas: Sequence[float] = (1.0, 0.75, 0.5, 0.25),
                 alpha: float = 7.0, losses: Optional[Dict[str, Any]] = None,
                 time_grid: Optional[Dict[str, Any]] = None, fake_sigma: Any = dict(type='UniformSigma'),
                 fake_loss: Dict[str, Any] = dict(type='FlowMatchingLoss'),
                 fake_steps: int = 1, student_every: Optional[int] = None, fake_merge: Optional[float] = None,
                 anchor_aware_fake: bool = False, max_batch_per_call: Optional[int] = None,
                 teacher_dtype: Optional[str] = None, image_size: Union[None, int, Sequence[int]] = None,
                 activation_checkpointing: bool = False, lora: Optional[Dict[str, Any]] = None,
                 data_preprocessor: Optional[Dict[str, Any]] = None) -> None:
        super().__init__(backbone, sample_sigmas, image_size, activation_checkpointing, lora, data_preprocessor)
        self.alpha = alpha
        self.fake_steps = fake_steps
        self.student_every = self.default_student_every if student_every is None else student_every
        self.fake_merge = self.default_fake_merge if fake_merge is None else fake_merge
        self.max_batch_per_call = max_batch_per_call
        self.check_trainable()
        self._check_numbers()
        self.time_grid = TASK_UTILS.build(self._time_grid_config(time_grid or {}))
        self.fake_sigma = build_sampler(fake_sigma)
        self.losses = self._build_losses(losses or {})
        self.fake_loss = MODELS.build(dict(fake_loss))
        self.teacher = self._build_teacher(teacher_dtype)
        self.fake = self.build_trained('fake')
        if anchor_aware_fake:
            make_anchor_aware(self.fake, self.backbone.time_embedder, self.backbone.time_embedding_width())
        if self.backbone.pretrained is None and self.base is None:
            # Without pretrained weights the three roles still start as one network.
            self.teacher.load_state_dict(self.student.state_dict())
            self.fake.load_state_dict(self.student.state_dict(), strict=False)

    def _build_teacher(self, dtype: Optional[str]) -> nn.Module:
        if self.base is None:
            kwargs = {} if dtype is None else dict(dtype=check_dtype(dtype, 'model.teacher_dtype'))
            return frozen(self.backbone.build_network(**kwargs))
        if dtype is not None:
            raise ValueError(f'model.teacher_dtype={dtype!r} does not go with model.lora, whose roles share one base: '
                             'set model.backbone.dtype')
        return frozen(AdapterRole(self.base))

    def default_time_grid(self) -> Dict[str, Any]:
        """The method's time grid. Fixed by default: the levels of inference."""
        return dict(type='FixedTimeGrid')

    def default_losses(self) -> Dict[str, Dict[str, Any]]:
        """The method's losses by name."""
        raise NotImplementedError

    def _time_grid_config(self, override: Dict[str, Any]) -> Dict[str, Any]:
        cfg = self.default_time_grid()
        if 'type' not in override:
            known = set(inspect.signature(TASK_UTILS.get(cfg['type'])).parameters)
            siblings = {k for grid in (FixedTimeGrid, DynamicTimeGrid) for k in inspect.signature(grid).parameters}
            for key in sorted(override.keys() & siblings - known):
                print_log(f'model.time_grid.{key} does not apply to {cfg["type"]}: left aside', 'current')
            override = {k: v for k, v in override.items() if k in known or k not in siblings}
        cfg = _override(cfg, override)
        if cfg['type'] == 'FixedTimeGrid':
            cfg.setdefault('sigmas', self.sample_sigmas.tolist())
        return cfg

    def _check_numbers(self) -> None:
        for key in ('fake_steps', 'student_every'):
            value = getattr(self, key)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f'model.{key} must be a whole number of 1 or more, but is {value!r}')
        if not 0 <= self.fake_merge <= 1:
            raise ValueError(f'model.fake_merge must lie in [0, 1], but is {self.fake_merge}')
        if self.max_batch_per_call is not None and not (
                isinstance(self.max_batch_per_call, int) and self.max_batch_per_call >= 1):
            raise ValueError(f'model.max_batch_per_call must be 1 or more, or None, but is {self.max_batch_per_call}')

    def _build_losses(self, overrides: Dict[str, Any]) -> nn.ModuleDict:
        configs = self.default_losses()
        for extra in plugins.manager.hook.cdm_student_losses(method=self):
            for name, cfg in (extra or {}).items():
                if name in configs:
                    raise ValueError(f'two plug-ins give a student loss named {name!r}, or {type(self).__name__} has '
                                     'one itself: rename it in the plug-in, or set CDM_DISABLE_PLUGINS=1')
                configs[name] = cfg
        for name, override in overrides.items():
            if name not in configs and not (isinstance(override, dict) and 'type' in override):
                if name not in FAMILY_TERMS:
                    raise ValueError(f'model.losses.{name} is unknown: {type(self).__name__} has {sorted(configs)}; '
                                     'give a type to add a loss')
                print_log(f'model.losses.{name} does not apply to {type(self).__name__}: left aside', 'current')
            elif override is None:
                del configs[name]
            else:
                configs[name] = _override(configs.get(name, {}), override)
        if not configs:
            raise ValueError('model.losses removes every loss: at least one must stay')
        return nn.ModuleDict({name: MODELS.build(cfg) for name, cfg in configs.items()})

    @property
    def trained_roles(self) -> Tuple[str, ...]:
        return ('student', 'fake')

    def train(self, mode: bool = True) -> 'Distillation':
        """Sets the training mode; frozen parts stay in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    # One iteration

    def is_student_turn(self) -> bool:
        """Whether this iteration has a student step: every `student_every`-th one."""
        return (self.iteration + 1) % self.student_every == 0

    def sample_draws(self, batch: int) -> Draws:
        """The random numbers of this iteration, on the networks' device."""
        draws = Draws.sample(
            **self.draw_key(), world_size=self.world_size, shape=self.latent_shape(batch), time_grid=self.time_grid,
            fake_sigma=self.fake_sigma, losses=self.losses if self.is_student_turn() else {}, shift=self.shift,
            fake_steps=self.fake_steps)
        return draws.to(self.device, self.math_dtype)

    def train_step(self, data: Any, optim_wrapper: Any) -> Dict[str, Tensor]:
        """One iteration: rollout, fake-score steps and, on its turn, student step.

        Args:
            data (dict or list): A batch from the dataloader.
            optim_wrapper (OptimWrapperDict): With `student` and `fake`.

        Returns:
            dict: Scalars to log.
        """
        with self.stepping(optim_wrapper):
            condition = self.backbone.condition(self.data_preprocessor(data, True))
            draws = self.sample_draws(len(condition))
            x, sigma = rollout(lambda x, s, i: self.velocity('student', x, s, condition[i]), draws)
            student_turn = self.is_student_turn()
            # The student's prediction at the anchor serves the fake-score steps and every on-trajectory loss.
            with torch.set_grad_enabled(student_turn):
                anchor = self.predict(x, sigma, condition)
            x0, losses = anchor.detach(), []
            for fake_sigma, fake_noise in zip(draws.fake_sigma, draws.fake_noise):
                losses.append(self.fake_step(x0, condition, fake_sigma, fake_noise))
            logs = dict(loss_fake=torch.stack(losses).mean())
            if student_turn:
                logs.update(self.student_step(anchor, condition, draws))
            self.anchor_sigma = sigma
            logs.update(anchor_sigma=sigma.mean(), grid_steps=float(len(draws.sigmas)))
            return self.finish(logs)

    def predict(self, x: Tensor, sigma: Tensor, condition: Condition) -> Prediction:
        """The student's prediction at (x, sigma)."""
        velocity = self.velocity('student', x, sigma, condition)
        return Prediction(x, sigma, velocity, to_x0(x, velocity, sigma))

    def fake_step(self, anchor: Prediction, condition: Condition, sigma: Tensor, noise: Tensor) -> Tensor:
        """Trains the fake score on the student's x0 at the anchors, then merges the student into it.

        Args:
            anchor (Prediction): The student at the anchors, without graph.
            condition (Condition): B rows.
            sigma (Tensor): Noise levels of this step, (B,).
            noise (Tensor): Standard normal, (B, ...).

        Returns:
            Tensor: The loss, a scalar without graph.
        """
        z = add_noise(anchor.x0, noise, sigma)
        velocity = self.velocity('fake', z, sigma, condition, anchor.sigma)
        loss = self.fake_loss(velocity, anchor.x0, noise).mean()
        wrapper = self._optim_wrapper['fake']
        wrapper.update_params(loss)
        if self.fake_merge and wrapper.should_update():
            merge_weights(self.fake, self.student, self.fake_merge)
        return loss.detach()

    def student_step(self, anchor: Prediction, condition: Condition, draws: Draws) -> Dict[str, Tensor]:
        """Trains the student on the weighted sum of the losses."""
        predictions = self._predictions(anchor, condition, draws)
        answers = self._answer(predictions, condition, draws)
        values, logs = {}, {}
        for name, loss in self.losses.items():
            per_sample, scalars = loss(predictions[name], answers[name])
            values[name] = per_sample.mean()
            logs[f'loss_{name}'] = values[name].detach()
            logs.update({f'{key}_{name}': value.detach() for key, value in scalars.items()})
        if 'ca' in values and 'dm' in values and predictions['ca'] is predictions['dm']:
            logs['cosine_ca_dm'] = gradient_cosine(values['ca'], values['dm'], anchor.x0)
        total = sum(self.losses[name].weight * value for name, value in values.items())
        wrapper = self._optim_wrapper['student']
        wrapper.update_params(total)
        self.student_updated = wrapper.should_update()
        return dict(logs, loss_student=total.detach())

    def _predictions(self, anchor: Prediction, condition: Condition, draws: Draws) -> Dict[str, Prediction]:
        """The student's prediction at every loss's point; all points off the trajectory go in one call."""
        points = {name: loss.point(anchor.detach(), draws.losses[name]) for name, loss in self.losses.items()}
        own = {name: point for name, point in points.items() if point is not None}
        predictions = {name: anchor for name in points}
        if own:
            x = torch.cat([x for x, _ in own.values()])
            sigma = torch.cat([sigma for _, sigma in own.values()])
            velocity = self.velocity('student', x, sigma, Condition.cat([condition] * len(own)))
            for (name, (x, sigma)), v in zip(own.items(), velocity.chunk(len(own))):
                predictions[name] = Prediction(x, sigma, v, to_x0(x, v, sigma))
        return predictions

    def _answer(self, predictions: Dict[str, Prediction], condition: Condition,
                draws: Draws) -> Dict[str, Dict[str, Tensor]]:
        """Answers every loss's questions, one batched call a role."""
        asked: Dict[str, List[Tuple[str, str, ScoreQuery]]] = {}
        for name, loss in self.losses.items():
            for key, query in loss.queries(predictions[name].detach(), draws.losses[name]).items():
                asked.setdefault(query.role, []).append((name, key, query))
        answers: Dict[str, Dict[str, Tensor]] = {name: {} for name in self.losses}
        for role, questions in asked.items():
            anchors = torch.cat([predictions[name].sigma for name, _, _ in questions])
            x0 = self._ask(role, [query for _, _, query in questions], condition, anchors)
            for (name, key, _), answer in zip(questions, x0.chunk(len(questions))):
                answers[name][key] = answer
        return answers

    @torch.no_grad()
    def _ask(self, role: str, queries: List[ScoreQuery], condition: Condition, anchor_sigma: Tensor) -> Tensor:
        """D_role of all queries, (len(queries) B, ...), in calls of at most `max_batch_per_call` samples."""
        x, sigma = torch.cat([q.x for q in queries]), torch.cat([q.sigma for q in queries])
        null = self.null_condition(len(condition)) if any(q.null for q in queries) else None
        conditions = Condition.cat([null if q.null else condition for q in queries])
        size = self.max_batch_per_call or len(x)
        velocity = [self.velocity(role, x[i:i + size], sigma[i:i + size], conditions[i:i + size],
                                  anchor_sigma[i:i + size]) for i in range(0, len(x), size)]
        return to_x0(x, torch.cat(velocity), sigma)


def gradient_cosine(loss_a: Tensor, loss_b: Tensor, x0: Tensor) -> Tensor:
    """Mean cosine over the batch between two losses' gradients with respect to the student's x0, in [-1, 1].

    Costs no pass through a network: it stops at x0.
    """
    a, b = (torch.autograd.grad(loss, x0, retain_graph=True)[0].flatten(1) for loss in (loss_a, loss_b))
    return torch.nn.functional.cosine_similarity(a, b, dim=1).mean()


def _override(default: Dict[str, Any], override: Dict[str, Any]) -> Dict[str, Any]:
    """A part's config: replaced if the override names another type, changed in single arguments otherwise."""
    if not isinstance(override, dict):
        raise ValueError(f'model.losses.* and model.time_grid must be dicts such as {default}, but one is {override!r}')
    if override.get('type', default.get('type')) != default.get('type'):
        return dict(override)
    return {**default, **override}
