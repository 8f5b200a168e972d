"""How good a checkpoint's samples are: Fréchet distances and CLIP scores."""
