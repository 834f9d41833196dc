"""Many runs: the central baseline, comparisons, sweeps, and what leaks."""
