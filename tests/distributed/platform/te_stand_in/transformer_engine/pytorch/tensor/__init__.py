import torch


class QuantizedTensor(torch.Tensor):
    """Nothing is one here."""
