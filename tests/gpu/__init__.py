"""Tests on a real GPU, with an unchanged PyTorch; on_device.sh runs them."""
