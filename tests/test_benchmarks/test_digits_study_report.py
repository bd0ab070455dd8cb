"""The report of the study on the digits, from known numbers."""
import json
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / 'docs'
STEPS = [1, 2, 3, 4, 6, 8]


@pytest.fixture(scope='module')
def plan(benchmark):
    return benchmark('digits_study_plan')


@pytest.fixture(scope='module')
def report(benchmark):
    return benchmark('digits_study_report')


def result(name, fds, plan):
    """Runs of a row with these distances at every number of steps."""
    def entry(steps, fd):
        return dict(steps=steps, fd=fd, fd_real=None if fd is None else 2 * fd, **dict.fromkeys(
            ('accuracy', 'precision', 'recall', 'precision_real', 'recall_real'), None if fd is None else 0.5))
    runs = [dict(seed=seed, seconds=60.0, curve=[entry(4, fd) for _ in range(3)],
                 final=[entry(steps, fd) for steps in STEPS]) for seed, fd in fds.items()]
    return dict(row=name, type=plan.ROWS[name].type, student_steps=200, num_samples=1000, forwards_a_step=16,
                runs=runs)


def test_the_report_has_means_spreads_and_differences_by_seed(plan, report, tmp_path):
    distances = {'dmd2': {0: 10.0, 1: 14.0}, 'dmd2-aware': {1: 11.0, 0: 8.0, 2: 99.0}, 'cdm': {0: None, 1: 5.0}}
    for name, fds in distances.items():
        (tmp_path / f'{name}.json').write_text(json.dumps(result(name, fds, plan)))
    (tmp_path / 'findings.md').write_text('By hand.\n')
    report.main(['--study', str(tmp_path), '--out', str(tmp_path / 'results.md')])
    text = (tmp_path / 'results.md').read_text(encoding='utf-8')
    assert '| dmd2 | 2 | 200 | 16 | 12.0 ± 2.8 |' in text  # sqrt(((10 - 12)^2 + (14 - 12)^2) / 1)
    assert '| dmd2 | 2 | 200 | 16 | 24.0 ± 5.7 |' in text  # real digits
    assert '| cdm | 2 | 200 | 16 | diverged |' in text
    # Seed 2 has no partner; -2 and -3.
    assert '| dmd2-aware - dmd2 | 2 | -2.5 ± 0.7 (2/2) |' in text
    assert '| cdm - dmd2 | 2 | diverged (1/2) |' in text
    assert f'**7 of {sum(row.seeds for row in plan.ROWS.values())} runs are done**' in text
    assert f'3 of {len(plan.ROWS)} rows, in 7 minutes' in text
    main, forwards = (sum(row.seeds for row in plan.ROWS.values() if row.group == group)
                      for group in ('main', 'forwards'))
    assert f'| Methods | 7 of {main} | `dmd2` 2 of 5, `dmd2-aware` 3 of 5, `cdm` 2 of 5 | `decoupled-dmd`, ' in text
    assert f'| Equal forwards | 0 of {forwards} |  | all |' in text
    assert '\nBy hand.\n' in text and '| 3,200 |' in text


def test_numbers_of_the_findings_are_read_from_the_results(plan, report):
    results = {'dmd2': result('dmd2', {0: 10.0, 1: 14.0}, plan), 'cdm': result('cdm', {1: 11.5, 0: 8.0, 2: 9.0}, plan)}
    results['cdm']['runs'][0]['curve'][1]['fd'] = 2.5
    text = '{dmd2}; {dmd2@4}; {dmd2@8±}; {dmd2.fd_real@1}; {cdm.recall@4±}; {cdm < dmd2@2}; {cdm^}; {a set}'
    assert report.fill(text, results) == (
        '12.0, 12.0, 12.0 and 12.0; 12.0; 12.0 ± 2.8; 24.0; 0.50 ± 0.00; 2.2 ± 0.4 on 2 of 2 seeds; '
        '9.5, 6.5, 9.5 and 9.5; {a set}')  # 2 and 2.5; (11.5 + 8 + 9) / 3 = 9.5, (2.5 + 8 + 9) / 3 = 6.5
    with pytest.raises(KeyError, match='tdm'):
        report.fill('{tdm@4}', results)


def test_the_report_in_the_repository_is_of_the_results_in_it(report):
    page = (DOCS / 'results.md').read_text(encoding='utf-8')
    assert page == report.report(DOCS / 'study'), 'run benchmarks/digits_study_report.py'


def test_the_table_of_the_recipes_is_of_the_results(report):
    page = (DOCS / 'recipes.md').read_text(encoding='utf-8')
    table = re.findall(r'^\|.*\(`([\w-]+)`.*?\) \| (.*) \|$', page, re.MULTILINE)
    assert len(table) >= 7 and table[0][0] == 'fixed-grid-one-rollout-400'
    for name, cells in table:
        result = json.loads((DOCS / f'study/{name}.json').read_text())
        expected = [str(result['student_steps']), str(len(result['runs']))]
        expected += [report.spread(report.final(result, steps, 'fd'), 1) for steps in (1, 2, 4, 8)]
        expected += [report.spread(report.final(result, 4, 'accuracy'), 3).split()[0]]
        assert cells.split(' | ') == expected, name


def test_without_results_there_is_no_report(report, tmp_path):
    with pytest.raises(SystemExit, match='holds no results: run benchmarks/digits_study.py first'):
        report.main(['--study', str(tmp_path)])
