"""The benchmark: what operations on real VMs take, beside baselines of the same run."""
