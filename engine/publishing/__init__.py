"""Publishing: pipelines of diffusers, model cards."""
