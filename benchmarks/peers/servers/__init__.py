"""Each runs in the environment of the server that it is written for, and imports nothing of ours but `graph`."""
