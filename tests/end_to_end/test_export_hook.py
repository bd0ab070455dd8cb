"""PipelineExportHook in whole runs: what it leaves, and that training does not notice it."""
import logging
import shutil

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from mmengine.registry import MODELS
from tests_support import same_bits
from tiny_pipelines import save_tiny_sd3

import cdm_plugin.hooks.pipeline_export_hook as module
from cdm_plugin.hooks import PipelineExportHook
from cdm_plugin.inference import load_method, sample_prompts

PROMPTS = ['a red fox', 'dogs and birds']


@pytest.fixture
def text_run(short_run, tmp_path):
    """A short run on a tiny SD3 pipeline: text_run(name, hook, **options) -> runner."""
    save_tiny_sd3(tmp_path / 'base')
    (tmp_path / 'prompts.txt').write_text('a fox\na dog\nbirds\nred\n')

    def build(name, hook=None, lora=None, **options):
        torch.manual_seed(0)
        model = dict(type='CDM', backbone=dict(type='SD3Backbone', pretrained=str(tmp_path / 'base')), lora=lora)
        return short_run(work_dir=tmp_path / name, **{
            'model': dict(model, _delete_=True), 'train_dataloader.batch_size': 2,
            'train_dataloader.dataset': dict(type='PromptDataset', ann_file=str(tmp_path / 'prompts.txt'),
                                             _delete_=True),
            'val_dataloader': None, 'val_cfg': None, 'val_evaluator': None,  # of the digits
            'custom_hooks': [dict(type='CDMHook')] + (
                [] if hook is None else [dict(hook, type='PipelineExportHook')]),
            **options})

    return build


def draw(folder, noise):
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(PROMPTS, latents=noise, height=16, width=16, num_inference_steps=4, guidance_scale=1.0,
                      sigmas=[1.0, 0.75, 0.5, 0.25], output_type='pt').images
    return 2 * images - 1


@pytest.mark.parametrize('lora', [pytest.param(None, marks=pytest.mark.slow), dict(rank=2)], ids=['full', 'lora'])
def test_a_run_with_the_hook_trains_to_the_same_bits(lora, text_run, tmp_path):
    text_run('plain', lora=lora).train()
    expected = torch.rand(3)
    runner = text_run('hooked', dict(interval=2, prompts=PROMPTS, fuse=lora is not None), lora=lora)
    runner.train()
    assert torch.equal(torch.rand(3), expected)  # global random numbers too
    a, b = (torch.load(tmp_path / name / 'iter_4.pth', weights_only=True) for name in ('plain', 'hooked'))
    for part in ('state_dict', 'student_ema', 'optimizer', 'param_schedulers'):
        same_bits(a[part], b[part], part)

    out, noise = tmp_path / 'hooked/export', torch.randn(2, 4, 8, 8)
    with runner.model.student_ema.applied():
        images = sample_prompts(runner.model.eval(), PROMPTS, noise)
    torch.testing.assert_close(draw(out, noise), images, rtol=0, atol=1e-5)
    assert (draw(out / 'iter_2', noise) - images).abs().max() > 0
    assert not (out / 'iter_4').exists()  # that is the last one
    text = (out / 'README.md').read_text()
    assert '| iterations | 4 |' in text and '| student steps | 2 |' in text and 'PipelineExportHook' in text
    assert '| iterations | 2 |' in (out / 'iter_2/README.md').read_text()
    assert (out / 'samples/0001.png').is_file() and (out / 'iter_2/samples/0001.png').is_file()


def test_a_finished_run_that_is_resumed_exports_again(text_run, tmp_path):
    text_run('run').train()
    text_run('run', dict(), resume=True).train()
    kept = load_method(str(tmp_path / 'run/export'), device='cpu')
    state = torch.load(tmp_path / 'run/iter_4.pth', weights_only=True)
    assert all(torch.equal(p, state['student_ema']['weights'][name]) for name, p in kept.student.named_parameters())


def test_a_failing_export_is_logged_and_the_run_goes_on(text_run, tmp_path, monkeypatch):
    seen = []

    def fail(*args, **kwargs):
        seen.append(sorted(p.name for p in (tmp_path / 'run').glob('*.pth')))
        raise OSError('no space left on device')

    class Records(logging.Handler):
        def emit(self, record):
            records.append(record)

    records = []
    monkeypatch.setattr(module, 'export', fail)
    runner = text_run('run', dict(interval=2), **{'default_hooks.checkpoint.interval': 2})
    runner.logger.addHandler(Records(logging.ERROR))
    runner.train()
    assert seen == [['iter_2.pth'], ['iter_2.pth', 'iter_4.pth']]  # the checkpoint came first
    assert len(records) == 2 and 'OSError: no space left on device' in records[0].getMessage()
    assert 'iter_2 failed' in records[0].getMessage() and 'cdm export' in records[1].getMessage()


def test_mistakes_are_found_before_training(text_run, tmp_path):
    for hook, what in ((dict(dtype='float16'), 'dtype must be'), (dict(fuse=True), 'model.lora'),
                       (dict(out_dir=str(tmp_path / 'base')), 'holds the model')):
        with pytest.raises(ValueError, match=f'PipelineExportHook.*{what}'):
            text_run('run', hook).train()
    assert not list((tmp_path / 'run').glob('*.pth'))
    with pytest.raises(ValueError, match='PipelineExportHook.interval'):
        PipelineExportHook(interval=0)


def test_the_digits_are_exported_too_and_train_another(short_run, tmp_path):
    short_run(iters=2, custom_hooks=[dict(type='CDMHook'), dict(
        type='PipelineExportHook', out_dir=str(tmp_path / 'student'), prompts=[3, 7], ema=False)]).train()
    folder = shutil.move(tmp_path / 'student', tmp_path / 'moved')
    assert {p.name for p in folder.iterdir()} == {
        'README.md', 'transformer', 'scheduler', 'cdm_parts.json', 'samples'}
    backbone = MODELS.build(dict(type='SD3Backbone', pretrained=str(folder)))
    state = torch.load(tmp_path / 'run/iter_2.pth', weights_only=True)['state_dict']
    assert all(torch.equal(w, state[f'student.{name}']) for name, w in backbone.build_network().state_dict().items())
