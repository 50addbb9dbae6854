"""python -m gptlab: what can be run."""

print("""gptlab: experiments with GPT language models

  python -m gptlab.train      train a model, resume a run, or run a sweep (-m)
  python -m gptlab.sample     write text with a trained model
  python -m gptlab.evaluate   its loss, perplexity and bits per byte on any data
  python -m gptlab.compare    compare runs and sweeps
  python -m gptlab.sizing     parameters, FLOPs, memory and time of a training, before it runs

--help after any of them lists its settings; README.md shows the way.
In a clone, scripts/prepare_openwebtext.py makes token files of documents, and scripts/export_hf.py takes a model to
Hugging Face's format.""")
