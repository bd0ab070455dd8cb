from pathlib import Path

import pytest

from cdm_plugin import assets


@pytest.fixture
def root(tmp_path, monkeypatch):
    (tmp_path / 'digits').mkdir()
    (tmp_path / 'digits' / 'x.npz').touch()
    (tmp_path / '__init__.py').touch()
    monkeypatch.setattr(assets, 'ROOT', tmp_path)
    return tmp_path


def test_files_and_folders(root):
    assert assets.resolve('asset:digits/x.npz') == str(root / 'digits' / 'x.npz')
    assert assets.resolve('asset:digits') == str(root / 'digits')


def test_other_paths_stay(root, monkeypatch):
    monkeypatch.setenv('HOME', str(root))
    assert assets.resolve('~/x.txt') == str(root / 'x.txt')
    assert assets.resolve(Path('a/../b.txt')) == 'a/../b.txt'
    for path in ('', 'x.txt', '/x/y', 's3://bucket/x.txt', 'owner/model'):
        assert assets.resolve(path) == path


@pytest.mark.parametrize('path', ['asset:x.npz', 'asset:', 'asset:../x', 'asset:digits/../..', 'asset:/etc'])
def test_unknown_assets(root, path):
    with pytest.raises(FileNotFoundError) as info:
        assets.resolve(path)
    assert str(info.value) == (f'no asset {path!r} in the installed cdm_plugin; there are: asset:digits/x.npz')


def test_no_assets_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(assets, 'ROOT', tmp_path)
    with pytest.raises(FileNotFoundError, match='there are: none'):
        assets.resolve('asset:x')


def test_installed_assets():
    assert Path(assets.resolve('asset:digits')).is_dir()
