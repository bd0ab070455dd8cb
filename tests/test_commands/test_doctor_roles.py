"""What `cdm doctor` says of roles that a plug-in adds, teachers of their own and several sizes."""
import acme_plugin
import pytest
from tests_support import TINY_SD3

from cdm_plugin.commands.doctor.diagnosis import diagnose
from cdm_plugin.commands.doctor.report import format_report

LARGER = dict(TINY_SD3, num_layers=3)


def report_of(tmp_path, **model):
    cfg = acme_plugin.config(tmp_path, 4, **model)
    if model.get('type') == 'CDM' and 'gan' not in model.get('losses', {}):
        del cfg.optim_wrapper.discriminator
    return diagnose(cfg)


def parts(report):
    return {part.name: part for part in report.parts}


@pytest.mark.parametrize('model', [dict(), dict(type='CDM', losses=dict(gan=dict(type='AcmeGANLoss')))])
def test_a_role_of_a_plug_in_is_counted_with_its_optimizer(model, tmp_path):
    report = report_of(tmp_path, **model)
    assert report.problems == []
    head = parts(report)['discriminator']
    numel = 4 * 8 * 9 + 8 + 8 + 1  # a convolution of 3x3 on 4 channels, a linear layer on their means
    assert head.parameters == numel and head.weights == 4 * numel and head.gradients == 4 * numel
    assert 8 * numel <= head.optimizer <= 8 * numel + 64  # AdamW's two moments, and the steps
    # torch's default optimizers work on a copy of the gradients.
    assert report.phases["discriminator's optimizer"] == 2 * head.gradients
    assert 'losses of discriminator add' in ' '.join(report.warnings)
    assert 'discriminator' in format_report(report)


def test_a_larger_teacher_is_counted_as_it_is(tmp_path):
    plain, large = report_of(tmp_path), report_of(tmp_path, teacher=dict(config=LARGER))
    assert (plain.recipe['teacher'], large.recipe['teacher']) == ("the backbone's network", 'another network')
    more = large.part('teacher').weights - plain.part('teacher').weights
    for name in ('data parallel', 'ZeRO 1', 'ZeRO 2'):
        for row, other in zip(large.sharing[name], plain.sharing[name]):
            assert row.resident - other.resident == more, name
    assert large.problems == [] and parts(large)['student'].parameters == parts(plain)['student'].parameters
    assert parts(large)['teacher'].parameters > parts(plain)['teacher'].parameters == parts(plain)['student'].parameters
    assert any("model.teacher.lora='absent' does not exist" in problem
               for problem in report_of(tmp_path, teacher=dict(lora='absent')).problems)
    assert any("model.teacher.pretrained='./no/teacher' is no folder" in problem
               for problem in report_of(tmp_path, teacher=dict(pretrained='./no/teacher')).problems)


def test_adapters_beside_a_teacher_of_its_own(tmp_path):
    """The base and the teacher are both there, and both frozen."""
    alone, report = (report_of(tmp_path, type='CDM', lora=dict(rank=2), **teacher)
                     for teacher in ({}, dict(teacher=dict(config=LARGER))))
    assert report.problems == [] and report.part('base').weights == alone.part('base').weights > 0
    assert alone.part('teacher').weights == 0 < report.part('teacher').weights
    assert 'adapters' not in report.part('teacher').note and 'adapters off' in alone.part('teacher').note
    for row, other in zip(report.sharing['ZeRO 2'], alone.sharing['ZeRO 2']):
        assert row.resident - other.resident == report.part('teacher').weights


def test_the_largest_of_several_sizes_counts(tmp_path):
    small, large, both = (report_of(tmp_path, type='CDM', image_size=size) for size in (8, 16, [8, (16, 16)]))
    assert both.phases == large.phases != small.phases
    assert '8x8 pixels, 4 tokens or 16x16 pixels, 16 tokens' in both.recipe['image']


def test_a_frozen_judge_is_counted(tmp_path):
    report = report_of(tmp_path, type='CDM', losses=dict(reward=dict(type='AcmeRewardLoss', weight=0.1)))
    assert report.problems == [] and report.part('losses').parameters == 2
    assert report.part('losses').weights == 8 and not report.part('losses').gradients


def test_a_loss_of_weight_0_asks_nothing(tmp_path):
    muted = report_of(tmp_path, type='CDM', losses=dict(ca=dict(weight=0.0), cdm=dict(weight=0.0))).calls
    absent = report_of(tmp_path, type='CDM', losses=dict(ca=None, cdm=None)).calls
    assert muted == absent and muted.samples['teacher', False] > 0
