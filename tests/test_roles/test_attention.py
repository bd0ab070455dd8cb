"""The choice of the attention kernel: every kernel computes what torch's does, and nothing else is touched."""
import copy
import logging
import sys
import types

import pytest
import torch
from diffusers import (
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    Krea2Transformer2DModel,
    LongCatImageTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)
from diffusers.models import attention_dispatch, attention_processor
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.attention_processor import JointAttnProcessor2_0, XFormersJointAttnProcessor
from packaging.version import Version
from peft import LoraConfig
from tests_support import TINY_SD3, perturb
from torch import nn

from cdm_plugin.roles import attention
from cdm_plugin.roles.attention import KernelJointAttnProcessor, check_name, set_attention

SD35 = dict(TINY_SD3, dual_attention_layers=(0,), qk_norm='rms_norm')
LONGCAT = dict(patch_size=1, in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=16,
               num_attention_heads=2, joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=[4, 4, 8])
# Attention modules of each; SD3.5's first block has a second one.
FLUX2 = dict(in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
             joint_attention_dim=8, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False)
CALLS = dict(sd3=2, sd35=3, longcat=3, flux=3, flux2=3)
ARCHITECTURES = tuple(CALLS)


real_xformers_state = attention.xformers_state


@pytest.fixture(autouse=True)
def fresh_and_unchanged(monkeypatch):
    """No choice is remembered from another test, nothing is said of an xformers that may be installed, and diffusers'
    default backend is the same after each."""
    monkeypatch.setattr(attention, 'xformers_state', lambda: None)
    attention._fastest.cache_clear()
    before = _AttentionBackendRegistry._active_backend
    assert before == AttentionBackendName.NATIVE
    yield
    assert _AttentionBackendRegistry._active_backend is before
    attention._fastest.cache_clear()


def build(architecture, dtype=torch.float64, config=None):
    torch.manual_seed(0)
    if architecture == 'longcat':
        network = LongCatImageTransformer2DModel(**(config or LONGCAT))
    elif architecture == 'flux':
        network = FluxTransformer2DModel(**(config or LONGCAT))  # its dimensions have the same names
    elif architecture == 'flux2':
        network = Flux2Transformer2DModel(**(config or FLUX2))
    else:
        network = SD3Transformer2DModel(**(config or dict(sd3=TINY_SD3, sd35=SD35)[architecture]))
    perturb(network, 0.1)
    return network.to(dtype)


def run(network, device='cpu'):
    """Output and all parameters' gradients, of 2 images and 3 text tokens."""
    network.zero_grad()
    unwrapped, generator = attention.unwrap(network), torch.Generator().manual_seed(1)
    config, dtype = unwrapped.config, unwrapped.dtype

    def randn(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    kwargs = dict(timestep=torch.tensor([200.0, 700.0], device=device), return_dict=False)
    if isinstance(unwrapped, FluxTransformer2DModel):
        kwargs['pooled_projections'] = randn(2, config.pooled_projection_dim)
    if isinstance(unwrapped, (LongCatImageTransformer2DModel, FluxTransformer2DModel, Flux2Transformer2DModel)):
        axes = len(config.axes_dims_rope)
        ids = torch.arange(axes * 9.0, device=device).reshape(9, axes) % 5
        out = network(hidden_states=randn(2, 6, 4), encoder_hidden_states=randn(2, 3, config.joint_attention_dim),
                      txt_ids=ids[:3], img_ids=ids[3:], **kwargs)[0]
    else:
        out = network(hidden_states=randn(2, 4, 4, 4), pooled_projections=randn(2, config.pooled_projection_dim),
                      encoder_hidden_states=randn(2, 3, config.joint_attention_dim), **kwargs)[0]
    out.float().square().sum().backward()
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in network.named_parameters()}
    return out.detach(), gradients


def assert_same(a, b, rtol, atol):
    torch.testing.assert_close(a[0], b[0], rtol=rtol, atol=atol)
    assert a[1].keys() == b[1].keys() and sum(g is not None for g in a[1].values()) > 10
    for name, gradient in a[1].items():
        assert (gradient is None) == (b[1][name] is None), name
        if gradient is not None:
            torch.testing.assert_close(gradient, b[1][name], rtol=rtol, atol=atol, msg=lambda m: f'{name}: {m}')


def processors(network):
    return [m.processor for m in network.modules() if hasattr(m, 'set_processor')]


def explicit_attention(q, k, v, scale):
    """softmax(q k^T scale) v in the layout (B, tokens, heads, head_dim); mixed dtypes are refused, as by the real."""
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError('Query/Key/Value should either all have the same dtype')
    scores = torch.einsum('bmhk,bnhk->bhmn', q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return torch.einsum('bhmn,bnhk->bmhk', scores.softmax(-1), v)


@pytest.fixture
def xformers(monkeypatch):
    """The package, as the interface of its one function; counts the calls."""
    calls = []

    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
        assert attn_bias is None and p == 0 and op is None
        calls.append(query.shape)
        if query.ndim == 4:
            return explicit_attention(query, key, value, scale)
        return explicit_attention(query[:, :, None], key[:, :, None], value[:, :, None], scale)[:, :, 0]

    ops = types.SimpleNamespace(memory_efficient_attention=memory_efficient_attention)
    monkeypatch.setattr(attention_processor, 'xformers', types.SimpleNamespace(ops=ops))
    monkeypatch.setattr(attention_dispatch, 'xops', ops)
    monkeypatch.setattr(attention_dispatch, '_CAN_USE_XFORMERS_ATTN', True)
    return calls


@pytest.fixture
def flash(monkeypatch):
    """flash-attn's function; counts the calls."""
    calls = []

    def flash_attn_func(q, k, v, dropout_p, softmax_scale, causal, window_size, return_attn_probs):
        assert dropout_p == 0 and not causal and window_size == (-1, -1) and not return_attn_probs
        assert q.dtype == torch.bfloat16
        calls.append(q.shape)
        return explicit_attention(q.float(), k.float(), v.float(), softmax_scale).to(q.dtype)

    monkeypatch.setattr(attention_dispatch, 'flash_attn_func', flash_attn_func)
    monkeypatch.setattr(attention_dispatch, '_CAN_USE_FLASH_ATTN', True)
    return calls


# Every kernel computes the same


@pytest.mark.parametrize('architecture', ARCHITECTURES)
def test_xformers_equals_native(architecture, xformers):
    network = build(architecture)
    expected = run(network)
    used, _ = set_attention(network, 'xformers', dtype=torch.float64)
    assert used == 'xformers'
    xformers.clear()
    out = run(network)
    assert len(xformers) == CALLS[architecture]
    # Norms and rotary embeddings compute in float32 whatever the network's dtype.
    assert_same(out, expected, **(dict(rtol=1e-12, atol=1e-12) if architecture == 'sd3' else
                                  dict(rtol=1e-5, atol=1e-6)))
    kinds = {type(p) for p in processors(network)}
    assert (XFormersJointAttnProcessor in kinds) == architecture.startswith('sd3')
    assert len(kinds) == (2 if architecture == 'flux2' else 1)


@pytest.mark.parametrize('architecture', ARCHITECTURES)
def test_dispatched_kernel_equals_native(architecture, monkeypatch):
    """torch's own unfused kernel, through our processor in SD3 and through LongCat-Image's own."""
    calls = []
    math = _AttentionBackendRegistry._backends[AttentionBackendName._NATIVE_MATH]
    monkeypatch.setitem(_AttentionBackendRegistry._backends, AttentionBackendName._NATIVE_MATH,
                        lambda **kwargs: calls.append(kwargs['query'].shape) or math(**kwargs))
    network = build(architecture)
    expected = run(network)
    assert set_attention(network, '_native_math', dtype=torch.float64)[0] == '_native_math'
    calls.clear()
    out = run(network)
    heads = (network.config.num_attention_heads, network.config.attention_head_dim)
    assert len(calls) == CALLS[architecture] and all(shape[2:] == heads for shape in calls)
    assert_same(out, expected, **(dict(rtol=1e-12, atol=1e-12) if architecture == 'sd3' else
                                  dict(rtol=1e-5, atol=1e-6)))
    ours = [type(p) is KernelJointAttnProcessor for p in processors(network)]
    assert all(ours) if architecture.startswith('sd3') else not any(ours)


@pytest.mark.parametrize('architecture', ARCHITECTURES)
@pytest.mark.parametrize('name', ['flash', 'xformers'])
def test_autocast_of_float32_weights(architecture, name, flash, xformers):
    """Norms return float32 beside values in bfloat16, which torch's attention casts and the other kernels refuse."""
    network = build(architecture, torch.float32)
    exact = run(network)
    with torch.autocast('cpu', torch.bfloat16):
        expected = run(network)
        set_attention(network, name, dtype=torch.bfloat16)
        out = run(network)
    calls = flash if name == 'flash' else xformers
    assert len(calls) == CALLS[architecture] + 1  # the trial
    assert_same(out, expected, rtol=0.1, atol=0.1 * exact[0].abs().max().item())
    error, native_error = ((o[0].float() - exact[0]).norm() for o in (out, expected))
    assert error < 2 * native_error + 1e-6
    # Without autocast, what a norm returns stays as it is.
    set_attention(network, 'xformers')
    assert_same(run(network), exact, rtol=1e-4, atol=1e-5)


def test_autocast_leaves_a_float64_network(xformers):
    network = build('sd35')
    expected = run(network)
    set_attention(network, 'xformers', dtype=torch.float64)
    with torch.autocast('cpu', torch.bfloat16):
        assert_same(run(network), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('architecture', ARCHITECTURES)
def test_adapters(architecture, xformers):
    network = build(architecture)
    network.add_adapter(LoraConfig(r=2, target_modules=['to_q', 'to_k', 'to_v', 'to_out.0', 'to_qkv_mlp_proj'],
                                   init_lora_weights=False))
    network.to(torch.float64)
    expected = run(network)
    assert any('lora' in name and g is not None and g.abs().max() > 0 for name, g in expected[1].items())
    for name in ('xformers', '_native_math'):
        set_attention(network, name, dtype=torch.float64)
        assert_same(run(network), expected, rtol=1e-5, atol=1e-6)
    assert len(xformers) == CALLS[architecture] + 1


@pytest.mark.gpu
@pytest.mark.parametrize('architecture', ARCHITECTURES)
@pytest.mark.parametrize('name', ['xformers', '_native_flash', '_native_cudnn', 'flash', 'auto'])
def test_on_the_gpu(architecture, name):
    """The real kernels, under bfloat16 autocast, are as far from float32 as torch's own."""
    config = dict(dict(sd3=TINY_SD3, sd35=SD35, longcat=LONGCAT, flux2=FLUX2)[architecture], attention_head_dim=64)
    config.update(dict(axes_dims_rope=[16, 24, 24]) if architecture == 'longcat' else dict(axes_dims_rope=[16] * 4)
                  if architecture == 'flux2' else dict(caption_projection_dim=128))
    network = build(architecture, torch.float32, config).cuda()
    exact = run(network, 'cuda')
    try:
        used, why = set_attention(network, name, dtype=torch.bfloat16)
    except ValueError as error:
        if 'install' not in str(error):
            raise
        pytest.skip(str(error))
    assert used == name or name == 'auto' and 'native' in why
    with torch.autocast('cuda', torch.bfloat16):
        out = run(network, 'cuda')
        set_attention(network, 'native')
        native = run(network, 'cuda')
    assert (out[0] - exact[0]).norm() < 1.5 * (native[0] - exact[0]).norm() + 1e-6
    for key, gradient in exact[1].items():
        if gradient is not None:
            slack = 0.02 * gradient.norm() + 1e-5
            assert (out[1][key] - gradient).norm() < 2 * (native[1][key] - gradient).norm() + slack, key


# Texts of different lengths, whose padding a mask leaves out


def build_masked(architecture):
    torch.manual_seed(0)
    if architecture == 'krea2':
        network = Krea2Transformer2DModel(
            in_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2, num_key_value_heads=1,
            intermediate_size=24, text_hidden_dim=8, num_text_layers=1, text_num_attention_heads=1,
            text_num_key_value_heads=1, text_intermediate_size=16, num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1, axes_dims_rope=(8, 4, 4))
        perturb(network, 0.1)
        return network
    if architecture == 'qwen_image':
        network = QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=8, axes_dims_rope=(8, 4, 4))
        perturb(network, 0.1)
        return network
    network = ZImageTransformer2DModel(in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
                                       cap_feat_dim=8, axes_dims=[8, 4, 4], axes_lens=[128, 8, 8])
    perturb(network, 0.1)
    return network


def run_masked(network, lengths=(3, 40)):
    """Output and all parameters' gradients, of 2 images and 3 and 40 text tokens."""
    network.zero_grad()
    generator = torch.Generator().manual_seed(1)
    images, texts = torch.randn(2, 4, 1, 4, 4, generator=generator), torch.randn(2, 40, 8, generator=generator)
    time = torch.tensor([0.2, 0.7])
    tokens = torch.nn.functional.pixel_unshuffle(images[:, :, 0], 2).flatten(2).transpose(1, 2)
    mask = torch.arange(40) < torch.tensor(lengths)[:, None]
    if isinstance(network, QwenImageTransformer2DModel):
        out = network(tokens, texts, mask, time, [[(1, 2, 2)]] * 2, return_dict=False)[0]
    elif isinstance(network, Krea2Transformer2DModel):
        ids = torch.cat([torch.zeros(40, 3), torch.cartesian_prod(*(torch.arange(n).float() for n in (1, 2, 2)))])
        out = network(tokens, texts[:, :, None], time, ids, mask, return_dict=False)[0]
    else:
        out = torch.stack(network(list(images), time, [t[:n] for t, n in zip(texts, lengths)], return_dict=False)[0])
    out.square().sum().backward()
    return out.detach(), {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


MASKED = ('z_image', 'qwen_image', 'krea2')


@pytest.mark.parametrize('architecture', MASKED)
def test_dispatched_kernel_equals_native_under_a_mask(architecture):
    network = build_masked(architecture)
    expected = run_masked(network)
    longer = run_masked(network, (40, 40))[0]  # attends to what is masked above
    assert (longer[0] - expected[0][0]).abs().max() > 1e-3 and torch.allclose(longer[1], expected[0][1], atol=1e-5)
    assert set_attention(network, '_native_math', masked=True)[0] == '_native_math'
    assert_same(run_masked(network), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('architecture', MASKED)
def test_kernels_that_take_no_mask_are_refused(architecture, xformers, flash, monkeypatch):
    """flash says so itself; diffusers hands a mask of booleans to xformers as numbers to add: every token is seen."""
    network = build_masked(architecture)
    seen = []

    def memory_efficient_attention(q, k, v, attn_bias=None, p=0.0, scale=None):
        seen.append(attn_bias)
        weights = torch.einsum('bmhk,bnhk->bhmn', q, k) * q.shape[-1] ** -0.5
        return torch.einsum('bhmn,bnhk->bmhk', (weights + attn_bias).softmax(-1), v)

    monkeypatch.setattr(attention_dispatch.xops, 'memory_efficient_attention', memory_efficient_attention)
    for name, dtype, part in (
            ('xformers', torch.float32, 'xformers lets padding through, which texts of different lengths have'),
            ('flash', torch.bfloat16, "with heads of width 16 and a mask of texts' padding: `attn_mask` is not")):
        with pytest.raises(ValueError, match=f"attention='{name}' cannot be used: .*{part}"):
            set_attention(network, name, dtype=dtype, masked=True)
    assert {m.min().item() for m in seen} == {0.0} and {m.max().item() for m in seen} == {1.0}
    assert not flash and set_attention(network, 'flash', dtype=torch.bfloat16)[0] == 'flash'  # texts of one length
    assert len(flash) == 1


@pytest.mark.parametrize('architecture', MASKED)
def test_auto_measures_what_the_network_needs(architecture, timed):
    network = build_masked(architecture)
    set_attention(network, 'auto', device='cuda:1', dtype=torch.bfloat16, masked=True)
    assert set(timed[1]) == {(torch.device('cuda:1'), torch.bfloat16, 2, 16, True, True)}


# What is touched


@pytest.mark.parametrize('name', ['xformers', '_native_math'])
@pytest.mark.parametrize('architecture', ARCHITECTURES)
def test_native_restores(architecture, name, xformers):
    network = build(architecture)
    before, own = run(network), processors(network)
    for kernel in ('_native_math', name, name):  # also after more than one switch
        set_attention(network, kernel, dtype=torch.float64)
    assert set_attention(network, 'native')[0] == 'native'
    assert all(a is b for a, b in zip(processors(network), own, strict=True))
    assert not any(m._forward_hooks for m in network.modules())
    xformers.clear()
    after = run(network)
    assert not xformers and torch.equal(after[0], before[0])


@pytest.mark.parametrize('architecture', ARCHITECTURES)
def test_a_copy_is_switched_by_itself(architecture, xformers):
    network = build(architecture)
    set_attention(network, 'xformers', dtype=torch.float64)
    average = copy.deepcopy(network)
    set_attention(average, 'native')
    assert not any(m._forward_hooks for m in average.modules())
    xformers.clear()
    run(average)
    assert not xformers
    run(network)
    assert len(xformers) == CALLS[architecture]


def test_native_holds_when_the_default_of_diffusers_changes(xformers, monkeypatch):
    network = build('longcat')
    set_attention(network, 'native')
    monkeypatch.setattr(_AttentionBackendRegistry, '_active_backend', AttentionBackendName.XFORMERS)
    run(network)
    monkeypatch.undo()
    assert not xformers


def test_another_network_keeps_its_attention(xformers):
    networks = [build('longcat'), build('longcat')]
    set_attention(networks[0], 'xformers', dtype=torch.float64)
    xformers.clear()
    run(networks[1])
    assert not xformers


def test_wrapper_and_random_numbers(xformers):
    wrapper = nn.Module()
    wrapper.module = build('sd35')
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    set_attention(wrapper, 'xformers', dtype=torch.float64)
    assert torch.equal(torch.randn(4), expected)
    assert {type(p) for p in processors(wrapper)} == {XFormersJointAttnProcessor}


# Names and errors


def test_known_names():
    for name in ('auto', 'native', 'xformers', 'flash', '_flash_3', 'flash_hub', 'sage'):
        assert check_name(name) == name
    assert {'auto', *(b.value for b in AttentionBackendName)} == set(attention.KNOWN)


@pytest.mark.parametrize('name, hint', [('xformer', 'xformers'), ('Native', 'native'), ('flash_3', '_flash_3')])
def test_unknown_name_is_answered_with_the_nearest(name, hint):
    with pytest.raises(ValueError, match=fr"^model\.backbone\.attention='{name}' is unknown; known are auto, native, "
                                         fr"xformers, flash, .*; did you mean '{hint}'\?$"):
        check_name(name)


def test_unknown_name_without_likeness_and_in_set_attention():
    with pytest.raises(ValueError, match='is unknown') as error:
        check_name(None)
    assert 'did you mean' not in str(error.value)
    with pytest.raises(ValueError, match='model.backbone.attention=.spda. is unknown'):
        set_attention(build('sd3'), 'spda')


def needs_no(package):
    return pytest.mark.skipif(getattr(attention_dispatch, package), reason='the package is installed')


@pytest.mark.parametrize('architecture', ['sd3', 'longcat'])
@pytest.mark.parametrize('name, dtype, message', [
    pytest.param('xformers', torch.float32, r"xformers is not installed: pip install 'cdm_plugin\[scale\]'",
                 marks=needs_no('_CAN_USE_XFORMERS_ATTN')),
    pytest.param('flash', torch.bfloat16, 'flash-attn', marks=needs_no('_CAN_USE_FLASH_ATTN')),
    ('flash', torch.float32, 'flash needs float16 or bfloat16, but the networks run in float32 .*AmpOptimWrapper'),
    ('_native_flash', torch.float64, 'needs float16 or bfloat16, but the networks run in float64'),
    ('_native_efficient', torch.float32, '_native_efficient failed on the CPU in float32'),
    pytest.param('flex', torch.float32, 'flex has no kernel for the CPU: .*backward', marks=pytest.mark.skipif(
        Version(torch.__version__) < Version('2.13'), reason='older ones (2.10) compute it on the CPU as well')),
    ('sage', torch.bfloat16, 'sage has no backward pass'),
    ('_sage_qk_int8_pv_fp8_cuda', torch.bfloat16, 'has no backward pass'),
    ('aiter_fa2_hub', torch.bfloat16, 'aiter_fa2_hub has no kernel for the CPU: .* CUDA device')])
def test_kernels_that_cannot_run(architecture, name, dtype, message):
    network = build(architecture, torch.float32)
    own = processors(network)
    with pytest.raises(ValueError, match=fr"^model\.backbone\.attention='{name}' cannot be used: .*{message}"):
        set_attention(network, name, dtype=dtype)
    # An error leaves the network as it was.
    assert all(a is b for a, b in zip(processors(network), own, strict=True))
    assert all(getattr(p, '_attention_backend', None) is None for p in own)


def test_kernel_without_backward_pass(monkeypatch):
    """Diffusers registers FlashAttention 3 as an operator without gradients."""
    op = torch.library.custom_op('cdm_plugin_tests::forward_only', torch.clone, mutates_args=(),
                                 schema='(Tensor x) -> Tensor')
    monkeypatch.setitem(_AttentionBackendRegistry._backends, AttentionBackendName._NATIVE_MATH,
                        lambda query, **kwargs: op(query))
    with pytest.raises(ValueError, match='cannot be used: _native_math .* autograd formula'):
        set_attention(build('sd3'), '_native_math')
    assert set_attention(build('sd3'), '_native_math', training=False)[0] == '_native_math'


def test_sage_may_sample_but_only_on_a_gpu():
    with pytest.raises(ValueError, match='sage has no kernel for the CPU: .* CUDA device'):
        set_attention(build('sd3'), 'sage', dtype=torch.bfloat16, training=False)


def test_hub_kernel_needs_its_package(monkeypatch):
    monkeypatch.setattr(attention_dispatch, 'is_kernels_available', lambda: False)
    with pytest.raises(ValueError, match="'flash_hub' cannot be used: .*`kernels` package"):
        set_attention(build('sd3'), 'flash_hub', dtype=torch.bfloat16)


def test_xformers_without_a_kernel_for_the_cpu(xformers, monkeypatch):
    def no_operator(*args, **kwargs):
        raise NotImplementedError('No operator found for `memory_efficient_attention_forward` with inputs:\n query')

    monkeypatch.setattr(attention_dispatch.xops, 'memory_efficient_attention', no_operator)
    with pytest.raises(ValueError, match='attention=.xformers. cannot be used: xformers has no kernel for the CPU: '
                                         'No operator found .* inputs:$'):
        set_attention(build('sd3'), 'xformers')


# What there is of xformers


def kernel(name, available):
    return types.SimpleNamespace(NAME=name, is_available=lambda: available)


@pytest.fixture
def installed(monkeypatch):
    """A package xformers of these kernels and this build; returns what it says of itself then."""
    monkeypatch.setattr(attention, 'xformers_state', real_xformers_state.__wrapped__)
    packages = types.SimpleNamespace(
        _cpp_lib=types.SimpleNamespace(_cpp_library_load_exception=None), fmha=types.SimpleNamespace())
    monkeypatch.setattr(attention, 'is_xformers_available', lambda: True)
    monkeypatch.setattr(attention.importlib.metadata, 'version', lambda name: {'xformers': '0.0.99'}[name])
    monkeypatch.setitem(sys.modules, 'xformers', packages)
    monkeypatch.setitem(sys.modules, 'xformers.ops', packages)

    def say(forward, backward, built_for=None):
        packages.fmha.ALL_FW_OPS, packages.fmha.ALL_BW_OPS = forward, backward
        if built_for is not None:
            packages._cpp_lib._cpp_library_load_exception = types.SimpleNamespace(
                build_info=types.SimpleNamespace(torch_version=built_for))
        return attention.xformers_state()

    return say


def test_xformers_kernels_that_are_there_and_those_that_are_not(installed):
    """The names are of xformers 0.0.35 beside torch 2.10."""
    assert installed(
        [kernel('cutlassF-pt', True), kernel('cutlassF-blackwell', False), kernel('fa2F@2.5.7-pt', True),
         kernel('fa3F@0.0.0', True), kernel('triton_splitKF', True)],
        [kernel('cutlassB-pt', True), kernel('cutlassB-blackwell', False), kernel('fa2B@2.5.7-pt', True),
         kernel('fa3B@0.0.0', False)],
    ) == 'xformers 0.0.99: cutlass-pt, fa2, triton_splitK (without gradients) there, cutlass-blackwell, fa3 not'


def test_xformers_of_another_torch_says_so_once_where_it_might_be_taken(installed, xformers):
    state = installed([kernel('ckF', False)], [kernel('ckB', False)], built_for='2.1+cu0')
    assert state == (f'xformers 0.0.99: no attention kernel there, ck not; built for torch 2.1+cu0, beside '
                     f'{torch.__version__} its own code does not load')
    for name, said in (('auto', True), ('xformers', True), ('native', False), ('_native_math', False)):
        _, why = set_attention(build('sd3'), name, dtype=torch.float64)
        assert why.count(state) == said
    with pytest.raises(ValueError, match=r"'xformers' cannot be used: .* \(xformers 0\.0\.99: no attention kernel"):
        set_attention(build('sd3'), 'xformers', device='privateuseone')


def test_xformers_that_cannot_be_imported_and_none(installed, monkeypatch):
    monkeypatch.setitem(sys.modules, 'xformers.ops', None)
    assert installed([], []).startswith('xformers 0.0.99 cannot be imported: ')
    monkeypatch.setattr(attention, 'is_xformers_available', lambda: False)
    assert attention.xformers_state() is None
    assert 'xformers' not in set_attention(build('sd3'), 'auto')[1]


def test_the_notice_of_a_wrong_build_is_not_printed_and_other_warnings_are(caplog):
    """Five lines, in every process that imports diffusers after this package."""
    logger = logging.getLogger('xformers')
    try:
        from xformers._cpp_lib import xFormersInvalidLibException, xFormersWasNotBuiltException
    except ImportError:
        notices = ["xFormers can't load C++/CUDA extensions. xFormers was built for:\n    PyTorch 2.10.0"]
    else:
        notices = [xFormersInvalidLibException(None)]
        assert 'Need to compile' in str(xFormersWasNotBuiltException())  # which may be said
    for notice in notices:
        logger.warning(f'WARNING[XFORMERS]: {notice}')
    assert caplog.records == []
    logger.warning('A matching Triton is not available, some optimizations will not be enabled')
    assert len(caplog.records) == 1


def test_missing_device():
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match='xformers.* cuda'):
            set_attention(build('sd3'), 'xformers', device='cuda:0')


def test_network_whose_attention_cannot_be_switched():
    network = build('sd3')
    network.fuse_qkv_projections()
    assert set_attention(network, 'native')[0] == 'native'
    used, why = set_attention(network, 'auto')
    assert used == 'native' and 'FusedJointAttnProcessor2_0' in why
    with pytest.raises(ValueError, match='computes attention in FusedJointAttnProcessor2_0, which cannot be switched'):
        set_attention(network, '_native_math')
    with pytest.raises(ValueError, match='has no attention'):
        set_attention(nn.Linear(1, 1), '_native_math')


# The choice


@pytest.mark.parametrize('architecture', ARCHITECTURES)
def test_auto_on_the_cpu_is_native(architecture, xformers):
    network = build(architecture)
    own = processors(network)
    used, why = set_attention(network, 'auto', dtype=torch.bfloat16)
    assert used == 'native' and 'cpu' in why
    assert processors(network) == own and not xformers


@pytest.fixture
def timed(monkeypatch):
    """A GPU on which flash cannot run; the times are the test's."""
    times = dict(native=3.0, xformers=2.0, _flash_3=2.5)
    needs = []

    def problem(name, *need):
        needs.append(need)
        return None if name in times else 'the package is missing'

    monkeypatch.setattr(attention, '_problem', problem)
    monkeypatch.setattr(attention, '_milliseconds', lambda name, *need: needs.append(need) or times[name])
    return times, needs


def test_auto_takes_the_fastest(timed):
    network = build('sd3')
    used, why = set_attention(network, 'auto', device='cuda:1', dtype=torch.bfloat16)
    assert used == 'xformers' and {type(p) for p in processors(network)} == {XFormersJointAttnProcessor}
    assert 'native 3.00 ms, xformers 2.00 ms, _flash_3 2.50 ms' in why and 'not flash: the package is missing' in why
    assert set(timed[1]) == {(torch.device('cuda:1'), torch.bfloat16, 2, 8, True, False)}


def test_auto_asks_once_for_equal_networks(timed):
    first = set_attention(build('sd3'), 'auto', device='cuda', dtype=torch.bfloat16)
    timed[0].update(native=1.0)
    assert set_attention(build('sd3'), 'auto', device='cuda', dtype=torch.bfloat16) == first
    assert set_attention(build('sd3'), 'auto', device='cuda', dtype=torch.float16)[0] == 'native'


def test_auto_without_candidates_measures_nothing(timed):
    timed[0].clear()
    network = build('longcat')
    used, why = set_attention(network, 'auto', device='cuda')
    assert used == 'native' and 'not xformers: the package is missing' in why and ' ms' not in why


def test_all_ranks_take_the_choice_of_rank_0(timed, monkeypatch):
    def broadcast(data):
        assert data == [None]
        data[0] = ('_flash_3', 'said by rank 0')

    monkeypatch.setattr(attention.dist, 'is_main_process', lambda: False)
    monkeypatch.setattr(attention.dist, 'broadcast_object_list', broadcast)
    network = build('longcat')
    assert set_attention(network, 'auto', device='cuda') == ('_flash_3', 'said by rank 0')
    assert {p._attention_backend for p in processors(network)} == {AttentionBackendName._FLASH_3}
    attention._fastest.cache_clear()
    del timed[0]['_flash_3']  # this rank's machine lacks it
    with pytest.raises(ValueError, match="attention='auto' cannot be used: the package is missing"):
        set_attention(network, 'auto', device='cuda')


def test_processors_of_sd3_are_what_is_assumed():
    """diffusers may move SD3 to its dispatcher; the special case is then dead."""
    assert {type(p) for p in processors(build('sd35'))} == {JointAttnProcessor2_0}
