"""The child process of `built`: python -m tests.layer_logs JOBS LOGS."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

import tensorrt_rtx as trt


class Log(trt.ILogger):
    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.messages: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        self.messages.append(message)


def build(log: Log, job: dict[str, Any]) -> list[str]:
    log.messages.clear()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = len(job["for"])
    for index, name in enumerate(job["for"]):
        config.set_compute_capability(getattr(trt.ComputeCapability, name), index)
    for shapes in job["profiles"]:
        profile = builder.create_optimization_profile()
        for name, extents in shapes.items():
            profile.set_shape(name, *extents)
        config.add_optimization_profile(profile)
    done = parser.parse(base64.b64decode(job["model"])) and builder.build_serialized_network(network, config)
    if not done:
        raise SystemExit("\n".join(log.messages[-20:]))
    return list(log.messages)


jobs = json.loads(Path(sys.argv[1]).read_text())
only_log = Log()
Path(sys.argv[2]).write_text(json.dumps({name: build(only_log, job) for name, job in jobs.items()}))
