# DeepSpeed's ZeRO 2: optimizer states, gradients and float32 weights are shared out, bfloat16 weights whole on each
# GPU. Gradients are summed over the GPUs in float32, as data parallelism sums them (DeepSpeed's default is bfloat16).
runner_type = 'FlexibleRunner'
strategy = dict(
    type='DistillationDeepSpeedStrategy',
    zero_optimization=dict(stage=2, overlap_comm=True, reduce_bucket_size=100_000_000),
    communication_data_type='fp32')
