"""What the benchmarks share: questions, answers, judges, and the files that hold them."""
