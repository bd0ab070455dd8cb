"""Network calls of an iteration, in expectation."""
from typing import Any

import torch

from cdm_plugin.commands.doctor.report import Calls
from cdm_plugin.draws import DrawContext, stream
from cdm_plugin.losses import LossInputs
from cdm_plugin.methods import DiffusionModel, Distillation
from cdm_plugin.rollout import Prediction
from cdm_plugin.time_grids import DynamicTimeGrid, FixedTimeGrid


def ask(method: Distillation) -> tuple[dict[str, int], int]:
    """What the losses ask in one student step: questions by role, and points where the student is called once more."""
    shape = method.latent_shape(1)
    sigma, zeros = torch.full((1,), 0.5, dtype=torch.float64), torch.zeros(shape)
    anchor = Prediction(zeros, sigma, zeros, zeros)
    questions: dict[str, int] = {}
    points = 0
    for name, loss in method.active_losses.items():
        context = DrawContext(stream('doctor', name), sigma,
                              lambda generator: method.shift(method.time_grid.sample(generator)), shape)
        batch = dict.fromkeys(('latents', 'pair_noise', 'pair_latents'), zeros)
        inputs = LossInputs(anchor, loss.draw(context), batch, method.null_condition(1), method.backbone, method.call,
                            answering=dict(teacher=method.backbone_of('teacher')))
        points += loss.point(inputs) is not None
        for query in loss.queries(inputs).values():
            questions[query.role] = questions.get(query.role, 0) + 1
    return questions, points


def looks(method: Distillation) -> int:
    """What the fake score sees in one step, in batches: the student's samples, and what a GAN shows it beside them."""
    judge = method.fake_judge
    if judge is None:
        return 1
    shape = method.latent_shape(1)
    zeros, sigma = torch.zeros(shape), torch.full((1,), 0.5, dtype=torch.float64)
    draws = judge.fake_draw(DrawContext(stream('doctor'), sigma, lambda generator: sigma, shape))
    return 1 + len(judge.fake_points(LossInputs(
        Prediction(zeros, sigma, zeros, zeros), dict(draws, sigma=sigma, noise=zeros), dict(latents=zeros),
        method.null_condition(1), method.backbone, method.call)))


def grid_lengths(grid: Any) -> dict[int, float]:
    """Number of levels of a time grid -> its probability; of a grid from a plug-in, its frequency in 1,000 draws."""
    if isinstance(grid, DynamicTimeGrid):
        lengths = list(range(grid.min_steps, grid.max_steps + 1))
    elif isinstance(grid, FixedTimeGrid):
        lengths = [len(grid.sigmas)]
    else:
        generator = stream('doctor', 'time_grid')
        lengths = [len(grid.sample(generator)) for _ in range(1000)]
    found: dict[int, float] = {}
    for n in lengths:
        found[n] = found.get(n, 0) + 1 / len(lengths)
    return found


def expected_calls(method: DiffusionModel, batch: int, ranks: int) -> Calls:
    """Network calls of one iteration, in expectation over the draws: exact for the time grids of this package.

    Of N levels, an anchor lies above the s-th with probability 1 - (s + 1) / N; the rollout goes on while any of the
    batch x ranks anchors does, and a rank whose own have all arrived keeps one sample in the call.

    Args:
        method (DiffusionModel): The method, on any device.
        batch (int): Samples of one rank.
        ranks (int): Number of ranks.
    """
    with_gradient = 4 if method.activation_checkpointing else 3
    if not isinstance(method, Distillation):
        key = ('student', True)
        return Calls(0, 0, {key: 1.0}, {key: float(batch)}, with_gradient, 1)
    rollout = anchor = idle = 0.0
    for n, probability in grid_lengths(method.time_grid).items():
        arrived = [(s + 1) / n for s in range(n - 1)]
        rollout += probability * sum(1 - a**(batch * ranks) for a in arrived)
        idle += probability * sum(a**batch - a**(batch * ranks) for a in arrived)
        anchor += probability * (n - 1) / 2
    turn = 1 / method.student_every
    questions, points = ask(method)
    fooled = turn * (method.fake_judge is not None)  # the student's turn goes through the fake score once more
    calls = {('student', False): rollout + 1 - turn, ('student', True): turn * (1 + (points > 0)),
             ('fake', True): method.fake_steps + fooled}
    samples = {('student', False): batch * (anchor + 1 - turn) + idle, ('student', True): turn * batch * (1 + points),
               ('fake', True): batch * (method.fake_steps * looks(method) + fooled)}
    for role, count in questions.items():
        size = method.max_batch_per_call or count * batch
        calls[role, False] = turn * -(-count * batch // size)
        samples[role, False] = turn * count * batch
    work = sum(n * (with_gradient if grad else 1) for (_, grad), n in samples.items())
    return Calls(rollout, anchor, calls, samples, work / batch, method.student_every)
