from gptlab.callbacks.progress import Progress
from gptlab.callbacks.sample_text import SampleText
