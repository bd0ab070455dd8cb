# LoRA on one GPU, not a published schedule. Learning rates are ten times those of full weights, as adapters usually
# need, in the same ratio. Gradients of 4 iterations are averaged before an update, because one GPU's batch is a small
# part of the published 128: so 4,000 iterations are 1,000 updates of the fake score, 500 of the student. Checkpoints
# come at multiples of 40 iterations, whole updates of every method, so that a resumed run repeats an uninterrupted one.
_base_ = './distillation_4k.py'

optim_wrapper = dict(
    student=dict(accumulative_counts=4, optimizer=dict(lr=1e-4)),
    fake=dict(accumulative_counts=4, optimizer=dict(lr=5e-5)))
