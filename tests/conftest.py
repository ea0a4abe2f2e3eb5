"""What all tests share."""

from hypothesis import settings

# Continuous integration runs on slow and busy machines: an example's time says nothing.
settings.register_profile("landmark", deadline=None)
settings.load_profile("landmark")
