"""What every test shares."""

from hypothesis import settings

# An example is slow when the machine is: a deadline would only say so.
settings.register_profile("maskllm", deadline=None)
settings.load_profile("maskllm")
