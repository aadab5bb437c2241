"""Conversations: reading them, writing them by a chat template, their tokens, rows of them."""
