"""What happened, and whether it should have: comparisons of variants, reports on runs, measured against theory."""
