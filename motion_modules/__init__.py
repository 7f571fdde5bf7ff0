"""Networks and file formats: torch, einops and safetensors only."""
