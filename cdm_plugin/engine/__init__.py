from cdm_plugin.engine.ema import StudentEMA
from cdm_plugin.engine.optim_wrapper import AutocastOptimWrapper, DistillationOptimWrapperConstructor, RoleOptimWrapper

__all__ = ['AutocastOptimWrapper', 'DistillationOptimWrapperConstructor', 'RoleOptimWrapper',
           'StudentEMA']
