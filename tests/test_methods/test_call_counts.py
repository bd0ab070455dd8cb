"""What an iteration costs, against docs/performance.md: stopping at the anchors, one on-trajectory forward."""
from collections import Counter

import pytest
import torch
from tests_support import recording_optimizers, tiny_method

BATCH = 5
# A forward without gradient costs 1; with gradient 4: forward, backward of twice its cost, and the forward that
# activation checkpointing repeats.
WITH_GRADIENT = 4


class ForwardCounter:
    """Counts the samples that pass the networks' first blocks, recomputations included: an account of its own."""

    def __init__(self, method):
        self.samples = Counter()
        for role in ('student', 'fake', 'teacher'):
            block = getattr(method, role).transformer_blocks[0]
            block.register_forward_pre_hook(self._hook(role), with_kwargs=True)

    def _hook(self, role):
        def count(module, args, kwargs):
            hidden = kwargs['hidden_states'] if 'hidden_states' in kwargs else args[0]
            self.samples[role] += len(hidden)
        return count


def test_every_cycle_costs_what_the_table_says(labels):
    """Row two of the table, with the cycle's own anchors in place of their mean 6.75, exactly."""
    method = tiny_method(dtype=torch.float32, activation_checkpointing=True)
    optimizers, forwards = recording_optimizers(method, lr=1e-3), ForwardCounter(method)
    for cycle in range(12):
        samples, calls, moved, steps = Counter(), Counter(), 0, 0
        forwards.samples.clear()
        for iteration in (2 * cycle, 2 * cycle + 1):
            method.iteration = iteration
            draws = method.sample_draws(BATCH)
            moved, steps = moved + int(draws.anchor.sum()), steps + draws.rollout_steps
            method.train_step(labels, optimizers)
            samples.update(method.call_samples)
            calls.update(method.calls)
        # Samples by table column: rollout and its on-trajectory forward, fake steps, student, teacher, fake score.
        assert samples == {
            ('student', False): moved + BATCH, ('fake', True): 2 * BATCH, ('student', True): 2 * BATCH,
            ('teacher', False): 4 * BATCH, ('fake', False): 2 * BATCH}
        # Of the student with gradient: the on-trajectory forward that CA and DM share, and CDM's.
        assert calls == {('student', False): steps + 1, ('fake', True): 2, ('student', True): 2,
                         ('teacher', False): 1, ('fake', False): 1}
        work = sum(count * (WITH_GRADIENT if with_grad else 1) for (_, with_grad), count in samples.items())
        table = (moved / BATCH + 1) + 2 * 4 + 2 * 4 + 4 + 2
        assert work == pytest.approx(table * BATCH, rel=1e-15)
        # The networks themselves saw one forward without gradient and two (one of them recomputed) with.
        assert forwards.samples == {
            role: samples[role, False] + 2 * samples[role, True] for role in ('student', 'fake', 'teacher')}


def test_expected_cost_of_a_cycle():
    """36.5 forward-equivalents a sample over the draws; the authors' loop would take 55."""
    method, cycles, costs, authors = tiny_method(), 3000, [], []
    for cycle in range(cycles):
        moved = whole = 0
        for method.iteration in (2 * cycle, 2 * cycle + 1):
            draws = method.sample_draws(BATCH)
            moved, whole = moved + draws.anchor.double().mean(), whole + len(draws.sigmas)
        costs.append(moved + 1 + 2 * 4 + 2 * 4 + 4 + 2)
        authors.append(whole + 2 * 4 + 3 * 4 + 4 + 2)
    for values, expected in ((costs, 36.5), (authors, 55.0)):
        values = torch.tensor(values, dtype=torch.float64)
        error = values.std() / cycles**0.5
        assert abs(values.mean() - expected) < 3.7 * error and error < 0.3


@pytest.mark.parametrize('type, teacher_samples, fake_samples, own_points', [
    ('CDM', 4, 2, 1), ('DecoupledDMD', 3, 1, 0), ('DMD2', 2, 1, 0)])
def test_a_student_step_calls_each_frozen_role_once(type, teacher_samples, fake_samples, own_points, labels):
    method = tiny_method(type=type, student_every=1)
    method.train_step(labels, recording_optimizers(method))
    rollout = method.sample_draws(BATCH).rollout_steps
    assert +method.calls == Counter({
        ('student', False): rollout, ('student', True): 1 + own_points, ('fake', True): 1, ('fake', False): 1,
        ('teacher', False): 1})
    assert method.call_samples['teacher', False] == teacher_samples * BATCH
    assert method.call_samples['fake', False] == fake_samples * BATCH


def test_guided_cdm_costs_one_more_question_to_the_teacher_and_no_call(labels):
    method = tiny_method(student_every=1, losses=dict(cdm=dict(guided=True)))
    method.train_step(labels, recording_optimizers(method))
    assert method.calls['teacher', False] == 1 and method.call_samples['teacher', False] == 5 * BATCH


def test_fake_steps_of_one_iteration_share_its_rollout(labels):
    """Two of them and a student step: what `student_every=2` does with a second rollout and its last prediction."""
    method = tiny_method(fake_steps=2, student_every=1)
    method.train_step(labels, recording_optimizers(method))
    draws = method.sample_draws(BATCH)
    assert method.call_samples == {
        ('student', False): int(draws.anchor.sum()), ('fake', True): 2 * BATCH, ('student', True): 2 * BATCH,
        ('teacher', False): 4 * BATCH, ('fake', False): 2 * BATCH}


def test_an_iteration_without_a_student_step_asks_no_teacher(labels):
    method = tiny_method()
    logs = method.train_step(labels, recording_optimizers(method))
    assert {role for role, _ in method.calls} == {'student', 'fake'}
    assert ('student', True) not in method.calls and 'loss_student' not in logs
    assert method.sample_draws(BATCH).losses == {}


def test_counts_are_logged_by_role_and_start_again_every_iteration(labels):
    method = tiny_method()
    optimizers = recording_optimizers(method)
    for iteration in range(4):
        method.iteration = iteration
        logs = method.train_step(labels, optimizers)
        student_turn = iteration % 2 == 1
        rollout = method.sample_draws(BATCH).rollout_steps
        assert logs['calls_student'] == rollout + (2 if student_turn else 1)
        assert logs['calls_fake'] == (2 if student_turn else 1)
        assert logs.get('calls_teacher') == (1 if student_turn else None)


@pytest.mark.parametrize('size', [1, 3, 5, 19, 20, 1000])
@pytest.mark.parametrize('anchor_aware', [False, True], ids=['plain', 'anchor-aware'])
def test_max_batch_per_call_splits_calls_and_changes_no_result(size, anchor_aware, labels):
    runs = []
    for limit in (None, size):
        method = tiny_method(student_every=1, max_batch_per_call=limit, anchor_aware_fake=anchor_aware)
        optimizers = recording_optimizers(method)
        runs.append((method, method.train_step(labels, optimizers), optimizers['student'].gradients))
    (whole, logs, gradients), (split, split_logs, split_gradients) = runs
    # CA asks the teacher twice, DM and CDM once each; DM and CDM ask the fake score.
    assert split.calls['teacher', False] == -(-4 * BATCH // size)
    assert split.calls['fake', False] == -(-2 * BATCH // size)
    assert split.call_samples == whole.call_samples
    for name in logs:
        if name.startswith('loss'):
            assert split_logs[name].item() == pytest.approx(logs[name].item(), rel=1e-12)
    largest = max(g.abs().max() for g in gradients if g is not None)
    for ours, theirs in zip(split_gradients, gradients):
        assert (ours is None) == (theirs is None)
        assert ours is None or (ours - theirs).abs().max() < 1e-12 * largest
