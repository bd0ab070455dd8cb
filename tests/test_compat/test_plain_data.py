from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer, MessageHub

from cdm_plugin.compat import pack_message_hub, plain, unpack_message_hub


def test_message_hub_round_trip_is_exact(tmp_path):
    hub = MessageHub('compat_round_trip')
    for value in (0.1, float('nan'), float('inf'), -0.0, 1e-320):
        hub.update_scalar('loss', value, count=3)
    hub.update_scalar('whole', 7)
    hub.update_scalar('not resumed', 1.0, resumed=False)
    hub.log_scalars['short'] = HistoryBuffer([1, 2, 3], [1, 1, 1], max_length=3)
    hub.log_scalars['empty'] = HistoryBuffer()
    hub._resumed_keys.update(short=True, empty=True)
    hub.update_info_dict(dict(iter=5, keep_ckpt_ids=[1, 2], eta=np.float64(0.1), thing=object()))
    state = hub.state_dict()

    with pytest.warns(UserWarning, match="'thing' is left out of the checkpoint: object"):
        torch.save(pack_message_hub(state), tmp_path / 'hub.pth')
    unpacked = unpack_message_hub(torch.load(tmp_path / 'hub.pth', weights_only=True))
    again = MessageHub('compat_round_trip_again')
    again.load_state_dict(unpacked)

    assert list(again.log_scalars) == ['loss', 'whole', 'short', 'empty']
    for key, expected in state['log_scalars'].items():
        actual = again.get_scalar(key)
        assert actual.max_length == expected.max_length
        for ours, stock in zip(actual.data, expected.data):
            assert (ours.dtype, ours.shape, ours.tobytes()) == (stock.dtype, stock.shape, stock.tobytes())
    assert again.runtime_info == dict(iter=5, keep_ckpt_ids=[1, 2], eta=0.1)
    assert unpacked['resumed_keys'] == {k: v for k, v in state['resumed_keys'].items() if k != 'thing'}
    # The restored buffers are live: MMEngine appends to them and drops the oldest.
    again.update_scalar('short', 4)
    assert again.get_scalar('short').data[0].tolist() == [2, 3, 4]
    assert hub.get_scalar('short').data[0].tolist() == [1, 2, 3]


def test_unpacked_state_passes_through():
    state = dict(log_scalars=dict(loss=HistoryBuffer([1.0], [1])), runtime_info=dict(iter=1), resumed_keys={})
    assert unpack_message_hub(state) == state
    hub = MessageHub('compat_old')
    assert unpack_message_hub(hub) is hub


def test_copied_run_forgets_checkpoints_of_the_original(tmp_path):
    old, new = tmp_path / 'old', tmp_path / 'new'
    for directory, names in ((old, ['best_a.pth', 'best_b.pth', 'last_checkpoint']), (new, ['best_a.pth'])):
        directory.mkdir()
        for name in names:
            (directory / name).touch()
    info = dict(best_ckpt_a=str(old / 'best_a.pth'), best_ckpt_b=str(old / 'best_b.pth'), best_score_b=1.0)
    state = dict(log_scalars={}, runtime_info=info, resumed_keys=dict.fromkeys(info, True))
    unpacked = unpack_message_hub(state, str(new))
    assert unpacked['runtime_info'] == dict(best_ckpt_a=str(new / 'best_a.pth'), best_score_b=1.0)
    assert unpacked['resumed_keys'] == dict(best_ckpt_a=True, best_score_b=True)
    assert unpack_message_hub(state)['runtime_info'] == info


def test_plain_rejects_objects_in_lists_and_keeps_tensors():
    tensor = torch.ones(2)
    assert plain([tensor])[0] is tensor
    assert plain(Config(dict(a=dict(b=(np.int64(1), np.bool_(True)))))._cfg_dict) == dict(a=dict(b=(1, True)))
    with pytest.raises(TypeError, match='Path is not plain data'):
        plain([Path('x')])
