from cdm_plugin.losses.base import LossInputs, ScoreLoss, ScoreQuery
from cdm_plugin.losses.direction import CALoss, CDMLoss, DirectionLoss, DMLoss, TDMLoss
from cdm_plugin.losses.flow_matching import FlowMatchingLoss
from cdm_plugin.losses.gan import GANLoss
from cdm_plugin.losses.regression import RegressionLoss
from cdm_plugin.losses.reward import RewardLoss

__all__ = ['CALoss', 'CDMLoss', 'DMLoss', 'DirectionLoss', 'FlowMatchingLoss', 'GANLoss', 'LossInputs',
           'RegressionLoss', 'RewardLoss', 'ScoreLoss', 'ScoreQuery', 'TDMLoss']
