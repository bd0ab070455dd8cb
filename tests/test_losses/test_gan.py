"""DMD2's GAN (arXiv 2405.14867, section 4.3): against a literal second loop, by role, for every way to train."""
import copy

import pytest
import torch
from acme_plugin import config, picture
from literal import anchors_by_full_rollout, denoise, network_velocity, noised
from mmengine.registry import MODELS
from mmengine.runner import Runner
from tests_support import perturb, recording_optimizers, same_bits, tiny_method
from tiny_pipelines import save_tiny_flux
from torch.nn.functional import pixel_unshuffle

from cdm_plugin.export import export
from cdm_plugin.losses.gan import DiscriminatorHead
from cdm_plugin.roles.weights import unwrap

GAN = dict(type='GANLoss', weight=0.3, fake_weight=0.2, width=16)


def batch(rows=4):
    return dict(prompt=torch.arange(rows) % 3, image=torch.stack([picture(i) for i in range(rows)]).double())


def gan_method(type='DMD2', student_every=1, gan=(), **kwargs):
    method = tiny_method(type=type, student_every=student_every, losses=dict(gan=dict(GAN, **dict(gan))), **kwargs)
    if hasattr(method, 'discriminator'):
        perturb(method.discriminator, 0.1)
    return method.to(torch.float64)


def literal_logits(head, maps):
    """One logit an image and block, by hand: convolutions, the mean over places."""
    logits = []
    for branch, x in zip(head.branches, maps):
        for i in range(0, 9, 3):
            x = torch.nn.functional.conv2d(x, branch[i].weight, branch[i].bias, stride=2, padding=1)
            groups = x.reshape(len(x), branch[i + 1].num_groups, -1)
            mean, var = groups.mean(2, keepdim=True), groups.var(2, unbiased=False, keepdim=True)
            x = ((groups - mean) / (var + 1e-5).sqrt()).reshape(x.shape)
            x = x * branch[i + 1].weight[:, None, None] + branch[i + 1].bias[:, None, None]
            x = x * torch.sigmoid(x)
        logits.append((x * branch[9].weight[0, :, 0, 0][:, None, None]).sum(1).mean((1, 2)) + branch[9].bias)
    return torch.stack(logits, 1)


def literal_maps(network, x, sigma, fields, blocks):
    """The blocks' image tokens by plain forward hooks, as maps."""
    found, handles = {}, []
    for i in blocks:
        handles.append(network.transformer_blocks[i].register_forward_hook(
            lambda module, args, output, i=i: found.update({i: output[1]})))
    velocity = network_velocity(network, x, sigma, fields)
    for handle in handles:
        handle.remove()
    side = x.shape[-1] // 2
    return velocity, [found[i].reshape(len(x), side, side, -1).permute(0, 3, 1, 2) for i in blocks]


@pytest.mark.parametrize('gan, steps', [(dict(), 1), (dict(blocks=[-1, 0], r1=2.0, r1_sigma=0.3), 2)])
def test_one_iteration_equals_the_literal_one(gan, steps):
    """DMD2 without its DM loss: what each role's first step minimises, and its gradient."""
    method = gan_method(gan=gan, fake_steps=steps)
    blocks = sorted(i % 2 for i in gan.get('blocks', [1]))
    networks = {role: copy.deepcopy(getattr(method, role)) for role in ('student', 'fake', 'teacher', 'discriminator')}
    draws, data = method.sample_draws(4), batch()
    fields = {k: v.double() for k, v in method.backbone.condition(dict(prompt=data['prompt'])).fields.items()}
    method.losses['dm'].weight = 1e-30
    optimizers = recording_optimizers(method, lr=0.0)
    logs = method.train_step(data, optimizers)

    student, fake, head = (networks[role].requires_grad_(True) for role in ('student', 'fake', 'discriminator'))
    x, sigma_n = anchors_by_full_rollout(student, draws, fields)
    real = pixel_unshuffle(data['image'], 2)
    step = steps - 1  # the recorded gradients are the last step's
    with torch.no_grad():
        x0 = denoise(student, x, sigma_n, fields)
    sigma, noise = draws.fake_sigma[step], draws.fake_noise[step]
    points = [noised(x0, noise, sigma), noised(real, noise, sigma)]
    if 'r1' in gan:
        points.append(points[1] + 0.3 * draws.losses['phase:fake']['r1'][step])
    velocity, fake_maps = literal_maps(fake, points[0], sigma, fields, blocks)
    logits = [literal_logits(head, fake_maps)] + [
        literal_logits(head, literal_maps(fake, p, sigma, fields, blocks)[1]) for p in points[1:]]
    gan_loss = torch.log1p(logits[0].exp()).mean() + torch.log1p((-logits[1]).exp()).mean()
    if 'r1' in gan:
        gan_loss = gan_loss + 2.0 * ((logits[1] - logits[2])**2).mean()
    matching = ((velocity - (noise - x0))**2).mean()
    expected = dict(fake=torch.autograd.grad(matching + 0.2 * gan_loss, list(fake.parameters()), retain_graph=True,
                                             allow_unused=True),
                    discriminator=torch.autograd.grad(gan_loss, list(head.parameters())))
    own = draws.losses['gan']
    x0 = denoise(student, x, sigma_n, fields)
    _, maps = literal_maps(fake, noised(x0, own['noise'], own['sigma']), own['sigma'], fields, blocks)
    fool = 0.3 * torch.log1p((-literal_logits(head, maps)).exp()).mean()
    expected['student'] = torch.autograd.grad(fool, list(student.parameters()), allow_unused=True)

    if steps == 1:
        assert float(logs['loss_fake']) == pytest.approx(float(matching + 0.2 * gan_loss), rel=1e-6)
        assert float(logs['loss_discriminator']) == pytest.approx(float(gan_loss), rel=1e-6)
    assert 0.3 * float(logs['loss_gan']) == pytest.approx(float(fool), rel=1e-9)
    for role, gradients in expected.items():
        total = 0.0
        for ours, theirs in zip(optimizers[role].gradients, gradients):
            theirs = torch.zeros(()) if theirs is None else theirs
            ours = torch.zeros_like(theirs) if ours is None else ours
            assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-8), role  # the pictures are float32
            total += float(theirs.abs().sum())
        assert total > 1e-4, role


WAYS = {'full weights': {}, 'adapters': dict(lora=dict(rank=2)), 'checkpointed': dict(activation_checkpointing=True),
        'checkpointed adapters': dict(lora=dict(rank=2), activation_checkpointing=True),
        'aware': dict(anchor_aware_fake=True, fake_merge=0.1)}


def test_on_flux_it_equals_the_literal_one(tmp_path):
    """Maps of a double and of a single block, by hooks; one level, so that the anchors are the noise itself."""
    save_tiny_flux(tmp_path / 'flux')
    torch.manual_seed(0)
    method = MODELS.build(dict(
        type='DMD2', backbone=dict(type='FluxBackbone', pretrained=str(tmp_path / 'flux')), image_size=16,
        sample_sigmas=[1.0], student_every=1, losses=dict(dm=dict(weight=1e-30), gan=dict(GAN, blocks=[0, -1]))))
    perturb(method.discriminator, 0.1)
    method.to(torch.float64).train()
    method.seed, method.iteration = 5, 0
    data = dict(prompt=['a red fox', 'a lighthouse'], image=torch.rand(2, 3, 16, 16) * 2 - 1)
    networks = {role: copy.deepcopy(getattr(method, role)) for role in ('student', 'fake', 'discriminator')}
    student, fake, head = (network.requires_grad_(True) for network in networks.values())
    condition, draws = method.backbone.condition(dict(prompt=data['prompt'])), method.sample_draws(2)
    real = method.backbone.codec.encode(data['image']).double()
    optimizers = recording_optimizers(method, lr=0.0)
    method.train_step(data, optimizers)

    def looked(x, sigma):
        found, handles = [], [block.register_forward_hook(lambda module, args, output: found.append(output[1]))
                              for block in (fake.transformer_blocks[0], fake.single_transformer_blocks[-1])]
        velocity = method.backbone.velocity(fake, x, sigma, condition)
        for handle in handles:
            handle.remove()
        side = x.shape[-1] // 2
        return velocity, [tokens.reshape(2, side, side, -1).permute(0, 3, 1, 2) for tokens in found]

    def x0_of(noise):
        return noise - method.backbone.velocity(student, noise, torch.ones(2, dtype=torch.float64), condition)

    sigma, noise = draws.fake_sigma[0], draws.fake_noise[0]
    x0 = x0_of(draws.noise).detach()
    velocity, generated = looked(noised(x0, noise, sigma), sigma)
    logits = literal_logits(head, generated), literal_logits(head, looked(noised(real, noise, sigma), sigma)[1])
    judged = torch.log1p(logits[0].exp()).mean() + torch.log1p((-logits[1]).exp()).mean()
    own = draws.losses['gan']
    maps = looked(noised(x0_of(draws.noise), own['noise'], own['sigma']), own['sigma'])[1]
    fool = 0.3 * torch.log1p((-literal_logits(head, maps)).exp()).mean()
    for role, loss in (('fake', ((velocity - (noise - x0))**2).mean() + 0.2 * judged), ('discriminator', judged),
                       ('student', fool)):
        expected = torch.autograd.grad(loss, list(networks[role].parameters()), retain_graph=True, allow_unused=True)
        scale = max(float(g.abs().max()) for g in expected if g is not None)
        assert scale > 1e-5
        for ours, theirs in zip(optimizers[role].gradients, expected):
            theirs = torch.zeros(()) if theirs is None else theirs
            assert torch.allclose(torch.zeros_like(theirs) if ours is None else ours, theirs, rtol=1e-4,
                                  atol=1e-5 * scale), role


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize('type, way', [
    ('DMD2', 'full weights'), ('CDM', 'checkpointed adapters'), ('CDM', 'aware'), slow('DecoupledDMD', 'full weights'),
    slow('CDM', 'full weights'), slow('CDM', 'adapters'), slow('CDM', 'checkpointed')])
def test_each_role_learns_in_its_own_phase_only(type, way):
    method = gan_method(type, student_every=2, **WAYS[way])
    roles, seen = ('student', 'fake', 'teacher', 'discriminator'), []

    class Wrapper:

        def __init__(self, role):
            self.role = role

        def update_params(self, loss):
            method.zero_grad()
            loss.backward()
            seen.append((self.role, [role for role in roles if any(
                p.grad is not None and p.grad.abs().sum() for p in unwrap(getattr(method, role)).parameters())]))

        def should_update(self):
            return False

        def optim_context(self, network):
            return torch.enable_grad() if torch.is_grad_enabled() else torch.no_grad()

    for method.iteration in range(2):
        method.train_step(batch(), {role: Wrapper(role) for role in method.trained_roles})
    assert seen == [(role, [role]) for role in (
        'fake', 'discriminator', 'fake', 'discriminator', 'student')]
    assert all(p.requires_grad for role in method.trained_roles for p in getattr(method, role).parameters())


@pytest.mark.parametrize('way', [slow('checkpointed'), 'checkpointed adapters'])
def test_recomputed_activations_change_no_gradient(way):
    gradients = {}
    for checkpointed in (False, True):
        method = gan_method('CDM', **{**WAYS[way], 'activation_checkpointing': checkpointed})
        optimizers = recording_optimizers(method)
        method.train_step(batch(), optimizers)
        gradients[checkpointed] = {role: optimizers[role].gradients for role in method.trained_roles}
    for role, ours in gradients[True].items():
        for a, b in zip(ours, gradients[False][role]):
            assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, rtol=1e-9, atol=1e-12)), role


def test_a_compiled_block_is_seen():
    method, twin = gan_method(), gan_method()
    for block in method.fake.transformer_blocks:
        block.compile(backend='eager')
    with torch.no_grad():  # compiled before the first look
        x, condition = torch.randn(2, 4, 4, 4, dtype=torch.float64), method.null_condition(2)
        method.velocity('fake', x, torch.full((2,), 0.5), condition)
        (ours,), (theirs,) = (m.features('fake', x, torch.full((2,), 0.5), condition, None, None)[1]
                              for m in (method, twin))
    assert ours.shape == (2, 16, 2, 2) and torch.allclose(ours, theirs, rtol=1e-10)


def test_calls_of_an_iteration():
    """One call of the fake score of twice the samples in its turn, one with gradient more in the student's."""
    with_gan, without = gan_method(), tiny_method(type='DMD2', student_every=1)
    for method in (with_gan, without):
        method.train_step(batch(), recording_optimizers(method))
    more = with_gan.call_samples - without.call_samples
    assert dict(more) == {('fake', True): 4 + 4} and dict(with_gan.calls - without.calls) == {('fake', True): 1}
    assert without.call_samples - with_gan.call_samples == {}


def test_with_a_fake_weight_of_0_the_trunk_learns_nothing_of_it():
    gradients, methods = [], (gan_method(gan=dict(fake_weight=0)), tiny_method('DMD2', student_every=1))
    for role in ('student', 'fake', 'teacher'):
        getattr(methods[1], role).load_state_dict(getattr(methods[0], role).state_dict())
    for method in methods:
        optimizers = recording_optimizers(method)
        logs = method.train_step(batch(), optimizers)
        gradients.append(optimizers['fake'].gradients)
    for a, b in zip(*gradients):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)
    assert 'loss_discriminator' not in logs


def test_the_student_may_start_later():
    method = gan_method(gan=dict(start=1))
    for method.iteration in range(2):
        logs = method.train_step(batch(), recording_optimizers(method))
        assert ('loss_gan' in logs) == bool(method.iteration) and 'loss_discriminator' in logs


@pytest.mark.parametrize('gan, match', [
    (dict(blocks=[2]), r'blocks must be different ones of the 2 blocks .*\[2\]'),
    (dict(blocks=[1, -1]), 'blocks must be different ones'),
    (dict(r1=-1), 'model.losses.gan.r1 must be a number of 0 or more'),
    (dict(start=-1), 'model.losses.gan.start must be a whole number of 0 or more')])
def test_settings_that_cannot_be(gan, match):
    with pytest.raises(ValueError, match=match):
        gan_method(gan=gan)


def run(root, name, iterations, resume=False, **changes):
    torch.manual_seed(0)
    cfg = config(root / name, iterations, resume, type='DMD2', losses=dict(gan=dict(GAN, r1=1.0)))
    cfg.merge_from_dict(changes)
    runner = Runner.from_cfg(cfg)
    runner.train()
    return runner


def test_it_resumes_to_the_bit_and_is_left_out_of_the_export(tmp_path):
    runner = run(tmp_path, 'whole', 8)
    run(tmp_path, 'parts', 4)
    run(tmp_path, 'parts', 8, resume=True)
    whole, parts = (torch.load(tmp_path / name / 'iter_8.pth', weights_only=True) for name in ('whole', 'parts'))
    for part in ('state_dict', 'optimizer', 'student_ema', 'param_schedulers'):
        same_bits(whole[part], parts[part], part)
    steps = {role: max(float(s['step']) for s in state['state'].values()) for role, state in whole['optimizer'].items()}
    assert steps == dict(student=4, fake=8, discriminator=8)
    out = export(runner.model, tmp_path / 'out', config=runner.cfg)
    from safetensors import safe_open
    with safe_open(out / 'transformer' / 'diffusion_pytorch_model.safetensors', 'pt') as file:
        assert set(file.keys()) == set(runner.model.student.state_dict())


def test_a_dataset_without_pictures_is_named_before_training(tmp_path):
    with pytest.raises(ValueError, match=r'GANLoss \(model.losses\): real pictures are needed, but the batch has only'):
        run(tmp_path, 'run', 2, **{'train_dataloader.dataset': dict(
            _delete_=True, type='LabelDataset', num_classes=3, length=8)})
    assert not list((tmp_path / 'run').glob('*.pth'))


def test_without_the_gan_its_optimizer_is_left_aside(tmp_path):
    runner = run(tmp_path, 'run', 1, **{'model.losses.gan': None, 'model.losses.dm': dict(weight=1.0)})
    assert runner.model.trained_roles == ('student', 'fake') and not hasattr(runner.model, 'discriminator')


def test_gradients_of_a_small_map_in_bfloat16_are_those_in_float32():
    torch.manual_seed(0)
    head, map = DiscriminatorHead(16), torch.randn(8, 16, 4, 4)
    gradients = []
    for autocast in (False, True):
        head.zero_grad()
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            head([map]).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in head.parameters()])
    for expected, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)
