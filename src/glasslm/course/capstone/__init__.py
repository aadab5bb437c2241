"""The capstone.

One folder with a trained model, an ablation, a scaling study and answered questions.
"""
