"""Tables of docs/scaling.md: memory, traffic and time of the large recipes, from 1 to 64 GPUs.

    python benchmarks/scaling_plan.py            # writes the tables between the marks of docs/scaling.md

Memory and network calls are `cdm doctor`'s, traffic is the formula that `communication.py` checks against counted
bytes, floating-point operations are counted by torch on the recipe's networks. The speeds of GPUs and links are
assumptions.
"""
import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from communication import expected_bytes
from torch.utils.flop_counter import FlopCounterMode

from cdm_plugin.commands.doctor.calls import expected_calls
from cdm_plugin.commands.doctor.diagnosis import diagnose
from cdm_plugin.commands.doctor.meta import build_on_meta
from cdm_plugin.commands.doctor.report import Report
from cdm_plugin.config import read_config

RECIPES = {'SD3-Medium': 'sd3/cdm_sd3-medium_8xb16_4step_4k.py',
           'LongCat-Image': 'longcat/cdm_longcat-image_8xb8_4step_2k.py'}
GPUS = (1, 2, 4, 8, 16, 32, 64)
STAGES = {'data parallel': 0, 'ZeRO 2': 2, 'ZeRO 3': 3}
# Assumptions: dense bfloat16 at 40% of an H100's 989 TFLOP/s; GB/s a GPU in each direction, as collectives reach them.
FLOPS = 0.4 * 989e12
NODE, NVLINK, NETWORK = 8, 300e9, 40e9
MARK = '<!-- tables of benchmarks/scaling_plan.py -->'


def table(head: Sequence[str], rows: list[Sequence[str]]) -> str:
    """A Markdown table."""
    return '\n'.join('| ' + ' | '.join(row) + ' |' for row in (head, ['---'] * len(head), *rows))


def forward_flops(method: Any) -> float:
    """Floating-point operations of one forward pass of one sample."""
    x, sigma = torch.empty(method.latent_shape(1), device='meta'), torch.empty(1, device='meta')
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        method.velocity('teacher', x, sigma, method.null_condition(1))
    return counter.get_total_flops()


def memory_rows(recipe: str) -> list[Sequence[str]]:
    """GiB of a GPU, by the number of GPUs."""
    report = diagnose(read_config(recipe), table=GPUS)
    return [[name, *(f'{memory.peak / 2**30:.0f}' for memory in memories)] for name, memories in report.sharing.items()]


def traffic(recipe: str, stage: int, gpus: int) -> dict[str, float]:
    """GB that a GPU sends in a mean iteration, and seconds of sending and of computing."""
    cfg = read_config(recipe)
    method = build_on_meta(cfg.model.to_dict(), Report('', gpus))
    batch = cfg.train_dataloader.batch_size
    calls = expected_calls(method, batch, gpus)
    weights = {role: sum(p.numel() for p in getattr(method, role).parameters())
               for role in ('student', 'fake', 'teacher')}
    # Data parallelism reduces float32; the sharded recipes gather bfloat16 and reduce float32.
    whole = expected_bytes(stage, method.activation_checkpointing, weights, calls.calls,
                           dict(fake=method.fake_steps, student=1 / method.student_every),
                           method.fake_steps * (method.fake_merge > 0), 1)
    bytes_of = {'all-reduce': 4 * 2, 'all-gather': 2, 'reduce-scatter': 4}  # a ring's all-reduce sends all twice
    sent = sum(n * bytes_of[name] for name, n in whole.items()) * (gpus - 1) / gpus
    gathered = whole.get('all-gather', 0) * 2
    return dict(gathered=gathered / 1e9, sent=sent / 1e9, calls=sum(calls.calls.values()),
                wire=sent / (NVLINK if gpus <= NODE else NETWORK),
                compute=calls.equivalents * batch * forward_flops(method) / FLOPS)


def sections() -> str:
    """All tables."""
    parts = []
    for model, recipe in RECIPES.items():
        parts += [f'### {model}', '`' + recipe + '`: memory of each GPU at most, GiB.',
                  table(['GPUs', *map(str, GPUS)], memory_rows(recipe)),
                  'A mean iteration (one fake-score step and half a student step), each GPU:']
        rows = []
        for name, stage in STAGES.items():
            for gpus in (8, 64):
                t = traffic(recipe, stage, gpus)
                rows.append([name, str(gpus), f'{t["calls"]:.1f}', f'{t["gathered"]:.0f}', f'{t["sent"]:.0f}',
                             f'{t["wire"]:.2f}', f'{t["compute"]:.2f}'])
        parts.append(table(['', 'GPUs', 'network calls', 'GB gathered', 'GB sent', 's on the wire, assumed',
                            's of computing, assumed'], rows))
    return '\n\n'.join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, default=Path('docs/scaling.md'))
    args = parser.parse_args()
    before, _, after = args.out.read_text().split(MARK)
    args.out.write_text(f'{before}{MARK}\n\n{sections()}\n\n{MARK}{after}')


if __name__ == '__main__':
    main()
