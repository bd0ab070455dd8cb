from cdm_plugin.engine.data_parallel import DistillationDataParallel
from cdm_plugin.engine.deepspeed_strategy import DistillationDeepSpeedStrategy
from cdm_plugin.engine.optim_wrapper import AutocastOptimWrapper, DistillationOptimWrapperConstructor, RoleOptimWrapper
from cdm_plugin.roles.ema import StudentEMA

__all__ = ['AutocastOptimWrapper', 'DistillationDataParallel', 'DistillationDeepSpeedStrategy',
           'DistillationOptimWrapperConstructor', 'RoleOptimWrapper', 'StudentEMA']
