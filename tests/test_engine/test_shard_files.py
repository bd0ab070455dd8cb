"""The file format of sharded checkpoints, without DeepSpeed: sharded by rows as FSDP2 does, and by runs of elements."""
import threading
from types import SimpleNamespace

import pytest
import torch
from mmengine.runner import CheckpointLoader
from tests_support import same_bits

from cdm_plugin.engine.shard_files import Span, layout_of, read_common, read_pieces, read_whole, write

SHAPES = {'student': {'a.weight': (5, 3), 'b': (7,), 'c': (1,)}, 'critic': {'a.weight': (2, 3)}}


def wholes(seed):
    generator = torch.Generator().manual_seed(seed)
    return {role: {name: torch.randn(shape, generator=generator) for name, shape in of.items()}
            for role, of in SHAPES.items()}


WEIGHTS, MOMENTS, AVERAGE = wholes(0), wholes(1), wholes(2)['student']


def by_rows(shape, rank, world_size):
    """FSDP2 cuts the first dimension with torch.chunk; a rank may have none of it."""
    rows = [len(chunk) for chunk in torch.arange(shape[0]).chunk(world_size)] + [0] * world_size
    width = torch.Size(shape[1:]).numel()
    return sum(rows[:rank]) * width, rows[rank] * width


def by_elements(shape, rank, world_size):
    size = -(-torch.Size(shape).numel() // world_size)
    start = min(rank * size, torch.Size(shape).numel())
    return start, min(size, torch.Size(shape).numel() - start)


def shards(cut, rank, world_size):
    """What a sharded network is to the format: shapes, and this rank's pieces."""
    made = {}
    for role, shapes in SHAPES.items():
        spans = {name: cut(shape, rank, world_size) for name, shape in shapes.items()}
        made[role] = SimpleNamespace(
            shapes=shapes, pieces={name: Span(*span) for name, span in spans.items() if span[1] > 0})
    return made


def pieces(cut, rank, world_size):
    """The expected content of a rank, cut from the whole tensors."""
    def of(tensors, role):
        own = {}
        for name, shape in SHAPES[role].items():
            start, numel = cut(shape, rank, world_size)
            if numel > 0:
                own[name] = tensors[name].flatten()[start:start + numel].clone()
        return own

    optimizer = {role: dict(sliced=dict(exp_avg=of(MOMENTS[role], role)),
                            single=dict(step={name: torch.tensor(4.0) for name in of(MOMENTS[role], role)}),
                            groups=[dict(lr=0.1)]) for role in SHAPES}
    return dict(layout=layout_of(shards(cut, rank, world_size)),
                weights={role: of(WEIGHTS[role], role) for role in SHAPES}, optimizer=optimizer,
                student_ema=dict(steps=3, weights=of(AVERAGE, 'student')))


def save(folder, cut, world_size, broken_rank=None):
    """Every rank in a thread of its own."""
    barrier, failed, values = threading.Barrier(world_size, timeout=20), [], [None] * world_size

    def run(rank):
        common = dict(world_size=world_size, shapes=SHAPES, state_dict={'student.buffer': torch.ones(2)},
                      meta=dict(iter=8), message_hub={})
        own = pieces(cut, rank, world_size)
        if rank == broken_rank:
            own['weights'] = lambda: None  # cannot be pickled

        def gather(value):
            values[rank] = value
            barrier.wait()
            gathered = list(values)
            barrier.wait()
            return gathered

        try:
            write(folder, rank, common, own, gather)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failed


def test_a_checkpoint_is_put_together_whole(tmp_path):
    for cut in (by_rows, by_elements):
        for world_size in (1, 2, 3):
            folder = tmp_path / f'{cut.__name__}_{world_size}.pth'
            assert save(folder, cut, world_size) == []
            state = CheckpointLoader.load_checkpoint(str(folder), map_location='cpu', logger='silent')
            same_bits(state['state_dict'], {'student.buffer': torch.ones(2), **{
                f'{role}.{name}': w for role, of in WEIGHTS.items() for name, w in of.items()}})
            same_bits(state['student_ema'], dict(steps=3, weights=AVERAGE))
            assert state['meta'] == dict(iter=8) and 'format' not in state


def test_only_the_roles_that_are_asked_for_are_read(tmp_path):
    assert save(tmp_path / 'a.pth', by_rows, 2) == []
    student, critic = (read_whole(tmp_path / 'a.pth', roles=[role]) for role in SHAPES)
    assert set(student['state_dict']) == {'student.buffer', 'student.a.weight', 'student.b', 'student.c'}
    assert set(critic['state_dict']) == {'student.buffer', 'critic.a.weight'}
    assert 'student_ema' in student and 'student_ema' not in critic


@pytest.mark.parametrize('saved_by', [by_rows, by_elements])
@pytest.mark.parametrize('read_by', [by_rows, by_elements])
@pytest.mark.parametrize('world_size', [1, 2, 4])
def test_any_sharding_reads_what_any_other_wrote(saved_by, read_by, world_size, tmp_path):
    assert save(tmp_path / 'a.pth', saved_by, 2) == []
    for rank in range(world_size):
        read = read_pieces(tmp_path / 'a.pth', read_common(tmp_path / 'a.pth'), rank, world_size,
                           shards(read_by, rank, world_size))
        same_bits(read, pieces(read_by, rank, world_size))
        for piece in read['weights']['student'].values():
            assert piece.is_contiguous()


def test_a_piece_that_was_cut_keeps_no_whole_weight_in_memory(tmp_path):
    assert save(tmp_path / 'a.pth', by_rows, 1) == []
    read = read_pieces(tmp_path / 'a.pth', read_common(tmp_path / 'a.pth'), 0, 2, shards(by_rows, 0, 2))
    piece = read['weights']['student']['a.weight']
    assert piece.untyped_storage().nbytes() == piece.nbytes == 9 * 4


def test_a_rank_that_fails_leaves_the_earlier_checkpoint(tmp_path):
    assert save(tmp_path / 'a.pth', by_rows, 2) == []
    for rank in (0, 1):
        own, others = sorted(save(tmp_path / 'a.pth', by_elements, 2, broken_rank=rank),
                             key=lambda error: 'was not written' in str(error))
        assert f'because rank {rank} failed: {type(own).__name__}: {own}' in str(others)
        same_bits(read_whole(tmp_path / 'a.pth')['student_ema'], dict(steps=3, weights=AVERAGE))
        assert [p.name for p in tmp_path.iterdir()] == ['a.pth']


def test_what_does_not_fit_or_is_damaged_is_named(tmp_path):
    folder = tmp_path / 'a.pth'
    assert save(folder, by_rows, 2) == []
    other = shards(by_rows, 0, 1)
    other['critic'].shapes = {'a.weight': (3, 2)}
    with pytest.raises(ValueError, match="does not fit the config's model.*critic.a.weight"):
        read_pieces(folder, read_common(folder), 0, 1, other)
    (folder / 'rank_1.pth').write_bytes(b'x')
    with pytest.raises(ValueError, match='is damaged, rank_1.pth cannot be read'):
        read_whole(folder)
    (folder / 'rank_1.pth').unlink()
    with pytest.raises(FileNotFoundError, match='incomplete, it has no rank_1.pth'):
        read_whole(folder)
    torch.save(dict(format='cdm_plugin shards 9'), folder / 'common.pth')
    with pytest.raises(ValueError, match="'cdm_plugin shards 9'.*reads 'cdm_plugin shards 1'"):
        read_common(folder)
