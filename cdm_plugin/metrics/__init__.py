"""MMEngine metrics; importing this package registers them."""
from cdm_plugin.metrics.aesthetic_score import AestheticScore
from cdm_plugin.metrics.base import ImageMetric, Judged, MissingMetric, ScoreMetric, SetMetric
from cdm_plugin.metrics.clip_scores import CLIPScore, HPSv2, PickScore
from cdm_plugin.metrics.digit_classifier import DigitClassifier, pixels_to_images
from cdm_plugin.metrics.digit_metric import DigitMetric, class_accuracy, classifier_features
from cdm_plugin.metrics.distances import FID, KID, PrecisionRecall, kernel_distance
from cdm_plugin.metrics.diversity import Diversity, mean_distance_within
from cdm_plugin.metrics.dpg_bench import DPGBench
from cdm_plugin.metrics.frechet import frechet_distance
from cdm_plugin.metrics.hpsv3 import HPSv3
from cdm_plugin.metrics.image_reward import ImageReward
from cdm_plugin.metrics.precision_recall import precision_recall

__all__ = ['AestheticScore', 'CLIPScore', 'DPGBench', 'DigitClassifier', 'DigitMetric', 'Diversity', 'FID', 'HPSv2',
           'HPSv3', 'ImageMetric', 'ImageReward', 'Judged', 'KID', 'MissingMetric', 'PickScore', 'PrecisionRecall',
           'ScoreMetric', 'SetMetric', 'class_accuracy', 'classifier_features', 'frechet_distance', 'kernel_distance',
           'mean_distance_within', 'pixels_to_images', 'precision_recall']
