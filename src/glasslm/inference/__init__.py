"""A trained model in use: `trained_model.load`, generation, sampling, the JSON grammar, evaluation."""
