"""The only package with private pixels: how a private stage is opened, what it reads, and how it learns."""
