"""What a rank needs while it runs: who else there is, stop flags, exit codes, the contract of a strategy."""
