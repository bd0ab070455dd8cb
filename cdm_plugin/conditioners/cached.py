
from mmengine.dataset import BaseDataset
from mmengine.registry import MODELS
from torch import Tensor

from cdm_plugin.condition import Condition
from cdm_plugin.conditioners.base import Conditioner, Prompts


@MODELS.register_module()
class EmbeddingConditioner(Conditioner):
    """Text embeddings computed before, by `cdm cache` or `write_embeddings`: looks prompts up and loads no encoder.

    Data that carry their embeddings (`EmbeddingDataset`) need only its null condition; others (images with captions,
    validation prompts) have their prompts looked up.

    Args:
        folder (str): Folder of the embeddings, with `null.safetensors` in it.
    """
    light = True

    def __init__(self, folder: str) -> None:
        super().__init__()
        from cdm_plugin.data import EmbeddingDataset
        self.folder = folder
        self._dataset = EmbeddingDataset(data_root=folder)
        for name, row in self._dataset.null_condition().items():
            self.register_buffer(name, row[None], persistent=False)
        self._rows: dict[str, int] | None = None  # of the prompts, made when the first one is asked for

    def encode(self, prompts: Prompts) -> Condition:
        """Looks B prompts up.

        Raises:
            ValueError: If the folder does not say what prompts it holds, or has no embedding of one of them.
        """
        if self._rows is None:
            infos = (BaseDataset.get_data_info(self._dataset, i) for i in range(len(self._dataset)))
            self._rows = {info['prompt']: i for i, info in enumerate(infos) if 'prompt' in info}
        given = prompts.tolist() if isinstance(prompts, Tensor) else list(prompts)
        missing = [prompt for prompt in given if prompt not in self._rows]
        if missing:
            what = (f'has no embedding of {len(missing)} of {len(given)} prompts, such as {str(missing[0])[:80]!r}'
                    if self._rows else 'does not say what prompts it holds')
            raise ValueError(f'model.backbone.conditioner.folder={self.folder!r} {what}: run `cdm cache` with these '
                             'prompts, or set model.backbone.conditioner to the text encoders that made the folder')
        rows = [self._dataset.get_data_info(self._rows[prompt])['condition'] for prompt in given]
        device = next(self.buffers()).device
        return Condition.of_rows({name: [row[name] for row in rows] for name in rows[0]}).to(device)

    def null(self) -> Condition:
        return Condition.of_rows(dict(self.named_buffers()))
