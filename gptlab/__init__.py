"""gptlab: experiments with GPT language models. PyTorch Lightning runs the loop, Hydra composes the experiment."""

__version__ = "0.1.0"
