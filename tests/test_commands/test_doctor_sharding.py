"""What `cdm doctor` says of sharded runs, against the tensors that real DeepSpeed engines hold on two processes."""
import gc
import os

import pytest
import torch
from mmengine.registry import MODEL_WRAPPERS, MODELS

pytest.importorskip('deepspeed', reason='needs DeepSpeed, which the extra `test` installs')

from deepspeed_support import build, config  # noqa: E402
from recipes import SD3_ZERO2, report_of  # noqa: E402
from scale_support import init_gloo, launch, slow  # noqa: E402
from tests_support import tiny_backbone  # noqa: E402

from cdm_plugin.commands.doctor import diagnosis  # noqa: E402
from cdm_plugin.commands.doctor.diagnosis import diagnose  # noqa: E402
from cdm_plugin.commands.doctor.memory import build_optimizers, count_parts  # noqa: E402
from cdm_plugin.commands.doctor.meta import build_on_meta  # noqa: E402
from cdm_plugin.commands.doctor.report import Report  # noqa: E402
from cdm_plugin.commands.doctor.sharding import SHARINGS, chosen, memory  # noqa: E402

GIB = 2**30
# No weight of these is below the threshold that keeps it whole, what was gathered is let go at once, and the bucket,
# empty memory, is small.
ZERO = dict(reduce_bucket_size=1000, stage3_param_persistence_threshold=0, stage3_max_reuse_distance=0,
            stage3_max_live_parameters=0)


def wide():
    """A small SD3 of 4 million weights, beside which everything else in a process is little."""
    backbone = tiny_backbone()
    backbone['config'] = dict(backbone['config'], num_attention_heads=16, attention_head_dim=16,
                              caption_projection_dim=256)
    return backbone


CASES = {
    'stage 2, bfloat16': (dict(stage=2), True, {}),
    'stage 3': (dict(stage=3), False, {}),
    'stage 3, thresholds': (dict(stage=3, stage3_param_persistence_threshold=5000), True, {}),
    'lora, stage 3': (dict(stage=3), False, dict(lora=dict(rank=16)))}


def case_config(case, work_dir, world_size=1):
    zero, bf16, model = CASES[case]
    return config(work_dir, world_size, 2, dict(zero_optimization={**ZERO, **zero}, bf16=dict(enabled=bf16)),
                  backbone=wide(), **model)


def held(case, work_dir):
    """Bytes of all tensors of a process after two iterations, one of them with a student step."""
    world_size = int(os.environ['WORLD_SIZE'])
    runner = build(case_config(case, work_dir, world_size), world_size, int(os.environ['RANK']))
    runner.train()
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def estimated(case, gpus):
    """The doctor's bytes that stay on a GPU, with what waits in the CPU's memory."""
    cfg = case_config(case, 'none')
    method = build_on_meta(cfg.model.to_dict(), Report('', gpus))
    wrappers = build_optimizers(cfg, method)
    found = memory(cfg, method, wrappers, count_parts(cfg, method, wrappers), 0, chosen(cfg), gpus)
    return found.resident + found.cpu


@pytest.mark.parametrize('case', ['stage 2, bfloat16', 'lora, stage 3', *slow('stage 3', 'stage 3, thresholds')])
def test_engines_hold_what_the_doctor_says(case, tmp_path):
    found = launch(held, case, str(tmp_path))
    assert found == pytest.approx([estimated(case, 2)] * 2, rel=0.01)


def test_gradients_of_data_parallel_roles_stay_in_their_buckets():
    """They are the same memory after every step, so both roles' count for good."""
    for addresses, nbytes, expected in launch(buckets):
        assert addresses[0] == addresses[1]
        assert nbytes == expected


def buckets():
    init_gloo()
    method = MODELS.build(dict(type='CDM', backbone=tiny_backbone()))
    MODEL_WRAPPERS.build(dict(type='DistillationDataParallel', module=method))
    seen, nbytes = [], 0
    for _ in range(3):  # buckets are laid out anew after the first pass
        condition = method.backbone.condition(dict(prompt=torch.tensor([0, 1])))
        method.velocity('student', torch.zeros(method.latent_shape(2)), torch.ones(2), condition).sum().backward()
        storages = {p.grad.untyped_storage().data_ptr(): p.grad.untyped_storage().nbytes()
                    for p in method.student.parameters()}
        seen.append(sorted(storages))
        nbytes = sum(storages.values())
        method.student.zero_grad(set_to_none=True)
        torch.zeros(1000)  # would take freed memory
    return seen[1:], nbytes, sum(4 * p.numel() for p in method.student.parameters())


def test_the_table_of_the_large_recipes_by_hand():
    """SD3-Medium, N of 8, P = 2.028 B: bfloat16 weights 2 P each of three roles, masters and AdamW 12 P / N each of
    two, EMA 4 P / N; the stage 2 engine's buffers of positions."""
    p, encoders, positions = 2_028_328_000, 5_580_620_800, 192 * 192 * 1536
    report = report_of(SD3_ZERO2)
    vae = report.part('VAE').weights
    whole = 3 * 2 * (p + positions) + 2 * encoders + vae
    assert report.own_memory.resident == pytest.approx(whole + (2 * 12 + 4) * p / 8, rel=1e-4)
    assert report.own_sharing == 'ZeRO 2' and set(report.sharing) == {sharing.name for sharing in SHARINGS}
    sizes = {name: [m.peak / GIB for m in row] for name, row in report.sharing.items()}
    for name, row in sizes.items():
        assert name == 'data parallel' or row == sorted(row, reverse=True), name
    assert sizes['ZeRO 3'][3] < sizes['ZeRO 2'][3] < sizes['data parallel'][3]
    assert report.own_memory.cpu == 0 < report.sharing['ZeRO 3, all offloaded'][0].cpu


@pytest.mark.parametrize('strategy, part', [
    (dict(zero_optimization=dict(stage=4)), 'stage must be 1, 2 or 3'),
    (dict(zero_optimization=dict(stage=2, offload_param=dict(device='cpu'))), 'needs stage=3'),
    (dict(communication_datatype='fp32'), "did you mean 'communication_data_type'?")])
def test_mistakes_in_the_strategy_are_problems(strategy, part):
    cfg = config('none', strategy=strategy)
    assert [problem for problem in diagnose(cfg).problems if part in problem]


def test_a_strategy_without_deepspeed_is_a_problem(monkeypatch):
    monkeypatch.setattr(diagnosis, '_versions', lambda: dict.fromkeys(diagnosis.PACKAGES, 'not installed'))
    cfg = config('none', strategy=dict(zero_optimization=dict(stage=2)))
    assert "strategy needs deepspeed: pip install 'cdm_plugin[scale]'" in diagnose(cfg).problems
