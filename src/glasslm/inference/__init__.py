"""Inference: loading a trained model, generation, sampling, the JSON grammar, evaluation."""
