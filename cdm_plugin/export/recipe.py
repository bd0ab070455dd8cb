"""How a student came about, for the model card and for later exports of an exported folder."""
from typing import Any

from mmengine.registry import MODELS
from torch import Tensor

from cdm_plugin.backbones.parts import read_parts
from cdm_plugin.export.job import FLOAT8, ExportJob, is_whole_pipeline, name_of
from cdm_plugin.methods import DiffusionModel, FlowMatching
from cdm_plugin.registry import is_type, registered
from cdm_plugin.sampling import step_sigmas

# What the method that opened an exported folder knows itself; the rest is known from that folder alone.
KNOWN_AGAIN = ('steps of inference', 'from step to step', 'LoRA', 'dtype of the files')


def describe_recipe(job: ExportJob) -> dict[str, Any]:
    """How the student came about, as far as the method, or the exported folder that it was opened from, knows."""
    recipe = _of_method(job)
    earlier = _of_folder(job.method)
    if earlier:
        known = (*KNOWN_AGAIN, 'iterations') if job.iterations is not None else KNOWN_AGAIN
        recipe = {**earlier, **{key: recipe[key] for key in known if key in recipe}}
    if not _is_distilled(recipe):
        recipe.pop('steps of inference', None)
    return recipe


def is_distilled(job: ExportJob) -> bool:
    """Whether few steps and guidance are part of the model, rather than chosen when it samples."""
    return _is_distilled(describe_recipe(job))


def _is_distilled(recipe: dict[str, Any]) -> bool:
    return not is_type(registered(recipe.get('method'), MODELS), FlowMatching)


def how_to_sample(job: ExportJob) -> tuple[Tensor, float]:
    """Levels of the steps, before the scheduler's shift, and guidance scale: a student's own and 1; for a model of a
    diffusers pipeline that is not distilled, the usual ones of that pipeline."""
    if is_distilled(job) or not is_whole_pipeline(job.backbone):
        return job.method.sample_sigmas, 1.0
    usual = job.backbone.pipeline_defaults()
    return step_sigmas(usual['num_inference_steps']), usual['guidance_scale']


def _of_method(job: ExportJob) -> dict[str, Any]:
    method, trained = job.method, job.trained_as
    recipe: dict[str, Any] = {
        'method': type(trained).__name__, 'weights': 'moving average (EMA)' if job.ema else "the student's own",
        'iterations': job.iterations, 'student steps': method.student_ema.steps if method.student_ema else None,
        'steps of inference': f'{len(method.sample_sigmas)}, sigmas {method.sample_sigmas.tolist()}'}
    if method.rollout != 'ode':
        recipe['from step to step'] = 'x0 noised anew'
    if hasattr(trained, 'alpha'):
        recipe['alpha'] = f'{trained.alpha:g} (guidance scale {1 + trained.alpha:g})'
        recipe['losses'] = ', '.join(f'{name} ({type(loss).__name__}, weight {getattr(loss, "weight", 1):g})'
                                     for name, loss in trained.losses.items())
        recipe['time grid'] = type(trained.time_grid).__name__
    if method.lora is not None:
        recipe['LoRA'] = f'rank {method.lora.rank}, alpha {method.lora.alpha:g}' + (', fused' if job.fuse else '')
    if not job.as_lora:
        linear = f'{name_of(FLOAT8)} (linear layers), ' if job.dtype == FLOAT8 else ''
        recipe['dtype of the files'] = linear + name_of(job.target_dtype)
    return {key: value for key, value in recipe.items() if value is not None}


def _of_folder(method: DiffusionModel) -> dict[str, Any]:
    """The recipe in the exported folder that the method only opened; one that trains has its own."""
    source = method.backbone.pretrained if method.lora is None else method.lora.start['student']
    if type(method) is not DiffusionModel or method.config is not None or source is None:
        return {}
    recipe = read_parts(source).get('recipe')
    return recipe if isinstance(recipe, dict) and isinstance(recipe.get('method'), str) else {}
