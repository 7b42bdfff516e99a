"""Training: one LightningModule, one loop, checkpoints that survive."""
