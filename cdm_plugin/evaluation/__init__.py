"""MMEngine metrics; importing this package registers them."""
from .base import ImageMetric, Judged, MissingMetric, ScoreMetric, SetMetric, prepare_metrics
from .digit_classifier import DigitClassifier, pixels_to_images
from .digit_metric import DigitMetric, class_accuracy, classifier_features
from .frechet import frechet_distance
from .precision_recall import precision_recall

__all__ = ['DigitClassifier', 'DigitMetric', 'ImageMetric', 'Judged', 'MissingMetric', 'ScoreMetric', 'SetMetric',
           'class_accuracy', 'classifier_features', 'frechet_distance', 'pixels_to_images', 'precision_recall',
           'prepare_metrics']
