"""Process groups, and the division of work between ranks. Models do not depend on this package."""
