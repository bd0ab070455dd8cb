from cdm_plugin.cli import script

script()
