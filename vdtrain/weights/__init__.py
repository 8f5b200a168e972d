"""Key maps between published weight layouts and the diffuser's own names."""
