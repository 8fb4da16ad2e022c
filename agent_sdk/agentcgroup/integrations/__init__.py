"""Adapters for frameworks that agents are written with, one module each. The framework has to be
installed: `pip install 'agentcgroup[langchain]'`, and so on."""
