"""The study on the digits in short: its plan, and the command, resumed."""
import json
from types import SimpleNamespace

import pytest
import torch
from mmengine.registry import MODELS

from cdm_plugin.commands.demo.distil import RECIPE as DEMO
from cdm_plugin.config import load_config

STEPS = [1, 2, 3, 4, 6, 8]


@pytest.fixture(scope='module')
def plan(benchmark):
    return benchmark('digits_study_plan')


@pytest.fixture(scope='module')
def study(benchmark):
    return benchmark('digits_study')


# The plan

def test_no_two_rows_are_one(plan):
    rows = list(plan.ROWS.values())
    assert all(a != b for i, a in enumerate(rows) for b in rows[:i])
    # Alone (one is a main row), in pairs, and two of a baseline.
    assert sum(row.group == 'changes' for row in rows) == 3 + 6 + 2


@pytest.mark.slow
def test_schedules_are_as_long_as_the_run_and_never_rise(plan, study, tmp_path):
    for name, row in plan.ROWS.items():
        cfg = study.config_of(row, 3, tmp_path)
        for role, schedulers in cfg.param_scheduler.items():
            assert schedulers[-1].end == cfg.train_cfg.max_iters, name
            assert schedulers[-1].eta_min < cfg.optim_wrapper[role].optimizer.lr, name
        assert cfg.randomness.seed == 3
    assert study.config_of(plan.ROWS['student-every-5'], 0, tmp_path).train_cfg.max_iters == 5 * 200
    assert study.config_of(plan.ROWS['cdm-consistent-1600'], 0, tmp_path).train_cfg.max_iters == 2 * 1600


def test_the_demo_is_one_of_the_rows(plan, study, tmp_path):
    cfg, demo = study.config_of(plan.ROWS['fixed-grid-one-rollout-400'], 0, tmp_path), load_config(DEMO)
    assert cfg.train_cfg.max_iters == demo.train_cfg.max_iters
    for key in ('model', 'train_dataloader', 'param_scheduler', 'randomness'):
        assert cfg[key].to_dict() == demo[key].to_dict(), key
    for role, wrapper in demo.optim_wrapper.items():
        if role != 'constructor':
            assert cfg.optim_wrapper[role].optimizer.to_dict() == dict(wrapper.optimizer, fused=True)


def test_the_published_row_has_the_defaults_of_the_method(plan, study):
    """But for what the recipe sets for every method: alpha, the update ratio and the data."""
    model = study.recipe_of(plan.ROWS['cdm']).model
    published = MODELS.build(model)
    default = MODELS.build(dict(type='CDM', alpha=1.0, backbone=model.backbone))
    for name in ('ca', 'dm', 'cdm'):
        one, other = (method.losses[name] for method in (published, default))
        assert vars(one).keys() == vars(other).keys()
        for key, value in vars(one).items():
            if not key.startswith('_'):
                known = getattr(other, key)
                assert type(value) is type(known), (name, key)
                assert getattr(value, '__dict__', value) == getattr(known, '__dict__', known), (name, key)
    assert published.student_every == default.student_every == 2
    assert published.fake_merge == default.fake_merge == 0.001
    keys = published.fake.state_dict().keys()
    assert keys == default.fake.state_dict().keys()
    consistent = MODELS.build(study.recipe_of(plan.ROWS['cdm-consistent']).model)
    assert consistent.fake.state_dict().keys() > keys  # the embedding of the anchor


@pytest.mark.parametrize('name, forwards', [
    # Two iterations and a student step, mean anchor index 6.75 (N of 28) or 1.5 (fixed): the rollouts, one anchor
    # without gradient, two fake steps and the student's at the anchor with gradient; then CDM's own point, and the
    # questions.
    ('cdm', 2 * 6.75 + 1 + 2 * 3 + 3 + 3 + 4 + 2), ('cdm-consistent', 2 * 6.75 + 1 + 2 * 3 + 3 + 3 + 5 + 2),
    ('dmd2', 2 * 1.5 + 1 + 2 * 3 + 3 + 2 + 1), ('decoupled-dmd', 2 * 1.5 + 1 + 2 * 3 + 3 + 3 + 1),
    ('max-steps-4', 2 * 0.75 + 1 + 2 * 3 + 3 + 3 + 5 + 2), ('points-on-trajectory', 2 * 6.75 + 1 + 2 * 3 + 3 + 5 + 2),
    ('one-rollout', 6.75 + 2 * 3 + 3 + 3 + 5 + 2)])
def test_forwards_of_a_student_step(name, forwards, plan, study):
    assert study.forwards_a_step(plan.ROWS[name]) == pytest.approx(forwards, abs=1e-9)


def test_rows_at_equal_forwards_are_as_long_as_that_takes(plan, study):
    assert study.student_steps_of(plan.ROWS['dmd2-aware-equal-forwards']) == round(200 * 33.5 / 16)
    assert study.student_steps_of(plan.ROWS['fixed-grid-with-cdm-1113']) == 1113 == round(1600 * 16 / 23)


def test_main_rows_come_first_and_the_long_ones_last(plan, study):
    order = study.jobs(list(plan.ROWS), 5)
    groups = [plan.ROWS[name].group for name, _ in order]
    place = dict(main=0, changes=1, forwards=1, grid=1, length=3)
    assert groups == sorted(groups, key=lambda group: place.get(group, 2))
    assert [seed for _, seed in order[:20]] == [0] * 10 + [1] * 10 and len(set(order)) == len(order)


def test_a_finished_run_is_not_run_again(plan, study, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, 'ROWS', dict(dmd2=plan.Row('DMD2', plan.PUBLISHED, 12, seeds=2)))
    monkeypatch.setattr(study, 'teacher_rows', lambda *args: None)
    monkeypatch.setattr(study, 'run', lambda row, seed, *args: run(seed, fd=2.0))

    def run(seed, fd):
        return dict(seed=seed, seconds=1.0, final=[dict(steps=4, fd=fd)])

    file = tmp_path / 'dmd2.json'
    head = study.results_of('dmd2', 30, file)
    study.write(file, dict(head, runs=[run(1, 8.0)]))
    study.main(['--num-samples', '30', '--out', str(tmp_path), '--work-dir', str(tmp_path / 'work')])
    assert json.loads(file.read_text())['runs'] == [run(1, 8.0), run(0, 2.0)]


@pytest.mark.slow
def test_compiled_networks_compute_the_same(plan, study):
    """The fake score's class and shapes are the student's: it must not get the student's compiled code."""
    method = MODELS.build(study.recipe_of(plan.ROWS['cdm-consistent']).model).eval()
    torch.nn.init.normal_(method.fake.anchor_embedding.embedding.linear_2.weight)
    condition = method.backbone.condition(dict(prompt=[3, 7]))
    x, sigma, anchor = torch.randn(method.latent_shape(2)), torch.tensor([0.3, 0.8]), torch.tensor([1.0, 0.5])

    def answers():
        return [method.velocity(role, x, sigma, condition, anchor) for role in ('student', 'teacher', 'fake')]

    names = ('recompile_limit', 'skip_nnmodule_hook_guards')  # put back after
    with torch.no_grad(), torch._dynamo.config.patch({name: getattr(torch._dynamo.config, name) for name in names}):
        expected = answers()
        study.compile_networks(method, backend='eager')
        found = answers()
    for one, other in zip(expected, found):
        torch.testing.assert_close(one, other)
    assert not torch.allclose(found[0], found[2], atol=0.1)


# The command

@pytest.fixture(scope='module')
def short(plan, study, tmp_path_factory):
    """A study of two rows of 12 student steps and 30 samples; returns what runs it, and where to."""
    folder = tmp_path_factory.mktemp('study')
    small = {'train_dataloader.batch_size': 4}
    rows = dict(dmd2=plan.Row('DMD2', {**plan.PUBLISHED, **small}, 12, seeds=2),
                consistent=plan.Row('CDM', {'model.time_grid.max_steps': 4, **small}, 12, seeds=1))
    out = folder / 'out'

    def command(*argv):
        study.main(['--num-samples', '30', '--out', str(out), '--work-dir', str(folder / 'work'), *argv])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, 'ROWS', rows)
        patch.setattr(study, 'HELD_OUT', 40)
        command()
        yield command, out


def read(out, name):
    return json.loads((out / f'{name}.json').read_text())


def judgements(run):
    return run['seed'], run['curve'], run['final']


@pytest.mark.slow
def test_every_row_is_judged(short):
    _, out = short
    assert sorted(file.name for file in out.iterdir()) == ['consistent.json', 'dmd2.json', 'teacher.json']
    for name, seeds, length, forwards in (('dmd2', 2, 12, 16), ('consistent', 1, 12, 21.5)):
        result = read(out, name)
        assert [run['seed'] for run in result['runs']] == list(range(seeds))
        assert (result['student_steps'], result['forwards_a_step']) == (length, forwards)
        for run in result['runs']:
            assert [entry['steps'] for entry in run['final']] == STEPS
            assert [entry['student_steps'] for entry in run['curve']] == [3, 6, 9]
            for entry in run['final'] + run['curve']:
                assert entry['fd'] > 0 and entry['fd_real'] > 0
                assert all(0 <= entry[key] <= 1 for key in ('accuracy', 'precision', 'recall'))
    assert judgements(read(out, 'dmd2')['runs'][0]) != judgements(read(out, 'dmd2')['runs'][1])


@pytest.mark.slow
def test_the_teacher_is_judged_with_and_without_guidance(short):
    teacher = read(short[1], 'teacher')
    for name in ('guided', 'unguided', 'guided, alpha 7'):
        assert [entry['steps'] for entry in teacher[name]] == [1, 2, 3, 4, 6, 8, 50]
    guided, unguided = (teacher[name][-1]['fd'] for name in ('guided', 'unguided'))
    assert guided < unguided  # the reference is guided


@pytest.mark.slow
def test_what_has_run_is_not_run_again_and_nothing_starts_beyond_the_budget(short, study, monkeypatch, capsys):
    command, out = short
    before = {file: file.read_bytes() for file in out.iterdir()}
    monkeypatch.setattr(study, 'run', lambda *args: pytest.fail('a finished run was run again'))
    command()
    (out / 'consistent.json').unlink()
    command('--budget-minutes', '0')
    assert 'the budget ends before consistent, seed 0' in capsys.readouterr().out
    (out / 'consistent.json').write_bytes(before[out / 'consistent.json'])
    assert {file: file.read_bytes() for file in out.iterdir()} == before


@pytest.mark.slow
def test_a_run_that_was_cut_off_leaves_nothing_and_comes_out_the_same(short, study, monkeypatch):
    command, out = short
    whole = read(out, 'dmd2')
    cut = dict(whole, runs=whole['runs'][:1])
    study.write(out / 'dmd2.json', cut)

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(study, 'run', interrupted)
        with pytest.raises(KeyboardInterrupt):
            command()
    assert read(out, 'dmd2') == cut and not list(out.glob('*.part'))
    command('--only', 'dmd2')
    assert [judgements(run) for run in read(out, 'dmd2')['runs']] == [judgements(run) for run in whole['runs']]


@pytest.mark.slow
def test_results_of_another_recipe_are_not_gone_on_with(short, study):
    command, out = short
    result = read(out, 'consistent')
    study.write(out / 'consistent.json', dict(result, options={'model.time_grid.max_steps': 5}))
    with pytest.raises(ValueError, match='consistent.json holds runs with options=.*: 5.* would go on with .*: 4'):
        command()
    study.write(out / 'consistent.json', result)


def test_samples_that_are_not_finite_have_no_figures(study, monkeypatch):
    monkeypatch.setattr(study, 'sample_prompts', lambda *args, **kwargs: torch.full((3, 1, 16, 16), torch.nan))
    examiner = object.__new__(study.Examiner)
    examiner.judge = SimpleNamespace(method=None, labels=[0, 1, 2], noise=None, guidance=2.0)
    found = examiner.examine('student', 4)
    assert found.pop('steps') == 4 and set(found.values()) == {None} and list(found) == list(study.MEASURES)
