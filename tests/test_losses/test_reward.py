"""The reward of a frozen judge: gradients of the package's judges, and students that follow them."""
import pytest
import torch
from acme_plugin import config
from mmengine.registry import METRICS, MODELS
from mmengine.runner import Runner
from tests_support import perturb, recording_optimizers, tiny_method
from tiny_judges import literal_pixels, random_images, tiny_clip
from torch import nn

from cdm_plugin.codecs import PixelCodec
from cdm_plugin.config import load_config
from cdm_plugin.losses import RewardLoss
from cdm_plugin.metrics import DigitClassifier, MissingMetric
from cdm_plugin.metrics.clip_scores import pixel_values

DIGITS = 'digits/dmd2_sd3-digits_1xb32_4step_800.py'
PROMPTS = ['a red fox', 'two dogs']


class Brightness:
    """A judge of any size."""
    differentiable, device = True, torch.device('cpu')

    def prepare(self):
        pass

    def reward(self, images, prompts):
        return images.double().flatten(1).mean(1) + torch.tensor(prompts)


def digits_method(**reward):
    losses = {**load_config(DIGITS).model.losses, 'dm': dict(weight=1e-30),
              'reward': dict(type='RewardLoss', judge=dict(type='DigitMetric'), **reward)}
    method = MODELS.build(dict(load_config(DIGITS).model, losses=losses, student_every=1, fake_steps=1))
    method.seed, method.iteration = 5, 0
    return method.train()


def test_the_gradient_is_that_of_the_formula():
    """Cross-entropy of the classifier's logits on unshuffled pixels, without codec, metric or loss."""
    method, twin = digits_method(weight=0.5), digits_method()
    optimizers, labels = recording_optimizers(method), torch.tensor([3, 1, 4, 1])
    logs = method.train_step(dict(prompt=labels), optimizers)
    iteration = twin.start(dict(prompt=labels))
    pixels = nn.functional.pixel_shuffle(iteration.anchor.x0, 2).clamp(-1, 1)
    loss = nn.functional.cross_entropy(DigitClassifier.from_pretrained()(pixels), labels)
    assert float(logs['loss_reward']) == pytest.approx(loss.item(), rel=1e-5)
    assert float(logs['reward_reward']) == pytest.approx(-loss.item(), rel=1e-5)
    (0.5 * loss).backward()
    total = 0.0
    for ours, parameter in zip(optimizers['student'].gradients, twin.student.parameters()):
        theirs = torch.zeros(()) if parameter.grad is None else parameter.grad
        assert torch.allclose(torch.zeros_like(theirs) if ours is None else ours, theirs, rtol=1e-3, atol=1e-6)
        total += float(theirs.abs().sum())
    assert total > 0.1


@pytest.mark.parametrize('crop, side', [(None, 8), (4, 4), (1, 2)])
def test_a_crop_of_pixels(crop, side):
    loss = RewardLoss(Brightness(), crop=crop)
    method = tiny_method('DMD2', student_every=1)
    method.losses['reward'] = loss
    seen = []
    loss.judge.reward = lambda images, prompts: seen.append(images.shape) or images.double().flatten(1).mean(1)
    method.train_step(dict(prompt=torch.tensor([0, 1])), recording_optimizers(method))
    assert seen == [(2, 1, side, side)] and isinstance(method.backbone.codec, PixelCodec)


def test_the_judge_says_more_after_training(tmp_path):
    """By config alone, on the digits: 10 steps for the classifier, where DMD2's own loss has next to no weight."""
    cfg = load_config(DIGITS, {
        'model.losses.reward': dict(type='RewardLoss', judge=dict(type='DigitMetric')), 'model.losses.dm.weight': 1e-30,
        'model.student_every': 1, 'train_cfg.max_iters': 10, 'work_dir': str(tmp_path), 'log_level': 'ERROR',
        'param_scheduler.student': [], 'param_scheduler.fake': [], 'default_hooks.checkpoint.interval': 10**9,
        'train_cfg.val_interval': 10**9})
    cfg.custom_hooks = [dict(type='CDMHook')]
    cfg.experiment_name = tmp_path.name
    runner = Runner.from_cfg(cfg)
    judge, labels = METRICS.build(dict(type='DigitMetric')), list(range(10)) * 10

    @torch.no_grad()
    def judged():
        method = runner.model
        condition = method.backbone.condition(dict(prompt=torch.tensor(labels)))
        images = method.sample(condition, method.noise(0, range(100)), sigmas=torch.tensor([1.0]))
        return float(judge.reward(images, labels).mean())

    torch.manual_seed(0)
    perturb(runner.model.student, 0.2)  # whom the judge has something to say to
    before = judged()
    runner.train()
    assert before < -4 and judged() > before + 1


@pytest.mark.parametrize('type', ['PickScore', *(pytest.param(type, marks=pytest.mark.slow)
                                                 for type in ('HPSv2', 'CLIPScore'))])
def test_gradients_of_the_judges_of_people(type, tmp_path):
    """Of images that keep their gradient the judge sees their 8-bit pictures, to rounding; and the gradient is what the
    score grows by."""
    judge = METRICS.build(dict(type=type, pretrained=tiny_clip(tmp_path / 'clip'), device='cpu'))
    judge.prepare()
    for size in ((32, 32), (48, 40)):
        images = (0.5 * random_images(2, *size)).requires_grad_()
        reward = judge.reward(images, PROMPTS)
        pictures = torch.stack([literal_pixels(image) for image in images.detach()])
        torch.testing.assert_close(pixel_values(images, judge.clip.preprocess).detach(), pictures, rtol=0, atol=0.03)
        slope, = torch.autograd.grad(reward.sum(), images)
        step = 1e-3 * slope / slope.abs().max()
        ahead, behind = (judge.reward((images + sign * step).detach().requires_grad_(), PROMPTS).sum()
                         for sign in (1, -1))
        assert (ahead - behind).item() == pytest.approx(2 * (slope * step).sum().item(), rel=0.05)


def test_a_judge_without_gradients_is_refused():
    with pytest.raises(ValueError, match='judge: HPSv3 gives no gradients, but .*ImageReward.*PickScore.* do'):
        RewardLoss(dict(type='HPSv3'))
    with pytest.raises(ValueError, match='crop must be a whole number of 1 or more'):
        RewardLoss(Brightness(), crop=0)


def test_what_is_missing_is_said_before_training(tmp_path):
    reward = dict(type='RewardLoss', judge=dict(type='PickScore', pretrained=str(tmp_path / 'absent')))
    cfg = config(tmp_path / 'run', 1, type='CDM', losses=dict(reward=reward))
    del cfg.optim_wrapper['discriminator']
    with pytest.raises(MissingMetric, match='PickScore has no weights'):
        Runner.from_cfg(cfg).train()
    loss = RewardLoss(Brightness())
    with pytest.raises(ValueError, match='RewardLoss .model.losses. reads prompts, but the batch has only .*condition'):
        loss.check(dict(condition={}), None)
