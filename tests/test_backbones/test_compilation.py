"""What torch.compile does with the repeated blocks, besides computing the same (test_every_architecture.py)."""
import torch
from diffusers import ModelMixin
from mmengine.registry import MODELS
from tests_support import tiny_backbone
from torch import nn

from cdm_plugin.backbones import SD3Backbone


class Block(nn.Module):

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x, text):
        return self.linear(x) + len(text)  # of every text, a variant of its own


class Network(ModelMixin):

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x, text):
        for block in self.blocks:
            x = block(x, text)
        return x


def test_more_variants_of_a_block_compile_than_torch_allows_and_the_limit_of_the_process_stays(monkeypatch):
    compile_module, graphs = nn.Module.compile, []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(nn.Module, 'compile', lambda module, **kw: compile_module(module, backend=backend, **kw))
    monkeypatch.setattr(SD3Backbone, 'repeated_blocks', ['Block'])
    torch._dynamo.reset()
    limit = torch._dynamo.config.recompile_limit
    network = MODELS.build(dict(tiny_backbone(), compile=True)).compile_blocks(Network())
    plain, x = Network(), torch.randn(3, 2, requires_grad=True)
    plain.load_state_dict(network.state_dict())

    @torch.compile(backend=backend)  # what somebody else compiles
    def lengthen(x, text):
        return x + len(text)

    for i in range(limit + 3):
        found = network(x, i * 'a')
        torch.testing.assert_close(found, plain(x, i * 'a'))
        found.sum().backward()
        assert torch._dynamo.config.recompile_limit == limit
    assert len(graphs) == limit + 3  # the two blocks share them
    graphs.clear()
    for i in range(limit + 3):
        torch.testing.assert_close(lengthen(x, i * 'a'), x + i)
    assert len(graphs) == limit
