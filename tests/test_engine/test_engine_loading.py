"""Weights that others have written, and the comparison with a model's."""
import pytest
import torch
from safetensors.torch import save_file
from tests_support import same_bits

from cdm_plugin.compat.checkpoints import load_from_local
from cdm_plugin.engine.loading import as_checkpoint, check_start, check_whole, named_as

OWN = {'student.a.weight': (2, 3), 'student.b': (4,), 'fake.a.weight': (2, 3)}
W = {name: torch.zeros(shape) for name, shape in OWN.items()}
STUDENT = {name.removeprefix('student.'): w for name, w in W.items() if name.startswith('student.')}


@pytest.mark.parametrize('content', [
    dict(state_dict=W, meta=1), W, dict(module=W, ds_config={}), dict(model=W, epoch=3), dict(model_state_dict=W)],
    ids=['checkpoint', 'bare', 'deepspeed', 'model', 'script'])
def test_weights_are_found(content):
    checkpoint = as_checkpoint(content, 'x.pth')
    assert checkpoint['state_dict'] == W and checkpoint.get('meta') == content.get('meta')


@pytest.mark.parametrize('content, found', [
    ([1], 'a list'), (torch.zeros(1), 'a Tensor'), ({}, 'an empty dict'), (dict(epoch=3, a=torch.zeros(1)), 'epoch'),
    (dict(state_dict=[1]), 'a dict of state_dict')], ids=str)
def test_what_holds_no_weights_is_named(content, found):
    with pytest.raises(ValueError, match=f'x.pth holds .*{found}.*no weights by name'):
        as_checkpoint(content, 'x.pth')


@pytest.mark.parametrize('weights, expected', [
    (W, W), ({f'module.{k}': w for k, w in W.items()}, W),
    ({k.replace('.', '.module._orig_mod.', 1): w for k, w in W.items()}, W),
    (STUDENT, {k: w for k, w in W.items() if 'student' in k}),
    ({f'_orig_mod.{k}': w for k, w in STUDENT.items()}, {k: w for k, w in W.items() if 'student' in k}),
    ({'student.module.a.weight': 0}, {'student.a.weight': 0}),
    ({'other.weight': 0}, {'other.weight': 0})],
    ids=['own', 'data parallel', 'wrapped roles', 'bare', 'compiled', 'one role', 'other'])
def test_names(weights, expected):
    assert named_as(weights, OWN, 'student') == expected
    inside = {'student.module.a': (1,)}  # a network may have a part of that name
    assert named_as(dict.fromkeys(inside), inside, 'student').keys() == inside.keys()


def test_files_of_others(tmp_path):
    weights = {name: torch.randn(3) for name in 'abc'}
    save_file(weights, tmp_path / 'w.safetensors')
    same_bits(load_from_local(str(tmp_path / 'w.safetensors'), 'cpu'), weights)
    folder = tmp_path / 'transformer'
    folder.mkdir()
    (folder / 'config.json').write_text('{}')
    for i, name in enumerate(weights):  # as diffusers writes large networks
        save_file({name: weights[name]}, folder / f'diffusion_pytorch_model-{i}-of-3.safetensors')
    same_bits(load_from_local(str(folder), 'cpu'), weights)
    (folder / 'diffusion_pytorch_model-0-of-3.safetensors').write_bytes(b'cut')
    with pytest.raises(ValueError, match='damaged or was cut short'):
        load_from_local(str(folder), 'cpu')


def test_a_whole_model():
    check_whole(W, OWN, 'x.pth', 'advice')
    changed = {**W, 'fake.a.weight': torch.zeros(3), 'critic.a': torch.zeros(1)}
    del changed['student.b']
    with pytest.raises(ValueError) as error:
        check_whole(changed, OWN, 'x.pth', 'advice')
    assert str(error.value) == (
        "the checkpoint x.pth does not fit the config's model: 1 of the 3 weights are missing (student.b); 1 have "
        'another shape (fake.a.weight (3,), not (2, 3)); 1 are unknown (critic.a). advice')


@pytest.mark.parametrize('names, parts', [
    (['transformer.a.lora_A.weight'], ["PEFT's names", 'model.lora.student or model.teacher.lora']),
    (['lora_unet_a.lora_down.weight', 'lora_unet_a.alpha'], ["kohya's names", 'save_lora_weights']),
    (['unet.a.lora.down.weight'], ["diffusers' old names"])], ids=['peft', 'kohya', 'old'])
def test_lora_files_are_named(names, parts):
    weights = {name: torch.zeros(1) for name in names}
    for check in (lambda: check_whole(weights, OWN, 'x.pth', 'advice'), lambda: check_start(weights, OWN, (), 'x.pth')):
        with pytest.raises(ValueError) as error:
            check()
        assert all(part in str(error.value) for part in ['x.pth', *parts]), error.value


def test_a_start_needs_weights_of_every_role():
    check_start({name: w for name, w in W.items() if 'b' not in name}, OWN, ('student', 'fake'), 'x.pth')
    check_start({**W, 'critic.a': torch.zeros(1)}, OWN, ('student', 'fake'), 'x.pth')
    student = {name: w for name, w in W.items() if name.startswith('student')}
    check_start(student, OWN, ('student',), 'x.pth')
    for weights, text in [
            (student, r'x.pth has weights of student alone, and fake and the teacher .*cdm export.*model\.teacher='),
            ({'conv.weight': torch.zeros(1)}, "none of the model's weights: it has conv.weight, the model fake.a"),
            ({**W, 'fake.a.weight': torch.zeros(3)}, r'another shape \(fake.a.weight \(3,\), not \(2, 3\)\)')]:
        with pytest.raises(ValueError, match=text):
            check_start(weights, OWN, ('student', 'fake'), 'x.pth')
