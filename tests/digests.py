"""What a few iterations of every method end in, to the bit: `python tests/digests.py` compares them with
tests/data/digests.json, `--write [ROW ...]` records them anew (all, or those rows).

Each row trains a shipped recipe through MMEngine's runner, on one thread in float32, and reads what its last checkpoint
holds. Bits depend on the processor's kernels: a digest of diffusers' network alone (`probe`) says whether this machine
computes as the one that recorded them; where it does not, losses are compared to 1e-4.
"""
import argparse
import copy
import hashlib
import json
import sys
import tempfile
from pathlib import Path

import torch

RECORDED = Path(__file__).parent / 'data' / 'digests.json'
PUBLISHED = {'model.anchor_aware_fake': False, 'model.losses': dict(_delete_=True)}
DIGITS = 'digits/cdm_sd3-digits_1xb32_4step_800.py'
TEACHER = 'digits/teacher_flow-matching_sd3-digits_1xb128_6k.py'
LARGE = {
    'model.backbone.config': None, 'model.backbone.dtype': 'float32', 'model.backbone.conditioner.dtype': 'float32',
    'model.time_grid.max_steps': 4, 'model.student_every': 1, 'model.lora.rank': 4, 'model.lora.alpha': 8,
    'train_dataloader.num_workers': 0, 'train_dataloader.persistent_workers': False, 'train_dataloader.batch_size': 2,
    'param_scheduler': None, 'optim_wrapper': dict(
        _delete_=True, constructor='DistillationOptimWrapperConstructor',
        **{role: dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-2), clip_grad=dict(max_norm=1.0))
           for role in ('student', 'fake')})}
# Row -> (recipe, tiny pipeline or None, options).
ROWS = {
    'cdm-published': (DIGITS, None, PUBLISHED),
    'cdm-consistent': (DIGITS, None, {}),
    'decoupled-dmd': (DIGITS, None, {'model.type': 'DecoupledDMD', **PUBLISHED}),
    'dmd2': (DIGITS, None, {'model.type': 'DMD2', **PUBLISHED}),
    'flow-matching': (TEACHER, None, {}),
    'cdm-lora-sd3': ('sd3/cdm_lora_sd3-medium_1xb4_4step_4k.py', 'sd3', {'model.image_size': 16}),
    'cdm-lora-longcat': ('longcat/cdm_lora_longcat-image_1xb4_4step_2k.py', 'longcat', {'model.image_size': 64}),
    'cdm-lora-flux': ('flux/cdm_lora_flux-dev_1xb1_4step_4k.py', 'flux',
                      {'model.image_size': 16, 'model.alpha': 1.0, 'model.losses': None}),  # all losses
}
ITERATIONS = 6


def digest(*tensors):
    """Of the bits of tensors, in their order."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


def probe():
    """Digest of one forward and backward pass of diffusers' network, without this package."""
    from diffusers import SD3Transformer2DModel
    torch.manual_seed(0)
    network = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, pos_embed_max_size=8, num_layers=2,
        num_attention_heads=4, attention_head_dim=16, caption_projection_dim=64, joint_attention_dim=22,
        pooled_projection_dim=11, qk_norm='rms_norm')
    out = network(torch.randn(32, 4, 8, 8), torch.randn(32, 2, 22), torch.randn(32, 11), torch.rand(32) * 1000).sample
    out.square().mean().backward()
    return digest(out, *(p.grad for p in network.parameters() if p.grad is not None))


def pipelines(root):
    """The tiny pipelines, and the prompts of all of them."""
    from tiny_pipelines import save_tiny_flux, save_tiny_longcat, save_tiny_sd3
    for name, save in (('sd3', save_tiny_sd3), ('longcat', save_tiny_longcat), ('flux', save_tiny_flux)):
        save(root / name)
    (root / 'prompts.txt').write_text('a red fox\na lighthouse\ndogs and birds\n')


def run(row, root):
    """Trains one row.

    Returns:
        dict: `losses`, by name of every iteration, and digests by what they are of.
    """
    from mmengine.runner import Runner

    from cdm_plugin.config import load_config
    recipe, pipeline, options = copy.deepcopy(ROWS[row])
    options = {'train_cfg.max_iters': ITERATIONS, 'train_cfg.val_interval': 10**6, 'log_level': 'ERROR',
               'default_hooks.checkpoint.interval': ITERATIONS, 'default_hooks.logger.interval': 1,
               'custom_hooks': [dict(type='CDMHook')], 'visualizer': None, 'work_dir': str(root / f'run-{row}'),
               'experiment_name': row, **(copy.deepcopy(LARGE) if pipeline else {}), **options}
    if pipeline:
        options.update({'model.backbone.pretrained': str(root / pipeline),
                        'train_dataloader.dataset.ann_file': str(root / 'prompts.txt')})
        options = {k: v for k, v in options.items() if k != 'train_cfg.val_interval'}
    torch.manual_seed(0)
    Runner.from_cfg(load_config(recipe, options)).train()
    state = torch.load(root / f'run-{row}' / f'iter_{ITERATIONS}.pth', weights_only=True)
    scalars = state['message_hub']['log_scalars']
    losses = {name: buffer['log']['data'].numpy().view(buffer['log']['dtype']).tolist()
              for name, buffer in scalars.items() if name.startswith('train/loss_')}
    weights = state['state_dict']
    roles = sorted({name.partition('.')[0] for name in weights})
    found = {role: digest(*(weights[k] for k in sorted(weights) if k.startswith(f'{role}.'))) for role in roles}
    ema = state['student_ema']['weights']
    found['ema'] = digest(*(ema[k] for k in sorted(ema)))
    for role, optimizer in state['optimizer'].items():
        moments = [value for _, of in sorted(optimizer['state'].items()) for _, value in sorted(of.items())
                   if isinstance(value, torch.Tensor)]
        found[f'optimizer of {role}'] = digest(*moments)
    return dict(losses=losses, **found)


def compare(row, found, recorded, same_machine):
    """What differs, as lines of text; bits count where `same_machine`."""
    lines = []
    for name, values in recorded['losses'].items():
        ours = found['losses'].get(name, [])
        close = len(ours) == len(values) and all(
            a == b if same_machine else abs(a - b) <= 1e-4 * abs(b) + 1e-7 for a, b in zip(ours, values))
        if not close:
            lines.append(f'{row}: {name} is {ours} instead of {values}')
    if found['losses'].keys() != recorded['losses'].keys():
        lines.append(f'{row}: losses {sorted(found["losses"])} instead of {sorted(recorded["losses"])}')
    for name in found.keys() | recorded.keys():
        if same_machine and name != 'losses' and found.get(name) != recorded.get(name):
            lines.append(f'{row}: other bits of {name}')
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--write', nargs='*', metavar='ROW')
    args = parser.parse_args()
    torch.set_num_threads(1)
    recorded = json.loads(RECORDED.read_text()) if RECORDED.is_file() else dict(probe=probe(), rows={})
    if args.write is not None and recorded['probe'] != probe() and args.write:
        sys.exit('this machine computes other bits than the one that recorded the rest: write all rows')
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        pipelines(root)
        found = {row: run(row, root) for row in args.write or ROWS}
    if args.write is not None:
        recorded = dict(probe=probe(), rows={**recorded['rows'], **found})
        RECORDED.write_text(json.dumps(recorded, indent=1, sort_keys=True) + '\n')
        return
    lines = [line for row in ROWS for line in compare(row, found[row], recorded['rows'][row],
                                                      recorded['probe'] == probe())]
    sys.exit('\n'.join(lines) or None)


if __name__ == '__main__':
    main()
