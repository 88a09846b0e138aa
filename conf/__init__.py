"""The Hydra tree, shipped as ``finetuna_lightning.conf``."""
