"""The dashboard of machines."""

from __future__ import annotations

from deploy.grafana.layout import (
    BLUE,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    YELLOW,
    Dashboard,
    Panel,
    Query,
    Row,
)
from deploy.grafana.queries import (
    INSTANCE,
    JOB,
    SERVER,
    rate,
)

MODES = {
    "user": BLUE,
    "system": PURPLE,
    "iowait": ORANGE,
    "steal": RED,
    "throttled": YELLOW,
}
HARDWARE = Dashboard(
    uid="espalier-hardware",
    title="Espalier / Hardware",
    words="Processors, memory, disks and GPUs of the machines or containers, and the serving processes on them.",
    variables=[JOB, INSTANCE],
    rows=[
        Row(
            "Machine or container",
            [
                Panel(
                    "CPU",
                    "Share of the cores that may be used that is. Near 1 for long: more cores, or more servers.",
                    "percentunit",
                    [
                        Query(
                            "sum by (instance) (rate(espalier_machine_cpu_seconds_total"
                            f'{{{SERVER}, mode=~"user|system"}}[$__rate_interval])) / on (instance) '
                            f"max by (instance) (espalier_machine_cpu_cores{{{SERVER}}})",
                            "{{instance}}",
                        )
                    ],
                    most=1,
                ),
                Panel(
                    "CPU by mode",
                    "Cores. iowait: it waits for a disk. steal: the host takes it away. throttled: the container's "
                    "limit holds it back.",
                    "short",
                    [Query(rate("espalier_machine_cpu_seconds_total", f'{SERVER}, mode!="idle"', "mode"), "{{mode}}")],
                    stacked=True,
                    colors=MODES,
                ),
                Panel(
                    "Memory",
                    "used cannot be given back; available can, with the cache of files.",
                    "bytes",
                    [Query(f"sum by (state) (espalier_machine_memory_bytes{{{SERVER}}})", "{{state}}")],
                    stacked=True,
                    colors={"used": BLUE, "available": GREY},
                ),
                Panel(
                    "Disk",
                    "Share of the disk of each of the server's folders that is used.",
                    "percentunit",
                    [
                        Query(
                            f'sum by (instance, folder) (espalier_disk_bytes{{{SERVER}, state="used"}}) / '
                            f"sum by (instance, folder) (espalier_disk_bytes{{{SERVER}}})",
                            "{{instance}} {{folder}}",
                        )
                    ],
                    most=1,
                ),
                Panel(
                    "Free space",
                    "On the disk of each folder.",
                    "bytes",
                    [
                        Query(
                            f'sum by (instance, folder) (espalier_disk_bytes{{{SERVER}, state="free"}})',
                            "{{instance}} {{folder}}",
                        )
                    ],
                ),
                Panel(
                    "Cores",
                    "That may be used; of a container perhaps a part of one.",
                    "short",
                    [Query(f"max by (instance) (espalier_machine_cpu_cores{{{SERVER}}})", "{{instance}}")],
                ),
            ],
        ),
        Row(
            "Serving process",
            [
                Panel(
                    "CPU of the process",
                    "Cores.",
                    "short",
                    [Query(rate("process_cpu_seconds_total", SERVER, "instance"), "{{instance}}")],
                ),
                Panel(
                    "Memory of the process",
                    "Resident.",
                    "bytes",
                    [Query(f"max by (instance) (process_resident_memory_bytes{{{SERVER}}})", "{{instance}}")],
                ),
                Panel(
                    "Open files",
                    "Connections are files, too; and how many may be open.",
                    "short",
                    [
                        Query(f"max by (instance) (process_open_fds{{{SERVER}}})", "{{instance}} open"),
                        Query(f"max by (instance) (process_max_fds{{{SERVER}}})", "{{instance}} most"),
                    ],
                    logarithmic=True,
                ),
                Panel(
                    "Up for",
                    "Time since the process was started.",
                    "s",
                    [
                        Query(
                            f"time() - max by (instance) (process_start_time_seconds{{{SERVER}}})",
                            "{{instance}}",
                        )
                    ],
                    width=12,
                ),
                Panel(
                    "Garbage collections",
                    "A second, by generation. The oldest should be rare.",
                    "ops",
                    [Query(rate("python_gc_collections_total", SERVER, "generation"), "generation {{generation}}")],
                    width=12,
                ),
            ],
        ),
        Row(
            "GPUs",
            [
                Panel(
                    "GPUs",
                    "What they are.",
                    "short",
                    [Query(f"max by (instance, device, name) (espalier_gpu_info{{{SERVER}}})", "")],
                    kind="table",
                    columns={"instance": "Server", "device": "Device", "name": "Name"},
                ),
                Panel(
                    "Utilization",
                    "Share of the time in which a kernel ran. It says nothing of how much of the GPU that kernel used.",
                    "percentunit",
                    [
                        Query(
                            f"max by (instance, device) (espalier_gpu_utilization_ratio{{{SERVER}}})",
                            "{{instance}} {{device}}",
                        )
                    ],
                    most=1,
                ),
                Panel(
                    "Memory in use",
                    "By whichever process, of all that there is.",
                    "percentunit",
                    [
                        Query(
                            f'sum by (instance, device) (espalier_gpu_memory_bytes{{{SERVER}, state="used"}}) / '
                            f"sum by (instance, device) (espalier_gpu_memory_bytes{{{SERVER}}})",
                            "{{instance}} {{device}}",
                        )
                    ],
                    most=1,
                ),
                Panel(
                    "Memory",
                    "Of all GPUs.",
                    "bytes",
                    [Query(f"sum by (state) (espalier_gpu_memory_bytes{{{SERVER}}})", "{{state}}")],
                    stacked=True,
                    colors={"used": BLUE, "free": GREY},
                ),
                Panel(
                    "Power",
                    "That each draws.",
                    "watt",
                    [
                        Query(
                            f"max by (instance, device) (espalier_gpu_power_watts{{{SERVER}}})",
                            "{{instance}} {{device}}",
                        )
                    ],
                ),
                Panel(
                    "Temperature",
                    "Of the die. Beyond about 87 °C the clock is lowered.",
                    "celsius",
                    [
                        Query(
                            f"max by (instance, device) (espalier_gpu_temperature_celsius{{{SERVER}}})",
                            "{{instance}} {{device}}",
                        )
                    ],
                ),
            ],
        ),
    ],
)
