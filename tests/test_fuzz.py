"""Wrong inputs by the dozen in every run, by the thousand with `-m slow`; `python tests/fuzz.py` prints the table."""
import pytest
from fuzz import KINDS, fuzz

# A case of a config may train an iteration; the others are quick.
FEW = {'configs': 12, 'command lines': 12}


@pytest.mark.parametrize('kind', KINDS)
def test_a_few_wrong_inputs_end_as_they_should(kind, tmp_path):
    counts, bad = fuzz(kind, FEW.get(kind, 30), tmp_path)
    assert not bad and sum(counts.values()) >= 10


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
def test_thousands_of_wrong_inputs_end_as_they_should(kind, tmp_path):
    counts, bad = fuzz(kind, int(2000 * KINDS[kind][1]), tmp_path)
    assert not bad, '\n'.join(bad)
