"""What the doctor found, and its text."""
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from cdm_plugin.errors import USER_ERRORS, describe

# Numbers of GPUs in the table of ways to share the work.
GPUS = (1, 2, 4, 8)
ROLES = dict(student='student', fake='fake score', teacher='teacher')


@dataclass
class Part:
    """One thing that occupies a GPU's memory; sizes in bytes.

    Attributes:
        name (str): 'base', 'student', 'fake', 'teacher', 'text encoders' or 'VAE'.
        parameters (int): Number of parameters.
        dtype (str): Of the weights.
        weights (int): Weights and buffers that stay on the GPU.
        gradients (int): Gradients, while there are any.
        optimizer (int): The optimizer's state.
        ema (int): The moving average.
        note (str): What else to know.
    """
    name: str
    parameters: int
    dtype: str
    weights: int
    gradients: int = 0
    optimizer: int = 0
    ema: int = 0
    note: str = ''


@dataclass
class Calls:
    """Network calls of one iteration, in expectation over the draws.

    Attributes:
        rollout (float): Sequential calls of the rollout: the largest anchor index over batch and ranks.
        anchor (float): Mean anchor index of a sample.
        calls (dict): (role, with gradient) -> calls an iteration.
        samples (dict): The same in samples of one rank.
        equivalents (float): Forward passes a sample and iteration; with gradient 3, or 4 with activation checkpointing.
        cycle (int): Iterations a student step.
    """
    rollout: float
    anchor: float
    calls: dict[tuple[str, bool], float]
    samples: dict[tuple[str, bool], float]
    equivalents: float
    cycle: int


@dataclass
class Memory:
    """What one of several GPUs holds, in bytes.

    Attributes:
        resident (float): What stays.
        step (float): What comes on top while gradients are reduced and weights gathered.
        iteration (float): What an iteration adds, without gradients.
        cpu (float): What one process keeps in the CPU's memory.
    """
    resident: float = 0
    step: float = 0
    iteration: float = 0
    cpu: float = 0

    @property
    def peak(self) -> float:
        """Most at one time, as if everything that comes on top came together."""
        return self.resident + self.step + self.iteration


@dataclass
class Report:
    """What `diagnose` found; what could not be found out is empty.

    Attributes:
        config (str): The config's file.
        gpus (int): Number of GPUs, one process each.
        versions (dict): Package -> version, or 'not installed'.
        device (str): What would train here.
        recipe (dict): Setting -> what it resolves to, as a text.
        attention (str): The kernel, and why.
        parts (list[Part]): What stays in a GPU's memory, role by role.
        activations (dict): Call -> bytes that it adds while it runs.
        phases (dict): Phase of an iteration -> bytes on top of the parts.
        sharing_gpus (tuple): Numbers of GPUs in `sharing`.
        sharing (dict): Way to share the work -> memory of one of so many GPUs.
        own_sharing (str): The config's way.
        own_memory (Memory): A GPU's memory in the config's way on `gpus`.
        checkpoint (int): Bytes of a checkpoint on disk.
        calls (Calls): Network calls.
        problems (list[str]): What will fail.
        warnings (list[str]): What may fail, or is worth knowing.
    """
    config: str
    gpus: int
    versions: dict[str, str] = field(default_factory=dict)
    device: str = ''
    recipe: dict[str, str] = field(default_factory=dict)
    attention: str = ''
    parts: list[Part] = field(default_factory=list)
    activations: dict[str, int] = field(default_factory=dict)
    phases: dict[str, int] = field(default_factory=dict)
    sharing_gpus: tuple[int, ...] = ()
    sharing: dict[str, list[Memory]] = field(default_factory=dict)
    own_sharing: str = ''
    own_memory: Memory | None = None
    checkpoint: int = 0
    calls: Calls | None = None
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def part(self, name: str) -> Part:
        """A part by its name."""
        return next(part for part in self.parts if part.name == name)

    @property
    def resident(self) -> int:
        """Bytes that stay on a GPU: weights, optimizer state, EMA."""
        return sum(part.weights + part.optimizer + part.ema for part in self.parts)

    @property
    def peak(self) -> int:
        """Largest number of bytes at one time in one process alone; allocator and CUDA context come on top."""
        return self.resident + max(self.phases.values(), default=0)

    @property
    def needed(self) -> int:
        """The same on each of `gpus` GPUs, shared as the config says."""
        return self.peak if self.own_memory is None else int(self.own_memory.peak)


@contextlib.contextmanager
def _problems(report: Report, estimate: str = '') -> Iterator[None]:
    """A user's mistake becomes a line of the report; so does any error of an estimate, which parts from outside this
    package may not allow."""
    try:
        yield
    except Exception as error:
        text = ' '.join(describe(error).split())
        if estimate:
            report.warnings.append(f'{estimate} could not be estimated: {type(error).__name__}: {text[:200]}')
        elif not isinstance(error, USER_ERRORS):
            raise
        elif text not in report.problems:
            report.problems.append(text)


def format_report(report: Report) -> str:
    """The report as lines for a terminal."""
    missing = [name for name, version in report.versions.items() if version == 'not installed']
    lines = [report.config, '', 'versions']
    lines.append('  ' + ', '.join(f'{n} {v}' for n, v in report.versions.items() if n not in missing))
    lines += [f'  not installed: {", ".join(missing)}'] * bool(missing) + [f'  {report.device}']
    if report.recipe:
        attention = zip(['attention', *[''] * 9], filter(None, report.attention.split('; ')))
        lines += ['', 'recipe', *_table([[name, text] for name, text in (*report.recipe.items(), *attention)])]
    if report.parts:
        lines += ['', 'memory of one GPU, estimated', *_table(_memory_rows(report))]
    if report.phases:
        lines += ['', 'memory that a network call adds while it lasts', *_table(
            [[name, _size(value)] for name, value in report.activations.items()])]
        lines += ['', 'memory that an iteration adds, phase by phase', *_table(
            [[name, _size(value)] for name, value in report.phases.items()])]
        lines.append(f'  at most {_size(report.resident)} + {_size(max(report.phases.values()))} = '
                     f'{_size(report.peak)} at a time, and what CUDA and the allocator take')
    if report.sharing:
        lines += ['', 'memory of each GPU at most, estimated, by the number of GPUs', *_table(_sharing_rows(report))]
        own, count = report.own_memory, f'{report.gpus} GPU{"s" * (report.gpus > 1)}'
        lines.append(f'  this config on {count}: {_size(own.resident)} stay on each, at most {_size(own.peak)} at a '
                     'time' + (f'; {_size(own.cpu)} a process in the CPU\'s memory' if own.cpu else ''))
    if report.checkpoint:
        lines.append(f'  a checkpoint on disk: {_size(report.checkpoint)}')
    if report.calls is not None:
        lines += ['', 'network calls of one iteration, expected', *_call_lines(report.calls)]
    lines += ['', *(f'problem: {text}' for text in report.problems), *(f'note: {text}' for text in report.warnings)]
    if not report.problems:
        lines.append('no problem found')
    return '\n'.join(lines)


def _memory_rows(report: Report) -> list[list[str]]:
    rows = [['', 'parameters', 'dtype', 'weights', 'optimizer', 'EMA', 'gradients', '']]
    for part in report.parts:
        sizes = (part.weights, part.optimizer, part.ema, part.gradients)
        rows.append([ROLES.get(part.name, part.name), _billions(part.parameters), part.dtype if part.parameters else '',
                     *(_size(n) if n else '' for n in sizes), part.note])
    sums = (sum(getattr(part, key) for part in report.parts) for key in ('weights', 'optimizer', 'ema'))
    return [*rows, ['together', '', '', *(_size(n) if n else '' for n in sums)]]


def _sharing_rows(report: Report) -> list[list[str]]:
    rows = [['', *map(str, report.sharing_gpus)]]
    for name, memories in report.sharing.items():
        mark = 'as this config' if name == report.own_sharing else ''
        rows.append([name, *(_size(memory.peak) for memory in memories), mark])
    return rows


def _call_lines(calls: Calls) -> list[str]:
    rows = [['', 'calls', 'samples']]
    for (role, grad), n in calls.calls.items():
        name = f'{ROLES.get(role, role)} {"with" if grad else "without"} gradient'
        rows.append([name, f'{n:.2f}', f'{calls.samples[role, grad]:.1f}'])
    lines = _table(rows)
    if calls.rollout:
        lines.append(f'  rollout: {calls.rollout:.2f} calls in sequence, {calls.anchor:.2f} a sample')
    return [*lines, f'  {calls.equivalents:.2f} forward passes a sample, {calls.equivalents * calls.cycle:.2f} a '
            'student step (a call with gradient counts with its backward pass)']


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    return ['  ' + '  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def _size(nbytes: float) -> str:
    return f'{nbytes / 2**30:.1f} GiB' if nbytes >= 2**30 / 10 else f'{nbytes / 2**20:.1f} MiB'


def _billions(count: int) -> str:
    return '' if not count else f'{count / 1e9:.2f} B' if count >= 1e8 else f'{count / 1e6:.2f} M'


def _numbers(values: Sequence[float]) -> str:
    texts = [f'{v:.4g}' for v in values]
    return '[' + ', '.join(texts if len(texts) <= 8 else [*texts[:3], '...', texts[-1]]) + ']'
