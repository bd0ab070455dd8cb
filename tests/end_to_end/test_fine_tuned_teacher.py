"""From a LoRA of one's own to its few-step form, by the command line alone: a teacher that was fine-tuned to draw two
digits only, whatever it is asked for, gives a student that does the same in four steps."""
import numpy as np
import pytest
import torch

from cdm_plugin.assets import resolve
from cdm_plugin.cli import main
from cdm_plugin.inference import load_method, sample_prompts, step_sigmas
from cdm_plugin.metrics import DigitClassifier, classifier_features, frechet_distance

TEACHER = 'digits/teacher_flow-matching_sd3-digits_1xb128_6k.py'
CDM = 'digits/cdm_sd3-digits_1xb32_4step_800.py'
TWO = (1, 7)
LORA = ['model.lora.rank=16',
        "model.lora.target_modules=['to_q','to_k','to_v','to_out.0','linear_1','linear_2','proj']"]
QUIET = ['default_hooks.logger.interval=1000', 'custom_hooks.1.interval=100000', 'log_level=ERROR',
         'train_cfg.val_interval=100000']


def command(*arguments):
    assert main([str(a) for a in arguments]) == 0


def judged(images):
    """Share of the images that are one of the two digits, by a classifier that no training saw; their features."""
    classifier = DigitClassifier.from_pretrained()
    features = classifier_features(images, classifier)
    with torch.no_grad():
        found = classifier.head(features).argmax(1)
    return float(sum(found == digit for digit in TWO).double().mean()), features


@pytest.mark.slow
def test_the_student_draws_what_the_fine_tuned_teacher_draws(tmp_path, monkeypatch):
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    with np.load(resolve('asset:digits/digits_16.npz')) as file:
        chosen = np.isin(file['labels'], TWO)
        images = file['images'][chosen][:1500]
    labels = np.random.default_rng(0).integers(0, 10, len(images))  # they follow the pictures, not the labels
    np.savez(tmp_path / 'two.npz', images=images, labels=labels)

    tuning = [
        '--cfg-options', *QUIET, *LORA, 'model.backbone.config=None', 'model.backbone.pretrained=asset:digits/teacher',
        f'train_dataloader.dataset.data_file={tmp_path / "two.npz"}', 'train_dataloader.batch_size=32',
        'train_cfg.max_iters=300', 'optim_wrapper.student.optimizer.lr=0.003', 'default_hooks.checkpoint.interval=300']
    command('train', TEACHER, '--work-dir', tmp_path / 'tuning', *tuning)
    command('export', TEACHER, '--checkpoint', tmp_path / 'tuning', '--out', tmp_path / 'lora', '--no-ema', *tuning)

    distilling = [
        '--cfg-options', *QUIET, *LORA, f'model.teacher.lora={tmp_path / "lora"}', 'train_cfg.max_iters=120',
        'param_scheduler.student.1.end=120', 'param_scheduler.fake.1.end=120', 'default_hooks.checkpoint.interval=120',
        'optim_wrapper.student.optimizer.lr=0.001', 'optim_wrapper.fake.optimizer.lr=0.002']
    command('train', CDM, '--work-dir', tmp_path / 'student', *distilling)

    run = load_method(CDM, str(tmp_path / 'student'), device='cpu', roles=('student', 'teacher'))
    prompts = list(range(10)) * 25
    noise = torch.randn(run.latent_shape(len(prompts)), generator=torch.Generator().manual_seed(0))
    base = load_method('asset:digits/teacher', device='cpu')
    share, _ = judged(sample_prompts(base, prompts, noise, sigmas=step_sigmas(10), guidance_scale=2))
    assert share < 0.3  # the base draws what it is asked for
    share, reference = judged(sample_prompts(run, prompts, noise.flip(0), role='teacher', sigmas=step_sigmas(50),
                                             guidance_scale=2))
    assert share > 0.8, share
    with run.student_ema.applied():
        share, drawn = judged(sample_prompts(run, prompts, noise))
    assert share > 0.8, share
    _, teacher = judged(sample_prompts(run, prompts, noise, role='teacher', sigmas=step_sigmas(2), guidance_scale=2))
    # In four calls it is closer than the teacher in four, which are two guided steps.
    assert frechet_distance(drawn, reference) < frechet_distance(teacher, reference)
