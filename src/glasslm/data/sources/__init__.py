"""Sources of text: named corpora, files, downloads and Hugging Face datasets."""
