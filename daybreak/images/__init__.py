"""Pictures: reading them, a codec that turns them into ids and back, data sets of them, and drawing with a model."""
