"""Turns `pip freeze` of one machine into a lock that holds on others: drops local build tags, adds platform markers."""

import re
import sys

LINUX_X86 = "sys_platform == 'linux' and platform_machine == 'x86_64'"
ELSEWHERE = "sys_platform != 'linux' or platform_machine != 'x86_64'"

for line in sys.stdin:
    requirement = re.sub(r"\+[\w.]+$", "", line.strip())  # torch==2.13.0+cpu: the same pin brings CUDA on a CUDA host
    name, _, version = requirement.partition("==")
    if name == "onnxruntime-gpu":
        print(f"onnxruntime=={version}; {ELSEWHERE}")
        print(f"onnxruntime-gpu=={version}; {LINUX_X86}")
    elif name == "uvloop":
        print(f"{requirement}; sys_platform != 'win32'")
    else:
        print(requirement)
