"""Smaller models: pruning, and what shrinks, distils, factorises and quantises them."""
