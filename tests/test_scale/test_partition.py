"""Pretrained networks under ZeRO-3: built partitioned, LoRA over a partitioned base, partitioned text encoders."""
import shutil

import pytest
import torch

pytest.importorskip('deepspeed', reason='needs DeepSpeed, which the extra `test` installs')

from deepspeed_support import STRATEGIES, build_pretrained, checkpoint, config, logged, train  # noqa: E402
from scale_support import launch, selected, slow  # noqa: E402
from tiny_pipelines import save_tiny_longcat, save_tiny_sd3  # noqa: E402

ITERATIONS = 6
SHORT = dict(time_grid=dict(max_steps=4), student_every=2)
# Name -> pipeline, strategy, settings of the run. The encoders of both pipelines encode every batch.
CASES = {
    'sd3': ('sd3', 'stage3', dict(SHORT, type='CDM', activation_checkpointing=True)),
    'sd3_lora': ('sd3', 'stage3', dict(SHORT, type='CDM', lora=dict(rank=2), accumulate=2)),
    'longcat': ('longcat', 'stage3', dict(type='DMD2', student_every=2)),
    'longcat_lora': ('longcat', 'stage3', dict(type='DecoupledDMD', lora=dict(rank=2), activation_checkpointing=True)),
    'longcat_stage2': ('longcat', 'stage2', dict(SHORT, type='CDM')),
    'digits': ('digits', 'stage1', dict(type='DecoupledDMD'))}


def options(root, case):
    """Arguments of `config` for a case."""
    pipeline, _, chosen = CASES[case]
    if pipeline == 'digits':
        return dict(chosen, iters=ITERATIONS, backbone=dict(type='SD3Backbone', pretrained='asset:digits/teacher'),
                    dataset=dict(type='LabelDataset', num_classes=10, length=24))
    backbone, size = dict(sd3=('SD3Backbone', 16), longcat=('LongCatImageBackbone', 64))[pipeline]
    return dict(chosen, iters=ITERATIONS, image_size=size,
                backbone=dict(type=backbone, pretrained=f'{root}/{pipeline}'),
                dataset=dict(type='PromptDataset', ann_file=f'{root}/prompts.txt'))


def train_cases(root, cases):
    """Cases on this rank. All runs start from the weights of the single process: new parts (adapters, the anchor's
    embedding) are drawn, and the order of draws is no promise."""
    return {case: train(f'{root}/{case}', STRATEGIES[CASES[case][1]], build=build_pretrained,
                        load_from=f'{root}/{case}_start.pth', **options(root, case)) for case in cases}


@pytest.fixture(scope='module')
def pipelines(tmp_path_factory):
    """The folder of everything: small pipelines and prompts."""
    root = tmp_path_factory.mktemp('partition')
    save_tiny_sd3(root / 'sd3')
    save_tiny_longcat(root / 'longcat')
    (root / 'prompts.txt').write_text(''.join(f'{word} {n}\n' for n in range(3) for word in (
        'a fox', 'two birds over the sea', 'snow')))
    return root


def train_single(root, case):
    """The case in one process, without a strategy; its losses."""
    runner = build_pretrained(config(f'{root}/{case}_single', **options(root, case)))
    torch.save(dict(state_dict=runner.model.state_dict(), meta={}), f'{root}/{case}_start.pth')
    runner.train()
    return logged(runner)


@pytest.fixture(scope='module')
def runs(request, pipelines):
    """Losses of a single process and of every rank, by case."""
    cases = selected(request, 'case')
    single = {case: train_single(pipelines, case) for case in cases}
    return single, launch(train_cases, str(pipelines), cases)


@pytest.mark.parametrize('case', ['sd3', 'longcat_lora', *slow('sd3_lora', 'longcat', 'longcat_stage2', 'digits')])
def test_same_training_as_in_one_process(runs, pipelines, case):
    single, ranks = runs
    a, b = (checkpoint(pipelines / folder / f'iter_{ITERATIONS}.pth') for folder in (f'{case}_single', case))
    start = checkpoint(pipelines / f'{case}_start.pth')['state_dict']
    assert a['state_dict'].keys() == b['state_dict'].keys() == start.keys()
    assert max(float((a['state_dict'][key] - start[key]).abs().max()) for key in start) > 1e-3
    for key, weight in a['state_dict'].items():
        assert torch.allclose(weight, b['state_dict'][key], rtol=0, atol=1e-5), key
    for own in ranks:
        assert own[case].keys() == single[case].keys()
        for key, values in single[case].items():
            assert own[case][key] == pytest.approx(values, rel=1e-5, abs=1e-5), key


def build_only(root):
    """What rank 1 loads, and what it holds when the networks are built; masters in bfloat16 runs."""
    import diffusers
    loaded = []
    load = diffusers.SD3Transformer2DModel.from_pretrained.__func__

    def watched(cls, *args, **kwargs):
        loaded.append(cls.__name__)
        return load(cls, *args, **kwargs)

    diffusers.SD3Transformer2DModel.from_pretrained = classmethod(watched)
    results = {}
    for stage in ('stage3', 'stage2'):
        cfg = config(f'{root}/built_{stage}', 2, strategy=dict(STRATEGIES[stage], bf16=dict(enabled=True)),
                     **options(root, 'sd3'))
        loaded.clear()
        runner = build_pretrained(cfg)
        built = {}
        build_model = runner.strategy.build_model

        def watch(model):
            method = build_model(model)
            for role in ('student', 'fake', 'teacher'):
                own = [p for name, p in getattr(method, role).named_parameters() if 'anchor_embedding' not in name]
                built[role] = (sum(p.numel() for p in own), sum(getattr(p, 'ds_tensor', p).numel() for p in own))
            return method

        runner.strategy.build_model = watch
        runner.strategy.prepare(runner.model, optim_wrapper=runner.optim_wrapper, dispatch_kwargs=dict(
            train_micro_batch_size_per_gpu=2))
        results[stage] = (list(loaded), built, {
            role: {name: w.clone() for name, w in shards.weights.items()}
            for role, shards in runner.strategy.shards.items()},
            {role: {name: (p.start, p.numel) for name, p in shards.pieces.items()}
             for role, shards in runner.strategy.shards.items()})
    return results


def test_only_the_first_rank_loads_and_none_keeps_a_whole_network(pipelines):
    """And the float32 weights of a bfloat16 run are those of the file, not their bfloat16 roundings."""
    import diffusers
    pretrained = dict(diffusers.SD3Transformer2DModel.from_pretrained(
        pipelines / 'sd3', subfolder='transformer').named_parameters())
    whole = sum(p.numel() for p in pretrained.values())
    ranks = launch(build_only, str(pipelines))
    for rank, results in enumerate(ranks):
        loaded, built, _, _ = results['stage3']
        assert len(loaded) == (3 if rank == 0 else 0)
        for held, partitioned in built.values():
            assert held == 0 and whole / 2 <= partitioned < 0.6 * whole
        for _, _, weights, places in results.values():
            assert weights['student'] and weights['fake']
            for role, pieces in weights.items():
                for name, piece in pieces.items():
                    if name in pretrained:
                        start, numel = places[role][name]
                        assert torch.equal(piece, pretrained[name].detach().flatten()[start:start + numel]), name


def build_broken(root):
    """What every rank says of weights that cannot be loaded."""
    try:
        build_pretrained(config(f'{root}/broken_run', 2, strategy=STRATEGIES['stage3'], **{
            **options(root, 'sd3'), 'backbone': dict(type='SD3Backbone', pretrained=f'{root}/broken')})).train()
    except (ValueError, OSError) as error:
        return f'{type(error).__name__}: {error}'


def test_weights_that_rank_0_cannot_load_stop_every_rank(pipelines):
    shutil.copytree(pipelines / 'sd3', pipelines / 'broken')
    for file in (pipelines / 'broken/transformer').glob('*.safetensors'):
        file.write_bytes(file.read_bytes()[:100])
    first, second = launch(build_broken, str(pipelines), timeout=100)
    assert 'cannot be loaded' in first
    assert 'rank 0 could not load a network' in second and 'cannot be loaded' in second
