"""What tests share: an exact test bed, and small pipelines of diffusers."""
