"""Many runs: the central baseline, comparisons, sweeps, leakage."""
