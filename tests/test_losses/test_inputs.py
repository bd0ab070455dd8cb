"""What losses see beyond their answers: pictures, prompts, the codec with gradient, a frozen judge."""
import acme_plugin  # noqa: F401  registers it
import pytest
import torch
from acme_plugin import picture
from tests_support import recording_optimizers, tiny_method
from torch import nn
from torch.nn.functional import pixel_shuffle

from cdm_plugin.codecs import PixelCodec, VAECodec, crop_latents

ONLY = dict(ca=None, dm=None)


def batch(rows=3):
    return dict(prompt=torch.arange(rows) % 3, image=torch.stack([picture(i) for i in range(rows)]).double())


def student_gradient(method, data):
    optimizers = recording_optimizers(method)
    logs = method.train_step(data, optimizers)
    return logs, torch.cat([g.flatten() for g in optimizers['student'].gradients if g is not None])


@pytest.mark.parametrize('side', [None, 2])
def test_a_reward_on_decoded_samples(side):
    """The gradient of the mean pixel of x0's picture (or of the crop), written out without the codec."""
    losses = dict(ONLY, reward=dict(type='AcmeRewardLoss', weight=0.5, side=side))
    method = tiny_method(type='DecoupledDMD', student_every=1, losses=losses)
    twin = tiny_method(type='DecoupledDMD', student_every=1, losses=losses)
    data = dict(prompt=torch.tensor([0, 1, 2]))
    logs, gradient = student_gradient(method, data)
    draws = twin.sample_draws(3)
    iteration = twin.start(twin.data_preprocessor(data, True))
    x0 = iteration.anchor.x0
    if side is not None:
        corners = (draws.losses['reward']['place'] * 3).long().tolist()  # 4 - 2 + 1 places
        x0 = torch.stack([x[:, t:t + 2, s:s + 2] for x, (t, s) in zip(x0, corners)])
    expected = (2 * pixel_shuffle(x0, 2).clamp(-1, 1) + 0.25).mean()
    (-0.5 * expected).backward()
    assert float(logs['reward_reward']) == pytest.approx(float(expected), rel=1e-12)
    theirs = torch.cat([p.grad.flatten() for p in twin.student.parameters() if p.grad is not None])
    assert torch.allclose(gradient, theirs, rtol=1e-10) and gradient.abs().sum() > 0
    assert not any(key.startswith('losses.') for key in method.state_dict())


def test_a_regression_onto_real_latents():
    losses = dict(ONLY, regression=dict(type='AcmeRegressionLoss'))
    method, twin = (tiny_method(type='DecoupledDMD', student_every=1, losses=losses) for _ in range(2))
    data = batch()
    logs, gradient = student_gradient(method, data)
    noise = twin.sample_draws(3).losses['regression']['noise']
    condition = twin.backbone.condition(dict(prompt=data['prompt'])).fields
    velocity = twin.student(noise, timestep=torch.full((3,), 1000.0, dtype=torch.float64), return_dict=False,
                            **{k: v.double() for k, v in condition.items()})[0]
    real = torch.nn.functional.pixel_unshuffle(data['image'].float(), 2)
    expected = (noise - velocity - real).square().mean()
    expected.backward()
    assert float(logs['loss_regression']) == pytest.approx(float(expected), rel=1e-6)
    theirs = torch.cat([p.grad.flatten() for p in twin.student.parameters() if p.grad is not None])
    assert torch.allclose(gradient, theirs, rtol=1e-6, atol=1e-9)


def test_pictures_that_are_not_there_are_named():
    method = tiny_method(type='DecoupledDMD', losses=dict(regression=dict(type='AcmeRegressionLoss')), student_every=1)
    with pytest.raises(ValueError, match="real pictures are needed, but the batch has only .*PackInputs"):
        method.train_step(dict(prompt=torch.tensor([0, 1])), recording_optimizers(method))


def test_a_loss_with_loose_weights_is_refused(monkeypatch):
    from acme_plugin import AcmeRewardLoss
    monkeypatch.setattr(AcmeRewardLoss, '__init__', lambda self, **kw: (
        super(AcmeRewardLoss, self).__init__(), setattr(self, 'judge', nn.Linear(1, 1)))[0])
    with pytest.raises(ValueError, match='model.losses.reward .AcmeRewardLoss. has weights to train'):
        tiny_method(type='DMD2', losses=dict(reward=dict(type='AcmeRewardLoss')))


def test_a_loss_of_weight_0_asks_and_draws_nothing():
    data, counts = dict(prompt=torch.tensor([0, 1, 2])), {}
    for weight in (0, 1):
        method = tiny_method(type='CDM', student_every=1, losses=dict(cdm=dict(weight=weight)))
        assert ('cdm' in method.sample_draws(3).losses) == bool(weight)
        logs = method.train_step(data, recording_optimizers(method))
        counts[weight] = sum(method.call_samples.values())
        assert ('loss_cdm' in logs) == bool(weight)
    without = tiny_method(type='CDM', student_every=1, losses=dict(cdm=None))
    without.train_step(data, recording_optimizers(without))
    assert counts[0] == sum(without.call_samples.values()) < counts[1]
    with pytest.raises(ValueError, match='weight is 0 for every loss'):
        tiny_method(type='DMD2', losses=dict(dm=dict(weight=0)))


def test_recomputed_decoding_has_the_gradient_of_decoding(tmp_path):
    from tiny_pipelines import save_tiny_sd3
    save_tiny_sd3(tmp_path / 'sd3')
    for codec, channels in ((PixelCodec(2), 4), (VAECodec(str(tmp_path / 'sd3')).double(), 4)):
        latents = torch.randn(3, channels, 4, 4, dtype=torch.float64, requires_grad=True)
        gradients = []
        for decode in (codec.decode, codec.decode_recomputed):
            images = decode(latents)
            gradients.append(torch.autograd.grad(images.double().square().sum(), latents)[0])
        assert gradients[0].abs().sum() > 0 and torch.allclose(*gradients, rtol=1e-5, atol=1e-7)


def test_crops_cover_every_place_and_no_more():
    latents = torch.arange(5 * 4.).reshape(1, 1, 5, 4)
    corners = {float(crop_latents(latents, torch.tensor([[a, b]]), 3)[0, 0, 0, 0])
               for a in (0.0, 0.34, 0.67, 0.999) for b in (0.0, 0.51, 0.999)}
    assert corners == {0, 1, 4, 5, 8, 9}
    assert crop_latents(latents, torch.zeros(1, 2), 64).shape == latents.shape
