"""What `cdm evaluate` takes its models and metrics from."""
import pytest
from evaluation_support import InkMetric
from recipes import CDM, TEACHER
from type_styles import write_lazy

from cdm_plugin.commands.evaluate.entries import parse_entries
from cdm_plugin.commands.evaluate.metrics import build_metrics

CONFIG = '''
metrics = [dict(type={kind!r}, prefix='a'), dict(type='DigitMetric')]
'''


@pytest.mark.parametrize('kind', ['InkMetric', 'mmengine.InkMetric', 'evaluation_support.InkMetric'])
def test_metrics_of_a_config_may_be_written_in_any_way(kind, tmp_path):
    (tmp_path / 'metrics.py').write_text(CONFIG.format(kind=kind))
    ink, digits = build_metrics([str(tmp_path / 'metrics.py')], [])
    assert type(ink) is InkMetric and ink.prefix == 'a' and type(digits).__name__ == 'DigitMetric'


def test_metrics_of_a_config_may_be_classes(tmp_path):
    (tmp_path / 'metrics.py').write_text('from evaluation_support import InkMetric\nmetrics = dict(type=InkMetric)\n')
    assert [type(metric) for metric in build_metrics([str(tmp_path / 'metrics.py')], [])] == [InkMetric]


@pytest.mark.parametrize('kind, hint', [
    ('InkMetrik', "; did you mean 'InkMetric'?"), ('mmengine.InkMetrik', "; did you mean 'InkMetric'?"),
    ('torch.nn.Identity', '.'), ('qqq', '.')])
def test_what_is_no_metric_is_named(kind, hint, tmp_path):
    (tmp_path / 'metrics.py').write_text(CONFIG.format(kind=kind))
    with pytest.raises(ValueError) as error:
        build_metrics([str(tmp_path / 'metrics.py')], [])
    assert str(error.value).startswith(f'the metric {kind!r} is not registered{hint} There are ')


def test_the_teacher_is_that_of_the_first_distillation(tmp_path):
    (tmp_path / 'path.py').write_text(f"_base_ = 'cdm_plugin::{CDM}'\nmodel = dict(type='cdm_plugin.methods.CDM')\n")
    for source in (CDM, write_lazy(tmp_path), str(tmp_path / 'path.py')):
        teacher = parse_entries([TEACHER, source], teacher=True)[0]
        assert (teacher.name, teacher.role, teacher.source) == ('teacher', 'teacher', source)
    with pytest.raises(ValueError, match='--teacher needs the config of a distillation'):
        parse_entries([TEACHER], teacher=True)
