"""Finding similar pairs: embeddings of (prompt, attributes), an exact FAISS index, and the two retrievals of Stage 1 (paper: Sec. 3.2, "
"Steps 2 and 3)."""
