"""What a plug-in adds from outside the package: the parts of the template in examples/plugin, and a method with a
trained role of its own, a loss at a point of its own, and a short run of them."""
import torch
from acme_distillation.dataset import AcmePictures, picture  # noqa: F401  registers it
from acme_distillation.losses import AcmeGANLoss, AcmeRewardLoss  # noqa: F401  registers them
from mmengine.config import Config
from mmengine.registry import MODELS
from tests_support import tiny_backbone
from torch.nn.functional import softplus

from cdm_plugin.flow import add_noise
from cdm_plugin.losses import ScoreLoss
from cdm_plugin.methods import DMD2
from cdm_plugin.methods.phases import Phase


@MODELS.register_module()
class AcmeFoolLoss(AcmeGANLoss):
    """The student's side alone, of a discriminator that a method trains."""
    through, role = ('discriminator',), None


@MODELS.register_module()
class AcmeDMD2(DMD2):
    """DMD2 with a discriminator on noised latents, trained on pictures every second iteration."""
    trains = (*DMD2.trains, 'discriminator')

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.discriminator = AcmeGANLoss().build_role(self.backbone)

    def default_losses(self):
        return dict(super().default_losses(), fool=dict(type='AcmeFoolLoss', weight=0.5))

    @property
    def phases(self):
        return (*super().phases, Phase('discriminator', self.discriminator_loss, every=2,
                                       draw=lambda context: dict(noise=context.noise())))

    def discriminator_loss(self, iteration, step):
        noise = iteration.draws.losses['phase:discriminator']['noise']
        fake = iteration.anchor.x0.detach()
        sigma = torch.full_like(iteration.anchor.sigma, 0.3)
        real = self.backbone.real_latents(iteration.batch, self.math_dtype)
        scores = self.call('discriminator', torch.cat([add_noise(x, noise, sigma) for x in (real, fake)]))
        real, fake = scores.chunk(2)
        return softplus(-real).mean() + softplus(fake).mean()


@MODELS.register_module()
class AcmeRegressionLoss(ScoreLoss):
    """Squared distance of the student's x0 from pure noise to the batch's own pictures."""

    def draw(self, context):
        return dict(noise=context.noise())

    def point(self, inputs):
        return inputs.draws['noise'], torch.ones_like(inputs.prediction.sigma)

    def forward(self, inputs):
        assert inputs.batch['prompt'].shape == inputs.prediction.sigma.shape and len(inputs.condition) > 0
        return (inputs.prediction.x0 - inputs.real_latents()).square().flatten(1).mean(1), {}


def wrapper(lr=1e-2):
    """One role's optimizer. With AdamW's small epsilon a rounding error of a gradient near 0 would be a whole step."""
    return dict(optimizer=dict(type='AdamW', lr=lr, eps=1e-4), clip_grad=dict(max_norm=0.5))


def config(work_dir, iterations, resume=False, batch_size=2, shuffle=True, **model):
    """A short run with a discriminator."""
    return Config(dict(
        model=dict(dict(type='AcmeDMD2', backbone=tiny_backbone(), student_every=2), **model),
        optim_wrapper=dict(constructor='DistillationOptimWrapperConstructor', student=wrapper(), fake=wrapper(),
                           discriminator=wrapper(3e-2)),
        param_scheduler=[dict(type='LinearLR', start_factor=0.5, by_epoch=False, end=4)],
        train_dataloader=dict(
            batch_size=batch_size, num_workers=0, sampler=dict(type='InfiniteSampler', shuffle=shuffle),
            collate_fn=dict(type='default_collate'), dataset=dict(type='AcmePictures')),
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=iterations),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=4)),
        custom_hooks=[dict(type='CDMHook')], log_processor=dict(by_epoch=False), log_level='ERROR', resume=resume,
        randomness=dict(seed=0), work_dir=str(work_dir), experiment_name=f'{work_dir}-{iterations}',
        default_scope='mmengine'))
