"""A StableDiffusion3 pipeline of a few thousand random weights, built without a download."""
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedTokenizerFast,
                          T5Config, T5EncoderModel)

LETTERS = 'abcdefghijklmnopqrstuvwxyz'


def clip_tokenizer(folder):
    """Every letter is a token."""
    tokens = [*LETTERS, *(letter + '</w>' for letter in LETTERS), '<|startoftext|>', '<|endoftext|>']
    folder.mkdir(parents=True)
    (folder / 'vocab.json').write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / 'merges.txt').write_text('#version: 0.2\n')
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def clip_encoder(vocabulary, width):
    return CLIPTextModelWithProjection(CLIPTextConfig(
        vocab_size=vocabulary, bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1, pad_token_id=vocabulary - 1,
        hidden_size=width, projection_dim=width, intermediate_size=24, num_attention_heads=2, num_hidden_layers=3,
        max_position_embeddings=77))


def t5_tokenizer():
    """Every letter is a token here too."""
    vocabulary = {token: i for i, token in enumerate(['<pad>', '</s>', '<unk>', *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token='<unk>'))
    tokenizer.pre_tokenizer = pre_tokenizers.Split('', 'isolated')
    tokenizer.post_processor = processors.TemplateProcessing(single='$A </s>', special_tokens=[('</s>', 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token='<pad>', eos_token='</s>', unk_token='<unk>')


def tiny_vae():
    """Latents of 4 channels at half the images' side, with a shift and a scale."""
    return AutoencoderKL(
        sample_size=16, in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(4, 8),
        layers_per_block=1, norm_num_groups=2, down_block_types=('DownEncoderBlock2D',) * 2,
        up_block_types=('UpDecoderBlock2D',) * 2, use_quant_conv=False, use_post_quant_conv=False,
        shift_factor=0.0609, scaling_factor=1.5305)


def save_tiny_sd3(folder, t5=True, seed=0):
    """Writes the pipeline: 8x8 latents of 16x16 images, two CLIP encoders and, with `t5`, the third one.

    Args:
        folder (Path): Where to write.
        t5 (bool): Whether the pipeline has its third text encoder. Default True.
        seed (int): Of the weights. Default 0.

    Returns:
        StableDiffusion3Pipeline: What was written.
    """
    torch.manual_seed(seed)
    tokenizer = clip_tokenizer(Path(folder, 'clip_files'))
    encoders = [clip_encoder(len(tokenizer), 16).eval() for _ in range(2)]
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, pos_embed_max_size=8, num_layers=2,
        num_attention_heads=2, attention_head_dim=8, caption_projection_dim=16, joint_attention_dim=40,
        pooled_projection_dim=32, qk_norm='rms_norm', dual_attention_layers=(0,))
    with torch.no_grad():  # fresh networks have zero gates, and would ignore their condition
        for parameter in transformer.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    third = dict(text_encoder_3=None, tokenizer_3=None)
    if t5:
        config = T5Config(vocab_size=29, d_model=40, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
        third = dict(text_encoder_3=T5EncoderModel(config).eval(), tokenizer_3=t5_tokenizer())
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=tiny_vae(),
        text_encoder=encoders[0], tokenizer=tokenizer, text_encoder_2=encoders[1], tokenizer_2=tokenizer, **third)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    return pipeline
