"""HPSv3: a vision-language model that rates an image for a prompt as people would."""
import ast
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from mmengine.registry import METRICS
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, Qwen2VLConfig, Qwen2VLModel

from cdm_plugin.arguments import Count
from cdm_plugin.metrics.base import ScoreMetric
from cdm_plugin.metrics.clip_scores import to_pictures
from cdm_plugin.metrics.weights import download_command, image_processor, load_state

WEIGHTS = 'HPSv3.safetensors'
REWARD_TOKEN = '<|Reward|>'
NUM_PIXELS = 256 * 28 * 28
"""Every image is resized to about this area, in steps of 28 pixels."""
CHAT = ('<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n'
        '<|vision_start|>{image}<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n')


class HPSv3Judge(nn.Module):
    """Qwen2-VL whose hidden state at the reward token a small network turns into a rating's mean and spread.

    Ma et al., "HPSv3", 2025, section 4. Layout and sizes follow the published state dict.

    Args:
        state (dict[str, Tensor]): The published weights. Both of transformers' layouts of Qwen2-VL are taken.
        config (Qwen2VLConfig): Of the base model.
        dtype (torch.dtype): Of the base model; the head is float32.

    Raises:
        ValueError: The state dict does not fit the configuration.
    """

    def __init__(self, state: dict[str, Tensor], config: Qwen2VLConfig, dtype: torch.dtype) -> None:
        super().__init__()
        body, head = {}, {}
        for name, value in state.items():
            if name.startswith('rm_head.'):
                head[name.removeprefix('rm_head.')] = value
            elif name.startswith('visual.'):
                body[name] = value
            elif name.startswith('model.'):
                name = name.removeprefix('model.')
                body[name if name.startswith(('visual.', 'language_model.')) else f'language_model.{name}'] = value
        # the published embedding has a row more for the reward token, and none for the base model's unused ones
        config.text_config.vocab_size = len(body['language_model.embed_tokens.weight'])
        self.body, found = Qwen2VLModel.from_pretrained(None, config=config, state_dict=body, dtype=dtype,
                                                        output_loading_info=True)
        wrong = sorted([*found['missing_keys'], *found['unexpected_keys']])
        if wrong:
            raise ValueError(f'these are not the weights of HPSv3 on this base model: {wrong[0]} and {len(wrong) - 1} '
                             'more names do not fit; set `pretrained` and `base` of HPSv3 to what belongs together')
        layers = [nn.Linear(head[f'{i}.weight'].shape[1], len(head[f'{i}.weight'])) for i in (0, 3, 5)]
        self.head = nn.Sequential(layers[0], nn.ReLU(), nn.Dropout(), layers[1], nn.ReLU(), layers[2])
        self.head.load_state_dict({name: value.float() for name, value in head.items()})

    def forward(self, tokens: Tensor, mask: Tensor, pixels: Tensor, grid: Tensor, reward_token: int) -> Tensor:
        """Means and raw spreads (B, 2), float32.

        Args:
            tokens (Tensor): int (B, L), padded on the right, with one reward token a row.
            mask (Tensor): (B, L), 0 is padding.
            pixels (Tensor): Patches of all images, as Qwen2-VL's image processor gives them.
            grid (Tensor): int (B, 3), how many patches each image has.
            reward_token (int): Its number.
        """
        embeds = self.body.language_model.embed_tokens(tokens)
        visual = self.body.visual(pixels.to(embeds.dtype), grid_thw=grid)
        visual = getattr(visual, 'pooler_output', visual)  # transformers 4 returns the tensor itself
        places = (tokens == self.body.config.image_token_id).unsqueeze(-1).expand_as(embeds)
        embeds = embeds.masked_scatter(places, visual.to(embeds.dtype))
        # The published model counts image tokens like words: it never got Qwen2-VL's positions in the image.
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand(3, *tokens.shape)
        hidden = self.body.language_model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions,
                                          use_cache=False).last_hidden_state
        return self.head(hidden[tokens == reward_token].float())


@METRICS.register_module()
class HPSv3(ScoreMetric):
    """The mean rating by Human Preference Score v3 (7 billion parameters), around 5 to 12; higher is better.

    The weights are the published safetensors file over the configuration and tokenizer of Qwen2-VL-7B-Instruct. The
    package `hpsv3` pins another transformers and cannot live in this environment; what is needed of it is the
    instruction that the judge was trained with, which is read from its files and not imported
    (``pip install --no-deps hpsv3``). The result is `hpsv3`.

    Args:
        pretrained (str): Hub id, folder or file of ``HPSv3.safetensors``.
        base (str): Hub id or folder of the base model's configuration, tokenizer and image processor.
        dtype (str): Of the base model, 'bfloat16' (16 GB) as published, or 'float32'; the head is float32.
        batch_size (int): Images in one forward pass. Default 4.
        **kwargs: Of `ImageMetric`.
    """

    key = 'hpsv3'

    def __init__(self, pretrained: str = 'MizzenAI/HPSv3', base: str = 'Qwen/Qwen2-VL-7B-Instruct',
                 dtype: Literal['bfloat16', 'float32'] = 'bfloat16', batch_size: Count = 4, **kwargs) -> None:
        super().__init__(batch_size=batch_size, **kwargs)
        self.pretrained, self.base, self.dtype = pretrained, base, getattr(torch, dtype)
        self.model: HPSv3Judge | None = None

    def load(self) -> None:
        with self.needs('hpsv3'):
            self.instruction = published_instruction()
        with self.needs(self.base, 'base', f"hf download {self.base} --exclude '*.safetensors'"):
            config = AutoConfig.from_pretrained(self.base, trust_remote_code=False)
            self.tokenizer = AutoTokenizer.from_pretrained(self.base, trust_remote_code=False)
            self.preprocess = image_processor('Qwen2VLImageProcessor').from_pretrained(
                self.base, size=dict(shortest_edge=NUM_PIXELS, longest_edge=NUM_PIXELS))
        self.tokenizer.padding_side = 'right'
        self.tokenizer.add_tokens([REWARD_TOKEN], special_tokens=True)
        with self.needs(self.pretrained, get=download_command(self.pretrained, WEIGHTS)):
            state = load_state(self.pretrained, WEIGHTS)
        self.model = HPSv3Judge(state, config, self.dtype).eval().requires_grad_(False).to(self.device)

    def unload(self) -> None:
        self.model = None

    def scores(self, images: Tensor, prompts: list[str]) -> Tensor:
        patches = self.preprocess(to_pictures(images), return_tensors='pt')
        grid = patches['image_grid_thw']
        merged = self.model.body.config.vision_config.spatial_merge_size ** 2
        texts = [CHAT.format(image='<|image_pad|>' * (cells.prod().item() // merged), text=self.instruction.replace(
            '{text_prompt}', prompt)) for cells, prompt in zip(grid, self.texts(prompts))]
        tokens = self.tokenizer(texts, padding=True, return_tensors='pt').to(self.device)
        output = self.model(tokens.input_ids, tokens.attention_mask, patches['pixel_values'].to(self.device),
                            grid.to(self.device), self.tokenizer.convert_tokens_to_ids(REWARD_TOKEN))
        return output[:, 0]


def published_instruction() -> str:
    """The text that the judge was trained with, `{text_prompt}` in the prompt's place.

    Raises:
        ImportError: The package `hpsv3` is not installed.
    """
    spec = find_spec('hpsv3')
    if spec is None:
        raise ModuleNotFoundError('No module named hpsv3', name='hpsv3')
    source = Path(spec.origin).parent / 'dataset/data_collator_qwen.py'
    texts: dict[str, Any] = {}
    for node in ast.parse(source.read_text(encoding='utf-8')).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            texts[ast.unparse(node.targets[0])] = node.value.value
    return texts['INSTRUCTION'] + texts['prompt_with_special_token']
