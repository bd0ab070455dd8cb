import pytest
import torch
from mmengine.evaluator import Evaluator
from mmengine.registry import METRICS
from tiny_judges import literal_pixels, random_images, tiny_clip
from torch.nn.functional import cosine_similarity
from transformers import AutoTokenizer, CLIPModel

from cdm_plugin.metrics import AestheticScore, CLIPScore, HPSv2, MissingMetric, PickScore
from cdm_plugin.metrics.prepare import prepare_on_all_ranks

PROMPTS = ['a red fox', 'two dogs', 'a bird that sings on a branch', 'x' * 200]


@pytest.fixture(scope='module')
def clip(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp('judges') / 'clip')


@pytest.fixture(scope='module')
def images():
    return [*random_images(2), *random_images(2, 48, 40, seed=1)]


@pytest.fixture(scope='module')
def literal(clip, images):
    """What transformers' whole model says, one image at a time: unit embeddings, and logits, which have the scale."""
    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), AutoTokenizer.from_pretrained(clip)
    with torch.no_grad():
        outputs = [model(pixel_values=literal_pixels(image)[None],
                         **tokenizer(prompt, truncation=True, max_length=77, return_tensors='pt'))
                   for image, prompt in zip(images, PROMPTS)]
    return tuple(torch.cat(parts) for parts in zip(*(
        (output.image_embeds, output.text_embeds, output.logits_per_image[0]) for output in outputs)))


@pytest.mark.parametrize('metric, formula', [
    (CLIPScore, lambda image, text, logits: 100 * cosine_similarity(image, text).relu()),
    (PickScore, lambda image, text, logits: logits),
    (HPSv2, lambda image, text, logits: 100 * cosine_similarity(image, text)),
])
def test_scores_are_the_published_formula(metric, formula, clip, images, literal):
    metric = metric(pretrained=clip, device='cpu', batch_size=2)
    expected = formula(*literal)
    torch.testing.assert_close(metric.rows(images, PROMPTS), expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1  # the prompts and images differ enough to tell
    assert metric.value(expected, PROMPTS, torch.arange(4)) == {metric.key: pytest.approx(expected.mean().item())}


def test_negative_cosines_are_no_clip_score(clip):
    scores = CLIPScore(pretrained=clip, device='cpu').scaled(torch.tensor([-0.25, 0.25]))
    assert scores.tolist() == [0, 25]


def test_aesthetic_score_is_the_linear_layers_of_the_unit_embedding(clip, images, literal, tmp_path):
    torch.manual_seed(0)
    state, expected = {}, literal[0]
    for place, (width_in, width_out) in zip((0, 2, 4, 6, 7), [(8, 1024), (1024, 128), (128, 64), (64, 16), (16, 1)]):
        weight, bias = torch.randn(width_out, width_in) / width_in ** 0.5, torch.randn(width_out)
        state[f'layers.{place}.weight'], state[f'layers.{place}.bias'] = weight, bias
        expected = expected @ weight.T + bias
    torch.save(state, tmp_path / 'head.pth')
    metric = AestheticScore(pretrained=clip, head=str(tmp_path / 'head.pth'), device='cpu')
    torch.testing.assert_close(metric.rows(images, PROMPTS), expected[:, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(metric.rows(images, [3] * 4), expected[:, 0], rtol=1e-4, atol=1e-4)


def test_works_from_a_config_and_releases_its_judge(clip, images, literal):
    evaluator = Evaluator(dict(type='PickScore', pretrained=clip, device='cpu'))
    evaluator.process([dict(image=image, prompt=prompt, index=i)
                       for i, (image, prompt) in enumerate(zip(images, PROMPTS))])
    assert evaluator.evaluate(4) == {'images/pick_score': pytest.approx(literal[2].mean().item(), rel=1e-4)}
    metric = evaluator.metrics[0]
    metric.release()
    assert metric.clip is None
    torch.testing.assert_close(metric.rows(images, PROMPTS), metric.judged.rows)


def test_a_label_is_no_prompt(clip, images):
    with pytest.raises(ValueError, match='CLIPScore reads prompts, which must be text, got 3: take CLIPScore out'):
        CLIPScore(pretrained=clip, device='cpu').rows(images[:1], [3])


CASES = [
    (dict(type='CLIPScore', pretrained='ABSENT'), '`pretrained` of CLIPScore'),
    (dict(type='PickScore', pretrained='ABSENT', processor='CLIP'), '`pretrained` of PickScore'),
    (dict(type='HPSv2'), 'hf download laion/CLIP-ViT-H-14-laion2B-s32B-b79K'),
    (dict(type='AestheticScore', head='ABSENT'), '`head` of AestheticScore'),
    (dict(type='FID', reference='ABSENT'), '`reference` of FID'),
    (dict(type='KID', reference='CLIP', space='clip', pretrained='ABSENT'), '`reference` of KID'),
    (dict(type='Diversity', pretrained='nobody/clip'), 'hf download nobody/clip'),
    (dict(type='DPGBench', questions='ABSENT'), '`questions` of DPGBench'),
    (dict(type='ImageReward', tokenizer='ABSENT'), '`tokenizer` of ImageReward'),
]


def test_every_metric_says_what_it_lacks_and_the_others_run(clip, tmp_path, monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    places = dict(ABSENT=str(tmp_path / 'no/such/place'), CLIP=clip)
    metrics = [METRICS.build({key: places.get(value, value) for key, value in dict(config, device='cpu').items()})
               for config, _ in CASES]
    good = CLIPScore(pretrained=clip, device='cpu')
    ready, missing = prepare_on_all_ranks([*metrics, good])
    assert ready == [good] and len(missing) == len(CASES)
    for metric, (config, text) in zip(metrics, CASES):
        assert text in missing[config['type']] and '\n' not in missing[config['type']]
        with pytest.raises(MissingMetric):
            metric.prepare()
    with pytest.raises(MissingMetric, match='`processor` of CLIPScore'):
        CLIPScore(pretrained=clip, processor=places['ABSENT'], device='cpu').prepare()
