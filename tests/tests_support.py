"""Small models that the tests share."""
import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS

import cdm_plugin  # noqa: F401  registers everything
from cdm_plugin.engine.optim_wrapper import RoleOptimWrapperDict

# No qk_norm: diffusers' RMSNorm computes in float32 even in a float64 network.
TINY_SD3 = dict(
    sample_size=4, patch_size=2, in_channels=4, out_channels=4, pos_embed_max_size=4, num_layers=2,
    num_attention_heads=2, attention_head_dim=8, caption_projection_dim=16, joint_attention_dim=8,
    pooled_projection_dim=4)


def tiny_backbone(shift=3.0, **kwargs):
    """A small SD3 architecture with 3 classes: 4x4x4 latents of 8x8 images."""
    return dict(type='SD3Backbone', config=dict(TINY_SD3), scheduler=dict(shift=shift),
                conditioner=dict(type='ClassConditioner', num_classes=3), codec=dict(type='PixelCodec', scale=2),
                **kwargs)


def perturb(network, scale=0.05):
    """Makes every weight matter: fresh networks have zero gates and biases."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(scale * torch.randn_like(parameter))


def tiny_method(type='CDM', dtype=torch.float64, seed=0, **kwargs):
    """A method on the tiny backbone whose three networks differ, ready for train_step at iteration 0."""
    torch.manual_seed(seed)
    method = MODELS.build(dict(type=type, backbone=tiny_backbone(), **kwargs))
    for role in ('student', 'fake', 'teacher'):
        if hasattr(method, role):
            perturb(getattr(method, role))
    method = method.to(dtype).train()
    method.seed, method.iteration = 5, 0
    return method


class RecordingOptimWrapper(OptimWrapper):
    """Keeps the gradients of the last step; everything else is MMEngine's."""

    def step(self, **kwargs):
        self.gradients = [None if p.grad is None else p.grad.clone()
                          for group in self.optimizer.param_groups for p in group['params']]
        super().step(**kwargs)


def recording_optimizers(method, lr=0.05):
    """Plain SGD for every trained role, with the gradients recorded."""
    return RoleOptimWrapperDict(**{
        role: RecordingOptimWrapper(torch.optim.SGD(getattr(method, role).parameters(), lr=lr))
        for role in method.trained_roles})


def same_bits(a, b, path=''):
    """Asserts that two nested states hold the same bits."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            same_bits(a[key], b[key], f'{path}.{key}')
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b)):
            same_bits(x, y, f'{path}[{i}]')
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b, path
