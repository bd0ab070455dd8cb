from cdm_plugin.hooks.cdm_hook import CDMHook
from cdm_plugin.hooks.pipeline_export_hook import PipelineExportHook
from cdm_plugin.hooks.sample_grid_hook import SampleGridHook
from cdm_plugin.hooks.validation_grid_hook import ValidationGridHook

__all__ = ['CDMHook', 'PipelineExportHook', 'SampleGridHook', 'ValidationGridHook']
