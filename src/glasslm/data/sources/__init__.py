"""Where text comes from: named corpora, files, downloads and Hugging Face datasets; `corpora.find` opens them."""
