"""Pipelines of a few thousand random weights, one for each architecture, built without a download."""
import json
from pathlib import Path

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    LongCatImagePipeline,
    LongCatImageTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from mmengine.registry import MODELS
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLModel,
    T5Config,
    T5EncoderModel,
)

import cdm_plugin  # noqa: F401  registers everything

# Every byte is a token, so that any text is made of known ones.
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
PROMPTS = ['a "red" fox', 'dogs and birds']
QWEN_SPECIAL = ['<|endoftext|>', '<|im_start|>', '<|im_end|>', '<|vision_start|>', '<|vision_end|>', '<|vision_pad|>',
                '<|image_pad|>', '<|video_pad|>']
# Of Qwen's chat template, what a single text of a user needs.
CHAT = ("{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}")


def clip_tokenizer(folder):
    tokens = [*BYTES, *(byte + '</w>' for byte in BYTES), '<|startoftext|>', '<|endoftext|>']
    folder.mkdir(parents=True)
    (folder / 'vocab.json').write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / 'merges.txt').write_text('#version: 0.2\n')
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def clip_encoder(vocabulary, width, model=CLIPTextModelWithProjection):
    return model(CLIPTextConfig(
        vocab_size=vocabulary, bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1, pad_token_id=vocabulary - 1,
        hidden_size=width, projection_dim=width, intermediate_size=24, num_attention_heads=2, num_hidden_layers=3,
        max_position_embeddings=77)).eval()


def t5_tokenizer():
    vocabulary = {token: i for i, token in enumerate(['<pad>', '</s>', '<unk>', *BYTES])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token='<unk>'))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), pre_tokenizers.Split('', 'isolated')])
    tokenizer.post_processor = processors.TemplateProcessing(single='$A </s>', special_tokens=[('</s>', 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token='<pad>', eos_token='</s>', unk_token='<unk>')


def t5_encoder(width):
    return T5EncoderModel(T5Config(vocab_size=3 + len(BYTES), d_model=width, d_kv=8, d_ff=24, num_layers=2,
                                   num_heads=2)).eval()


def qwen_tokenizer(folder):
    """The word fox is a token too: it makes three in a quotation, of which every character is one."""
    tokens = [*BYTES, 'ox', 'fox']
    folder.mkdir(parents=True)
    (folder / 'vocab.json').write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / 'merges.txt').write_text('#version: 0.2\no x\nf ox\n')
    special = dict(lstrip=False, rstrip=False, normalized=False, single_word=False, special=True)
    (folder / 'tokenizer_config.json').write_text(json.dumps(dict(
        tokenizer_class='Qwen2Tokenizer', model_max_length=131072, pad_token='<|endoftext|>', eos_token='<|im_end|>',
        unk_token=None, bos_token=None, chat_template=CHAT, additional_special_tokens=QWEN_SPECIAL[1:],
        added_tokens_decoder={str(len(tokens) + i): dict(special, content=t) for i, t in enumerate(QWEN_SPECIAL)})))
    return Qwen2Tokenizer.from_pretrained(folder)


def qwen_encoder(tokenizer, width):
    token = {name: tokenizer.convert_tokens_to_ids(name) for name in QWEN_SPECIAL}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        text_config=dict(
            hidden_size=width, intermediate_size=24, num_hidden_layers=2, num_attention_heads=width // 8,
            num_key_value_heads=1, rope_parameters=dict(rope_type='default', mrope_section=[1, 1, 2], rope_theta=1e6),
            vocab_size=len(tokenizer), max_position_embeddings=4096, bos_token_id=token['<|endoftext|>'],
            eos_token_id=token['<|im_end|>'], pad_token_id=token['<|endoftext|>'], tie_word_embeddings=True),
        vision_config=dict(depth=1, hidden_size=8, intermediate_size=8, num_heads=2, out_hidden_size=width,
                           window_size=112, fullatt_block_indexes=[0]),
        image_token_id=token['<|image_pad|>'], video_token_id=token['<|video_pad|>'],
        vision_start_token_id=token['<|vision_start|>'], vision_end_token_id=token['<|vision_end|>'])).eval()


def qwen3_encoder(tokenizer, width, layers=3, model=Qwen3Model):
    return model(Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=24, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=4096)).eval()


def save_tiny_bert(folder, width=16, words=('a', 'cat', 'and', 'dogs', 'birds')):
    """Writes a text encoder of known words, for 64 tokens.

    Args:
        folder (Path): Where to write.
        width (int): Of its states. Default 16.
        words (Sequence[str]): What it knows.
    """
    torch.manual_seed(0)
    special = ['[PAD]', '[UNK]', '[CLS]', '[SEP]']
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *words])}, unk_token='[UNK]'))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single='[CLS] $A [SEP]', special_tokens=[('[CLS]', 2), ('[SEP]', 3)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token='[PAD]', unk_token='[UNK]', cls_token='[CLS]',
                            sep_token='[SEP]').save_pretrained(folder)
    BertModel(BertConfig(vocab_size=4 + len(words), hidden_size=width, num_hidden_layers=2, num_attention_heads=2,
                         intermediate_size=24, max_position_embeddings=64)).eval().save_pretrained(folder)


def tiny_vae(latent_channels=4, blocks=2):
    """An autoencoder with a shift and a scale, that halves the images' side `blocks` - 1 times."""
    return AutoencoderKL(
        sample_size=16, in_channels=3, out_channels=3, latent_channels=latent_channels,
        block_out_channels=(4, *[8] * (blocks - 1)), layers_per_block=1, norm_num_groups=2,
        down_block_types=('DownEncoderBlock2D',) * blocks, up_block_types=('UpDecoderBlock2D',) * blocks,
        use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609, scaling_factor=1.5305)


def tiny_qwen_vae():
    """Qwen-Image's autoencoder, that halves the images' side once."""
    return AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True],
        latents_mean=[-0.76, -0.12, 0.3, 1.5], latents_std=[2.8, 1.4, 0.7, 1.2])


def perturbed(transformer):
    """Fresh networks have zero gates and biases, and would ignore their condition."""
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return transformer


def saved(pipeline, folder):
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    return pipeline


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
    encoders = [clip_encoder(len(tokenizer), 16) for _ in range(2)]
    transformer = perturbed(SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, pos_embed_max_size=8, num_layers=2,
        num_attention_heads=2, attention_head_dim=8, caption_projection_dim=16, joint_attention_dim=40,
        pooled_projection_dim=32, qk_norm='rms_norm', dual_attention_layers=(0,)))
    third = dict(text_encoder_3=t5_encoder(40) if t5 else None, tokenizer_3=t5_tokenizer() if t5 else None)
    return saved(StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=tiny_vae(),
        text_encoder=encoders[0], tokenizer=tokenizer, text_encoder_2=encoders[1], tokenizer_2=tokenizer, **third),
        folder)


def save_tiny_longcat(folder, seed=0):
    """Writes a LongCat-Image pipeline: 8x8 latents of 64x64 images, the scheduler of the real model.

    Args:
        folder (Path): Where to write.
        seed (int): Of the weights. Default 0.

    Returns:
        LongCatImagePipeline: What was written. Loading it takes `text_processor=None`.
    """
    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer(Path(folder, 'qwen_files'))
    transformer = perturbed(LongCatImageTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=[2, 2, 4]))
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, shift=3.0, base_shift=0.5, max_shift=1.15, base_image_seq_len=256,
        max_image_seq_len=4096)
    return saved(LongCatImagePipeline(
        transformer=transformer, scheduler=scheduler, vae=tiny_vae(latent_channels=16, blocks=4), tokenizer=tokenizer,
        text_encoder=qwen_encoder(tokenizer, 16), text_processor=None), folder)


def save_tiny_flux(folder, guidance_embeds=False, seed=0):
    """Writes a Flux pipeline: 8x8 latents of 16x16 images, a shift that depends strongly on their number.

    Args:
        folder (Path): Where to write.
        guidance_embeds (bool): Whether the network is told a guidance, as FLUX.1-dev. Default False.
        seed (int): Of the weights. Default 0.

    Returns:
        FluxPipeline: What was written.
    """
    torch.manual_seed(seed)
    tokenizer = clip_tokenizer(Path(folder, 'clip_files'))
    transformer = perturbed(FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(2, 2, 4), guidance_embeds=guidance_embeds))
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.3, max_shift=1.5, base_image_seq_len=4, max_image_seq_len=64)
    return saved(FluxPipeline(
        transformer=transformer, scheduler=scheduler, vae=tiny_vae(), tokenizer=tokenizer,
        text_encoder=clip_encoder(len(tokenizer), 16, CLIPTextModel), tokenizer_2=t5_tokenizer(),
        text_encoder_2=t5_encoder(16)), folder)


def save_tiny_z_image(folder, seed=0):
    """Writes a Z-Image pipeline: 8x8 latents of 16x16 images, the scheduler of the real model.

    Args:
        folder (Path): Where to write.
        seed (int): Of the weights. Default 0.

    Returns:
        ZImagePipeline: What was written.
    """
    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer(Path(folder, 'qwen_files'))
    transformer = perturbed(ZImageTransformer2DModel(
        in_channels=4, dim=16, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=12,
        axes_dims=[4, 2, 2], axes_lens=[1024, 32, 32]))
    return saved(ZImagePipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0), vae=tiny_vae(),
        tokenizer=tokenizer, text_encoder=qwen3_encoder(tokenizer, 12)), folder)


def save_tiny_qwen_image(folder, seed=0):
    """Writes a Qwen-Image pipeline: 8x8 latents of 16x16 images, a shift that depends strongly on their number, and
    levels that end at 0.02, as those of the real model.

    Args:
        folder (Path): Where to write.
        seed (int): Of the weights. Default 0.

    Returns:
        QwenImagePipeline: What was written.
    """
    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer(Path(folder, 'qwen_files'))
    transformer = perturbed(QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(2, 2, 4)))
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.8, max_shift=1.5, base_image_seq_len=4, max_image_seq_len=256,
        shift_terminal=0.02)
    return saved(QwenImagePipeline(
        transformer=transformer, scheduler=scheduler, vae=tiny_qwen_vae(), tokenizer=tokenizer,
        text_encoder=qwen_encoder(tokenizer, 16)), folder)


def mistral_tokenizer():
    """In the place of the real model's PixtralProcessor, which needs torchvision; its chat template takes texts in
    parts."""
    special = ['<pad>', '<s>', '</s>', '<unk>', '[SYSTEM_PROMPT]', '[/SYSTEM_PROMPT]', '[INST]', '[/INST]', '[IMG]',
               '[IMG_BREAK]', '[IMG_END]']
    vocabulary = {token: i for i, token in enumerate([*special, *BYTES])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token='<unk>'))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), pre_tokenizers.Split('', 'isolated')])
    chat = ("<s>{% for message in messages %}{% if message.role == 'system' %}[SYSTEM_PROMPT]"
            "{{ message.content[0].text }}[/SYSTEM_PROMPT]{% else %}[INST]{{ message.content[0].text }}[/INST]"
            "{% endif %}{% endfor %}")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token='<pad>', bos_token='<s>', eos_token='</s>', unk_token='<unk>',
        additional_special_tokens=special[4:], padding_side='left', chat_template=chat)


def mistral_encoder(tokenizer, width):
    shape = dict(hidden_size=width, intermediate_size=16, num_attention_heads=2, head_dim=4)
    return Mistral3ForConditionalGeneration(Mistral3Config(
        text_config=dict(shape, model_type='mistral', num_hidden_layers=31, num_key_value_heads=1,
                         vocab_size=len(tokenizer), max_position_embeddings=4096),
        vision_config=dict(shape, model_type='pixtral', num_hidden_layers=1, image_size=28, patch_size=14),
        image_token_index=tokenizer.convert_tokens_to_ids('[IMG]'))).eval()


def tiny_flux2(guidance_embeds):
    """Network, scheduler and autoencoder of a FLUX.2: 8x8 latents of 32x32 images, the scheduler of the real model."""
    transformer = perturbed(Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=24, axes_dims_rope=(2, 2, 2, 2), guidance_embeds=guidance_embeds))
    vae = AutoencoderKLFlux2(
        block_out_channels=(4, 8), layers_per_block=1, latent_channels=4, norm_num_groups=2,
        down_block_types=('DownEncoderBlock2D',) * 2, up_block_types=('UpDecoderBlock2D',) * 2)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.3, 3)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    return dict(transformer=transformer, scheduler=scheduler, vae=vae)


def save_tiny_klein(folder, seed=0):
    """Writes a FLUX.2-klein pipeline, see `tiny_flux2`.

    Args:
        folder (Path): Where to write.
        seed (int): Of the weights. Default 0.

    Returns:
        Flux2KleinPipeline: What was written.
    """
    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer(Path(folder, 'qwen_files'))
    return saved(Flux2KleinPipeline(**tiny_flux2(False), tokenizer=tokenizer, text_encoder=qwen3_encoder(
        tokenizer, 8, 28, Qwen3ForCausalLM)), folder)


def save_tiny_flux2(folder, seed=0):
    """Writes a FLUX.2-dev pipeline, see `tiny_flux2`.

    Args:
        folder (Path): Where to write.
        seed (int): Of the weights. Default 0.

    Returns:
        Flux2Pipeline: What was written.
    """
    torch.manual_seed(seed)
    tokenizer = mistral_tokenizer()
    return saved(Flux2Pipeline(**tiny_flux2(True), tokenizer=tokenizer, text_encoder=mistral_encoder(tokenizer, 8)),
                 folder)


def save_tiny_krea2(folder, seed=0):
    """Writes a Krea 2 pipeline: 8x8 latents of 16x16 images, a shift that depends strongly on their number.

    Args:
        folder (Path): Where to write.
        seed (int): Of the weights. Default 0.

    Returns:
        Krea2Pipeline: What was written.
    """
    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer(Path(folder, 'qwen_files'))
    transformer = perturbed(Krea2Transformer2DModel(
        in_channels=16, num_layers=2, attention_head_dim=8, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=24, timestep_embed_dim=16, text_hidden_dim=12, num_text_layers=2,
        text_num_attention_heads=2, text_num_key_value_heads=1, text_intermediate_size=16,
        num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(2, 2, 4)))
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=1.5, base_image_seq_len=4, max_image_seq_len=64)
    encoder = Qwen3VLModel(Qwen3VLConfig(
        text_config=dict(hidden_size=12, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
                         num_key_value_heads=1, head_dim=8, vocab_size=len(tokenizer), max_position_embeddings=4096,
                         rope_scaling=dict(rope_type='default', mrope_section=[2, 1, 1], mrope_interleaved=True)),
        vision_config=dict(depth=1, hidden_size=8, intermediate_size=8, num_heads=2, out_hidden_size=12,
                           num_position_embeddings=4, deepstack_visual_indexes=[0]))).eval()
    return saved(Krea2Pipeline(
        transformer=transformer, scheduler=scheduler, vae=tiny_qwen_vae(), tokenizer=tokenizer, text_encoder=encoder,
        text_encoder_select_layers=(1, 3)), folder)


class Tiny:
    """A pipeline in a folder, as diffusers loads it, and methods over the same folder.

    Args:
        name (str): Of the architecture.
        backbone (type): Its backbone.
        folder (Path): Where its pipeline lies.
        size (int): Pixels of an image's side.
        loading (dict): What `from_pretrained` of the pipeline takes.
        options (dict): What every call of the pipeline takes.
        guidance (Callable): What a call of the pipeline takes for classifier-free guidance of a scale, of which 1 is
            off.
        packed (int): Autoencoder's latents in one of the backbone's, per side.
    """

    def __init__(self, name, backbone, folder, size=16, loading=None, options=None,
                 guidance=lambda scale: dict(guidance_scale=scale), packed=1):
        self.name, self.backbone, self.folder, self.size = name, backbone, str(folder), size
        self.options, self.guidance, self.packed = options or {}, guidance, packed
        self.pipeline = getattr(diffusers, backbone.pipeline_name).from_pretrained(folder, **(loading or {}))
        self.pipeline.set_progress_bar_config(disable=True)
        self.scale = packed * self.pipeline.vae_scale_factor  # pixels of a latent
        self.pipeline.vae.enable_slicing()  # as in VAECodec; rounding depends on the batch

    def method(self, type='FlowMatching', backbone=None, **kwargs):
        """A method over this folder; `backbone` changes single arguments of its backbone."""
        backbone = {'type': self.backbone.__name__, 'pretrained': self.folder, **(backbone or {})}
        return MODELS.build({'type': type, 'image_size': self.size, 'backbone': backbone, **kwargs})

    def noise(self, height=8, width=8, seed=1):
        config = self.pipeline.vae.config
        channels = self.packed**2 * (config.get('latent_channels') or config.z_dim)
        return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(seed))

    def images(self, noise, guidance=1.0, **kwargs):
        """The pipeline's images of PROMPTS, in [-1, 1]; `guidance` None is what its call has by default."""
        height, width = noise.shape[2:]
        scale = self.scale
        if hasattr(self.pipeline, '_pack_latents') and self.packed == 1:
            noise = self.pipeline._pack_latents(noise, *noise.shape)
        if 'sigmas' in kwargs:
            kwargs['num_inference_steps'] = len(kwargs['sigmas'])
        images = self.pipeline(
            prompt=list(PROMPTS), latents=noise, height=scale * height, width=scale * width, output_type='pt',
            **({} if guidance is None else self.guidance(guidance)), **dict(self.options, **kwargs)
        ).images  # Z-Image's changes its prompts
        return 2 * images - 1
