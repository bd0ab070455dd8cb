"""Peak memory of saving, sampling and exporting, in a process of its own.

    python tests/memory_support.py make FOLDER --layers 14          # 1 GiB of bfloat16 weights
    python tests/memory_support.py measure fuse FOLDER

`measure` prints the most memory that the step had at once beyond the imported interpreter, and the size of the weights.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

STEPS = ('save', 'load', 'sample', 'export', 'fuse')
LORA = dict(rank=4)
WRAPPER = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=1e-3, momentum=0.9))
RUN = dict(
    default_scope='mmengine', log_level='ERROR', custom_hooks=[dict(type='CDMHook')],
    default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=-1)),
    train_dataloader=dict(batch_size=1, num_workers=0, dataset=dict(type='PromptDataset', ann_file='prompts.txt'),
                          sampler=dict(type='InfiniteSampler')),
    optim_wrapper=dict(constructor='DistillationOptimWrapperConstructor', student=WRAPPER, fake=WRAPPER),
    train_cfg=dict(type='IterBasedTrainLoop', max_iters=2))


def make(folder, layers, heads):
    """A pipeline around a larger network, a config of full weights and one of adapters, and a checkpoint of each."""
    import tiny_pipelines
    import torch
    from diffusers import SD3Transformer2DModel
    from mmengine.config import Config
    folder = Path(folder)
    tiny_pipelines.save_tiny_sd3(folder / 'base')
    shutil.rmtree(folder / 'base/transformer')
    torch.manual_seed(0)
    network = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, pos_embed_max_size=8, num_layers=layers,
        num_attention_heads=heads, attention_head_dim=64, caption_projection_dim=64 * heads, joint_attention_dim=40,
        pooled_projection_dim=32)
    network.to(torch.bfloat16).save_pretrained(folder / 'base/transformer')
    for kind in ('full', 'lora'):
        model = dict(type='CDM', image_size=16, backbone=dict(type='SD3Backbone', pretrained=str(folder / 'base')))
        if kind == 'lora':
            model = dict(model, lora=LORA, backbone=dict(model['backbone'], dtype='bfloat16'))
        config = Config(dict(RUN, model=model))
        config.dump(folder / f'{kind}.py')
        state = adapters(network) if kind == 'lora' else network.float().state_dict()
        torch.save(checkpoint(state, config), folder / f'{kind}.pth')


def adapters(network):
    """Adapters as LoRA names them in a checkpoint."""
    import torch
    from torch import nn

    from cdm_plugin.backbones import Backbone
    targets = Backbone.lora_targets
    state = {}
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear) and name.endswith(tuple(targets)):
            key = f'adapters.{name.replace(".", "-")}'
            state[f'{key}.lora_A.weight'] = 0.05 * torch.randn(LORA['rank'], layer.in_features)
            state[f'{key}.lora_B.weight'] = 0.05 * torch.randn(layer.out_features, LORA['rank'])
    return state


def checkpoint(state, config):
    """What a run saves, without the optimizers."""
    average = {name: weight.clone() for name, weight in state.items() if name != 'pos_embed.pos_embed'}
    weights = {f'{role}.{name}': weight.clone() for role in ('student', 'fake') for name, weight in state.items()}
    return dict(state_dict=weights, student_ema=dict(steps=5, weights=average), meta=dict(iter=10),
                config=config.to_dict())


def status(key):
    """A line of /proc/self/status in bytes."""
    for line in Path('/proc/self/status').read_text().splitlines():
        if line.startswith(f'{key}:'):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def measure(step, folder):
    """Peak of a step beyond what the imported libraries take, and bytes of the weights.

    Args:
        step (str): One of STEPS.
        folder (str): As `make` wrote it.
    """
    import torch
    from mmengine.config import Config
    from mmengine.runner import Runner

    from cdm_plugin.export import export
    from cdm_plugin.inference import load_method, sample_prompts, student_weights
    torch.set_num_threads(1)
    folder, kind = Path(folder), 'lora' if step == 'fuse' else 'full'
    config, file = str(folder / f'{kind}.py'), str(folder / f'{kind}.pth')
    if step == 'save':
        (folder / 'prompts.txt').write_text('a')
        cfg = Config.fromfile(config)
        cfg.work_dir, cfg.train_dataloader.dataset.ann_file = str(folder / 'run'), str(folder / 'prompts.txt')
        runner = Runner.from_cfg(cfg)
        runner.train()
        before = start()
        runner.save_checkpoint(str(folder / 'run'), 'iter_2.pth', by_epoch=False)
        written = (folder / 'run/iter_2.pth').stat().st_size
        return dict(peak=written + peak() - before, weights=written)  # what is saved was there before
    # What is imported at the first use is no memory of the step.
    method = load_method(str(folder / f'warm/{kind}.py'), str(folder / f'warm/{kind}.pth'), device='cpu')
    export(method, folder / 'warm/out', prompts=['a'], fuse=step == 'fuse')
    del method
    before = start()
    method = load_method(config, file, device='cpu')
    if step == 'sample':
        with student_weights(method, ema=True):
            sample_prompts(method, ['a'], method.noise(0, [0]), sigmas=torch.tensor([1.0]))
    elif step in ('export', 'fuse'):
        export(method, folder / 'out', fuse=step == 'fuse')
    size = sum(w.nbytes for w in (method.base or method.student).state_dict().values())
    return dict(peak=peak() - before, weights=size)


def start():
    """Lets the peak begin anew, and returns the memory in use."""
    Path('/proc/self/clear_refs').write_text('5')
    return status('VmRSS')


def peak():
    """The most memory in use since then."""
    return status('VmHWM')


def child(*arguments):
    """This script in a process of its own; what it prints last, from JSON."""
    done = subprocess.run([sys.executable, __file__, *map(str, arguments)], capture_output=True, text=True,
                          env=dict(os.environ, OMP_NUM_THREADS='1'))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('action', choices=['make', 'measure'])
    parser.add_argument('arguments', nargs='+')
    parser.add_argument('--layers', type=int, default=14)
    parser.add_argument('--heads', type=int, default=16)
    args = parser.parse_args()
    if args.action == 'make':
        make(args.arguments[0], args.layers, args.heads)
        make(Path(args.arguments[0], 'warm'), 1, heads=1)
        print('null')
    else:
        print(json.dumps(measure(*args.arguments)))
