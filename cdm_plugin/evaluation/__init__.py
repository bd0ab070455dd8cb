"""MMEngine metrics; importing this package registers them."""
from .aesthetic_score import AestheticScore
from .base import ImageMetric, Judged, MissingMetric, ScoreMetric, SetMetric
from .clip_scores import CLIPScore, HPSv2, PickScore
from .digit_classifier import DigitClassifier, pixels_to_images
from .digit_metric import DigitMetric, class_accuracy, classifier_features
from .distances import FID, KID, PrecisionRecall, kernel_distance
from .diversity import Diversity, mean_distance_within
from .dpg_bench import DPGBench
from .frechet import frechet_distance
from .hpsv3 import HPSv3
from .image_reward import ImageReward
from .precision_recall import precision_recall

__all__ = ['AestheticScore', 'CLIPScore', 'DPGBench', 'DigitClassifier', 'DigitMetric', 'Diversity', 'FID', 'HPSv2',
           'HPSv3', 'ImageMetric', 'ImageReward', 'Judged', 'KID', 'MissingMetric', 'PickScore', 'PrecisionRecall',
           'ScoreMetric', 'SetMetric', 'class_accuracy', 'classifier_features', 'frechet_distance', 'kernel_distance',
           'mean_distance_within', 'pixels_to_images', 'precision_recall']
