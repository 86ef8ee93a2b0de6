"""How much each patch token matters to a frozen ViT: measured, stored, ranked."""
