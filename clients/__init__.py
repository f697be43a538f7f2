"""Other people's clients, which tests and the benchmark drive Sandmartin with."""
