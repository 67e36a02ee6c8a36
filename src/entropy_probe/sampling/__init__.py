"""Fresh responses from the policy."""
