"""A pruned tower as one file, from pixels to embeddings or class probabilities: ONNX, or a program of torch.export.

Nothing is imported here, so that a file can be tried where torch is not installed.
"""
