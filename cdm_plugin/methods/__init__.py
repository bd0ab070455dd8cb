from cdm_plugin.methods.base import DiffusionModel
from cdm_plugin.methods.cdm import CDM
from cdm_plugin.methods.decoupled_dmd import DecoupledDMD
from cdm_plugin.methods.distillation import Distillation
from cdm_plugin.methods.dmd2 import DMD2
from cdm_plugin.methods.flow_matching import FlowMatching
from cdm_plugin.methods.tdm import TDM

__all__ = ['CDM', 'DMD2', 'DecoupledDMD', 'DiffusionModel', 'Distillation', 'FlowMatching', 'TDM']
