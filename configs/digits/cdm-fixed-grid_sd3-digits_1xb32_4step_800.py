# CDM on the levels of inference instead of the dynamic grid: as good here for two thirds of the network forwards
# (docs/results.md). `cdm demo` trains it.
_base_ = './cdm_sd3-digits_1xb32_4step_800.py'

model = dict(time_grid=dict(type='FixedTimeGrid'))
