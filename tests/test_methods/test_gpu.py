import copy
import importlib.util
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from tests_support import TINY_SD3, recording_optimizers, tiny_method

from cdm_plugin.engine import DistillationOptimWrapperConstructor


@pytest.mark.gpu
@pytest.mark.parametrize('type', ['CDM', 'DecoupledDMD', 'DMD2'])
def test_a_cycle_on_the_gpu_equals_the_cpu(type, labels):
    gradients = {}
    for device in ('cpu', 'cuda'):
        method = copy.deepcopy(tiny_method(type, torch.float64, student_every=2, alpha=2.0)).to(device)
        optimizers = recording_optimizers(method)
        for method.iteration in (0, 1):
            method.train_step(labels, optimizers)
        assert method.device.type == device
        gradients[device] = [g.cpu() for g in optimizers['student'].gradients if g is not None]
    for a, b in zip(gradients['cpu'], gradients['cuda']):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-12)


def places_that_wait(function):
    """How often Python waits for the GPU inside a function, by file name."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        torch.cuda.set_sync_debug_mode('warn')
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode('default')
    return Counter(Path(w.filename).name for w in caught if 'called a synchronizing' in str(w.message))


@pytest.mark.gpu
def test_waiting_for_the_gpu_is_noticed():
    """The mode that the next test relies on."""
    x = torch.ones(1, device='cuda')
    assert places_that_wait(lambda: x + 1) == {}
    assert places_that_wait(lambda: x.item()) == {Path(__file__).name: 1}


@pytest.mark.gpu
def test_a_step_does_not_wait_for_the_gpu(labels):
    """A host that waits cannot launch ahead, and the GPU idles. Reading what is logged comes after the step."""
    method = tiny_method(dtype=torch.float32, student_every=1, activation_checkpointing=True).cuda()
    optimizers = DistillationOptimWrapperConstructor({role: dict(
        type='AmpOptimWrapper', dtype='bfloat16', optimizer=dict(type='AdamW', lr=1e-5), clip_grad=dict(max_norm=1.0))
        for role in method.trained_roles})(method)
    # Embeddings that lie on the GPU, as pinned memory brings them; labels would be checked on the host.
    fields = method.backbone.condition(labels).fields
    data = dict(condition={name: t.cuda() for name, t in fields.items()})
    method.train_step(data, optimizers)  # null condition, libraries, optimizer state
    method.iteration = 1
    assert method.sample_draws(len(labels['prompt'])).rollout_steps > 1
    assert places_that_wait(lambda: method.train_step(data, optimizers)) == {}


@pytest.mark.gpu
def test_the_loops_of_the_step_benchmark_agree_on_the_gpu():
    path = Path(__file__).parents[2] / 'benchmarks' / 'step.py'
    spec = importlib.util.spec_from_file_location('step_benchmark', path)
    step = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(step)
    result = step.compare(dict(TINY_SD3), tokens=3, batch=3, cycles=2, dtype='float64', device='cuda')
    assert result['weights']['difference'] < 1e-10
    assert all(row['peak_gb'] >= row['transient_gb'] > 0 for rows in result['rows'].values() for row in rows)
