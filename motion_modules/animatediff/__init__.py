"""AnimateDiff motion modules, MotionLoRAs and domain adapters."""
