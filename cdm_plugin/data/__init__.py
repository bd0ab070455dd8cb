"""Prompts, class labels, images and cached text embeddings; importing it registers all of them."""
from cdm_plugin.data.bad_records import SkipBadRecords
from cdm_plugin.data.buckets import BucketBatchSampler, ResizeCrop
from cdm_plugin.data.data_preprocessor import DistillationDataPreprocessor
from cdm_plugin.data.embeddings.cache import CacheReport, cache_embeddings
from cdm_plugin.data.embeddings.dataset import EmbeddingDataset
from cdm_plugin.data.embeddings.files import write_embeddings
from cdm_plugin.data.embeddings.provenance import check_cache, check_encoder
from cdm_plugin.data.hf_dataset import HFDataset
from cdm_plugin.data.hf_stream import HFStream
from cdm_plugin.data.image_caption_folder import ImageCaptionFolder
from cdm_plugin.data.image_label_dataset import ImageLabelDataset
from cdm_plugin.data.images import check_pictures
from cdm_plugin.data.label_dataset import LabelDataset
from cdm_plugin.data.latents.cache import LatentReport, cache_latents
from cdm_plugin.data.latents.dataset import LatentDataset, check_latents
from cdm_plugin.data.mix import MixSampler, WeightedMixDataset
from cdm_plugin.data.pack_inputs import PackInputs, check_channel_order
from cdm_plugin.data.pairs import PairDataset
from cdm_plugin.data.prompt_dataset import PromptDataset
from cdm_plugin.data.stream import Stream
from cdm_plugin.data.web_dataset import WebDataset

__all__ = ['BucketBatchSampler', 'CacheReport', 'DistillationDataPreprocessor', 'EmbeddingDataset',
           'HFDataset', 'HFStream', 'ImageCaptionFolder', 'ImageLabelDataset', 'LabelDataset', 'LatentDataset',
           'LatentReport', 'MixSampler', 'PackInputs', 'PairDataset', 'PromptDataset', 'ResizeCrop', 'SkipBadRecords',
           'Stream', 'WebDataset', 'WeightedMixDataset', 'cache_embeddings', 'cache_latents', 'check_cache',
           'check_channel_order', 'check_encoder', 'check_latents', 'check_pictures', 'write_embeddings']
