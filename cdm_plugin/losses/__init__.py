from cdm_plugin.losses.base import ScoreLoss, ScoreQuery
from cdm_plugin.losses.ca_loss import CALoss
from cdm_plugin.losses.cdm_loss import CDMLoss
from cdm_plugin.losses.dm_loss import DMLoss
from cdm_plugin.losses.flow_matching_loss import FlowMatchingLoss

__all__ = ['CALoss', 'CDMLoss', 'DMLoss', 'FlowMatchingLoss', 'ScoreLoss', 'ScoreQuery']
