"""finetuna_lightning: many LoRA adapters trained side by side over one frozen 8-bit backbone."""
