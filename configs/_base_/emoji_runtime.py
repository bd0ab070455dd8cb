# The runtime of the emoji recipes, with a grid of captions that the teacher has seen and one (Brazil) that it has not.
_base_ = './default_runtime.py'

default_hooks = dict(logger=dict(interval=50), checkpoint=dict(interval=1000))
custom_hooks = [
    dict(type='CDMHook'),
    dict(type='SampleGridHook', interval=1000, num_images=8, steps=[1, 2, 8],
         prompts=['red apple', 'dog face', 'smiling face with sunglasses', 'locomotive', 'Brazil', 'cherry blossom',
                  'woman astronaut', 'blue heart'])]
