"""How much people like an image on average, whatever its prompt: LAION's aesthetic predictor."""
from mmengine.registry import METRICS
from torch import Tensor, nn

from cdm_plugin.metrics.base import ScoreMetric
from cdm_plugin.metrics.clip_scores import CLIPJudge
from cdm_plugin.metrics.weights import download_command, load_state

HEAD = ('https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/'
        'sac%2Blogos%2Bava1-l14-linearMSE.pth')


@METRICS.register_module()
class AestheticScore(ScoreMetric):
    """The predicted mean rating, from 1 to 10, of the improved aesthetic predictor; higher is better.

    Five linear layers (width -> 1024 -> 128 -> 64 -> 16 -> 1, nothing but dropout between them) on the unit vector of
    CLIP ViT-L/14's image embedding (768 wide). They are published as a pickled state dict of tensors
    (``sac+logos+ava1-l14-linearMSE.pth``, keys ``layers.N.weight`` and ``layers.N.bias``), which is read with
    ``weights_only=True``; a safetensors file with these keys does as well. The prompt is not looked at. The result is
    `aesthetic`.

    Args:
        pretrained (str): Hub id or folder of the `CLIPModel`. Default OpenAI's ViT-L/14.
        head (str): URL or file of the linear layers. Default the published ones, which torch.hub caches.
        **kwargs: Of `ImageMetric`.
    """

    key = 'aesthetic'
    differentiable = True

    def __init__(self, pretrained: str = 'openai/clip-vit-large-patch14', head: str = HEAD, **kwargs) -> None:
        super().__init__(**kwargs)
        self.pretrained, self.head_path = pretrained, head
        self.clip: CLIPJudge | None = None
        self.head: nn.Sequential | None = None

    def load(self) -> None:
        with self.needs(self.head_path, 'head', download_command(self.head_path)):
            state = load_state(self.head_path)
        with self.needs(self.pretrained):
            self.clip = CLIPJudge(self.pretrained, self.device)
        width = self.clip.model.config.projection_dim
        sizes = (width, 1024, 128, 64, 16, 1)
        linear = [nn.Linear(size_in, size_out) for size_in, size_out in zip(sizes, sizes[1:])]
        for layer, place in zip(linear, (0, 2, 4, 6, 7)):  # dropout has the places between
            layer.load_state_dict({name: state[f'layers.{place}.{name}'] for name in ('weight', 'bias')})
        self.head = nn.Sequential(*linear).requires_grad_(False).to(self.device)

    def unload(self) -> None:
        self.clip = self.head = None

    def scores(self, images: Tensor, prompts: list) -> Tensor:
        return self.head(self.clip.embed_images(images)).squeeze(-1)
