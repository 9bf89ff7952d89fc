"""Patterns, mask sets, and which layers are maskable: torch and safetensors only."""
