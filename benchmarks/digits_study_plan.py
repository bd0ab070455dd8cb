"""Rows of the study on the digits: what each changes of the consistent recipe, its length, its seeds."""
from dataclasses import dataclass, field, replace
from typing import Any

RECIPE = 'digits/cdm_sd3-digits_1xb32_4step_800.py'  # the consistent recipe
STEPS = 200  # student steps of a row, half of the recipe's
SEEDS = 5
TEACHERS = {'guided': (1.0, True), 'unguided': (1.0, False), 'guided, alpha 7': (7.0, True),
            'alpha 0': (0.0, True)}  # alpha, guided
TEACHER_STEPS = (1, 2, 3, 4, 6, 8, 50)

# These four settings make the consistent recipe the published one.
UNAWARE = {'model.anchor_aware_fake': False}
CAPPED = {'model.losses.ca.sigma': dict(type='CappedUniformSigma')}
UNGUIDED = {'model.losses.cdm.guided': False}
UNIFORM = {'model.losses.cdm.point_sigma': dict(type='UniformSigma')}
PUBLISHED = {**UNAWARE, **CAPPED, **UNGUIDED, **UNIFORM}
NO_CA, NO_DM, NO_CDM = ({f'model.losses.{name}': None} for name in ('ca', 'dm', 'cdm'))
VELOCITY = {f'model.losses.{name}.space': 'velocity' for name in ('ca', 'dm', 'cdm')}
SQUARE = {'model.losses.dm.huber': None}  # TDM with the squared distance, as its recipe
# Without guidance, and without the calls that it costs.
ALPHA_0 = {'model.alpha': 0.0, **NO_CA, 'model.losses.dm.guided': False, 'model.losses.cdm.guided': False}
EIGHT_LEVELS = {'model.time_grid': dict(type='FixedTimeGrid', sigmas=[1 - i / 8 for i in range(8)])}
FIXED_GRID = {'model.time_grid': dict(type='FixedTimeGrid')}


@dataclass(frozen=True)
class Row:
    """One line of the study.

    Attributes:
        type (str): `model.type`.
        options (dict): Dotted config key -> value, over the consistent recipe.
        student_steps (int): Length.
        seeds (int): Runs wanted.
        group (str): Table of the report.
        forwards_of (str, optional): Name of a row: train for as many network forwards as it, not for as many steps.
    """
    type: str = 'CDM'
    options: dict[str, Any] = field(default_factory=dict)
    student_steps: int = STEPS
    seeds: int = SEEDS
    group: str = 'main'
    forwards_of: str | None = None


def _without(*changes: dict[str, Any]) -> dict[str, Any]:
    """The published recipe with those of the four settings that `changes` name as in the consistent one."""
    kept = {key for change in changes for key in change}
    return {key: value for key, value in PUBLISHED.items() if key not in kept}


def _schedule(lowest: float, warm_up: int = 20) -> list[dict[str, Any]]:
    """The recipe's learning-rate schedule with another last rate, or a warm-up of another length in iterations."""
    return [dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=warm_up),
            dict(type='CosineAnnealingLR', eta_min=lowest, by_epoch=False, begin=warm_up, end=2 * STEPS)]


# Two fake-score steps a student step as everywhere, on one rollout; the warm-up as long in student steps.
ONE_ROLLOUT = {'model.fake_steps': 2, 'model.student_every': 1, 'param_scheduler.student': _schedule(1e-6, 10),
               'param_scheduler.fake': _schedule(4e-5, 10)}


# The published GAN on the pictures behind the labels; the head at the fake score's rate.
GAN = {'model.losses.gan': dict(type='GANLoss', width=64),
       'train_dataloader.dataset': dict(type='ImageLabelDataset', data_file='asset:digits/digits_16.npz', indices=9000),
       'optim_wrapper.discriminator': dict(
           type='OptimWrapper', optimizer=dict(type='AdamW', lr=4e-4, betas=(0.0, 0.999), weight_decay=1e-4),
           clip_grad=dict(max_norm=1.0)),
       'param_scheduler.discriminator': _schedule(4e-5)}


def _rows() -> dict[str, Row]:
    """In the order in which they run."""
    rows = {
        'dmd2': Row('DMD2', PUBLISHED),
        'dmd2-gan': Row('DMD2', {**PUBLISHED, **GAN}, group='gan'),
        'dmd2-gan-strong': Row('DMD2', {**PUBLISHED, **GAN, 'model.losses.gan': dict(
            GAN['model.losses.gan'], weight=0.1, fake_weight=0.1)}, group='gan'),
        'dmd2-aware': Row('DMD2'),
        'decoupled-dmd': Row('DecoupledDMD', PUBLISHED),
        'decoupled-dmd-aware': Row('DecoupledDMD'),
        'cdm': Row('CDM', PUBLISHED),
        'cdm-aware': Row('CDM', _without(UNAWARE)),
        'cdm-consistent': Row('CDM'),
        'cdm-consistent-400': Row('CDM', student_steps=400),
        'fixed-grid-with-cdm-400': Row('CDM', FIXED_GRID, student_steps=400),
        # The demo's recipe and length.
        'fixed-grid-one-rollout-400': Row('CDM', {**FIXED_GRID, **ONE_ROLLOUT}, student_steps=400),
    }
    # The published grid and loss, each with and without the other, on the consistent recipe. Fixed without the loss is
    # decoupled-dmd-aware.
    rows['dynamic-grid-without-cdm'] = Row('CDM', NO_CDM, group='grid')
    rows['fixed-grid-with-cdm'] = Row('CDM', FIXED_GRID, group='grid')
    for name in ('dmd2-aware', 'decoupled-dmd-aware'):
        rows[f'{name}-equal-forwards'] = Row(rows[name].type, group='forwards', forwards_of='cdm-consistent')
    rows['fixed-grid-with-cdm-equal-forwards'] = Row('CDM', FIXED_GRID, group='forwards', forwards_of='cdm-consistent')
    names = {'uncapped': CAPPED, 'guided': UNGUIDED, 'aware': UNAWARE, 'anchor-points': UNIFORM}
    for a, change in names.items():
        if a != 'aware':
            rows[f'cdm-{a}'] = Row('CDM', _without(change), group='changes')
    for i, (a, one) in enumerate(names.items()):
        for b, other in list(names.items())[i + 1:]:
            rows[f'cdm-{a}-{b}'] = Row('CDM', _without(one, other), group='changes')
    rows['decoupled-dmd-uncapped'] = Row('DecoupledDMD', UNAWARE, group='changes')
    rows['decoupled-dmd-capped-aware'] = Row('DecoupledDMD', CAPPED, group='changes')
    rows.update({
        'ca-only': Row('CDM', {**NO_DM, **NO_CDM}, group='ablations'),
        'dm-only': Row('CDM', {**NO_CA, **NO_CDM}, group='ablations'),
        'cdm-only': Row('CDM', {**NO_CA, **NO_DM}, group='ablations'),
        'without-ca': Row('CDM', NO_CA, group='ablations'),
        'without-dm': Row('CDM', NO_DM, group='ablations'),
        'points-on-trajectory': Row('CDM', {'model.losses.cdm.points': 'on-trajectory'}, group='ablations'),
        'points-noised': Row('CDM', {'model.losses.cdm.points': 'noised'}, group='ablations'),
        'max-steps-4': Row('CDM', {'model.time_grid.max_steps': 4}, group='ablations'),
        'max-steps-8': Row('CDM', {'model.time_grid.max_steps': 8}, group='ablations'),
        'grid-sigma-low': Row('CDM', {'model.time_grid.low': 0.05}, group='ablations'),
        'grid-sigma-high': Row('CDM', {'model.time_grid.low': 0.5}, group='ablations'),
        'ca-capped': Row('CDM', CAPPED, group='ablations'),
        'without-fake-merge': Row('CDM', {'model.fake_merge': 0.0}, group='ablations'),
        'student-every-1': Row('CDM', {'model.student_every': 1}, group='ablations'),
        'student-every-5': Row('CDM', {'model.student_every': 5}, group='ablations'),
    })
    rows['one-rollout'] = Row('CDM', ONE_ROLLOUT, group='ablations')
    for name, type in (('one-rollout', 'CDM'), ('dmd2-aware-one-rollout', 'DMD2')):
        rows[f'{name}-equal-forwards'] = Row(type, ONE_ROLLOUT, group='forwards', forwards_of='cdm-consistent')
    for name, change in (('fixed-grid', FIXED_GRID), ('without-cdm', NO_CDM)):
        rows[f'published-{name}'] = Row('CDM', {**PUBLISHED, **change}, group='published')
    # The rates of the published recipe, at the ends of the schedules too.
    small = {f'param_scheduler.{role}': _schedule(lowest) for role, lowest in (('student', 5e-8), ('fake', 5e-7))}
    for role, rate in (('student', 1e-5), ('fake', 5e-6)):
        small[f'optim_wrapper.{role}.optimizer.lr'] = rate
    rows['published-alpha-7'] = Row('CDM', {**PUBLISHED, 'model.alpha': 7.0}, group='drift')
    rows['consistent-alpha-7'] = Row('CDM', {'model.alpha': 7.0}, group='drift')
    rows['published-small-rates'] = Row('CDM', {**PUBLISHED, **small}, group='drift')
    rows['published-small-rates-1600'] = Row('CDM', {**PUBLISHED, **small}, 1600, seeds=2, group='drift')
    rows['published-batch-128'] = Row('CDM', {**PUBLISHED, 'train_dataloader.batch_size': 128}, group='drift')
    # Four times the demo's length, with what lies between over time; at half of that, CDM has DMD2's forwards, on the
    # fixed grid at 1,113.
    for name in ('cdm-consistent', 'dmd2-aware', 'decoupled-dmd-aware', 'dmd2', 'decoupled-dmd'):
        rows[f'{name}-1600'] = Row(rows[name].type, rows[name].options, 1600, group='length')
    rows['fixed-grid-with-cdm-1600'] = Row('CDM', FIXED_GRID, 1600, group='length')
    rows['cdm-consistent-800'] = Row('CDM', student_steps=800, group='length')
    rows['fixed-grid-with-cdm-1113'] = Row('CDM', FIXED_GRID, group='length', forwards_of='dmd2-aware-1600')
    rows.update(_questions())
    rows.update(_variants())
    return rows


def _questions() -> dict[str, Row]:
    """Rows beyond the paper's: why more steps are no better, guidance out of the way, the intervals of TDM."""
    rows = {
        'dmd2-one-rollout-equal-forwards': Row('DMD2', {**UNAWARE, **ONE_ROLLOUT}, group='intervals'),
        'tdm-one-rollout': Row('TDM', {**UNAWARE, **SQUARE, **ONE_ROLLOUT}, group='intervals'),
        'dmd2-aware-one-rollout': Row('DMD2', ONE_ROLLOUT, group='intervals'),
        'tdm-equal-forwards': Row('TDM', {**UNAWARE, **SQUARE, **ONE_ROLLOUT}, group='intervals'),
        'tdm-aware-equal-forwards': Row('TDM', {**SQUARE, **ONE_ROLLOUT}, group='intervals'),
        'alpha-0-dmd2': Row('DMD2', {**ALPHA_0, **UNAWARE}, group='alpha 0'),
        'alpha-0-dmd2-aware': Row('DMD2', ALPHA_0, group='alpha 0'),
        'alpha-0-cdm': Row('CDM', {**ALPHA_0, **UNAWARE, **UNIFORM}, group='alpha 0'),
        'alpha-0-cdm-aware': Row('CDM', ALPHA_0, group='alpha 0'),
        'alpha-0-fixed-grid-with-cdm': Row('CDM', {**ALPHA_0, **FIXED_GRID}, group='alpha 0'),
        'alpha-0-dynamic-grid-without-cdm': Row('CDM', {**ALPHA_0, **NO_CDM}, group='alpha 0'),
        'dmd2-aware-min-norm': Row('DMD2', {'model.losses.dm.min_norm': 0.01}, group='low anchors'),
        'fixed-grid-one-rollout-velocity-400': Row(
            'CDM', {**FIXED_GRID, **ONE_ROLLOUT, **VELOCITY}, 400, group='low anchors'),
        'dmd2-aware-one-rollout-velocity-equal-forwards': Row('DMD2', {**ONE_ROLLOUT, **VELOCITY}, group='low anchors'),
        'dmd2-aware-one-rollout-8-levels-equal-forwards': Row(
            'DMD2', {**ONE_ROLLOUT, **EIGHT_LEVELS}, group='low anchors'),
        # The CDM loss alone: its points lie on the trajectory too, wherever sigma_c is the anchor's.
        'fixed-grid-cdm-only-one-rollout-equal-forwards': Row(
            'CDM', {**FIXED_GRID, **ONE_ROLLOUT, **NO_CA, **NO_DM}, group='forwards'),
        'fixed-grid-one-rollout-equal-forwards': Row('CDM', {**FIXED_GRID, **ONE_ROLLOUT}, group='forwards'),
        'tdm-one-rollout-1600': Row('TDM', {**UNAWARE, **SQUARE, **ONE_ROLLOUT}, 1600, group='length'),
        'fixed-grid-one-rollout-1600': Row('CDM', {**FIXED_GRID, **ONE_ROLLOUT}, 1600, group='length'),
        'dmd2-aware-one-rollout-1600': Row('DMD2', ONE_ROLLOUT, 1600, group='length'),
        'alpha-0-dmd2-aware-one-rollout-1600': Row('DMD2', {**ALPHA_0, **ONE_ROLLOUT}, 1600, group='alpha 0'),
        'alpha-0-fixed-grid-one-rollout-1200': Row(
            'CDM', {**ALPHA_0, **FIXED_GRID, **ONE_ROLLOUT}, 1200, group='alpha 0'),
    }
    return {name: replace(row, forwards_of='cdm-consistent') if name.endswith('equal-forwards') else row
            for name, row in rows.items()}


def _variants() -> dict[str, Row]:
    """Rows of digits_variants.py; a fixed grid's levels say themselves what comes next, a dynamic grid's do not."""
    dynamic = {'model.time_grid': dict(type='DynamicTimeGrid')}
    posterior = {'model.losses.dm': dict(type='PosteriorDMLoss', guided=True, alpha=1.0)}
    rows = {
        'next-level': ('NextLevelDMD2', {}),
        'low-anchors': ('LowAnchorsDMD2', {}),
        'input': ('AnchorInputDMD2', {}),
        'posterior': ('AnchorInputDMD2', posterior),
        'dynamic-grid': ('DMD2', dynamic),
        'dynamic-grid-next-level': ('NextLevelDMD2', dynamic),
    }
    return {f'dmd2-aware-{name}-one-rollout-equal-forwards': Row(
        type, {**ONE_ROLLOUT, **options}, group='variants', forwards_of='cdm-consistent')
        for name, (type, options) in rows.items()}


ROWS = _rows()
