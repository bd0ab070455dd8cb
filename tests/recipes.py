"""Names of the shipped recipes."""
CDM = 'digits/cdm_sd3-digits_1xb32_4step_800.py'
DECOUPLED = 'digits/decoupled-dmd_sd3-digits_1xb32_4step_800.py'
DMD2 = 'digits/dmd2_sd3-digits_1xb32_4step_800.py'
TEACHER = 'digits/teacher_flow-matching_sd3-digits_1xb128_6k.py'
