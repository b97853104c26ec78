"""Parts that the benchmarks share: questions, answers, judges, and their files."""
