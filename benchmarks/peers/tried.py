"""What was tried for each peer before its settings were chosen (`python -m benchmarks.peers.tuning`)."""

TRIED = ""
