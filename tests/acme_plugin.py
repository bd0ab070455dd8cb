"""What a plug-in adds from outside the package: a trained role, losses that see the batch and the codec, a dataset."""
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS
from tests_support import tiny_backbone
from torch import nn
from torch.nn.functional import softplus
from torch.utils.data import Dataset

from cdm_plugin.codecs import crop_latents
from cdm_plugin.flow import add_noise
from cdm_plugin.losses import ScoreLoss
from cdm_plugin.methods import DMD2
from cdm_plugin.methods.phases import Phase


def picture(index, height=8, width=8):
    """A picture in [-1, 1] of its own, (1, H, W)."""
    return torch.rand(1, height, width, generator=torch.Generator().manual_seed(index)) * 2 - 1


@DATASETS.register_module()
class AcmePictures(Dataset):
    """Labelled pictures.

    Args:
        length (int): Number of pictures.
        sizes (list): Height and width of picture i: sizes[i // 2 % len(sizes)], so that a batch of 2 has one size.
    """

    def __init__(self, length=24, sizes=((8, 8),)):
        self.length, self.sizes = length, sizes

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return dict(prompt=index % 3, image=picture(index, *self.sizes[index // 2 % len(self.sizes)]))


def head(channels):
    """A discriminator of latents, which sees them from far away."""
    return nn.Sequential(nn.Conv2d(channels, 8, 3, padding=1), nn.SiLU(), nn.Flatten(), nn.LazyLinear(1))


@MODELS.register_module()
class AcmeFoolLoss(ScoreLoss):
    """The student's side of a GAN: -log D of its x0, noised."""
    through = ('discriminator',)

    def draw(self, context):
        return dict(noise=context.noise())

    def forward(self, inputs):
        x0 = inputs.prediction.x0
        noisy = add_noise(x0, inputs.draws['noise'], torch.full_like(inputs.prediction.sigma, 0.3))
        return softplus(-inputs.call('discriminator', noisy)).flatten(1).mean(1), {}


@MODELS.register_module()
class AcmeDMD2(DMD2):
    """DMD2 with a discriminator on noised latents, trained on pictures every second iteration."""
    trains = (*DMD2.trains, 'discriminator')

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.discriminator = head(self.backbone.latent_channels)
        self.discriminator(torch.zeros(self.latent_shape(1)))

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
class AcmeGANLoss(AcmeFoolLoss):
    """Both sides in one loss, which owns the discriminator: a GAN for any method, by config alone."""
    through = ()
    role = 'discriminator'
    role_every = 2

    def build_role(self, backbone):
        network = head(backbone.latent_channels)
        network(torch.zeros(1, backbone.latent_channels, 4, 4))
        return network

    def role_draw(self, context):
        return dict(noise=context.noise())

    def role_loss(self, inputs):
        sigma = torch.full_like(inputs.prediction.sigma, 0.3)
        real, fake = inputs.call('discriminator', torch.cat([
            add_noise(x, inputs.draws['noise'], sigma)
            for x in (inputs.real_latents(), inputs.prediction.x0)])).chunk(2)
        return softplus(-real).mean() + softplus(fake).mean()


@MODELS.register_module()
class AcmeRewardLoss(ScoreLoss):
    """Minus what a frozen judge says of a crop of the decoded sample."""

    def __init__(self, side=None, **kwargs):
        super().__init__(**kwargs)
        self.side = side
        self.judge = nn.Conv2d(1, 1, 1).requires_grad_(False)
        nn.init.constant_(self.judge.weight, 2.0)
        nn.init.constant_(self.judge.bias, 0.25)

    def draw(self, context):
        return dict(place=torch.rand(context.shape[0], 2, generator=context.generator))

    def forward(self, inputs):
        latents = inputs.prediction.x0
        if self.side is not None:
            latents = crop_latents(latents, inputs.draws['place'], self.side)
        reward = self.judge(inputs.codec.decode_recomputed(latents)).flatten(1).mean(1)
        return -reward, dict(reward=reward.detach().mean())


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
