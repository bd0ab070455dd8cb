"""DPG-Bench: which of a long prompt's claims a visual question answerer finds in the image."""
import csv
import dataclasses

import torch
from mmengine.registry import METRICS
from torch import Tensor
from transformers import AutoTokenizer, BlipForQuestionAnswering

from cdm_plugin import assets
from cdm_plugin.metrics.base import MissingMetric, ScoreMetric
from cdm_plugin.metrics.clip_scores import to_pictures
from cdm_plugin.metrics.weights import image_processor

QUESTIONS = 'https://raw.githubusercontent.com/TencentQQGYLab/ELLA/main/dpg_bench/dpg_bench.csv'


@dataclasses.dataclass(frozen=True)
class Question:
    """One question about a prompt's image.

    Attributes:
        text (str): The question, to be answered by yes or no.
        parents (tuple[int, ...]): Identifiers of the questions without whose yes this one is void.
    """

    text: str
    parents: tuple[int, ...]


@METRICS.register_module()
class DPGBench(ScoreMetric):
    """Share of a prompt's questions, in percent, that are answered yes; higher is better.

    Hu et al., "ELLA", 2024, section 4: a question counts only where all questions it depends on count. The prompts
    must be the benchmark's own, four images each. The result is `dpg_bench`, the mean over images.

    **Not comparable to published numbers**: those come from mPLUG-large of ModelScope
    (damo/mplug_visual-question-answering_coco_large_en), whose package pins libraries of another age; here BLIP of
    transformers answers, so that only models that were judged by it compare. The published script also drops the
    first question of the file and reports categories; here every question counts and there are no categories.

    Args:
        questions (str): The benchmark's `dpg_bench.csv`, from its repository.
        pretrained (str): Hub id or folder of a `BlipForQuestionAnswering`. Default the larger published one.
        **kwargs: Of `ImageMetric`; `batch_size` counts questions here.
    """

    key = 'dpg_bench'

    def __init__(self, questions: str = 'dpg_bench.csv', pretrained: str = 'Salesforce/blip-vqa-capfilt-large',
                 **kwargs) -> None:
        super().__init__(**kwargs)
        self.questions_path, self.pretrained = questions, pretrained
        self.questions: dict[str, dict[int, Question]] = {}
        self.model: BlipForQuestionAnswering | None = None

    def load(self) -> None:
        try:
            self.questions = read_questions(assets.resolve(self.questions_path))
        except OSError as error:
            raise MissingMetric(f'{self.name} has no questions at {self.questions_path!r}: run `curl -LO {QUESTIONS}` '
                                f'where there is a network, or set `questions` of {self.name} to where they lie'
                                ) from error
        with self.needs(self.pretrained):
            self.preprocess = image_processor('BlipImageProcessor').from_pretrained(self.pretrained)
            self.tokenizer = AutoTokenizer.from_pretrained(self.pretrained, trust_remote_code=False)
            model = BlipForQuestionAnswering.from_pretrained(self.pretrained, dtype=torch.float32)
        self.model = model.eval().requires_grad_(False).to(self.device)

    def unload(self) -> None:
        self.model = None

    def scores(self, images: Tensor, prompts: list[str]) -> Tensor:
        pixels = self.preprocess(to_pictures(images), return_tensors='pt')['pixel_values'].to(self.device)
        return torch.tensor([self._score(image, prompt) for image, prompt in zip(pixels, self.texts(prompts))])

    def _score(self, pixels: Tensor, prompt: str) -> float:
        questions = self.questions.get(prompt.strip())
        if questions is None:
            raise ValueError(f'{self.name} has no questions about {prompt!r}: take the prompts of '
                             f'{self.questions_path}')
        answers = self.answer(pixels, [question.text for question in questions.values()])
        yes = {number: answer.strip().lower() == 'yes' for number, answer in zip(questions, answers)}
        return 100 * share_of_yes(questions, yes)

    def answer(self, pixels: Tensor, questions: list[str]) -> list[str]:
        """What BLIP answers to each question about one preprocessed image (3, H, W)."""
        tokens = self.tokenizer(questions)['input_ids']
        answers: dict[int, str] = {}
        # Only equally long questions share a batch: BLIP's decoder would look at the padding of the shorter ones.
        for length in sorted(set(map(len, tokens))):
            places = [i for i, row in enumerate(tokens) if len(row) == length]
            for start in range(0, len(places), self.batch_size):
                batch = places[start:start + self.batch_size]
                output = self.model.generate(
                    input_ids=torch.tensor([tokens[i] for i in batch], device=self.device),
                    pixel_values=pixels.expand(len(batch), -1, -1, -1), max_new_tokens=10, do_sample=False)
                answers.update(zip(batch, self.tokenizer.batch_decode(output, skip_special_tokens=True)))
        return [answers[i] for i in range(len(questions))]


def share_of_yes(questions: dict[int, Question], answers: dict[int, bool]) -> float:
    """Share of questions, in [0, 1], that are answered yes and whose parents count too.

    Args:
        questions (dict[int, Question]): The questions about one prompt.
        answers (dict[int, bool]): Whether each is answered yes.
    """
    counts: dict[int, bool] = {}
    for number, question in questions.items():  # in the file's order, in which parents come first
        counts[number] = answers[number] and all(counts.get(p, answers.get(p, True)) for p in question.parents)
    return sum(counts.values()) / len(counts)


def read_questions(path: str) -> dict[str, dict[int, Question]]:
    """Prompt -> number -> question, from the benchmark's csv.

    Raises:
        OSError: There is no such file.
        ValueError: A column is missing.
    """
    found: dict[str, dict[int, Question]] = {}
    with open(path, encoding='utf-8', newline='') as file:
        reader = csv.DictReader(file)
        needed = {'text', 'proposition_id', 'dependency', 'question_natural_language'}
        if not needed <= set(reader.fieldnames or ()):
            raise ValueError(f'{path} lacks the columns {sorted(needed - set(reader.fieldnames or ()))} of '
                             'dpg_bench.csv: set `questions` of DPGBench to the benchmark\'s own file')
        for row in reader:
            parents = tuple(p for p in map(int, row['dependency'].split(',')) if p)  # 0 is no parent
            questions = found.setdefault(row['text'].strip(), {})
            questions[int(row['proposition_id'])] = Question(row['question_natural_language'], parents)
    return found
