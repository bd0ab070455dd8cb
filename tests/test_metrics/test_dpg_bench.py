import csv

import pytest
import torch
from tiny_judges import literal_pixels, random_images, tiny_blip
from transformers import AutoTokenizer, BlipForQuestionAnswering

from cdm_plugin.metrics import DPGBench, MissingMetric
from cdm_plugin.metrics.dpg_bench import Question, share_of_yes

ROWS = [  # item, prompt, number, parents, question
    ('p1', 'a red fox and a dog', 1, '0', 'is there a fox ?'),
    ('p1', 'a red fox and a dog', 2, '1', 'is the fox red ?'),
    ('p1', 'a red fox and a dog', 3, '0', 'is there a dog ?'),
    ('p1', 'a red fox and a dog', 4, '2, 3', 'is the dog there a red fox ?'),
    ('p2', 'the dog', 1, '0', 'is there the dog ?'),
]


@pytest.fixture(scope='module')
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp('dpg')
    with open(folder / 'dpg_bench.csv', 'w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(['item_id', 'text', 'keywords', 'proposition_id', 'dependency', 'category_broad',
                         'category_detailed', 'tuple', 'question_natural_language'])
        writer.writerows([item, text, '', number, parents, '', '', '', question]
                         for item, text, number, parents, question in ROWS)
    return dict(questions=str(folder / 'dpg_bench.csv'), pretrained=tiny_blip(folder / 'blip'), device='cpu')


def test_answers_are_the_librarys_of_one_question_at_a_time(places):
    metric = DPGBench(**places, batch_size=2)
    metric.prepare()
    model = BlipForQuestionAnswering.from_pretrained(places['pretrained']).eval()
    tokenizer = AutoTokenizer.from_pretrained(places['pretrained'])
    questions, seen = [row[4] for row in ROWS], set()
    for image in random_images(3, 40, 56):
        pixels = literal_pixels(image, crop=False)
        expected = [tokenizer.decode(model.generate(
            input_ids=tokenizer(question, return_tensors='pt')['input_ids'], pixel_values=pixels[None],
            max_new_tokens=10, do_sample=False)[0], skip_special_tokens=True) for question in questions]
        metric.judge_all([image], ['the dog'])
        assert metric.answer(pixels, questions) == expected
        seen.update(expected)
    assert len(seen) > 3  # the tiny judge looks at the image and the question


@pytest.mark.parametrize('no, share', [
    ((), 100), ((1,), 25), ((2,), 50), ((3,), 50), ((4,), 75), ((1, 3), 0)])
def test_a_question_counts_only_where_what_it_depends_on_does(places, no, share):
    metric = DPGBench(**places)
    metric.prepare()
    numbers = {row[4]: row[2] for row in ROWS[:4]}
    metric.answer = lambda pixels, questions: ['no' if numbers[question] in no else ' Yes' for question in questions]
    # (1, 3): 2 depends on 1, 4 on 2 and 3, nothing is left; (1,): 3 alone is left
    assert metric.rows(random_images(1), ['a red fox and a dog ']).tolist() == [share]


def test_the_answer_must_be_yes_and_nothing_more(places):
    metric = DPGBench(**places)
    metric.prepare()
    metric.answer = lambda pixels, questions: ['yes it is']
    assert metric.rows(random_images(1), ['the dog']).tolist() == [0]


def test_the_published_order_decides_where_a_parent_comes_later():
    questions = {1: Question('', (2,)), 2: Question('', (3,)), 3: Question('', (9,))}
    # 1 sees the answer to 2, which is voided only after; 9 is not there
    assert share_of_yes(questions, {1: True, 2: True, 3: False}) == pytest.approx(1 / 3)


def test_other_prompts_and_files_are_refused(places, tmp_path):
    with pytest.raises(ValueError, match="no questions about 'a cat': take the prompts of .*dpg_bench.csv"):
        DPGBench(**places).rows(torch.zeros(1, 3, 8, 8), ['a cat'])
    (tmp_path / 'other.csv').write_text('text,question\n')
    with pytest.raises(ValueError, match='lacks the columns .*dependency'):
        DPGBench(**dict(places, questions=str(tmp_path / 'other.csv'))).prepare()
    with pytest.raises(MissingMetric, match='`pretrained` of DPGBench'):
        DPGBench(**dict(places, pretrained=str(tmp_path / 'absent'))).prepare()
