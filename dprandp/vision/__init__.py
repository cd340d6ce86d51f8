"""Images as network input (``images``), augmentation (``views``), ``metrics``; independent of privacy and of runs."""
