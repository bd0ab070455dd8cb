"""Acme's parts for cdm_plugin. Nothing is imported here, so that `cdm --help` stays quick."""
