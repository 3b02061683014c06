"""What torch needs several passes over memory for, each as one Triton kernel with its twin in plain torch beside it.

choice     whether Triton's kernels are used: the one place that decides it
dropout    masks that no memory holds
lora       LoRA's small products
norm       residual stream and layer norm
head       softmax and its gradient
attention  of packed rows, by torch alone; and of one new token, for generation

Shapes: N positions of a batch together, G linear layers that read the same input, R LoRA rank, W width of an input, M
width of a layer's output, V vocabulary; n rows, H heads of width D, L positions of the cache.
"""
