"""The loop that DMD2, Decoupled DMD and CDM share: rollout, fake-score steps, student step (arXiv 2605.06376;
docs/paper.md has it line by line).

A method is this class with its defaults: a time grid, a set of losses, an update ratio.
"""
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from mmengine.registry import MODELS, TASK_UTILS
from torch import Tensor, nn

from cdm_plugin.arguments import Count, Share
from cdm_plugin.backbones import Backbone
from cdm_plugin.condition import Condition
from cdm_plugin.draws import DrawContext, Draws, Rollout, SigmaShift
from cdm_plugin.flow import add_noise, to_x0
from cdm_plugin.losses.base import LossInputs, Sampler, ScoreLoss, ScoreQuery, build_sampler
from cdm_plugin.losses.direction import Guidance
from cdm_plugin.methods.base import DiffusionModel, frozen
from cdm_plugin.methods.overrides import leave_aside, override_losses, override_time_grid
from cdm_plugin.methods.phases import Iteration, Phase
from cdm_plugin.methods.plugin_hooks import blaming, plugin_losses
from cdm_plugin.pretrained import check_dtype
from cdm_plugin.registry import class_of
from cdm_plugin.roles.anchor_aware import make_anchor_aware
from cdm_plugin.roles.lora import AdapterRole
from cdm_plugin.roles.teacher import Teacher, same_shapes, start_from_adapter
from cdm_plugin.roles.weights import merge_weights
from cdm_plugin.rollout import Prediction, rollout
from cdm_plugin.sizes import Size
from cdm_plugin.time_grids import FixedTimeGrid


class Distillation(DiffusionModel):
    """Base class of the distillation methods.

    Args:
        backbone (dict): Config of the backbone; its pretrained network is the teacher.
        sample_sigmas (Sequence[float]): Noise levels of inference before the scheduler's shift. Default: 4 steps.
        alpha (float): Guidance that the student learns, as alpha = guidance scale - 1. Default 7.
        losses (dict, optional): Overrides of the method's losses by name: a dict without `type` changes single
            arguments, one with `type` replaces or adds a loss, None removes it.
        time_grid (dict, optional): Override of the method's time grid, likewise.
        fake_sigma (dict, optional): Sigma sampler of the fake-score steps. Default: the method's, UniformSigma for
            most.
        fake_loss (dict): Loss of the fake-score steps. Default FlowMatchingLoss.
        fake_steps (int): Fake-score steps an iteration, all on its one rollout, with noise of their own. Default 1.
        student_every (int, optional): Iterations a student step. Default: the method's.
        fake_merge (float, optional): Share of the student merged into the fake score after each of its steps, in
            [0, 1]. Default: the method's.
        anchor_aware_fake (bool): Whether the fake score receives the anchor's noise level, as NCVSD's does (arXiv
            2506.09416). Default False.
        max_batch_per_call (int, optional): Largest batch of one call of the teacher or the fake score in the student
            step. Default: no limit.
        teacher_dtype (str, optional): Dtype of the teacher's weights; 'bfloat16' halves its memory. Default: the
            backbone's.
        teacher (dict, optional): Another teacher than the backbone's network, see `cdm_plugin.roles.teacher.Teacher`:
            `dict(lora='style.safetensors')`.
        guidance (str): What guidance is, for all losses: 'plain' or 'backbone', see `DirectionLoss`. Default 'plain',
            the published formula.
        sigma_shift (str, optional): `shift` of every sigma sampler that states none: 'scheduler' draws levels before
            the scheduler's shift, 'none' as they are used; see `SigmaSampler`. Default: the method's.
        rollout, image_size, activation_checkpointing, lora, data_preprocessor: See `DiffusionModel`.
        **siblings: What only other methods take, left aside: changing `model.type` alone swaps methods.
    """
    default_student_every: int
    default_fake_merge: float = 0.0
    default_fake_sigma: dict[str, Any] = dict(type='UniformSigma')
    default_sigma_shift: SigmaShift = 'none'
    trains = ('student', 'fake')
    denoisers = (*trains, 'teacher')
    frozen_prefixes = (*DiffusionModel.frozen_prefixes, 'teacher.')

    def __init__(self, backbone: dict[str, Any] | Backbone, sample_sigmas: Sequence[float] = (1.0, 0.75, 0.5, 0.25),
                 alpha: float = 7.0, losses: dict[str, Any] | None = None, time_grid: dict[str, Any] | None = None,
                 fake_sigma: Sampler | None = None,
                 fake_loss: dict[str, Any] = dict(type='FlowMatchingLoss'), fake_steps: Count = 1,
                 student_every: Count | None = None, fake_merge: Share | None = None,
                 anchor_aware_fake: bool = False, max_batch_per_call: Count | None = None,
                 teacher_dtype: str | None = None, teacher: dict[str, Any] | None = None, guidance: Guidance = 'plain',
                 image_size: None | Size | Sequence[Size] = None, activation_checkpointing: bool = False,
                 lora: dict[str, Any] | None = None, data_preprocessor: dict[str, Any] | None = None,
                 rollout: Rollout = 'ode', sigma_shift: SigmaShift | None = None, **siblings: Any) -> None:
        leave_aside(type(self), siblings, DiffusionModel)
        self._teacher = Teacher.from_config(teacher)
        super().__init__(backbone, sample_sigmas, image_size, activation_checkpointing, lora, data_preprocessor,
                         rollout)
        self.alpha, self.guidance = alpha, guidance
        self.fake_steps = fake_steps
        self.student_every = self.default_student_every if student_every is None else student_every
        self.fake_merge = self.default_fake_merge if fake_merge is None else fake_merge
        self.max_batch_per_call = max_batch_per_call
        self.check_trainable()
        self.time_grid = TASK_UTILS.build(self._time_grid_config(time_grid or {}))
        self.fake_sigma = build_sampler(fake_sigma or self.default_fake_sigma)
        self.sigma_shift = sigma_shift or self.default_sigma_shift
        self.losses = self._build_losses(losses or {})
        self.fake_loss = MODELS.build(dict(fake_loss))
        self.teacher = self._build_teacher(teacher_dtype)
        self.fake = self.build_trained('fake')
        if getattr(self.teacher, 'adapter', None) and self._teacher.init == 'teacher':
            for role in ('student', 'fake'):
                if self.lora.start[role] is None:
                    start_from_adapter(getattr(self, role), self.teacher)
        if anchor_aware_fake:
            if self.backbone.time_embedder is None:
                raise ValueError(f'{type(self.backbone).__name__} lacks time_embedder, the name of the submodule that '
                                 'gives the time embedding, which model.anchor_aware_fake needs')
            make_anchor_aware(self.fake, self.backbone.time_embedder, self.backbone.time_embedding_width())
        if self.start_backbone().pretrained is None and self.base is None:
            # Without pretrained weights the roles of one shape still start as one network.
            if same_shapes(self.backbone_of('teacher'), self.backbone):
                self.teacher.load_state_dict(self.student.state_dict())
            self.fake.load_state_dict(self.student.state_dict(), strict=False)
        for loss in self.losses.values():
            if loss.on_fake:
                self.blocks_of('fake', loss.blocks)
            if loss.role is not None:
                setattr(self, loss.role, loss.build_role(self.backbone).requires_grad_(True))

    # Roles

    def _teacher_backbone(self) -> Backbone:
        if 'teacher' not in self.own_backbones:
            self.own_backbones['teacher'] = self._teacher.backbone(self.backbone, shares_base=self.base is not None)
        return self.own_backbones['teacher']

    def start_backbone(self) -> Backbone:
        """Student and fake score start from the teacher's weights, unless these have other shapes or `init='base'`."""
        teacher = self._teacher_backbone()
        return teacher if self._teacher.init == 'teacher' and same_shapes(teacher, self.backbone) else self.backbone

    def _build_teacher(self, dtype: str | None) -> nn.Module:
        backbone = self._teacher_backbone()
        if self.base is None or backbone is not self.backbone:
            kwargs = {} if dtype is None else dict(dtype=check_dtype(dtype, 'model.teacher_dtype'))
            return frozen(backbone.build_network(**kwargs))
        if dtype is not None:
            raise ValueError(f'model.teacher_dtype={dtype!r} does not go with model.lora, whose roles share one base: '
                             'set model.backbone.dtype')
        return frozen(AdapterRole(self.base)) if self._teacher.lora is None else self._teacher.adapter(self.base)

    # Parts, as the config changes them

    def default_time_grid(self) -> dict[str, Any]:
        """The method's time grid. Fixed by default: the levels of inference."""
        return dict(type='FixedTimeGrid')

    def default_losses(self) -> dict[str, dict[str, Any]]:
        """The method's losses by name."""
        raise NotImplementedError

    def _time_grid_config(self, override: dict[str, Any]) -> dict[str, Any]:
        config = override_time_grid(self.default_time_grid(), override)
        if class_of(config, TASK_UTILS) is FixedTimeGrid:
            config.setdefault('sigmas', self.sample_sigmas.tolist())
        return config

    def _build_losses(self, overrides: dict[str, Any]) -> nn.ModuleDict:
        configs = self.default_losses()
        outside = plugin_losses(self, configs)
        configs.update({name: cfg for name, (cfg, _) in outside.items()})
        losses = nn.ModuleDict()
        for name, cfg in override_losses(type(self).__name__, configs, overrides).items():
            with blaming(outside[name][1] if name in outside else None, f'its student loss, model.losses.{name}'):
                losses[name] = MODELS.build(cfg)
        for name, loss in losses.items():
            if any(p.requires_grad for p in loss.parameters()):
                raise ValueError(f'model.losses.{name} ({type(loss).__name__}) has weights to train: build them in '
                                 '`build_role`, or freeze them with requires_grad_(False)')
            if loss.role is not None and hasattr(self, loss.role):
                raise ValueError(f'model.losses.{name}: the name of its role, {loss.role!r}, is taken')
        judges = [name for name, loss in losses.items() if loss.on_fake]
        if len(judges) > 1:
            raise ValueError(f'model.losses: {" and ".join(judges)} both judge the fake score\'s features; keep one')
        if not any(loss.weight for loss in losses.values()):
            raise ValueError('model.losses.*.weight is 0 for every loss: one at least must be above')
        return losses

    def train(self, mode: bool = True) -> 'Distillation':
        """Sets the training mode; frozen parts stay in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        self.losses.eval()
        return self

    # One iteration

    @property
    def active_losses(self) -> dict[str, ScoreLoss]:
        """The losses by name, without those of weight 0."""
        return {name: loss for name, loss in self.losses.items() if loss.weight}

    @property
    def due_losses(self) -> dict[str, ScoreLoss]:
        """Those that the student minimises by now."""
        return {name: loss for name, loss in self.active_losses.items() if (self.iteration or 0) >= loss.start}

    @property
    def fake_judge(self) -> ScoreLoss | None:
        """The loss whose role judges the fake score's features."""
        return next((loss for loss in self.active_losses.values() if loss.on_fake), None)

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The fake score's turn, that of the role that judges its features, the student's, and those of the other
        networks that losses train."""
        losses, judge = self.active_losses.values(), self.fake_judge
        through = [role for loss in losses for role in (*loss.through, loss.role, 'fake' if loss.on_fake else None)]
        fake: dict[str, Any] = dict(steps=self.fake_steps, stepped=self._merge)
        judges: tuple[Phase, ...] = ()
        if judge is not None:
            fake.update(through=(judge.role,), draw=partial(self._fake_draw, judge))
            judges = (Phase(judge.role, partial(self.role_loss, judge), steps=self.fake_steps),)
        return (Phase('fake', self.fake_loss_at, **fake), *judges,
                Phase('student', self.student_loss, every=self.student_every,
                      through=tuple(dict.fromkeys(filter(None, through)))),
                *(Phase(loss.role, partial(self.role_loss, loss), every=loss.role_every, draw=loss.role_draw)
                  for loss in losses if loss.role is not None and loss is not judge))

    def _fake_draw(self, judge: ScoreLoss, context: DrawContext) -> dict[str, Tensor]:
        drawn = [judge.fake_draw(context) for _ in range(self.fake_steps)]
        return {name: torch.stack([step[name] for step in drawn]) for name in drawn[0]}

    @property
    def trained_roles(self) -> tuple[str, ...]:
        roles = super().trained_roles
        return ('student', *(role for role in roles if role != 'student'))

    @property
    def merges(self) -> tuple[tuple[str, str], ...]:
        return (('fake', 'student'),) if self.fake_merge else ()

    def sample_draws(self, batch: int, latent_size: tuple[int, int] | None = None) -> Draws:
        """The random numbers of this iteration, on the networks' device.

        Args:
            batch (int): Samples of this rank.
            latent_size (tuple, optional): Height and width of the latents. Default: drawn from `image_size`.
        """
        size = latent_size or self.draw_latent_size()
        due = self.due_losses if self.is_due('student') else {}
        roles = {f'phase:{phase.role}': phase for phase in self.phases if phase.draw and phase.is_due(self.iteration)}
        draws = Draws.sample(
            **self.draw_key(), world_size=self.world_size, shape=self.latent_shape(batch, size),
            time_grid=self.time_grid, fake_sigma=self.fake_sigma, losses={**due, **roles},
            shift=partial(self.shift, latent_size=size), fake_steps=self.fake_steps, rollout=self.rollout,
            scheduler_shift=self.backbone.shift(size), sigma_shift=self.sigma_shift)
        return draws.to(self.device, self.math_dtype)

    def start(self, batch: dict[str, Any]) -> Iteration:
        """Condition, draws, and the student's prediction at the anchors, which serves the fake-score steps and every
        on-trajectory loss."""
        condition = self.backbone.condition(batch)
        draws = self.sample_draws(len(condition), self.backbone.latent_size_of(batch))
        x, sigma = rollout(lambda x, s, i: self.velocity('student', x, s, condition[i]), draws)
        with torch.set_grad_enabled(self.is_due('student')):
            anchor = self.predict(x, sigma, condition)
        self.anchor_sigma = sigma
        return Iteration(batch, condition, draws, anchor,
                         dict(anchor_sigma=sigma.mean(), grid_steps=float(len(draws.sigmas))))

    def predict(self, x: Tensor, sigma: Tensor, condition: Condition) -> Prediction:
        """The student's prediction at (x, sigma)."""
        velocity = self.velocity('student', x, sigma, condition)
        return Prediction(x, sigma, velocity, to_x0(x, velocity, sigma))

    def fake_point(self, anchor: Prediction, draws: Draws, step: int) -> tuple[Tensor, Tensor, float | Tensor]:
        """Where the fake score learns the student's x0 at the anchors.

        Returns:
            tuple: z, the x0 noised to `draws.fake_sigma`, (B, ...); the noise in it, (B, ...); weights, (B,) or 1.
        """
        noise = draws.fake_noise[step]
        return add_noise(anchor.x0, noise, draws.fake_sigma[step]), noise, 1.0

    def fake_loss_at(self, iteration: Iteration, step: int) -> Tensor:
        """What the fake score minimises: flow matching on the student's x0 at the anchors, noised anew."""
        anchor, draws = iteration.anchor.detach(), iteration.draws
        z, noise, weight = self.fake_point(anchor, draws, step)
        if self.fake_judge is None:
            velocity, added = self.velocity('fake', z, draws.fake_sigma[step], iteration.condition, anchor.sigma), None
        else:
            velocity, added = self._judged(self.fake_judge, iteration, step, z)
        per_sample = weight * self.fake_loss(velocity, anchor.x0, noise)
        iteration.per_sample.setdefault('fake', []).append(per_sample.detach())
        loss = per_sample.mean()
        return loss if added is None else loss + added

    def _judged(self, judge: ScoreLoss, iteration: Iteration, step: int, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """The fake score's velocity, and what the role adds to its loss that judges its features; the role's own turn
        sees them again."""
        anchor, draws = iteration.anchor.detach(), iteration.draws
        own = {name: values[step] for name, values in draws.losses['phase:fake'].items()}
        own.update(sigma=draws.fake_sigma[step], noise=draws.fake_noise[step])
        inputs = replace(self._inputs(iteration, '', anchor), draws=own)
        points = [z, *judge.fake_points(inputs)]
        count, condition = len(points), Condition.cat([iteration.condition] * len(points))
        velocity, seen = self.features('fake', torch.cat(points), own['sigma'].repeat(count), condition,
                                       anchor.sigma.repeat(count), judge.blocks)
        iteration.seen[judge.role, step] = [features.detach() for features in seen]
        added = judge.fake_weight * judge.role_loss(replace(inputs, seen=seen)) if judge.fake_weight else None
        return velocity[:len(z)], added

    def _merge(self, taken: bool | Tensor) -> None:
        for target, source in self.merges:
            merge_weights(getattr(self, target), getattr(self, source), self.fake_merge * taken)

    def student_loss(self, iteration: Iteration, step: int = 0) -> Tensor:
        """What the student minimises: the weighted sum of the losses."""
        inputs = self._answered(self._at_points(iteration))
        values, weighted, logs = {}, [], iteration.logs
        for name, loss in self.due_losses.items():
            per_sample, scalars = loss(inputs[name])
            if per_sample.shape != iteration.anchor.sigma.shape:
                raise ValueError(f'model.losses.{name} ({type(loss).__name__}) must return the loss of each sample, '
                                 f'{tuple(iteration.anchor.sigma.shape)}, but returned {tuple(per_sample.shape)}')
            values[name] = per_sample.mean()
            weighted.append(loss.weight * per_sample.detach())
            logs[f'loss_{name}'] = values[name].detach()
            iteration.terms[f'loss_{name}'] = values[name].detach().isfinite() & (scalars.pop('left_out', 0) == 0)
            logs.update({f'{key}_{name}': value.detach() for key, value in scalars.items()})
        if 'ca' in values and 'dm' in values and inputs['ca'].prediction is inputs['dm'].prediction:
            logs['cosine_ca_dm'] = gradient_cosine(values['ca'], values['dm'], iteration.anchor.x0)
        iteration.per_sample['student'] = [sum(weighted)]
        return sum(self.losses[name].weight * value for name, value in values.items())

    def role_loss(self, loss: ScoreLoss, iteration: Iteration, step: int = 0) -> Tensor:
        """What the network that a loss trains minimises."""
        inputs = self._inputs(iteration, f'phase:{loss.role}', iteration.anchor.detach())
        return loss.role_loss(replace(inputs, seen=iteration.seen.get((loss.role, step), ())))

    def _inputs(self, iteration: Iteration, name: str, prediction: Prediction) -> LossInputs:
        loss, condition = self.losses[name] if name in self.losses else None, iteration.condition
        features = None if loss is None or not loss.on_fake else lambda x, sigma: self.features(
            'fake', x, sigma, condition, prediction.sigma, loss.blocks)[1]
        return LossInputs(prediction, iteration.draws.losses.get(name, {}), iteration.batch, condition, self.backbone,
                          self.call, answering=dict(teacher=self.backbone_of('teacher')), features=features)

    def _at_points(self, iteration: Iteration) -> dict[str, LossInputs]:
        """Each loss's inputs at its point, by name; all points off the trajectory go in one call of the student."""
        anchor = iteration.anchor.detach()
        points = {name: loss.point(self._inputs(iteration, name, anchor)) for name, loss in self.due_losses.items()}
        own = {name: point for name, point in points.items() if point is not None}
        predictions = {name: iteration.anchor for name in points}
        if own:
            x = torch.cat([x for x, _ in own.values()])
            sigma = torch.cat([sigma for _, sigma in own.values()])
            velocity = self.velocity('student', x, sigma, Condition.cat([iteration.condition] * len(own)))
            for (name, (x, sigma)), v in zip(own.items(), velocity.chunk(len(own))):
                predictions[name] = Prediction(x, sigma, v, to_x0(x, v, sigma))
        return {name: self._inputs(iteration, name, prediction) for name, prediction in predictions.items()}

    def _answered(self, inputs: dict[str, LossInputs]) -> dict[str, LossInputs]:
        """The inputs with the answers to every loss's questions, one batched call a role."""
        asked: dict[str, list[tuple[str, str, ScoreQuery]]] = {}
        for name, own in inputs.items():
            for key, query in self.losses[name].queries(replace(own, prediction=own.prediction.detach())).items():
                asked.setdefault(query.role, []).append((name, key, query))
        answers: dict[str, dict[str, Prediction]] = {name: {} for name in inputs}
        for role, questions in asked.items():
            anchors = torch.cat([inputs[name].prediction.sigma for name, _, _ in questions])
            queries = [query for _, _, query in questions]
            velocity = self._ask(role, queries, next(iter(inputs.values())).condition, anchors)
            for (name, key, query), v in zip(questions, velocity.chunk(len(questions))):
                answers[name][key] = Prediction(query.x, query.sigma, v, to_x0(query.x, v, query.sigma))
        return {name: replace(own, answers=answers[name]) for name, own in inputs.items()}

    @torch.no_grad()
    def _ask(self, role: str, queries: list[ScoreQuery], condition: Condition, anchor_sigma: Tensor) -> Tensor:
        """A role's velocity at all queries, (len(queries) B, ...), in calls of at most `max_batch_per_call` samples."""
        x, sigma = torch.cat([q.x for q in queries]), torch.cat([q.sigma for q in queries])
        null = self.null_condition(len(condition)) if any(q.null for q in queries) else None
        conditions = Condition.cat([null if q.null else condition for q in queries])
        size = self.max_batch_per_call or len(x)
        return torch.cat([self.velocity(role, x[i:i + size], sigma[i:i + size], conditions[i:i + size],
                                        anchor_sigma[i:i + size]) for i in range(0, len(x), size)])


def gradient_cosine(loss_a: Tensor, loss_b: Tensor, x0: Tensor) -> Tensor:
    """Mean cosine over the batch between two losses' gradients with respect to the student's x0, in [-1, 1].

    Costs no pass through a network: it stops at x0.
    """
    a, b = (torch.autograd.grad(loss, x0, retain_graph=True)[0].flatten(1) for loss in (loss_a, loss_b))
    return torch.nn.functional.cosine_similarity(a, b, dim=1).mean()
