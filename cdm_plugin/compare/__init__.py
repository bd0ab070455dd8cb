"""`cdm compare`: what trainings have logged, side by side on one page."""
from .page import page_data, write_page
from .runs import Run, config_differences, read_runs

__all__ = ['Run', 'config_differences', 'page_data', 'read_runs', 'write_page']
