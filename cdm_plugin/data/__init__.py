"""Prompts, class labels, images and cached text embeddings; importing it registers all of them."""
from cdm_plugin.data.data_preprocessor import DistillationDataPreprocessor
from cdm_plugin.data.embedding_cache import CacheReport, cache_embeddings
from cdm_plugin.data.embedding_dataset import EmbeddingDataset
from cdm_plugin.data.embedding_files import write_embeddings
from cdm_plugin.data.embedding_provenance import check_cache, check_encoder
from cdm_plugin.data.image_label_dataset import ImageLabelDataset
from cdm_plugin.data.label_dataset import LabelDataset
from cdm_plugin.data.pack_inputs import PackInputs
from cdm_plugin.data.prompt_dataset import PromptDataset

__all__ = ['CacheReport', 'DistillationDataPreprocessor', 'EmbeddingDataset', 'ImageLabelDataset', 'LabelDataset',
           'PackInputs', 'PromptDataset', 'cache_embeddings', 'check_cache', 'check_encoder', 'write_embeddings']
