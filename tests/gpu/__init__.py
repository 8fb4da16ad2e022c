"""Tests on a real GPU, with PyTorch as it comes. See on_device.sh."""
