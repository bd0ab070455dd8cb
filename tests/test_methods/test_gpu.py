import copy

import pytest
import torch
from tests_support import recording_optimizers, tiny_method


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
