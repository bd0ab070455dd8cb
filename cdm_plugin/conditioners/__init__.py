"""From prompts (texts or class labels) to a `Condition`; importing it registers all of them."""
from cdm_plugin.conditioners.base import Conditioner, Encoder, TextConditioner, TokenCount
from cdm_plugin.conditioners.cached import EmbeddingConditioner
from cdm_plugin.conditioners.label import ClassConditioner
from cdm_plugin.conditioners.pipeline import (
    LimitedPipelineConditioner,
    PipelineConditioner,
    TextEncoderConditioner,
)

__all__ = ['ClassConditioner', 'Conditioner', 'EmbeddingConditioner', 'Encoder',
           'LimitedPipelineConditioner', 'PipelineConditioner', 'TextConditioner', 'TextEncoderConditioner',
           'TokenCount']
