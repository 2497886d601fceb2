"""The evaluation: data sets, methods, figures of merit, the benchmark that runs them, its report."""
