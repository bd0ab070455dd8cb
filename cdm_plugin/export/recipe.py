"""How a student came about, for the model card and for later exports of an exported folder."""
import json
from pathlib import Path
from typing import Any, Dict

from mmengine.registry import MODELS

from cdm_plugin.backbones.base import PARTS_FILE
from cdm_plugin.export.job import ExportJob, name_of
from cdm_plugin.methods import DiffusionModel, FlowMatching

# What the method that opened an exported folder knows itself; the rest is known from that folder alone.
KNOWN_AGAIN = ('steps of inference', 'LoRA', 'dtype of the files')


def describe_recipe(job: ExportJob) -> Dict[str, Any]:
    """How the student came about, as far as the method, or the exported folder that it was opened from, knows."""
    recipe = _of_method(job)
    earlier = _of_folder(job.method)
    if not earlier:
        return recipe
    known = (*KNOWN_AGAIN, 'iterations') if job.iterations is not None else KNOWN_AGAIN
    return {**earlier, **{key: recipe[key] for key in known if key in recipe}}


def is_distilled(job: ExportJob) -> bool:
    """Whether guidance is part of the student, rather than to be added when it samples."""
    kind = MODELS.get(describe_recipe(job)['method'])
    return not (isinstance(kind, type) and issubclass(kind, FlowMatching))


def _of_method(job: ExportJob) -> Dict[str, Any]:
    method = job.method
    recipe: Dict[str, Any] = {
        'method': type(method).__name__, 'weights': 'moving average (EMA)' if job.ema else "the student's own",
        'iterations': job.iterations, 'student steps': method.student_ema.steps if method.student_ema else None,
        'steps of inference': f'{len(method.sample_sigmas)}, sigmas {method.sample_sigmas.tolist()}'}
    if hasattr(method, 'alpha'):
        recipe['alpha'] = f'{method.alpha:g} (guidance scale {1 + method.alpha:g})'
        recipe['losses'] = ', '.join(f'{name} ({type(loss).__name__}, weight {getattr(loss, "weight", 1):g})'
                                     for name, loss in method.losses.items())
        recipe['time grid'] = type(method.time_grid).__name__
    if method.lora is not None:
        recipe['LoRA'] = f'rank {method.lora.rank}, alpha {method.lora.alpha:g}' + (', fused' if job.fuse else '')
    if not job.as_lora:
        recipe['dtype of the files'] = name_of(job.target_dtype)
    return {key: value for key, value in recipe.items() if value is not None}


def _of_folder(method: DiffusionModel) -> Dict[str, Any]:
    """The recipe in the exported folder that the method only opened; one that trains has its own."""
    source = method.backbone.pretrained if method.lora is None else method.lora.start['student']
    if type(method) is not DiffusionModel or source is None:
        return {}
    file = Path(source, PARTS_FILE)
    return json.loads(file.read_text()).get('recipe', {}) if file.is_file() else {}
