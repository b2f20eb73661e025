"""Training of the embedded pipeline and of its judge: ``python -m sfumato.zoo.train``."""
