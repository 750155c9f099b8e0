# SPDX-License-Identifier: Apache-2.0
"""Kata's AgentService and Health: it translates, `Sandbox` and the other modules do the work.

A method takes the request and returns a message, or a generator that returns one.  What is
seldom called imports its module when it is.
"""

from __future__ import annotations

import os

from google.protobuf import empty_pb2

from agent.api import agent_pb2, health_pb2
from agent.version import VERSION
from ttrpc.errors import Code, RpcError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from typing import Any

    from agent.sandbox import Sandbox

    Answer = Any  # a message, or a generator that returns one

GRPC_VERSION = "0.0.1"  # what Kata's agent answers; its runtimes read nothing from it
_EMPTY = empty_pb2.Empty()

# Calls that change nothing until they have something to tell.
_ONLY_WAIT = frozenset(("WaitProcess", "GetOOMEvent", "ReadStdout", "ReadStderr"))


class Services:
    """Finds the handler of an RPC by its names."""

    def __init__(self, *implementations: tuple[Any, Any]) -> None:
        self._found: dict[tuple[str, str], tuple[Any, Callable[[Any], Answer], bool]] = {}
        for module, implementation in implementations:
            for service in module.DESCRIPTOR.services_by_name.values():
                for method in service.methods:
                    handler = getattr(implementation, method.name, None)
                    if handler is not None:
                        kind = method.input_type._concrete_class
                        only_waits = method.name in _ONLY_WAIT
                        self._found[service.full_name, method.name] = (kind, handler, only_waits)

    def find(self, service: str, method: str) -> tuple[Any, Callable[[Any], Answer], bool] | None:
        return self._found.get((service, method))


class Health:
    """grpc.Health."""

    def Check(self, request: Any) -> Answer:
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)

    def Version(self, request: Any) -> Answer:
        return health_pb2.VersionCheckResponse(grpc_version=GRPC_VERSION, agent_version=VERSION)


class AgentService:
    """grpc.AgentService, in the order of its .proto file."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self._cpus_came = False  # since the boot

    # --- containers and processes -------------------------------------------------------

    def CreateContainer(self, request: Any) -> Answer:
        return _then_empty(self._sandbox.create_container(request))

    def StartContainer(self, request: Any) -> Answer:
        return _then_empty(self._sandbox.find(request.container_id).start())

    def RemoveContainer(self, request: Any) -> Answer:
        return _then_empty(self._sandbox.remove(request.container_id))

    def ExecProcess(self, request: Any) -> Answer:
        return _then_empty(self._sandbox.execute(request))

    def SignalProcess(self, request: Any) -> Answer:
        if not 0 <= request.signal <= 64:
            raise RpcError(Code.INVALID_ARGUMENT, f"signal {request.signal} does not exist")
        self._sandbox.find(request.container_id).signal(request.exec_id, request.signal)
        return _EMPTY

    def WaitProcess(self, request: Any) -> Answer:
        container = self._sandbox.find(request.container_id)
        process = container.process(request.exec_id)

        def wait() -> Generator[Any, Any, Any]:
            status = yield process.exited
            container.waited(process)
            return agent_pb2.WaitProcessResponse(status=status)

        return wait()

    def UpdateContainer(self, request: Any) -> Answer:
        container = self._sandbox.find(request.container_id)
        return _then_empty(container.update(request.resources))

    def UpdateEphemeralMounts(self, request: Any) -> Answer:
        self._sandbox.storages.update_ephemeral(request.storages)
        return _EMPTY

    def StatsContainer(self, request: Any) -> Answer:
        return self._sandbox.find(request.container_id).stats()

    def PauseContainer(self, request: Any) -> Answer:
        return _then_empty(self._sandbox.find(request.container_id).pause())

    def ResumeContainer(self, request: Any) -> Answer:
        return _then_empty(self._sandbox.find(request.container_id).resume())

    def GetDiagnosticData(self, request: Any) -> Answer:
        from agent import diagnostics

        source = self._sandbox.find(request.container_id).termination_log
        text = diagnostics.termination_log(request.log_type, source)
        return agent_pb2.GetDiagnosticDataResponse(data=text)

    # --- stdio --------------------------------------------------------------------------

    def WriteStdin(self, request: Any) -> Answer:
        from agent.stdio import RpcInput

        stdin = self._process(request).stdin
        if not isinstance(stdin, RpcInput):
            raise RpcError(Code.FAILED_PRECONDITION, "this stdin is not written by calls")
        if not request.data:  # Kata's sign for the end
            stdin.finish()
            return agent_pb2.WriteStreamResponse(len=0)

        def write() -> Generator[Any, Any, Any]:
            return agent_pb2.WriteStreamResponse(len=(yield stdin.write(request.data)))

        return write()

    def ReadStdout(self, request: Any) -> Answer:
        return self._read(self._process(request).stdout, request.len)

    def ReadStderr(self, request: Any) -> Answer:
        return self._read(self._process(request).stderr, request.len)

    def CloseStdin(self, request: Any) -> Answer:
        from agent.stdio import RpcInput

        stdin = self._process(request).stdin
        if isinstance(stdin, RpcInput):
            stdin.finish()
        elif stdin is not None:
            stdin.close()
        return _EMPTY

    def TtyWinResize(self, request: Any) -> Answer:
        self._process(request).resize(request.row, request.column)
        return _EMPTY

    def _process(self, request: Any) -> Any:
        return self._sandbox.find(request.container_id).process(request.exec_id)

    def _read(self, output: Any, size: int) -> Answer:
        from agent.stdio import RpcOutput

        if not isinstance(output, RpcOutput):
            raise RpcError(Code.FAILED_PRECONDITION, "this stream is not read by calls")

        def read() -> Generator[Any, Any, Any]:
            future = output.read(size)
            try:
                return agent_pb2.ReadStreamResponse(data=(yield future))
            finally:
                output.forget(future)

        return read()

    # --- network ------------------------------------------------------------------------

    def UpdateInterface(self, request: Any) -> Answer:
        from agent import network

        made = yield from network.update_interface(
            request.interface, self._sandbox.config.hotplug_timeout
        )
        if self._cpus_came:
            self._spread_queues()
        return made

    def UpdateRoutes(self, request: Any) -> Answer:
        from agent import routes

        return routes.update_routes(request.routes)

    def ListInterfaces(self, request: Any) -> Answer:
        from agent import network

        return network.list_interfaces()

    def ListRoutes(self, request: Any) -> Answer:
        from agent import routes

        return routes.list_routes()

    def AddARPNeighbors(self, request: Any) -> Answer:
        from agent import network

        network.add_arp_neighbors(request.neighbors.ARPNeighbors)
        return _EMPTY

    def GetIPTables(self, request: Any) -> Answer:
        from agent import iptables

        def get() -> Generator[Any, Any, Any]:
            data = yield from iptables.get_iptables(request.is_ipv6)
            return agent_pb2.GetIPTablesResponse(data=data)

        return get()

    def SetIPTables(self, request: Any) -> Answer:
        from agent import iptables

        def set_() -> Generator[Any, Any, Any]:
            data = yield from iptables.set_iptables(request.is_ipv6, request.data)
            return agent_pb2.SetIPTablesResponse(data=data)

        return set_()

    # --- the sandbox and its guest ------------------------------------------------------

    def GetMetrics(self, request: Any) -> Answer:
        from agent import metrics

        return agent_pb2.Metrics(metrics=metrics.guest_metrics())

    def CreateSandbox(self, request: Any) -> Answer:
        return _then_empty(self._sandbox.create(request))

    def DestroySandbox(self, request: Any) -> Answer:
        return _then_empty(self._sandbox.destroy())

    def RemoveStaleVirtiofsShareMounts(self, request: Any) -> Answer:
        # Mounts of the share go with their containers here: there are no stale ones.
        return _EMPTY

    def OnlineCPUMem(self, request: Any) -> Answer:
        from agent import resources

        cgroups = [container.cgroup for container in self._sandbox.containers.values()]
        yield from resources.online_cpu_mem(request, cgroups)
        if request.nb_cpus:
            self._cpus_came = True
            self._spread_queues()
        return _EMPTY

    def _spread_queues(self) -> None:
        from agent import queues

        queues.follow_cpus(os.cpu_count() or 1)

    def ReseedRandomDev(self, request: Any) -> Answer:
        from agent import clock

        clock.reseed(request.data)
        # Only the clone of a template is told so: what it was born with it shares with others.
        self._sandbox.new_identity()
        return _EMPTY

    def GetGuestDetails(self, request: Any) -> Answer:
        from agent import details

        return details.guest_details(request)

    def MemHotplugByProbe(self, request: Any) -> Answer:
        from agent import resources

        resources.mem_hotplug_by_probe(request.memHotplugProbeAddr)
        return _EMPTY

    def SetGuestDateTime(self, request: Any) -> Answer:
        from agent import clock

        clock.set_date_time(request, idle=not self._sandbox.containers)
        return _EMPTY

    def CopyFile(self, request: Any) -> Answer:
        from agent import copyfile

        copyfile.copy_file(request)
        return _EMPTY

    def GetOOMEvent(self, request: Any) -> Answer:
        def wait() -> Generator[Any, Any, Any]:
            future = self._sandbox.next_oom()
            try:
                return agent_pb2.OOMEvent(container_id=(yield future))
            finally:
                self._sandbox.forget_oom_reader(future)

        return wait()

    def AddSwap(self, request: Any) -> Answer:
        from agent import resources

        timeout = self._sandbox.config.hotplug_timeout
        return _then_empty(resources.add_swap(request.PCIPath, timeout))

    def AddSwapPath(self, request: Any) -> Answer:
        from agent import resources

        resources.add_swap_path(request.path)
        return _EMPTY

    def GetVolumeStats(self, request: Any) -> Answer:
        from agent import volumes

        return volumes.volume_stats(request.volume_guest_path)

    def ResizeVolume(self, request: Any) -> Answer:
        from agent import volumes

        timeout = self._sandbox.config.hotplug_timeout
        return _then_empty(volumes.resize_volume(request.volume_guest_path, request.size, timeout))


def _then_empty(work: Generator[Any, Any, None]) -> Generator[Any, Any, Any]:
    yield from work
    return _EMPTY
