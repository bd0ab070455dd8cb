"""Prompts, class labels, images and cached text embeddings; importing it registers all of them."""
from cdm_plugin.data.buckets import BucketBatchSampler, ResizeCrop
from cdm_plugin.data.data_preprocessor import DistillationDataPreprocessor
from cdm_plugin.data.embeddings.cache import CacheReport, cache_embeddings
from cdm_plugin.data.embeddings.dataset import EmbeddingDataset
from cdm_plugin.data.embeddings.files import write_embeddings
from cdm_plugin.data.embeddings.provenance import check_cache, check_encoder
from cdm_plugin.data.image_label_dataset import ImageLabelDataset
from cdm_plugin.data.images import check_pictures
from cdm_plugin.data.label_dataset import LabelDataset
from cdm_plugin.data.latents import LatentDataset, cache_latents, check_latents
from cdm_plugin.data.pack_inputs import PackInputs, check_channel_order
from cdm_plugin.data.pairs import PairDataset
from cdm_plugin.data.prompt_dataset import PromptDataset

__all__ = ['BucketBatchSampler', 'CacheReport', 'DistillationDataPreprocessor', 'EmbeddingDataset',
           'ImageLabelDataset', 'LabelDataset', 'LatentDataset', 'PackInputs', 'PairDataset', 'PromptDataset',
           'ResizeCrop', 'cache_embeddings', 'cache_latents', 'check_cache', 'check_channel_order', 'check_encoder',
           'check_latents', 'check_pictures', 'write_embeddings']
