"""What a cycle costs: this package's loop beside the literal one, on the same model, draws and batch.

    python benchmarks/step.py                        # a small SD3 on one CPU thread, under 2 minutes
    python benchmarks/step.py --config sd3-medium    # full size, random weights, bfloat16; needs a GPU
    python benchmarks/step.py --sweep                # what single config keys do to the optimised loop
    python benchmarks/step.py --recipes              # the literal loop beside the consistent and the cheap recipes

A cycle is two iterations: two fake-score steps and one student step (CDM, the published recipe). The literal loop is
the authors': every sample goes through the whole time grid, every loss calls the student itself, every question to the
teacher or the fake score is a call of its own. Both loops run alternately in one process, so that what else the machine
does meets both, and both train: where each has weights of its own, these agree at the end.

Runs from a checkout: the literal loop's arithmetic is that of tests/literal.py, which shares no code with the package.
"""
import argparse
import contextlib
import copy
import gc
import importlib.util
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

import cdm_plugin  # noqa: F401  registers everything
from cdm_plugin.condition import Condition
from cdm_plugin.conditioners import Conditioner
from cdm_plugin.engine import DistillationOptimWrapperConstructor

ROLES = ('student', 'fake', 'teacher')
LEARNING_RATES = dict(student=1e-5, fake=5e-6)
WEIGHT_DECAY, MAX_NORM = 1e-4, 1.0
CONFIGS = {
    # 144 image tokens, so that a forward pass of even one sample is arithmetic rather than Python.
    'tiny': dict(
        network=dict(
            num_layers=4, num_attention_heads=4, attention_head_dim=32, joint_attention_dim=64,
            caption_projection_dim=128, pooled_projection_dim=32, pos_embed_max_size=12, in_channels=4,
            out_channels=4, sample_size=24, patch_size=2),
        tokens=16, batch=16, cycles=10, dtype='float32', device='cpu'),
    'sd3-medium': dict(
        network=dict(
            num_layers=24, num_attention_heads=24, attention_head_dim=64, joint_attention_dim=4096,
            caption_projection_dim=1536, pooled_projection_dim=2048, pos_embed_max_size=192, in_channels=16,
            out_channels=16, sample_size=128, patch_size=2),
        # 77 tokens of CLIP and 256 of T5. Two sets of trained weights with their moments would take some 140 GB.
        tokens=333, batch=16, cycles=3, dtype='bfloat16', device='cuda', checkpointing=True, shared=True),
}


CONSISTENT = dict(anchor_aware_fake=True, losses=dict(
    ca=dict(sigma=dict(type='UniformSigma')), cdm=dict(guided=True, point_sigma=dict(type='AnchorSigma'))))
ONE_ROLLOUT = dict(fake_steps=2, student_every=1)
FIXED_GRID = dict(time_grid=dict(type='FixedTimeGrid'))
# Changes of CDM's published recipe; each has two fake-score steps a student step.
RECIPES = {
    'CDM, published': {},
    'CDM, published, one rollout': ONE_ROLLOUT,
    'CDM, consistent': CONSISTENT,
    'CDM, consistent, one rollout': {**CONSISTENT, **ONE_ROLLOUT},
    'CDM, consistent, fixed grid, one rollout (the demo)': {**CONSISTENT, **ONE_ROLLOUT, **FIXED_GRID},
    'DMD2, aware, one rollout': dict(type='DMD2', anchor_aware_fake=True, **ONE_ROLLOUT),
}


def load_literal() -> Any:
    """The module tests/literal.py of this checkout."""
    path = Path(__file__).resolve().parents[1] / 'tests' / 'literal.py'
    spec = importlib.util.spec_from_file_location('cdm_literal', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class NullEmbedding(Conditioner):
    """Holds a null condition; the batch brings its embeddings."""

    def __init__(self, fields: dict[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in fields.items():
            self.register_buffer(name, tensor, persistent=False)

    def null(self) -> Condition:
        return Condition(dict(self.named_buffers()))


def random_fields(network: dict[str, Any], tokens: int, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Text embeddings of `batch` prompts that nobody wrote."""
    return dict(encoder_hidden_states=torch.randn(batch, tokens, network['joint_attention_dim'], generator=generator),
                pooled_projections=torch.randn(batch, network['pooled_projection_dim'], generator=generator))


def build(network: dict[str, Any], tokens: int, batch: int, *, seed: int, dtype: str, checkpointing: bool,
          device: str, **recipe: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """A method (CDM, as published but for `recipe`) on random weights, different in every role, and a batch of
    embeddings on the device."""
    generator = torch.Generator().manual_seed(seed)
    null = random_fields(network, tokens, 1, generator)
    fields = {name: t.to(device) for name, t in random_fields(network, tokens, batch, generator).items()}
    torch.manual_seed(seed)
    backbone = dict(type='SD3Backbone', config=dict(network), scheduler=dict(shift=3.0),
                    conditioner=NullEmbedding(null), codec=dict(type='PixelCodec', scale=1))
    method = MODELS.build({**dict(type='CDM', backbone=backbone, activation_checkpointing=checkpointing), **recipe})
    method = method.to(device, torch.float64 if dtype == 'float64' else torch.float32).train()
    with torch.no_grad():  # fresh networks have zero biases, and three equal ones make zero losses
        for role in ROLES:
            for parameter in getattr(method, role).parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.01)
    method.seed = seed
    return method, fields


def optimizers_of(method: nn.Module, autocast: bool, **adamw: Any) -> Any:
    """The published recipe's optimizers, as a config states them."""
    def role(name: str) -> dict[str, Any]:
        wrapper = dict(type='AmpOptimWrapper', dtype='bfloat16') if autocast else dict(type='OptimWrapper')
        optimizer = dict(type='AdamW', lr=LEARNING_RATES[name], weight_decay=WEIGHT_DECAY, **adamw)
        return dict(wrapper, optimizer=optimizer, clip_grad=dict(max_norm=MAX_NORM))
    return DistillationOptimWrapperConstructor({name: role(name) for name in LEARNING_RATES})(method)


@contextlib.contextmanager
def counted(networks: dict[str, nn.Module], calls: Counter, samples: Counter) -> Iterator[None]:
    """Counts the networks' forward passes inside by (role, with gradient), recomputations left out: they call blocks,
    not networks."""
    def count(role: str) -> Callable:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            x = kwargs['hidden_states'] if 'hidden_states' in kwargs else args[0]
            calls[role, torch.is_grad_enabled()] += 1
            samples[role, torch.is_grad_enabled()] += len(x)
        return hook

    handles = [network.register_forward_hook(count(role), with_kwargs=True) for role, network in networks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class OptimisedLoop:
    """The package's own train_step.

    Args:
        method (CDM): What trains.
        fields (dict): The batch's embeddings.
        optimizers (OptimWrapperDict): Of the student and the fake score.
    """

    def __init__(self, method: nn.Module, fields: dict[str, Tensor], optimizers: Any) -> None:
        self.method, self.fields, self.optimizers = method, fields, optimizers
        self.networks = {role: getattr(method, role) for role in ROLES}

    def iterate(self, iteration: int) -> None:
        self.method.iteration = iteration
        self.method.train_step(dict(condition=self.fields), self.optimizers)


class LiteralLoop:
    """The authors' loop, with the arithmetic of tests/literal.py and one rollout an iteration.

    Args:
        method (CDM): Where draws and weights come from.
        fields (dict): The batch's embeddings.
        optimizers (OptimWrapperDict): Those of the method.
        autocast (bool): Whether networks run in bfloat16.
        shared (bool): Train the method's own networks with its optimizers, rather than copies.
    """

    def __init__(self, method: nn.Module, fields: dict[str, Tensor], optimizers: Any, autocast: bool,
                 shared: bool) -> None:
        self.method, self.literal, self.autocast = method, load_literal(), autocast
        own = (lambda network: network) if shared else copy.deepcopy
        self.networks = {role: own(getattr(method, role)) for role in ROLES}
        self.optimizers = {name: optimizers[name].optimizer if shared else torch.optim.AdamW(
            self.networks[name].parameters(), lr=LEARNING_RATES[name], weight_decay=WEIGHT_DECAY)
            for name in LEARNING_RATES}
        self.fields = {name: t.to(method.math_dtype) for name, t in fields.items()}
        null = method.null_condition(len(next(iter(fields.values()))))
        self.null_fields = {name: t.to(method.math_dtype) for name, t in null.fields.items()}

    def velocity(self, role: str, x: Tensor, sigma: Tensor, null: bool = False) -> Tensor:
        # One autocast context a call: it would keep weights that were cast without gradient.
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast):
            v = self.literal.network_velocity(
                self.networks[role], x, sigma, self.null_fields if null else self.fields)
        return v.to(self.method.math_dtype)

    def denoise(self, role: str, x: Tensor, sigma: Tensor, null: bool = False) -> Tensor:
        return x - sigma[:, None, None, None] * self.velocity(role, x, sigma, null)

    def step(self, role: str, loss: Tensor) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.networks[role].parameters(), MAX_NORM)
        self.optimizers[role].step()
        self.optimizers[role].zero_grad()

    @torch.no_grad()
    def rollout(self, draws: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The whole trajectory of every sample, in which the anchors are looked up: x, velocity, sigma."""
        x, points, velocities = draws.noise, [], []
        levels = torch.cat([draws.sigmas, draws.sigmas.new_zeros(1)])
        for i in range(len(draws.sigmas)):
            v = self.velocity('student', x, levels[i].expand(len(x)))
            points.append(x)
            velocities.append(v)
            x = x + (levels[i + 1] - levels[i]) * v
        rows = torch.arange(len(x), device=x.device)
        return torch.stack(points)[draws.anchor, rows], torch.stack(velocities)[draws.anchor, rows], draws.anchor_sigma

    def iterate(self, iteration: int) -> None:
        self.method.iteration = iteration
        draws = self.method.sample_draws(len(next(iter(self.fields.values()))))
        x_n, v_n, sigma_n = self.rollout(draws)
        x0 = x_n - sigma_n[:, None, None, None] * v_n
        (fake_sigma,), (fake_noise,) = draws.fake_sigma, draws.fake_noise
        z = self.literal.noised(x0, fake_noise, fake_sigma)
        velocity = self.velocity('fake', z, fake_sigma)
        self.step('fake', ((velocity - (fake_noise - x0)) ** 2).mean())
        self.literal.merge(self.networks['fake'], self.networks['student'], self.method.fake_merge)
        if draws.losses:
            point_sigma = draws.losses['cdm']['point_sigma']
            x_c = x_n + (point_sigma - sigma_n)[:, None, None, None] * v_n
            self.step('student', self.ca(draws.losses['ca'], x_n, sigma_n)
                      + self.matching(draws.losses['dm'], x_n, sigma_n)
                      + self.matching(draws.losses['cdm'], x_c, point_sigma))

    def ca(self, draws: dict[str, Tensor], x: Tensor, sigma: Tensor) -> Tensor:
        x0 = self.denoise('student', x, sigma)
        with torch.no_grad():
            z = self.literal.noised(x0, draws['noise'], draws['sigma'])
            cond, null = self.denoise('teacher', z, draws['sigma']), self.denoise('teacher', z, draws['sigma'], True)
        return self.literal.regression(x0, self.method.alpha * (cond - null), cond)

    def matching(self, draws: dict[str, Tensor], x: Tensor, sigma: Tensor) -> Tensor:
        x0 = self.denoise('student', x, sigma)
        with torch.no_grad():
            z = self.literal.noised(x0, draws['noise'], draws['sigma'])
            real, fake = self.denoise('teacher', z, draws['sigma']), self.denoise('fake', z, draws['sigma'])
        return self.literal.regression(x0, real - fake, real)


def synchronise(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def timed_cycle(loop: Any, cycle: int) -> dict[str, Any]:
    """Runs one cycle: seconds on the clock and of the processor (which other programs do not lengthen), calls and
    samples by (role, with gradient), and on a GPU gigabytes: the peak, and what of it is not there before the cycle
    (activations, gradients)."""
    device, calls, samples = loop.method.device, Counter(), Counter()
    synchronise(device)
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
        resident = torch.cuda.memory_allocated(device)
    with counted(loop.networks, calls, samples):
        start, processor_start = time.perf_counter(), time.process_time()
        every = loop.method.student_every
        for iteration in range(every * cycle, every * (cycle + 1)):
            loop.iterate(iteration)
        synchronise(device)
        seconds, processor_seconds = time.perf_counter() - start, time.process_time() - processor_start
    row = dict(seconds=seconds, processor_seconds=processor_seconds, calls=calls, samples=samples)
    if device.type == 'cuda':
        peak = torch.cuda.max_memory_allocated(device)
        row.update(peak_gb=peak / 1e9, transient_gb=(peak - resident) / 1e9)
    return row


def work(samples: Counter, checkpointing: bool) -> float:
    """Forward-equivalents: 1 without gradient; forward and backward 3, and 1 more where activations are recomputed."""
    return sum(n * (1 if not with_grad else 4 if checkpointing else 3) for (_, with_grad), n in samples.items())


def total(rows: list[dict[str, Any]], key: str) -> Counter:
    return sum((row[key] for row in rows), Counter())


def spread(values: Sequence[float]) -> dict[str, float]:
    return dict(median=statistics.median(values), low=min(values), high=max(values))


def largest_difference(networks: dict[str, nn.Module], others: dict[str, nn.Module]) -> float:
    """Largest difference between the trained weights of two sets of networks, relative to the largest weight."""
    pairs = [(a, b) for role in LEARNING_RATES
             for a, b in zip(networks[role].parameters(), others[role].parameters())]
    with torch.no_grad():
        return (max((a - b).abs().max() for a, b in pairs) / max(b.abs().max() for _, b in pairs)).item()


def compare(network: dict[str, Any], tokens: int, batch: int, cycles: int, *, seed: int = 0, dtype: str = 'float32',
            checkpointing: bool = False, device: str = 'cpu', shared: bool = False, warmup: int = 1) -> dict[str, Any]:
    """Runs the literal and the optimised loop alternately.

    Args:
        network (dict): Dimensions of the SD3 network.
        tokens (int): Text tokens of a condition.
        batch (int): Samples a batch.
        cycles (int): Measured cycles.
        seed (int): Of weights, data and draws. Default 0.
        dtype (str): 'float32', 'float64', or 'bfloat16': autocast around float32 weights. Default 'float32'.
        checkpointing (bool): Recompute activations in backward. Default False.
        device (str): Default 'cpu'.
        shared (bool): Both loops train the same weights; saves memory, but nothing is left to compare. Default False.
        warmup (int): Cycles of each loop before the measured ones. Default 1.

    Returns:
        dict: `ratio` (literal / optimised seconds of a cycle), `processor_ratio` (the same of the processor's time),
        `counted_ratio` (the same of forward-equivalents, over all cycles), the rows of either loop, and `weights`: the
        loops' relative difference after all cycles, and how far training moved them (None if shared).
    """
    method, fields = build(network, tokens, batch, seed=seed, dtype=dtype, checkpointing=checkpointing, device=device)
    autocast = dtype == 'bfloat16'
    optimizers = optimizers_of(method, autocast)
    loops = dict(literal=LiteralLoop(method, fields, optimizers, autocast, shared),
                 optimised=OptimisedLoop(method, fields, optimizers))
    start = None if shared else copy.deepcopy(loops['literal'].networks)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in loops}
    for cycle in range(warmup + cycles):
        for name, loop in loops.items():
            row = timed_cycle(loop, cycle)
            if cycle >= warmup:
                rows[name].append(row)
    ratios = {}
    for name, key in (('ratio', 'seconds'), ('processor_ratio', 'processor_seconds')):
        literal, optimised = ([row[key] for row in rs] for rs in rows.values())
        ratios[name] = dict(spread([a / b for a, b in zip(literal, optimised)]), of_sums=sum(literal) / sum(optimised))
    costs = {name: work(total(rs, 'samples'), checkpointing) / (batch * cycles) for name, rs in rows.items()}
    return dict(
        **ratios, counted_ratio=costs['literal'] / costs['optimised'], forward_equivalents=costs, rows=rows,
        weights=None if shared else dict(
            difference=largest_difference(loops['literal'].networks, loops['optimised'].networks),
            moved=largest_difference(start, loops['optimised'].networks)))


def compare_recipes(network: dict[str, Any], tokens: int, batch: int, cycles: int, *, seed: int = 0,
                    dtype: str = 'float32', checkpointing: bool = False, device: str = 'cpu',
                    warmup: int = 1) -> list[dict[str, Any]]:
    """A student step and its two fake-score steps by the literal loop and by each of `RECIPES`, alternately, each on
    weights of its own that start as the same.

    Args:
        network, tokens, batch, cycles, seed, dtype, checkpointing, device, warmup: See `compare`.

    Returns:
        list[dict]: One a recipe, the literal loop first: `recipe`, `forward_equivalents` and `calls` of a student step,
        `processor_seconds` (median) and `share` (its CPU time / the literal loop's, spread over the cycles).
    """
    arguments = dict(seed=seed, dtype=dtype, checkpointing=checkpointing, device=device)
    loops: dict[str, Any] = {}
    for name, recipe in RECIPES.items():
        method, fields = build(network, tokens, batch, **arguments, **recipe)
        optimizers = optimizers_of(method, dtype == 'bfloat16')
        if not loops:
            loops['the literal loop'] = LiteralLoop(method, fields, optimizers, dtype == 'bfloat16', shared=False)
        loops[name] = OptimisedLoop(method, fields, optimizers)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in loops}
    for cycle in range(warmup + cycles):
        for name, loop in loops.items():
            row = timed_cycle(loop, cycle)
            if cycle >= warmup:
                rows[name].append(row)
    literal = [row['processor_seconds'] for row in rows['the literal loop']]
    return [dict(
        recipe=name, forward_equivalents=work(total(rs, 'samples'), checkpointing) / (batch * cycles),
        calls=sum(total(rs, 'calls').values()) / cycles,
        processor_seconds=statistics.median(row['processor_seconds'] for row in rs),
        share=spread([row['processor_seconds'] / own for row, own in zip(rs, literal)])) for name, rs in rows.items()]


def report_recipes(table: list[dict[str, Any]]) -> None:
    """Prints the table of `compare_recipes`."""
    print(f'{"of a student step":<53}{"forwards":>9}{"calls":>7}{"CPU s":>8}{"CPU / the literal loop":>26}')
    for row in table:
        share = '{median:.3f} ({low:.3f} to {high:.3f})'.format(**row['share'])
        print(f'{row["recipe"]:<53}{row["forward_equivalents"]:>9.1f}{row["calls"]:>7.1f}'
              f'{row["processor_seconds"]:>8.2f}{share:>26}')


def named(counts: Counter) -> dict[str, int]:
    return {f'{role}, {"with" if with_grad else "no"} gradient': n for (role, with_grad), n in sorted(counts.items())}


def report(result: dict[str, Any]) -> None:
    """Prints what `compare` measured."""
    rows = result['rows']
    calls, samples = ({name: named(total(rs, key)) for name, rs in rows.items()} for key in ('calls', 'samples'))
    print(f'{len(rows["literal"])} cycles{"":<20}{"calls":>11}{"":>11}{"samples":>11}\n'
          f'{"":<28}' + f'{"literal":>11}{"optimised":>11}' * 2)
    for key in calls['literal']:
        print(f'{key:<28}' + ''.join(f'{c[name].get(key, 0):>11}' for c in (calls, samples) for name in rows))
    costs = result['forward_equivalents']
    print(f'forward-equivalents a sample and cycle: {costs["literal"]:.2f} and {costs["optimised"]:.2f}, '
          f'ratio {result["counted_ratio"]:.3f}')
    for name, rs in rows.items():
        peak = f', peak memory {max(row["peak_gb"] for row in rs):.1f} GB' if 'peak_gb' in rs[0] else ''
        print(f'{name + ":":<11} {statistics.median(row["seconds"] for row in rs):.3f} s a cycle (median){peak}')
    keys = dict(ratio='time') if 'peak_gb' in rows['literal'][0] else dict(ratio='time', processor_ratio='CPU time')
    for key, name in keys.items():
        print(f'literal / optimised {name} of a cycle: '
              'median {median:.3f}, from {low:.3f} to {high:.3f}; of the sums {of_sums:.3f}'.format(**result[key]))
    if result['weights']:
        print('weights of the two loops differ by {difference:.1e} of the largest weight; training moved them by '
              '{moved:.1e}'.format(**result['weights']))


@contextlib.contextmanager
def checkpointing_set(method: nn.Module, on: bool) -> Iterator[None]:
    def apply(value: bool) -> None:
        for network in (method.student, method.fake):
            network.enable_gradient_checkpointing() if value else network.disable_gradient_checkpointing()

    before = method.student.is_gradient_checkpointing
    apply(on)
    try:
        yield
    finally:
        apply(before)


def compile_blocks(method: nn.Module) -> None:
    """Compiles the transformer blocks of every role, as `network.compile_repeated_blocks` does."""
    import torch._dynamo
    # Two kinds of blocks x student, fake score, teacher x with and without gradient x one and many samples: beyond
    # the default of 8 variants, the rest would silently stay uncompiled.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for role in ROLES:
        network = getattr(method, role)
        network._repeated_blocks = list(method.backbone.repeated_blocks)  # diffusers names none for some
        network.compile_repeated_blocks(dynamic=True)


SETTINGS = ('checkpointing', 'autocast', 'fused', 'compile')


def sweep(network: dict[str, Any], tokens: int, batch: int, cycles: int, *, seed: int = 0, dtype: str = 'float32',
          checkpointing: bool = False, device: str = 'cpu',
          settings: Sequence[str] = SETTINGS) -> list[dict[str, Any]]:
    """The optimised loop with one setting changed, against the loop as given, alternately, on the same weights.

    Args:
        network, tokens, batch, cycles, seed, dtype, checkpointing, device: See `compare`.
        settings (Sequence[str]): Which to change, of `SETTINGS`. Default all.

    Returns:
        list[dict]: One a setting: `setting`, then `ratio` (time with it / without), the medians of seconds (on a CPU
        of its own time, which other programs do not lengthen) and, on a GPU, of gigabytes beyond weights and
        optimizers; or `failed`, why it does not run here.
    """
    method, fields = build(network, tokens, batch, seed=seed, dtype=dtype, checkpointing=checkpointing, device=device)
    autocast = dtype == 'bfloat16'
    eager = contextlib.nullcontext
    clock = 'seconds' if device.startswith('cuda') else 'processor_seconds'
    default = OptimisedLoop(method, fields, optimizers_of(method, autocast))

    labels = dict(
        checkpointing=f'model.activation_checkpointing={not checkpointing}',
        autocast='optim_wrapper.*: no autocast' if autocast else "optim_wrapper.*.type='AmpOptimWrapper', bfloat16",
        fused='optim_wrapper.*.optimizer.fused=True', compile='torch.compile of the repeated blocks')

    def variant(name: str) -> tuple[OptimisedLoop, Callable, Callable]:
        """The changed loop, and the contexts of the default's and of its own cycles."""
        if name == 'checkpointing':
            return default, eager, lambda: checkpointing_set(method, not checkpointing)
        if name == 'autocast':
            other = optimizers_of(method, not autocast)
            for role, wrapper in other.items():  # moments of its own would only cost memory
                wrapper.optimizer = default.optimizers[role].optimizer
            return OptimisedLoop(method, fields, other), eager, eager
        if name == 'fused':
            return OptimisedLoop(method, fields, optimizers_of(method, autocast, fused=True)), eager, eager
        compile_blocks(method)
        return default, lambda: torch.compiler.set_stance('force_eager'), eager

    table = []
    for name in [s for s in SETTINGS if s in settings]:  # compile last: it cannot be taken back
        pairs, label = [], labels[name]
        try:
            loop, default_context, own_context = variant(name)
            for cycle in range(1 + cycles):
                with default_context():
                    without = timed_cycle(default, cycle)
                with own_context():
                    pairs.append((without, timed_cycle(loop, cycle)))
        except Exception as error:
            table.append(dict(setting=label, failed=f'{type(error).__name__}: {(str(error).splitlines() or [""])[0]}'))
        else:
            measured = pairs[1:]
            table.append(dict(
                setting=label, ratio=spread([own[clock] / base[clock] for base, own in measured]),
                first_cycle_s=pairs[0][1]['seconds'],
                **{f'{key.replace("processor_", "")}_{side}': statistics.median(pair[i][key] for pair in measured)
                   for key in (clock, 'transient_gb') if key in measured[0][0]
                   for i, side in enumerate(('default', 'changed'))}))
        loop = None
        for optimizer in default.optimizers.values():
            optimizer.optimizer.zero_grad()
        gc.collect()
        if device.startswith('cuda'):
            torch.cuda.empty_cache()
    return table


def report_sweep(table: list[dict[str, Any]]) -> None:
    """Prints the table of `sweep`."""
    print(f'{"one setting changed":<51}{"s a cycle":>11}{"default":>9}{"changed / default":>26}{"activations, GB":>18}')
    for row in table:
        if 'failed' in row:
            print(f'{row["setting"]:<51}  does not run here: {row["failed"]}')
            continue
        memory = (f'{row["transient_gb_changed"]:.1f} (default {row["transient_gb_default"]:.1f})'
                  if 'transient_gb_default' in row else '')
        ratio = '{median:.3f} ({low:.3f} to {high:.3f})'.format(**row['ratio'])
        seconds = f'{row["seconds_changed"]:>11.3f}{row["seconds_default"]:>9.3f}'
        print(f'{row["setting"]:<51}{seconds}{ratio:>26}{memory:>18}')
        if row['first_cycle_s'] > 3 * row['seconds_changed']:
            print(f'{"":<51}  the first cycle took {row["first_cycle_s"]:.0f} s')


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--config', choices=CONFIGS, default='tiny')
    parser.add_argument('--sweep', action='store_true', help='single config keys against the default')
    parser.add_argument('--recipes', action='store_true', help='the literal loop beside other recipes')
    parser.add_argument('--settings', choices=SETTINGS, nargs='+', default=SETTINGS, help='what to sweep')
    parser.add_argument('--batch', type=int)
    parser.add_argument('--cycles', type=int, help='measured cycles; one more warms up')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--dtype', choices=('float32', 'float64', 'bfloat16'),
                        help='bfloat16 is autocast around float32 weights')
    parser.add_argument('--checkpointing', action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument('--device')
    parser.add_argument('--threads', type=int, default=1, help='of the CPU')
    parser.add_argument('--json', type=Path, metavar='OUT')
    args = parser.parse_args(argv)
    options = dict(CONFIGS[args.config], seed=args.seed)
    options.update({k: v for k in ('batch', 'cycles', 'dtype', 'checkpointing', 'device')
                    if (v := getattr(args, k)) is not None})
    if options['device'].startswith('cuda') and not torch.cuda.is_available():
        parser.error(f'--config {args.config} needs a GPU, and torch {torch.__version__} finds none')
    torch.set_num_threads(args.threads)
    on_gpu = options['device'].startswith('cuda')
    setup = dict(
        config=args.config, **{k: v for k, v in options.items() if k != 'network'},
        machine=torch.cuda.get_device_name() if on_gpu else f'{args.threads} CPU thread(s)', torch=torch.__version__,
        diffusers=diffusers.__version__)
    print(', '.join(f'{k} {v}' for k, v in setup.items()), flush=True)
    if args.recipes and options.pop('shared', False):
        parser.error(f'--recipes keeps weights for each recipe, too many of the size of --config {args.config}')
    if args.recipes:
        table = compare_recipes(**options)
        report_recipes(table)
        result = dict(setup, recipes=table)
    elif args.sweep:
        options.pop('shared', None)  # both sides of a sweep train the same weights
        table = sweep(**options, settings=args.settings)
        report_sweep(table)
        result = dict(setup, sweep=table)
    else:
        measured = compare(**options)
        report(measured)
        rows = {name: [dict(row, calls=named(row['calls']), samples=named(row['samples'])) for row in rs]
                for name, rs in measured.pop('rows').items()}
        result = dict(setup, **measured, rows=rows)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + '\n')
    return result


if __name__ == '__main__':
    main(sys.argv[1:])
