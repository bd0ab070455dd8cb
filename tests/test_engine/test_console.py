"""The console shows a training, its log file everything."""
import logging

import pytest
import transformers
from mmengine.config import Config
from mmengine.logging import MMLogger
from tests_support import tiny_backbone

from cdm_plugin.cli import main
from cdm_plugin.engine.console import quiet_console

WRAPPER = dict(optimizer=dict(type='SGD', lr=1e-3))


@pytest.fixture
def config(tmp_path):
    """A file of a short training."""
    Config(dict(
        model=dict(type='DMD2', student_every=1, backbone=tiny_backbone()),
        train_dataloader=dict(batch_size=2, num_workers=0, sampler=dict(type='InfiniteSampler'),
                              dataset=dict(type='LabelDataset', num_classes=3)),
        optim_wrapper=dict(constructor='DistillationOptimWrapperConstructor', student=WRAPPER, fake=WRAPPER),
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=1), custom_hooks=[dict(type='CDMHook')],
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=1),
                           logger=dict(type='LoggerHook', interval=1, log_metric_by_epoch=False)),
        log_processor=dict(by_epoch=False), default_scope='mmengine')).dump(tmp_path / 'own.py')
    return tmp_path / 'own.py'


def lines(capsys):
    """What a training has printed, before its first iteration and from it on."""
    before, first, after = capsys.readouterr().out.partition('Iter(train)')
    assert first
    return before.splitlines(), after.splitlines()


def test_a_training_begins_with_a_few_lines(config, tmp_path, capsys):
    assert main(['train', str(config), '--work-dir', str(tmp_path / 'run'), '--cfg-options',
                 'experiment_name=console-quiet']) == 0
    before, after = lines(capsys)
    assert len(before) < 10 and not any('deprecated' in line for line in before)
    path, = [line.split()[-1] for line in before if 'the whole log' in line]
    whole = open(path).read()
    for table in ('System environment', 'Config:', 'Hooks will be executed in the following order'):
        assert table in whole and not any(table in line for line in before + after)
    assert main(['train', str(config), '--work-dir', str(tmp_path / 'told'), '--verbose', '--cfg-options',
                 'experiment_name=console-told']) == 0
    assert len(lines(capsys)[0]) > 100


def test_weights_are_read_without_bars(tmp_path, capsys):
    encoder = transformers.BertModel(transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9))
    encoder.save_pretrained(tmp_path)
    capsys.readouterr()
    with quiet_console():
        transformers.BertModel.from_pretrained(tmp_path)
    assert capsys.readouterr().err == ''
    transformers.BertModel.from_pretrained(tmp_path)
    assert '100%' in capsys.readouterr().err


def test_warnings_and_errors_are_never_hidden(tmp_path, capsys):
    logger = MMLogger(f'console-{tmp_path.name}', log_file=str(tmp_path / 'log.txt'), log_level='INFO')
    with quiet_console():
        for level, text in ((logging.INFO, 'one line'), (logging.INFO, 'a\ntable'), (logging.WARNING, 'two\nlines'),
                            (logging.ERROR, 'bad\nthing'), (logging.DEBUG, 'detail'),
                            (logging.WARNING, '"FileClient" will be deprecated in future.')):
            logger.log(level, text)
    logger.info('after\nit')
    shown, kept = capsys.readouterr().out, (tmp_path / 'log.txt').read_text()
    for text, on_console, in_file in (
            ('one line', True, True), ('a\ntable', False, True), ('two\nlines', True, True), ('bad\nthing', True, True),
            ('detail', False, False), ('deprecated', False, True), ('after\nit', True, True)):
        assert (text in shown, text in kept) == (on_console, in_file), text
