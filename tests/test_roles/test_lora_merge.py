"""How near the merge of LoRA roles comes to merging their products B A, computed beside it in float64."""
import logging

import pytest
import torch
from mmengine.registry import MODELS
from tests_support import tiny_backbone
from torch.nn.functional import cosine_similarity

from cdm_plugin.roles.lora import save_lora
from cdm_plugin.roles.weights import merge_weights

RANK, RATE, MERGES = 4, 0.001, 1000


def build(type='CDM', **lora):
    torch.manual_seed(0)
    return MODELS.build(dict(type=type, backbone=tiny_backbone(), lora=dict(rank=RANK, **lora)))


def parts(role, part):
    """A or B of all layers, by layer."""
    return {name.removesuffix(f'.lora_{part}.weight'): p for name, p in role.named_parameters()
            if name.endswith(f'.lora_{part}.weight')}


def flat(role, other=None):
    """B A of all layers; with another role, (B - B')(A - A'). A vector in float64."""
    a, b = ({name: p.detach().double() for name, p in parts(role, part).items()} for part in 'AB')
    if other is not None:
        a, b = ({name: p - of[name] for name, p in own.items()}
                for own, of in ((a, parts(other, 'A')), (b, parts(other, 'B'))))
    return torch.cat([(b[name] @ a[name]).flatten() for name in a])


def separate(method):
    """An A of its own for the fake score, as PEFT draws it."""
    with torch.no_grad():
        for p in parts(method.fake, 'A').values():
            torch.nn.init.normal_(p, std=1 / RANK)


def drifting(method, kind, seed=1):
    """Trains a role by one step of Adam at every call, as far as the shipped recipe's do (a learning rate of 1e-4 at
    rank 64, that is 0.0064 of A's standard deviation), on gradients without a direction ('walk') or with one."""
    generator = torch.Generator().manual_seed(seed)
    optimizers, directions = {}, {}
    for role, share in (('student', 1), ('fake', 0.5)):
        parameters = list(getattr(method, role).parameters())
        optimizers[role] = torch.optim.Adam(parameters, lr=share * 0.0064 / RANK)
        directions[role] = [0 if kind == 'walk' else torch.randn(p.shape, generator=generator) for p in parameters]

    def train(role):
        for p, direction in zip(getattr(method, role).parameters(), directions[role]):
            p.grad = (direction + 2 * torch.randn(p.shape, generator=generator)).to(p)
        optimizers[role].step()

    return train


def run(method, train, merges=MERGES):
    """Merges after every step of the fake score; the student steps every second time.

    Returns:
        tuple: Cosine and relative error of every merge's change against the intended one; the distance of the fake
        score's product from exact merging, relative to all that was merged; and what of that distance the mean of
        (B - B')(A - A') leaves open.
    """
    cosines, errors = [], []
    exact, mean, merged = (torch.zeros_like(flat(method.fake)) for _ in range(3))
    for i in range(merges):
        start = flat(method.fake)
        train('fake')
        before, source = flat(method.fake), flat(method.student)
        intended = RATE * (source - before)
        mean = (1 - RATE) * (mean + RATE * flat(method.fake, method.student))
        merge_weights(method.fake, method.student, RATE)
        change = flat(method.fake) - before
        exact = (1 - RATE) * (exact + before - start) + RATE * source
        merged += intended
        cosines.append(cosine_similarity(change, intended, dim=0).item())
        errors.append(((change - intended).norm() / intended.norm()).item())
        if i % 2:
            train('student')
    off = flat(method.fake) - exact
    return cosines, errors, (off.norm() / merged.norm()).item(), ((off + mean).norm() / mean.norm()).item()



@pytest.mark.parametrize('kind, cosine, error, off', [('walk', 0.99, 0.12, 0.07), ('direction', 0.75, 0.7, 0.5)])
def test_a_thousand_merges_stay_within_the_bound(kind, cosine, error, off):
    """Half of the merged change is the worst: what 500 steps in one direction do, three times A's own size."""
    method = build(target_modules=['to_q', 'to_out.0'])
    cosines, errors, missed, beside_theory = run(method, drifting(method, kind))
    assert min(cosines) > cosine and max(errors) < error and missed < off
    assert min(cosines[:100]) > 0.98 and max(errors[:100]) < 0.2
    assert beside_theory < 1e-4  # of the moving mean of (B - B')(A - A'), which bounds it


@pytest.mark.parametrize('kind', ['walk', 'direction'])
def test_with_an_a_for_each_role_a_merge_would_miss_more_than_it_moves(kind):
    method = build(target_modules=['to_q', 'to_out.0'])
    separate(method)
    cosines, errors, *_ = run(method, drifting(method, kind), merges=100)
    assert max(cosines[10:]) < 0.7 and min(errors[10:]) > 1.1


@pytest.mark.parametrize('merges', [1, 10, 5000])
def test_merges_alone_miss_by_a_closed_form_and_end_at_the_student(merges):
    """With c the share of the source, (1 - c) f + c s, the product lies off by c (1 - c)(B_s - B_f)(A_s - A_f)."""
    method = build().double()
    train = drifting(method, 'direction')
    for role in ('student', 'fake', 'student', 'fake'):
        train(role)
    fake, student, apart = flat(method.fake), flat(method.student), flat(method.fake, method.student)
    for _ in range(merges):
        merge_weights(method.fake, method.student, 0.01)
    c = 1 - 0.99 ** merges
    torch.testing.assert_close(flat(method.fake), (1 - c) * fake + c * student - c * (1 - c) * apart,
                               rtol=0, atol=1e-9 * student.norm().item())


# One A


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_roles_start_from_one_a_as_the_base():
    method = build()
    assert same(parts(method.student, 'A'), parts(method.fake, 'A')) and len(parts(method.fake, 'A')) > 10
    assert not any(p.any() for role in (method.student, method.fake) for p in parts(role, 'B').values())
    alone = build('FlowMatching')  # what PEFT draws for the first role stays as it is
    assert same(parts(alone.student, 'A'), parts(method.student, 'A'))
    pairs = zip(parts(method.student, 'A').values(), parts(method.fake, 'A').values())
    assert all(a.data_ptr() != b.data_ptr() for a, b in pairs)


def saved(tmp_path, name, seed=None):
    """A LoRA file of anything but zeros, on the A that all roles of `build` have or, with a seed, on another."""
    method = build()
    generator = torch.Generator().manual_seed(seed or 0)
    with torch.no_grad():
        for p in (parts(method.student, 'B') if seed is None else dict(method.student.named_parameters())).values():
            p.copy_(torch.randn(p.shape, generator=generator))
    save_lora(method.student, str(tmp_path / name))
    return str(tmp_path / name), method.student


@pytest.mark.parametrize('role', ['student', 'fake'])
def test_a_role_without_a_file_starts_as_the_base_from_the_other_ones_a(role, tmp_path):
    path, source = saved(tmp_path, 'earlier', seed=1)
    method = build(**{role: path})
    started, other = method.student, method.fake
    if role == 'fake':
        started, other = other, started
    assert same(dict(source.named_parameters()), dict(started.named_parameters()))
    assert same(parts(source, 'A'), parts(other, 'A'))
    assert not any(p.any() for p in parts(other, 'B').values())


@pytest.mark.parametrize('related', [True, False])
def test_two_files_stay_as_they_are_and_unrelated_ones_are_told(related, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr('cdm_plugin.roles.lora.print_log', lambda text, *args, level: told.append((text, level)))
    (path, student), (other, fake) = saved(tmp_path, 'one', 1), saved(tmp_path, 'two', 1 if related else 2)
    method = build(student=path, fake=other)
    assert same(dict(student.named_parameters()), dict(method.student.named_parameters()))
    assert same(dict(fake.named_parameters()), dict(method.fake.named_parameters()))
    if related:
        assert told == []
    else:
        (text, level), = told
        assert 'model.lora.student and model.lora.fake start from unrelated A' in text and level == logging.WARNING
