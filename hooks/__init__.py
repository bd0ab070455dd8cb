from cdm_plugin.hooks.anchor_histogram_hook import AnchorHistogramHook
from cdm_plugin.hooks.bad_records_hook import BadRecordsHook
from cdm_plugin.hooks.cdm_hook import CDMHook
from cdm_plugin.hooks.collapse_watch_hook import CollapseWatchHook
from cdm_plugin.hooks.config_check_hook import ConfigCheckHook
from cdm_plugin.hooks.data_check_hook import DataCheckHook
from cdm_plugin.hooks.iteration_hook import IterationHook
from cdm_plugin.hooks.load_check_hook import LoadCheckHook
from cdm_plugin.hooks.method import method_of
from cdm_plugin.hooks.non_finite_hook import NonFiniteHook
from cdm_plugin.hooks.pipeline_export_hook import PipelineExportHook
from cdm_plugin.hooks.plain_checkpoint_hook import PlainCheckpointHook
from cdm_plugin.hooks.precision_hook import PrecisionHook
from cdm_plugin.hooks.sample_grid_hook import SampleGridHook
from cdm_plugin.hooks.scalars_hook import ScalarsHook
from cdm_plugin.hooks.signal_hook import SignalHook
from cdm_plugin.hooks.stream_hook import StreamHook
from cdm_plugin.hooks.student_ema_hook import StudentEMAHook
from cdm_plugin.hooks.validation_grid_hook import ValidationGridHook
from cdm_plugin.hooks.validation_hook import ValidationHook

__all__ = ['AnchorHistogramHook', 'BadRecordsHook', 'CDMHook', 'CollapseWatchHook', 'ConfigCheckHook', 'DataCheckHook',
           'IterationHook', 'LoadCheckHook', 'NonFiniteHook', 'PipelineExportHook', 'PlainCheckpointHook',
           'PrecisionHook', 'SampleGridHook', 'ScalarsHook', 'SignalHook', 'StreamHook', 'StudentEMAHook',
           'ValidationGridHook', 'ValidationHook', 'method_of']
