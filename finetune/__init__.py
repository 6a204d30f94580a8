import os

# OpenMP's threads spin while they wait for each other; where cores are shared, with the server for one, each spinning
# thread keeps the awaited one from running: MiniLM trained four to eight times slower. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
