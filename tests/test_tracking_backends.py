"""MMEngine's backends for experiment trackers, offline: what this package's hooks draw is read back from their files.

What each should hold is what LocalVisBackend and TensorBoard have of the same run.
"""
import json

import numpy as np
import pytest
from environment_support import Environment, clean_copy, pip
from host_project import write_project
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytestmark = pytest.mark.slow

RUN = '''
custom_hooks = [dict(type='CDMHook', histogram_interval=2),
                dict(type='SampleGridHook', interval=2, num_images=2, teacher_steps=2)]
vis_backends = [dict(type='LocalVisBackend'), dict(type='TensorboardVisBackend'), {backend}]
visualizer = dict(type='Visualizer', vis_backends=vis_backends)
work_dir = 'run'
'''
TRAIN = """
from mmengine.config import Config
from mmengine.runner import Runner
Runner.from_cfg(Config.fromfile('project.py')).train()
"""
READ = '''
import json, os
from glob import glob
losses, pictures = [], dict(samples=[], anchor_sigma_histogram=[])
{}
print(json.dumps(dict(losses=losses, pictures=pictures)))
'''
# A file of W&B is a log of LevelDB's: blocks of 32 KiB, and in them pieces of records (checksum, length, kind).
WANDB = '''
from wandb.proto.wandb_internal_pb2 import Record
(file,) = glob('run/*/vis_data/wandb/offline-run-*/run-*.wandb')
data, at, whole = open(file, 'rb').read(), 7, b''
while at < len(data):
    if 32768 - at % 32768 < 7:
        at += 32768 - at % 32768
    length, kind = int.from_bytes(data[at + 4:at + 6], 'little'), data[at + 6]
    whole += data[at + 7:at + 7 + length]
    at += 7 + length
    if kind in (1, 4):
        record, whole = Record.FromString(whole), b''
        for item in record.history.item:
            key = item.key or '.'.join(item.nested_key)
            if key == 'loss_student':
                losses.append(json.loads(item.value_json))
            elif key.endswith('.path'):
                folder = file.rpartition('/')[0] + '/files/'
                pictures[key.removesuffix('.path')].append(folder + json.loads(item.value_json))
'''
CLEARML = '''
(file,) = glob('home/.clearml/cache/offline/offline-*/metrics.jsonl')
for line in open(file):
    for event in json.loads(line):
        if event['metric'] == 'loss_student':
            losses.append(event['value'])
        elif event['metric'] in pictures:
            pictures[event['metric']].append(event['url'])
'''
MLFLOW = '''
from mlflow.tracking import MlflowClient
(store,) = glob('run/*/vis_data')
client = MlflowClient('file:' + os.path.abspath(store))
(run,) = client.search_runs([client.get_experiment_by_name('Default').experiment_id])
losses += [metric.value for metric in client.get_metric_history(run.info.run_id, 'loss_student')]
folder = run.info.artifact_uri.removeprefix('file://') + '/images/'
for name in pictures:
    pictures[name] += sorted(glob(folder + name + '+step+*.png'))
'''
# What is installed, whether with all that it requires, the config's backend, how its files are read, and how far the
# pixels of a grid may be off in the mean: ClearML writes JPEG, which blurs the colours of noise.
BACKENDS = dict(
    wandb=(['wandb==0.31.0'], True, "dict(type='WandbVisBackend')", WANDB, 0),
    clearml=(['clearml==2.1.12'], True,
             "dict(type='ClearMLVisBackend', init_kwargs=dict(project_name='p', task_name='t', "
             'auto_connect_frameworks=False))', CLEARML, 11),  # else it takes what TensorBoard gets, too
    mlflow=(['mlflow-skinny==3.17.2', 'cachetools', 'cloudpickle', 'databricks-sdk', 'fastapi', 'opentelemetry-api',
             'opentelemetry-proto', 'opentelemetry-sdk', 'opentelemetry-semantic-conventions', 'python-dotenv',
             'sqlparse', 'starlette', 'uvicorn', 'google-auth'], False, "dict(type='MLflowVisBackend')", MLFLOW, 0))


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp('wheel')
    pip('wheel', '--no-deps', '--no-index', '--no-build-isolation', '-w', folder, clean_copy(folder / 'copy'))
    return next(folder.glob('*.whl'))


@pytest.mark.parametrize('name', BACKENDS)
def test_grids_histograms_and_scalars_arrive(name, wheel, tmp_path):
    requirements, whole, backend, read, error = BACKENDS[name]
    environment = Environment(tmp_path / 'environment')
    environment.install_from_index(*requirements, whole=whole)
    environment.pip_install(wheel)
    folder = write_project(environment.elsewhere)
    with open(folder / 'project.py', 'a') as config:
        config.write(RUN.format(backend=backend))
    variables = dict(WANDB_MODE='offline', CLEARML_OFFLINE_MODE='1', MLFLOW_ALLOW_FILE_STORE='true',
                     HOME=str(folder / 'home'), OMP_NUM_THREADS='1')
    environment.run('python', '-c', TRAIN, **variables)
    found = json.loads(environment.run('python', '-c', READ.format(read), **variables).stdout.splitlines()[-1])
    (data,) = folder.glob('run/*/vis_data')
    scalars = [json.loads(line) for line in (data / 'scalars.json').read_text().splitlines()]
    assert found['losses'] == [row['loss_student'] for row in scalars] and len(scalars) == 2
    expected = dict(samples=[pixels(data / f'vis_image/samples_{step}.png') for step in (0, 2, 4)],
                    anchor_sigma_histogram=list(map(chart, histograms(data))))
    for key, pictures in expected.items():
        assert len(found['pictures'][key]) == len(pictures)
        for path, picture in zip(found['pictures'][key], pictures):
            limit = error if key == 'samples' else min(error, 1)
            assert np.abs(pixels(folder / path) - picture).mean() <= limit


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert('RGB')).astype(float)


def histograms(data):
    """TensorBoard's counts of the anchors' sigmas in 50 bins of [0, 1], one a histogram."""
    events = EventAccumulator(str(data), size_guidance=dict(histograms=0)).Reload()
    for event in events.Histograms('train/anchor_sigma_histogram'):
        counts = np.zeros(50)
        for right, count in zip(event.histogram_value.bucket_limit, event.histogram_value.bucket):
            if count:
                counts[round(right * 50) - 1] += count
        yield counts


def chart(counts):
    """Bars of 8 x 120 pixels, blue on white."""
    picture = np.full((120, 400, 3), 255.0)
    for i, count in enumerate(counts):
        top = round(120 * count / counts.max())
        picture[120 - top:, 8 * i:8 * i + 8] = 31, 119, 180
    return picture
