"""The student alone out of a checkpoint, against the whole method that was saved."""
import shutil
from pathlib import Path

import pytest
import tiny_pipelines
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from tests_support import perturb

from cdm_plugin import inference
from cdm_plugin.backbones import Backbone
from cdm_plugin.compat import plain
from cdm_plugin.compat.checkpoints import save_checkpoint
from cdm_plugin.engine import StudentEMA
from cdm_plugin.inference import load_method, sample_prompts, student_weights
from cdm_plugin.methods import CDM, DiffusionModel, FlowMatching

PROMPTS = ['a red fox', 'dogs and birds']
WRITERS = {'SD3Backbone': (tiny_pipelines.save_tiny_sd3, 16), 'FluxBackbone': (tiny_pipelines.save_tiny_flux, 16),
           'LongCatImageBackbone': (tiny_pipelines.save_tiny_longcat, 64)}
BOTH = ('student', 'teacher')


class Saved:
    """A method with random differences between its networks, its config and its checkpoint on the disk."""

    def __init__(self, folder, backbone='SD3Backbone', **model):
        write, size = WRITERS[backbone]
        write(folder / 'base')
        options = dict(backbone=dict(type=backbone, pretrained=str(folder / 'base')), image_size=size,
                       sample_sigmas=[1.0, 0.6])
        options = {**dict(type='CDM', alpha=3.0), **options, **model}
        cfg = Config(dict(model={key: value for key, value in options.items() if value is not None},
                          train_dataloader={}, optim_wrapper={}, train_cfg={}))
        self.config, self.file, self.base = str(folder / 'config.py'), str(folder / 'iter_8.pth'), folder / 'base'
        cfg.dump(self.config)
        self.method = MODELS.build(cfg.model).eval()
        for role in self.method.trained_roles:
            perturb(getattr(self.method, role))
        average = self.method.student_ema = StudentEMA(self.method.student)
        for weight in average.weights.values():
            weight.add_(0.05 * torch.randn_like(weight))
        save_checkpoint(dict(state_dict=self.method.state_dict(), student_ema=average.state_dict(), meta=dict(iter=8),
                             config=plain(cfg.to_dict())), self.file)
        self.noise = torch.randn(self.method.latent_shape(2), generator=torch.Generator().manual_seed(1))

    def images(self, method=None, ema=True, **kwargs):
        method = method or self.method
        with student_weights(method, ema):
            return sample_prompts(method, PROMPTS, self.noise, **kwargs)

    def load(self, **kwargs):
        return load_method(self.config, self.file, device='cpu', **kwargs)


@pytest.fixture
def built(monkeypatch):
    """Number of networks with weights that are built."""
    calls, load = [], Backbone.load_network
    monkeypatch.setattr(Backbone, 'load_network', lambda self, dtype=None: (calls.append(self), load(self, dtype))[1])
    return calls


def is_mapped(tensor, file):
    for line in Path('/proc/self/maps').read_text().splitlines():
        start, end = (int(x, 16) for x in line.split()[0].split('-'))
        if start <= tensor.data_ptr() < end:
            return line.endswith(str(file))
    return False


@pytest.mark.parametrize('backbone', list(WRITERS))
def test_the_student_alone_makes_the_same_images(backbone, tmp_path, built):
    saved = Saved(tmp_path, backbone)
    expected = {ema: saved.images(ema=ema) for ema in (True, False)}
    assert (expected[True] - expected[False]).abs().max() > 1e-3
    built.clear()
    for file in (saved.base / 'transformer').glob('*.safetensors'):
        file.unlink()  # the checkpoint has all weights of the student
    method = saved.load()
    assert type(method) is DiffusionModel and not built and not hasattr(method, 'fake') and method.iteration == 7
    assert not any(t.is_meta for t in (*method.student.parameters(), *method.student.buffers()))
    for ema, images in expected.items():
        assert torch.equal(saved.images(method, ema), images)
    for name, weight in saved.method.student.named_parameters():
        assert torch.equal(method.student.get_parameter(name), weight)  # its own again
        assert method.student.get_parameter(name).requires_grad


def test_weights_and_average_stay_on_the_disk(tmp_path):
    saved = Saved(tmp_path)
    method = saved.load()
    for name, weight in method.student.named_parameters():
        assert is_mapped(weight, saved.file) and is_mapped(method.student_ema.weights[name], saved.file)
    with method.student_ema.applied():
        for name, weight in method.student.named_parameters():
            assert weight.data_ptr() == method.student_ema.weights[name].data_ptr()
    before = Path(saved.file).read_bytes()
    perturb(method.student)
    assert Path(saved.file).read_bytes() == before


def test_another_role_brings_the_whole_method(tmp_path, built):
    saved = Saved(tmp_path)
    built.clear()
    method = saved.load(roles=BOTH)
    assert type(method) is CDM and method.alpha == 3 and len(built) == 3
    for role in BOTH:
        assert torch.equal(saved.images(method, role=role), saved.images(role=role))
    assert torch.equal(saved.images(saved.load(roles=['fake']), role='fake'), saved.images(role='fake'))


def test_adapters_have_one_base_and_no_other_role(tmp_path, built):
    saved = Saved(tmp_path, lora=dict(rank=2))
    built.clear()
    method = saved.load()
    assert type(method) is DiffusionModel and len(built) == 1
    assert not any('.fake.' in name for name in method.base.state_dict())
    for ema in (True, False):
        assert torch.equal(saved.images(method, ema), saved.images(ema=ema))


def test_without_a_checkpoint_the_student_is_the_pretrained_network(tmp_path, built):
    saved = Saved(tmp_path)
    built.clear()
    method = load_method(saved.config, device='cpu')
    assert type(method) is DiffusionModel and len(built) == 1 and method.student_ema is None
    assert torch.equal(saved.images(method), saved.images(role='teacher'))


def test_weights_in_half_precision_for_sampling(tmp_path):
    saved = Saved(tmp_path)
    method = saved.load(options={'model.backbone.dtype': 'bfloat16'})
    assert {p.dtype for p in method.student.parameters()} == {torch.bfloat16}
    assert (saved.images(method) - saved.images()).abs().max() < 0.2


@MODELS.register_module()
class InferenceTestNoisy(CDM):
    """Samples in a way of its own."""

    def sample(self, *args, **kwargs):
        return super().sample(*args, **kwargs) + 1


@MODELS.register_module()
class InferenceTestTwoSteps(FlowMatching):
    """Has other defaults."""

    def __init__(self, backbone, sample_sigmas=(1.0, 0.3), **kwargs):
        super().__init__(backbone, sample_sigmas=sample_sigmas, **kwargs)


def test_a_method_keeps_its_own_way_to_sample(tmp_path):
    saved = Saved(tmp_path, type='InferenceTestNoisy')
    method = saved.load()
    assert type(method) is InferenceTestNoisy and torch.equal(saved.images(method), saved.images())


def test_a_method_keeps_its_own_defaults(tmp_path):
    saved = Saved(tmp_path, type='InferenceTestTwoSteps', sample_sigmas=None, alpha=None)
    method = saved.load()
    assert type(method) is DiffusionModel and method.sample_sigmas.tolist() == [1.0, 0.3]
    assert torch.equal(saved.images(method), saved.images())


@pytest.mark.parametrize('type, rollout', [('CDM', 'renoise'), ('FlowMatching', 'ode')])
def test_a_student_alone_steps_as_its_method_does(type, rollout, tmp_path):
    """A teacher's training leaves the setting aside."""
    saved = Saved(tmp_path, type=type, rollout='renoise')
    method = saved.load()
    assert method.__class__ is DiffusionModel and method.rollout == saved.method.rollout == rollout
    assert torch.equal(saved.images(method), saved.images())


def test_every_setting_that_goes_with_a_checkpoint_is_taken_from_it(tmp_path, monkeypatch):
    saved = Saved(tmp_path)
    monkeypatch.setattr(inference, 'TRAINED_KEYS', (*inference.TRAINED_KEYS, 'fake_sigma', 'image_size'))
    method = saved.load(options={'model.image_size': 8, 'model.fake_sigma': dict(type='LogitNormalSigma'),
                                 'model.sample_sigmas': [1.0], 'model.type': 'DMD2'})
    assert method.latent_sizes == ((8, 8),) and method.sample_sigmas.tolist() == [1.0, 0.6]
    assert method.config.model.type == 'CDM' and method.config.model.get('fake_sigma') is None


@pytest.mark.parametrize('change', ['missing', 'left over', 'of another shape'])
@pytest.mark.parametrize('roles', [('student',), BOTH])
def test_a_student_that_does_not_fit_is_named(change, roles, tmp_path):
    saved = Saved(tmp_path)
    state = torch.load(saved.file)
    weights, name = state['state_dict'], 'student.transformer_blocks.0.attn.to_q.weight'
    if change == 'missing':
        del weights[name]
    elif change == 'left over':
        name = 'student.more'
        weights[name] = torch.ones(1)
    else:
        weights[name] = torch.ones(3, 3)
    torch.save(state, saved.file)
    with pytest.raises(ValueError, match=f"does not fit the config's model.*{name.partition('.')[2]}"):
        saved.load(roles=roles)


def test_an_average_of_another_network_is_named(tmp_path):
    saved = Saved(tmp_path)
    state = torch.load(saved.file)
    state['student_ema']['weights'].popitem()
    torch.save(state, saved.file)
    with pytest.raises(ValueError, match='EMA has other parameters than the student'):
        saved.load()


def test_the_latest_checkpoint_of_a_work_directory(tmp_path):
    saved = Saved(tmp_path)
    (tmp_path / 'run').mkdir()
    with pytest.raises(FileNotFoundError, match='has no checkpoint'):
        load_method(saved.config, str(tmp_path / 'run'), device='cpu')
    shutil.move(saved.file, tmp_path / 'run/iter_8.pth')
    method = load_method(saved.config, str(tmp_path / 'run'), device='cpu')
    assert torch.equal(saved.images(method), saved.images())
