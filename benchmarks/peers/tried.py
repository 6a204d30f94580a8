"""What was tried for each peer before its settings were chosen (`python -m benchmarks.peers.tuning`)."""

from benchmarks.architectures.pictures import table

ROWS = (
    (
        "LitServe",
        "batches of 1, 32, 64; 1 or 2 workers; ZeroMQ or a multiprocessing queue; its JSON or orjson in the worker",
        "no batches: its loop that makes them polls without a pause, and takes 2 to 10 times the CPU of a request",
    ),
    (
        "BentoML",
        "adaptive batches of 32 and 64 with 1 and 60 s of latency; a mounted application instead; 1 or 2 workers",
        "mounted: half again as fast as its batches with validation, and takes bytes, which those cannot",
    ),
    (
        "Ray Serve",
        "batches of 1, 32, 64; 1 or 2 replicas; its proxy in Python, or HAProxy with direct ingress",
        "HAProxy and throughput mode; for the MLP one replica, a fifth less CPU than two",
    ),
    (
        "MLServer",
        "0, 1 or 2 parallel workers; adaptive batches of 32 in 1 ms; a custom handler for bytes; threads for the graph",
        "no parallel workers: a request costs twice as much by their queues; batches gain nothing within the noise",
    ),
    (
        "pytriton",
        "1 or 2 instances; batches of 64 and 256; 0 or 0.5 ms of delay; 1 or 4 HTTP threads",
        "one instance and no delay for the MLP, two for the large networks; 4 HTTP threads answer twice as many as one",
    ),
    (
        "FastAPI",
        "1 or 2 workers; the graph in the coroutine or in FastAPI's threads; 1 or 2 threads of ONNX Runtime",
        "in the coroutine, two workers of one thread: in threads a request costs a quarter more, and large networks "
        "pile up 40 at once",
    ),
)
TRIED = "## What was tried for them\n\n" + table(("server", "tried", "chosen, and why"), ROWS, 3)
