"""A team's project under a `default_scope`, and a program that trains every method with it in its environment."""
import json
from pathlib import Path

from PIL import Image
from tests_support import tiny_backbone

SIZE = 8
REGISTRY = 'from mmengine import registry as root\n' + ''.join(
    f"{kind} = root.Registry({kind.lower()!r}, parent=root.{kind}, scope='acme_team', locations=['acme_team.parts'])\n"
    for kind in ('DATASETS', 'TRANSFORMS', 'HOOKS'))
PARTS = '''
from pathlib import Path

import numpy as np
from mmengine.dataset import BaseDataset
from mmengine.hooks import Hook
from PIL import Image

from {registry} import DATASETS, HOOKS, TRANSFORMS


@DATASETS.register_module()
class TeamPictures(BaseDataset):

    def parse_data_info(self, raw):
        return dict(img_path=str(Path(self.data_root, raw['file'])), gt_label=raw['label'])


@TRANSFORMS.register_module()
class TeamLoad:
    """Pixels as OpenCV has them."""

    def __call__(self, sample):
        return dict(sample, img=np.asarray(Image.open(sample['img_path']))[..., ::-1])


@TRANSFORMS.register_module()
class TeamFlip:
    """Mirrors the pictures of one class."""

    def __call__(self, sample):
        return dict(sample, img=sample['img'][:, ::-1]) if sample['gt_label'] == 1 else sample


@HOOKS.register_module()
class TeamHook(Hook):
    """Keeps the losses of every iteration."""

    def before_train(self, runner):
        self.losses = {{}}

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.losses[runner.iter + 1] = {{k: float(v) for k, v in outputs.items() if 'loss' in k}}
'''
CONFIG = '''
custom_imports = dict(imports=['cdm_plugin', 'acme_team.parts', *{imports}], allow_failed_imports=False)
default_scope = {scope}
model = dict(type='CDM', backbone={backbone}, student_every=2)
train_dataloader = dict(
    batch_size=4, num_workers=0, sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict({dataset}, pipeline=[
        *{load},
        dict(type='TeamFlip'),
        dict(type='mmengine.PackInputs', prompt='gt_label', image='img', channel_order='bgr')]))
optim_wrapper = dict(
    constructor='DistillationOptimWrapperConstructor',
    student=dict(optimizer=dict(type='AdamW', lr=1e-3)), fake=dict(optimizer=dict(type='AdamW', lr=1e-3)))
param_scheduler = [dict(type='ConstantLR', factor=0.5, begin=0, end=2, by_epoch=False)]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=4)
custom_hooks = [dict(type='CDMHook'), dict(type='TeamHook')]
default_hooks = dict(logger=dict(type='LoggerHook', interval=2, log_metric_by_epoch=False),
                     checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=2))
log_processor = dict(by_epoch=False)
randomness = dict(seed=3)
log_level = 'ERROR'
'''
OWN_DATASET = "type='TeamPictures', data_root='pictures', ann_file='pictures.json'"
OWN_LOAD = [dict(type='TeamLoad')]
METHODS = ('CDM', 'DMD2', 'DecoupledDMD', 'FlowMatching')
# With MMEngine's own runner; the losses of each iteration by method, and what commands say.
PROGRAM = '''
import contextlib, io, json, sys
import mmengine
from mmengine.config import Config
from mmengine.runner import Runner

def train(method, name, **options):
    cfg = Config.fromfile('project.py')
    cfg.merge_from_dict(dict(options, experiment_name=name, work_dir='runs/' + name))
    cfg.model.type = method
    runner = Runner.from_cfg(cfg)
    runner.train()
    return next(hook for hook in runner.hooks if type(hook).__name__ == 'TeamHook').losses

def command(*argv):
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            status = main(list(argv))
        except SystemExit as stopped:
            status = stopped.code
    return [status, text.getvalue()]

methods, commands = json.loads(sys.argv[1]), json.loads(sys.argv[2])
report = dict(mmengine=[mmengine.__version__, mmengine.__file__], losses={m: train(m, m) for m in methods})
if methods:
    report['resumed'] = train(methods[0], 'again', resume=True, load_from=f'runs/{methods[0]}/iter_2.pth')
from cdm_plugin.cli import main
report['said'] = [command(*argv) for argv in commands]
print(json.dumps(report))
'''


def write_project(folder: Path, scope: str | None = 'acme_team', registry: str = 'acme_team.registry',
                  dataset: str = OWN_DATASET, load: list = OWN_LOAD, imports: list = ()) -> Path:
    """The project's package, its pictures, and its config `project.py`.

    Args:
        folder (Path): Where to, from where it is run.
        scope (str, optional): The config's `default_scope`.
        registry (str): The module in whose registries the project's classes stand.
        dataset (str): Arguments of the config's dataset.
        load (list): Transforms that read a picture.
        imports (list): Further modules that the config imports.
    """
    package = folder / 'acme_team'
    package.mkdir()
    for name, text in dict(__init__='', registry=REGISTRY, parts=PARTS.format(registry=registry)).items():
        (package / f'{name}.py').write_text(text)
    entries = []
    for label in range(3):
        (folder / f'pictures/{label}').mkdir(parents=True)
        for i in range(3):
            name = f'{label}/{i}.png'
            picture = Image.new('RGB', (SIZE, SIZE))
            picture.putdata([(20 * label + 9 * x, 30 * i + 7 * y, 5 * x * y) for y in range(SIZE) for x in range(SIZE)])
            picture.save(folder / 'pictures' / name)
            entries.append(dict(file=name, label=label))
    (folder / 'pictures/pictures.json').write_text(json.dumps(dict(metainfo={}, data_list=entries)))
    backbone = tiny_backbone()
    backbone['config'] = dict(backbone['config'], in_channels=12, out_channels=12)
    (folder / 'project.py').write_text(CONFIG.format(
        scope=repr(scope), backbone=backbone, dataset=dataset, load=load, imports=list(imports)))
    return folder
