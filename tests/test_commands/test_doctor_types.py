"""The doctor says the same of a config in whatever way its types are written, and under any default scope."""
import sys
import types

import pytest
from mmengine.config import Config
from mmengine.registry import MODELS, Registry
from recipes import CDM, SD3_ZERO2, TEACHER, nothing_loads
from type_styles import STYLES, named, restyled, write_lazy

from cdm_plugin.backbones import SD3Backbone
from cdm_plugin.commands.doctor.diagnosis import diagnose
from cdm_plugin.commands.doctor.report import Report
from cdm_plugin.config import read_config


def findings(report: Report) -> dict:
    """What a report says of a config, apart from where it stands and from the disk of the moment."""
    warnings = [text for text in report.warnings if 'of checkpoints' not in text]
    return dict(vars(report), config='', warnings=warnings)


@pytest.mark.parametrize('recipe', [CDM, TEACHER, SD3_ZERO2])
def test_a_recipes_diagnosis_does_not_depend_on_how_types_are_written(recipe):
    options = {'model.backbone.config.num_layers': 1} if recipe == SD3_ZERO2 else {}  # the depth matters nothing here
    with nothing_loads():
        expected = findings(diagnose(read_config(recipe, options)))
        assert expected['recipe'] and expected['parts'] and not expected['problems'][recipe == SD3_ZERO2:]
        for style in STYLES:
            assert findings(diagnose(restyled(read_config(recipe, options), style))) == expected, style


def test_a_config_in_plain_python_is_examined(tmp_path):
    path = write_lazy(tmp_path)
    found = findings(diagnose(read_config(path)))
    assert found == findings(diagnose(named(path))) and found['problems'] == []
    assert found['recipe']['method'] == 'CDM' and found['recipe']['backbone'].startswith('SD3Backbone, asset:')
    assert "did you mean 'alpha'" in diagnose(read_config(path, {'model.alpa': 1.0})).problems[0]


@pytest.mark.parametrize('style', [STYLES[0], *(pytest.param(s, marks=pytest.mark.slow) for s in STYLES[1:])])
def test_what_is_missing_is_seen_in_any_style(style):
    cfg = restyled(read_config(CDM), style)
    cfg.custom_hooks = cfg.custom_hooks[1:]
    found = diagnose(cfg)
    assert not found.problems and any('custom_hooks has no CDMHook' in warning for warning in found.warnings)
    cfg = restyled(read_config(SD3_ZERO2, {'strategy.communication_datatype': 'fp32'}), style)
    assert any("did you mean 'communication_data_type'" in problem for problem in diagnose(cfg).problems)


def test_a_backbone_of_another_librarys_scope_is_found(monkeypatch):
    registry = Registry('model', parent=MODELS, scope='acme_doctor')
    registry.register_module(name='AcmeSD3', module=type('AcmeSD3', (SD3Backbone,), {}))
    monkeypatch.setitem(sys.modules, 'acme_doctor', types.ModuleType('acme_doctor'))
    monkeypatch.setitem(sys.modules, 'acme_doctor.registry', types.ModuleType('acme_doctor.registry'))
    try:
        cfg = read_config(CDM, {'model.backbone.type': 'AcmeSD3', 'default_scope': 'acme_doctor'})
        report = diagnose(Config(cfg.to_dict()))
        assert report.problems == [] and report.recipe['backbone'].startswith('AcmeSD3, ')
        cfg.default_scope = 'mmengine'
        assert any("'AcmeSD3' is not registered" in problem for problem in diagnose(cfg).problems)
    finally:
        MODELS.children.pop('acme_doctor')
