from gptlab.callbacks.overfit import Overfit
from gptlab.callbacks.profile import Profile
