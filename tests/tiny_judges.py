"""Judges of a few thousand random weights, of the classes that the published ones have, saved to folders."""
import numpy as np
import torch
from PIL import Image
from tiny_pipelines import clip_tokenizer, qwen_tokenizer
from transformers import BertTokenizerFast, BlipConfig, BlipForQuestionAnswering, CLIPConfig, CLIPModel, Qwen2VLConfig

from cdm_plugin.metrics.weights import image_processor

MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])
CLIP_SIDE = 32


def random_images(count, height=CLIP_SIDE, width=CLIP_SIDE, seed=0):
    """Smooth random images, (count, 3, height, width) in [-1, 1], not a multiple of 1 / 255."""
    noise = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return torch.nn.functional.interpolate(noise, (height, width), mode='bilinear')


def literal_pixels(image, side=CLIP_SIDE, crop=True):
    """CLIP's preprocessing, written out: a picture (3, H, W) in [-1, 1] as normalised pixels (3, side, side)."""
    picture = Image.fromarray(((image.numpy().transpose(1, 2, 0) + 1) * 127.5).round().astype(np.uint8))
    if crop:
        factor = side / min(picture.size)
        picture = picture.resize([int(length * factor) for length in picture.size], Image.Resampling.BICUBIC)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        picture = picture.crop((left, top, left + side, top + side))
    else:
        picture = picture.resize((side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy((np.asarray(picture) / 255 - MEAN) / STD).permute(2, 0, 1).float()


def tiny_clip(folder, seed=0):
    """A CLIPModel with its tokenizer and image processor."""
    torch.manual_seed(seed)
    vocabulary = len(clip_tokenizer(folder))
    layers = dict(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=2)
    model = CLIPModel(CLIPConfig(
        text_config=dict(layers, vocab_size=vocabulary, bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1,
                         pad_token_id=vocabulary - 1, projection_dim=8),
        vision_config=dict(layers, image_size=CLIP_SIDE, patch_size=8, projection_dim=8), projection_dim=8))
    with torch.no_grad():  # fresh weights are so small that all texts look alike
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    model.save_pretrained(folder)
    image_processor('CLIPImageProcessor')(
        size=dict(shortest_edge=CLIP_SIDE), crop_size=dict(height=CLIP_SIDE, width=CLIP_SIDE)).save_pretrained(folder)
    clip_tokenizer(folder / 'again').save_pretrained(folder)
    return str(folder)


def bert_tokenizer(folder):
    folder.mkdir(parents=True, exist_ok=True)
    words = '[PAD] [UNK] [CLS] [SEP] [MASK] is there a fox dog red ? the yes no'.split()
    (folder / 'vocab.txt').write_text('\n'.join(words))
    tokenizer = BertTokenizerFast(vocab=str(folder / 'vocab.txt'))
    tokenizer.save_pretrained(folder)
    return tokenizer


def tiny_blip(folder, seed=0):
    """A BlipForQuestionAnswering with its tokenizer and image processor."""
    torch.manual_seed(seed)
    tokenizer = bert_tokenizer(folder)
    layers = dict(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=2)
    model = BlipForQuestionAnswering(BlipConfig(
        text_config=dict(layers, vocab_size=len(tokenizer), encoder_hidden_size=16, bos_token_id=2, sep_token_id=3,
                         eos_token_id=3, pad_token_id=0, max_position_embeddings=40, initializer_range=0.5),
        vision_config=dict(layers, image_size=CLIP_SIDE, patch_size=8, initializer_range=0.5)))
    model.save_pretrained(folder)
    image_processor('BlipImageProcessor')(size=dict(height=CLIP_SIDE, width=CLIP_SIDE)).save_pretrained(folder)
    return str(folder)


def tiny_qwen(folder):
    """The configuration, tokenizer and image processor of a tiny Qwen2-VL, without weights."""
    tokenizer = qwen_tokenizer(folder)
    token = tokenizer.convert_tokens_to_ids
    Qwen2VLConfig(
        text_config=dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=1, vocab_size=len(tokenizer) + 7, max_position_embeddings=4096,
                         rope_parameters=dict(rope_type='default', mrope_section=[1, 1, 2], rope_theta=1e4)),
        vision_config=dict(depth=1, embed_dim=16, num_heads=2, hidden_size=16, mlp_ratio=2),
        image_token_id=token('<|image_pad|>'), video_token_id=token('<|video_pad|>'),
        vision_start_token_id=token('<|vision_start|>'), vision_end_token_id=token('<|vision_end|>'),
    ).save_pretrained(folder)
    image_processor('Qwen2VLImageProcessor')().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
