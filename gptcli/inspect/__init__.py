"""Looking into a model: its next tokens, its attention, its embeddings, what each of its layers would predict."""
