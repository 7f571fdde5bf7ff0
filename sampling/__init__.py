"""Pure tensor maths of sampling."""
