"""Serve one base model under many masks behind an OpenAI-compatible endpoint."""
