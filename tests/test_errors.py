from cdm_plugin.errors import USER_ERRORS, did_you_mean


def test_the_closest_known_word_is_named():
    assert did_you_mean('CMD', ['CDM', 'DMD2']) == "; did you mean 'CDM'?"
    assert did_you_mean('alpa', iter(['alpha', 'beta'])) == "; did you mean 'alpha'?"


def test_nothing_is_said_where_nothing_is_like_it():
    assert did_you_mean('quantization', ['CDM', 'DMD2']) == did_you_mean('CDM', []) == ''
    # difflib's ratio is 2 * 4 equal letters of 10 = 0.8.
    assert did_you_mean('size', ['sizeof'], cutoff=0.85) == '' != did_you_mean('size', ['sizeof'], cutoff=0.8)


def test_a_missing_file_or_package_is_a_users_error_and_a_broken_run_is_not():
    assert issubclass(FileNotFoundError, USER_ERRORS) and issubclass(ModuleNotFoundError, USER_ERRORS)
    assert not issubclass(RuntimeError, USER_ERRORS) and not issubclass(KeyboardInterrupt, USER_ERRORS)
