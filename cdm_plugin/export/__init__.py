from cdm_plugin.export.folder import check_export, export
from cdm_plugin.export.job import INDEX_FILE, missing_t5

__all__ = ['INDEX_FILE', 'check_export', 'export', 'missing_t5']
